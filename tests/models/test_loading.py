"""Model folders: what loads, and the one line that says why something does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from beaver_ray.data.templates import read_end_tokens
from beaver_ray.errors import UserError
from beaver_ray.models import loading
from beaver_ray.models.folders import read_model
from beaver_ray.models.loading import (
    attention_kernel,
    check_model_folder,
    context_length,
    load_policy,
    load_tokenizer,
    without_flash,
)
from beaver_ray.models.logprobs import install_logprob_head
from tests.models.families import tiny_model


def test_a_saved_policy_loads(tiny_world: Path) -> None:
    folder = str(tiny_world / "model")
    model = load_policy(folder, torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.config.tie_word_embeddings
    assert context_length(folder) == 512
    assert load_tokenizer(folder).eos_token == "</s>"


def test_errors_say_what_is_missing(tiny_world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reward model: no model in 'runs'"):
        check_model_folder("runs", "reward model")
    with pytest.raises(UserError, match=r"no config\.json there"):
        check_model_folder(str(tmp_path), "policy")
    check_model_folder("organisation/model", "policy")  # perhaps in the local cache
    with pytest.raises(UserError, match="policy: no model in"):
        load_policy(str(tmp_path), torch.float32)
    shutil.copy(tiny_world / "model" / "config.json", tmp_path)
    with pytest.raises(UserError, match="cannot load the model in"):
        load_policy(str(tmp_path), torch.float32)


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [({}, 64), ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, 256)],
)
def test_positions_of_a_model(tmp_path: Path, scaling: dict[str, Any], positions: int) -> None:
    """The same number for the generator as for the plan, whatever the family calls it."""
    tiny_model("llama").config.save_pretrained(tmp_path / "llama")
    settings = json.loads((tmp_path / "llama" / "config.json").read_text()) | scaling
    (tmp_path / "llama" / "config.json").write_text(
        json.dumps({k: v for k, v in settings.items() if k != "rope_parameters"})
    )
    assert context_length(str(tmp_path / "llama")) == read_model(str(tmp_path / "llama")).positions == positions
    for family in ("gpt2", "gemma3"):
        tiny_model(family).config.save_pretrained(tmp_path / family)
        assert context_length(str(tmp_path / family)) == read_model(str(tmp_path / family)).positions == 64


def test_flash_attention_is_used_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loading, "is_flash_attn_2_available", lambda: True)
    for gpu, dtype, kernel in (
        (False, torch.bfloat16, "sdpa"),
        (True, torch.bfloat16, "flash_attention_2"),
        (True, torch.float32, "sdpa"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        attention_kernel.cache_clear()
        assert attention_kernel(dtype) == attention_kernel(dtype) == kernel
    attention_kernel.cache_clear()
    assert capsys.readouterr().out.count("FlashAttention has no float32: attention runs on SDPA") == 1


def test_what_waits_for_flash_attention_runs_without_it_on_a_cpu(
    tiny_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where its package is there: the model is loaded on a CPU, and its engine moves it to the GPU later."""
    model = AutoModelForCausalLM.from_pretrained(tiny_world / "model", dtype=torch.bfloat16, attn_implementation="sdpa")

    def switch(model: Any, kernel: str) -> None:  # transformers' own asks for the package
        model.config._attn_implementation = kernel

    monkeypatch.setattr(type(model), "set_attn_implementation", switch)
    switch(model, "flash_attention_2")
    with pytest.raises(Exception, match=r"(?i)flash|kernels"):
        model(input_ids=torch.arange(4)[None])
    with without_flash(model):
        assert model.config._attn_implementation == "sdpa" and install_logprob_head(model)
    assert model.config._attn_implementation == "flash_attention_2"


def test_a_model_without_a_tokenizer_says_so(tiny_world: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_world / "model", tmp_path / "model", ignore=shutil.ignore_patterns("token*", "chat*"))
    with pytest.raises(UserError, match=r"model has no tokenizer; copy there those files of the model"):
        load_tokenizer(str(tmp_path / "model"))


def test_a_tokenizer_needs_an_end(tiny_world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_world / "model", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="has no EOS token"):
        load_tokenizer(str(folder))


def test_a_tokenizer_whose_unknown_token_is_no_token_is_refused(tiny_world: Path, tmp_path: Path) -> None:
    """transformers takes it for the unknown token of itself, without end."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_world / "model", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"unk_token": ""}))
    for load in (load_tokenizer, read_end_tokens):
        with pytest.raises(UserError, match=f"{folder}: RecursionError"):
            load(str(folder))


def test_a_tokenizer_that_its_models_type_cannot_read_is_refused(tiny_world: Path, tmp_path: Path) -> None:
    """transformers reads every folder of type qwen2 as byte-level BPE; of words nothing is left then."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_world / "model" / file, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(UserError, match=r"is read as Qwen2Tokenizer, .* loses words of its own"):
        load_tokenizer(str(tmp_path))
