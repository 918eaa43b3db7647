"""What is read of a model's folder without loading the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from beaver_ray.errors import UserError
from beaver_ray.models.folders import ModelFacts, count_parameters, read_model, read_shapes

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


def test_a_copy_beside_the_weights_is_not_counted(tmp_path: Path, write_model: WriteModel) -> None:
    """Mistral's folders hold the same weights once more, in one file of another layout."""
    folder = write_model(tmp_path / "a", {"x": [3, 4]})
    save_file({"x": torch.zeros(3, 4)}, str(folder / "consolidated.safetensors"))
    assert count_parameters(folder) == 12
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save_file({"y": torch.zeros(5)}, str(folder / "model-00002-of-00002.safetensors"))
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert count_parameters(folder) == 17 and read_shapes(folder) == {"x": (3, 4), "y": (5,)}
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"a lacks model-00002-of-00002\.safetensors, which its model"):
        count_parameters(folder)
    for text in ("{", "[]", '{"weight_map": 3}', "{}"):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match=r"index\.json names no files of weights"):
            count_parameters(folder)


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({}, 4096),
        ({"max_position_embeddings": None, "n_positions": 1024}, 1024),
        ({"max_position_embeddings": None, "max_seq_len": 2048}, 2048),
        ({"max_position_embeddings": None, "max_sequence_length": 2048}, 2048),
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": None}, None),
        # As Qwen2.5's card says to write it, and as DeepSeek writes it.
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}}, 16384),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}, 4096),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, 16384),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 8192),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 8192),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "model_type": "gemma3_text"}, 4096),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4}, "sliding_attention": {}}}, 16384),
        # Already in the number of positions.
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}}, 4096),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}, 4096),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, 4096),
        ({"rope_scaling": None}, 4096),
        ({"text_config": {"max_position_embeddings": 77}}, 77),
    ],
)
def test_positions(tmp_path: Path, write_model: WriteModel, config: dict[str, Any], positions: int | None) -> None:
    folder = write_model(tmp_path / "m", **{"max_position_embeddings": 4096, **config})
    assert read_model(str(folder)).positions == positions


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


def test_missing_models(tmp_path: Path, write_model: WriteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs", "runs/sft", "/nowhere", "a/b/c", "gone"):
        with pytest.raises(UserError, match="no model in"):
            read_model(name)
    write_model(tmp_path / "runs" / "sft" / "final" / "policy")
    with pytest.raises(UserError, match=r"it is a run's folder, give runs/sft/final/policy$"):
        read_model("runs/sft")
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


def test_weights_that_were_cut_off(tmp_path: Path, write_model: WriteModel) -> None:
    folder = write_model(tmp_path / "m", {"a": [3]})
    assert count_parameters(folder) == 3
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors is not a whole safetensors file"):
        count_parameters(folder)


@pytest.mark.parametrize(
    "header", [b"[1]", b'{"a": 1}', b'{"a": {"shape": ["x"]}}', b'{"a": {"shape": 3}}', b"{", b"[" * 100_000]
)
def test_headers_that_are_none(tmp_path: Path, write_model: WriteModel, header: bytes) -> None:
    folder = write_model(tmp_path / "m")
    for length in (len(header), len(header) + 1, 2**62):
        (folder / "a.safetensors").write_bytes(length.to_bytes(8, "little") + header)
        with pytest.raises(UserError, match=r"a\.safetensors is not a whole safetensors file"):
            count_parameters(folder)
