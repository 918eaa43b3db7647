"""Exported score models give the same scores in plain transformers and in vLLM's pooling runner."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2Model
from typer.testing import CliRunner

from beaver_ray.errors import UserError
from beaver_ray.models.export import export, find_score_model, folded_head
from beaver_ray.models.score import ScoreModel, load_score_model, save_score_model
from launch.cli import app
from tests.actors.conftest import build_tiny_llama
from tests.actors.support import write_score_folder

SEQUENCES = [[1, 5, 9, 14, 30, 2], [1, 7, 8, 2]]


@torch.no_grad()
def ours(folder: Path) -> Tensor:
    """[N, H]: the code under test, which other tests hold against plain transformers."""
    kind: Any = json.loads((folder / "config.json").read_text()).get("score_type", "reward")
    model = load_score_model(str(folder), kind, torch.float32).eval()
    return torch.stack([model(torch.tensor([s]), torch.arange(len(s))[None])[0, -1] for s in SEQUENCES])


@torch.no_grad()
def in_transformers(folder: Path) -> Tensor:
    """[N, H]: as whoever knows nothing of this program would, both sequences in one padded batch."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer.pad({"input_ids": SEQUENCES}, padding_side="right", return_tensors="pt")
    scores: Tensor = model(**batch).logits
    return scores


def in_vllm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """[N, H], by its pooling runner, without anything said of activations."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(str(folder), runner="pooling", dtype="float32", enforce_eager=True, max_model_len=64)
    found = engine.classify([{"prompt_token_ids": s} for s in SEQUENCES], use_tqdm=False)
    scores = torch.tensor([output.outputs.probs for output in found])
    del engine
    cleanup_dist_env_and_memory()
    return scores


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["beaver", "sequence-classification"])
def test_a_reward_and_a_cost_keep_their_scores(
    tiny_world: Path, tmp_path: Path, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Normalisation goes into the head; the constant is said where transformers has no place for it."""
    for kind in ("reward", "cost"):
        folder = tmp_path / kind
        write_score_folder(folder, tiny_world / "model", 4, kind, do_normalize=True, mean=[0.75], var=[4.0])
        target, notes = export(folder, form)
        assert target == folder / "export" / form
        close(ours(target), ours(folder))
        if form == "beaver":
            config = json.loads((target / "config.json").read_text())
            assert (config["score_type"], config["mean"], config["var"]) == (kind, [0.0], [1.0])
            assert config["architectures"] == ["LlamaForScore"] and config["rope_theta"] == 10_000.0
            tensors = load_file(target / "model.safetensors")
            assert tensors["score_head.weight"].shape == (1, 32) and tensors["normalizer.var"].tolist() == [1.0]
            assert {n for n in tensors if not n.startswith("model.")} == {
                *("score_head.weight", "score_head.bias"),
                *("normalizer.mean", "normalizer.var", "normalizer.count"),
            }
            continue
        # (0.25 - 0.75) / 2 of a reward, 0.25 / 2 of a cost, by hand.
        left = -0.25 if kind == "reward" else 0.125
        assert f"({kind} {left:+.6g}) is score.bias" in notes[0] and "LlamaForSequenceClassification" in notes[0]
        close(in_transformers(target) + left, ours(folder))


def test_without_a_constant_plain_transformers_and_vllm_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads, their normalisation, and no constant; then one in vLLM, which has a place for it."""
    base = build_tiny_llama(tmp_path / "base", tied=False)
    trunk = AutoModel.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    model = ScoreModel(trunk, "reward", ["reward", "cost"], mean=[0.0, 3.0], var=[4.0, 9.0])
    torch.nn.init.normal_(model.score_head.weight, std=0.3)  # for scores of about 1, whose float32 has six digits
    for name, constant in (("plain", 0.0), ("constant", 0.5)):
        torch.nn.init.constant_(model.score_head.bias, constant)
        save_score_model(model, model.state_dict(), tmp_path / name)
        write_tokenizer(tmp_path / name)
        target, notes = export(tmp_path / name, "sequence-classification")
        expected = ours(tmp_path / name)
        assert expected.shape == (2, 2) and bool(notes) == bool(constant)
        close(ours(target), expected)
        close(in_transformers(target) + constant / torch.tensor([2.0, 3.0]), expected)
    close(in_vllm(target, monkeypatch), expected)
    assert AutoModelForSequenceClassification.from_pretrained(target).config.id2label == {0: "reward", 1: "cost"}


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer as Core
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{n}": n for n in range(3, 40)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
    core = Core(models.WordLevel(words, unk_token="<unk>"))
    # EOS as padding is what many have: transformers would read the score one token early.
    PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", bos_token="<s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(folder)


def test_a_layer_norm_takes_the_constant(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=2, bos_token_id=1)
    model = ScoreModel(GPT2Model(config), "cost", mean=[2.0], var=[4.0])
    torch.nn.init.constant_(model.score_head.bias, 1.5)
    torch.nn.init.normal_(model.score_head.weight)
    save_score_model(model, model.state_dict(), tmp_path / "m")
    write_tokenizer(tmp_path / "m")
    target, notes = export(tmp_path / "m", "sequence-classification", tmp_path / "out")
    assert notes == [] and target == tmp_path / "out"
    assert "score.bias" not in load_file(target / "model.safetensors")
    close(in_transformers(target), ours(tmp_path / "m"))
    close(ours(target), ours(tmp_path / "m"))


def test_the_command(tiny_world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    with pytest.raises(UserError, match="no model in"):
        find_score_model(run)
    for name in ("policy", "reward_critic"):
        os.symlink(tiny_world / ("model" if name == "policy" else "reward_model"), run / "final" / name)
    said = CliRunner().invoke(app, ["export", str(run), "--as", "beaver", "--to", str(tmp_path / "out")])
    assert said.exit_code == 0 and f"written: {tmp_path / 'out'}" in said.output
    close(ours(tmp_path / "out"), ours(tiny_world / "reward_model"))
    with pytest.raises(UserError, match="out is there already; delete it"):
        export(run, "beaver", tmp_path / "out")
    moderation = tmp_path / "moderation"
    shutil.copytree(tiny_world / "reward_model", moderation)
    (moderation / "moderation.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a moderation model, .*copy that folder"):
        export(moderation, "beaver", tmp_path / "none")
    os.symlink(tiny_world / "cost_model", run / "final" / "harm_critic")
    with pytest.raises(UserError, match=r"several score models; .*harm_critic, .*reward_critic"):
        export(run, "beaver")
    for name in ("reward_critic", "harm_critic"):
        (run / "final" / name).unlink()
    with pytest.raises(UserError, match="is a language model, which transformers and vLLM load as it is"):
        export(run, "beaver")


def test_folding_by_hand() -> None:
    model = ScoreModel(GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)), "reward", mean=[1], var=[4])
    torch.nn.init.constant_(model.score_head.weight, 3.0)
    weight, bias = folded_head(model)
    close(weight, torch.full((1, 4), 1.5))
    close(bias, torch.tensor([-0.5]))
