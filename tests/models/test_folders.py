"""What is read of a model's folder without loading the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from beaver_ray.errors import UserError
from beaver_ray.models.folders import ModelFacts, count_parameters, read_model

WriteModel = Callable[..., Path]


def test_parameters_are_counted_from_headers(tmp_path: Path, write_model: WriteModel) -> None:
    assert count_parameters(write_model(tmp_path / "a", {"x": [3, 4], "y": [5], "scalar": []})) == 18
    assert count_parameters(write_model(tmp_path / "b")) == 0
    save_file({"w": torch.zeros(7, 11, dtype=torch.bfloat16)}, str(tmp_path / "b" / "one.safetensors"))
    save_file({"v": torch.zeros(13)}, str(tmp_path / "b" / "two.safetensors"))
    assert count_parameters(tmp_path / "b") == 90
    (tmp_path / "b" / "two.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0oops")
    with pytest.raises(UserError, match=r"two\.safetensors is not a whole safetensors file"):
        count_parameters(tmp_path / "b")


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_estimated_from_the_shape_are_those_of_llama(tmp_path: Path, tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    config.save_pretrained(tmp_path)
    facts, model = read_model(str(tmp_path)), LlamaForCausalLM(config)
    assert facts.parameters == model.num_parameters()
    adapter = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert facts.linear is not None and adapter.get_nb_trainable_parameters()[0] == 3 * facts.linear


def test_missing_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs", "runs/sft", "/nowhere", "a/b/c", "gone"):
        with pytest.raises(UserError, match="no model in"):
            read_model(name)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert read_model("some-org/some-model") == ModelFacts()  # a hub name that is not in the cache


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "8"}, "config.json: hidden_size must be a whole number above 0; save the model again"),
        ({"num_hidden_layers": -2}, "num_hidden_layers must be a whole number"),
        ({"max_position_embeddings": 10**10}, "max_position_embeddings must be a whole number"),
        ({"num_attention_heads": 0, "intermediate_size": 8}, "num_attention_heads must be a whole number"),
    ],
)
def test_sizes_that_are_none(tmp_path: Path, write_model: WriteModel, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_model(str(write_model(tmp_path / "m", **change)))


def test_a_configuration_that_is_none(tmp_path: Path, write_model: WriteModel) -> None:
    folder = write_model(tmp_path / "m")
    for text, message in (("{", "is not JSON"), ("[1]", "holds no JSON object"), ("[" * 100_000, "is not JSON")):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_model(str(folder))
    for name in ("x" * 300, "a\x00b", "~/" + "x" * 300, "a b/c"):
        with pytest.raises(UserError, match="no model in"):
            read_model(name)


@pytest.mark.parametrize(
    "header", [b"[1]", b'{"a": 1}', b'{"a": {"shape": ["x"]}}', b'{"a": {"shape": 3}}', b"{", b"[" * 100_000]
)
def test_headers_that_are_none(tmp_path: Path, write_model: WriteModel, header: bytes) -> None:
    folder = write_model(tmp_path / "m")
    for length in (len(header), len(header) + 1, 2**62):
        (folder / "a.safetensors").write_bytes(length.to_bytes(8, "little") + header)
        with pytest.raises(UserError, match=r"a\.safetensors is not a whole safetensors file"):
            count_parameters(folder)
