"""Score models in the layouts of the field, as they come, against transformers' trunk and the head by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, Qwen3Config, Qwen3ForSequenceClassification

from actors.roles.generator import load_format
from beaver_ray.errors import UserError
from beaver_ray.fit import check_weights
from beaver_ray.models.folders import fingerprint, read_model, read_shapes
from beaver_ray.models.loading import load_policy
from beaver_ray.models.score import ScoreType, load_score_model, save_score_model
from beaver_ray.stage import ModelUse
from tests.models.families import tiny_model
from tests.test_fit import supervised

TOKENS = [5, 9, 14, 30, 2]
BEAVER = {"architectures": ["LlamaForScore"], "score_dim": 1, "score_bias": True, "bias": True, "momentum": 0.9}


@torch.no_grad()
def scores_of(folder: Path, score_type: ScoreType = "reward") -> Tensor:
    """By the code under test, at every token."""
    model = load_score_model(str(folder), score_type, torch.float32)
    return model.eval()(torch.tensor([TOKENS]), torch.arange(len(TOKENS))[None])[0, :, 0]


@torch.no_grad()
def plain_scores(weight: Tensor, bias: float = 0.0) -> Tensor:
    """By transformers' trunk, at every token."""
    hidden = tiny_model("llama").model.eval()(torch.tensor([TOKENS])).last_hidden_state[0]
    return hidden @ weight[0] + bias


def write(folder: Path, state: dict[str, Tensor], shards: int = 0, **config: Any) -> Path:
    """A folder with safetensors, or with so many shards of pickles."""
    folder.mkdir()
    settings = tiny_model("llama").config.to_dict() | config
    (folder / "config.json").write_text(json.dumps(settings, default=str))
    if not shards:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = [f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin" for n in range(shards)]
    names = ["pytorch_model.bin"] if shards == 1 else names
    weight_map = {tensor: names[index % shards] for index, tensor in enumerate(state)}
    for name in names:
        torch.save({n: t for n, t in state.items() if weight_map[n] == name}, folder / name)
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def trunk() -> dict[str, Tensor]:
    return {n: t.clone() for n, t in tiny_model("llama").state_dict().items() if n.startswith("model.")}


def head() -> Tensor:
    return torch.randn(1, 16, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("shards", [1, 2])
def test_published_beaver_checkpoints_load_as_they_are(tmp_path: Path, shards: int) -> None:
    """Section 1.4 of the published code: score_head and the normaliser's numbers, in pytorch_model.bin."""
    numbers = {"normalizer.mean": torch.tensor([0.75]), "normalizer.var": torch.tensor([4.0])}
    state = {**trunk(), "score_head.weight": head(), "score_head.bias": torch.tensor([0.25]), **numbers}
    state["normalizer.count"] = torch.tensor([64])
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # which files of that time carry
    raw = plain_scores(head(), 0.25)
    normalized = {"reward": (raw - 0.75) / 2.0, "cost": raw / 2.0}
    for kind in ("reward", "cost"):
        for do_normalize in (False, True):
            settings = {"score_type": kind, "normalizer_type": "ExponentialMovingAverage", "mean": [0.75], "var": [4.0]}
            folder = tmp_path / f"{kind}-{do_normalize}"
            write(folder, state, shards, **BEAVER, **settings, do_normalize=do_normalize)
            expected = normalized[kind] if do_normalize else raw
            torch.testing.assert_close(scores_of(folder, kind), expected, atol=1e-5, rtol=0)  # type: ignore[arg-type]
    assert read_model(str(folder)).parameters == sum(tensor.numel() for tensor in state.values())
    stage = supervised("cost_model", folder)
    check_weights(stage, ModelUse("cost", str(folder), ("cost",), scores=True))
    first = fingerprint(str(folder))
    file = sorted(folder.glob("pytorch_model*.bin"))[-1]
    torch.save({n: t + 1 for n, t in torch.load(file, weights_only=True).items()}, file)
    assert fingerprint(str(folder)) != first
    # A tensor of another shape is seen before anything starts.
    torch.save({n: t[..., :1] for n, t in torch.load(file, weights_only=True).items()}, file)
    with pytest.raises(UserError, match=r"cost: .* of another shape"):
        check_weights(stage, ModelUse("cost", str(folder), ("cost",), scores=True))


def test_whatever_decides_answers_is_in_the_fingerprint(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", dict(tiny_model("llama").state_dict()), 1)
    found = [fingerprint(str(folder)), fingerprint(str(folder), "bfloat16")]
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        for text in ("1", "2"):
            (folder / name).write_text(text)
            found.append(fingerprint(str(folder)))
    assert len(set(found)) == 10
    (folder / "README.md").write_text("1")
    assert fingerprint(str(folder)) == found[-1]


@pytest.mark.parametrize("shards", [1, 2])
def test_policies_in_pickles_load(tmp_path: Path, shards: int) -> None:
    model = tiny_model("llama")
    folder = write(tmp_path / "m", dict(model.state_dict()), shards)
    loaded = load_policy(str(folder), torch.float32).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    assert load_format(str(folder)) == "hf"
    # Where both are there, safetensors are what is loaded.
    save_file({n: t * 2 for n, t in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})
    assert load_format(str(folder)) == "safetensors"
    assert torch.equal(load_policy(str(folder), torch.float32).lm_head.weight, model.lm_head.weight * 2)


def test_broken_pickles_get_one_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", trunk(), 2)
    whole = (folder / "pytorch_model-00002-of-00002.bin").read_bytes()
    for content in (whole[:-100], b"\x80\x02nothing", b""):
        (folder / "pytorch_model-00002-of-00002.bin").write_bytes(content)
        with pytest.raises(UserError, match=r"00002-of-00002\.bin is not a whole file of tensors; copy"):
            read_shapes(folder)
    torch.save({"module": {"w": torch.zeros(2)}}, folder / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(UserError, match="holds no tensors by name"):
        read_shapes(folder)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"lacks pytorch_model-00002-of-00002\.bin, which its pytorch_model"):
        read_shapes(folder)


def test_skywork(tmp_path: Path) -> None:
    """A sequence classifier of one label, in bfloat16."""
    sizes: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 2}
    config = Qwen3Config(vocab_size=96, hidden_size=16, intermediate_size=24, num_labels=1, **sizes)
    torch.manual_seed(0)
    Qwen3ForSequenceClassification(config).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", dtype=torch.float32)
    with torch.no_grad():
        expected = model.eval()(torch.tensor([TOKENS])).logits[0, 0]
    torch.testing.assert_close(scores_of(tmp_path / "m")[-1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", ["value_head", "score", "my_head"])
def test_openrlhf(tmp_path: Path, prefix: str) -> None:
    """A head without bias under value_head_prefix; mean and standard deviation of rewards where normalize_reward."""
    settings = {"value_head_prefix": prefix, "mean": 0.75, "std": 1.5}
    raw = plain_scores(head())
    state = {**trunk(), f"{prefix}.weight": head()}
    for normalize, expected in ((False, raw), (True, (raw - 0.75) / 1.5)):
        folder = write(tmp_path / f"m{normalize}", state, **settings, normalize_reward=normalize)
        torch.testing.assert_close(scores_of(folder), expected, atol=1e-5, rtol=0)
    # Saved again, as by whoever trains it further, it is ours, with the same scores.
    model = load_score_model(str(folder), "reward", torch.float32)
    save_score_model(model, model.state_dict(), tmp_path / "ours")
    torch.testing.assert_close(scores_of(tmp_path / "ours"), expected, atol=1e-5, rtol=0)
    critic = load_score_model(str(folder), "critic", torch.float32)
    save_score_model(critic, critic.state_dict(), tmp_path / "critic")
    torch.testing.assert_close(scores_of(tmp_path / "critic"), raw, atol=1e-5, rtol=0)


def test_like_armo_rm(tmp_path: Path) -> None:
    """A head of one objective; a gate over several is no head, and is said to be left over."""
    state = {**trunk(), "regression_layer.weight": head()}
    folder = write(tmp_path / "m", state, num_labels=1)
    torch.testing.assert_close(scores_of(folder), plain_scores(head()), atol=1e-5, rtol=0)
    gated = write(tmp_path / "gated", {**state, "gating.layers.0.weight": torch.zeros(3, 16)})
    with pytest.raises(UserError, match=r"1 tensor left over \(gating\.layers\.0\.weight\)"):
        load_score_model(str(gated), "reward", torch.float32)


def test_two_heads_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {**trunk(), "value_head.weight": head(), "score.weight": head()})
    with pytest.raises(UserError, match=r"several heads, score\.weight and value_head\.weight; save it again with one"):
        load_score_model(str(folder), "reward", torch.float32)
