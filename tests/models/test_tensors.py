"""Every tensor of a folder has its place in the model and every place its tensor, or the folder is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from beaver_ray.errors import UserError
from beaver_ray.models.loading import load_policy
from beaver_ray.models.score import HEADS, load_score_model, save_score_model
from beaver_ray.models.tensors import check_folder
from tests.models.families import FAMILIES, tiny_model

State = dict[str, Tensor]


def changed(folder: Path, source: Path, change: Callable[[State], State], **config: Any) -> str:
    """A copy of ``source`` with other tensors and another configuration."""
    shutil.copytree(source, folder)
    save_file(change(load_file(source / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((source / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


def refused(path: str, load: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        load()
    line = str(caught.value)
    assert line.startswith(f"{path}: the weights do not fit config.json") and "\n" not in line
    return line


CHANGES: dict[str, tuple[Callable[[State], State], list[str]]] = {
    "wrapped in DDP": (
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        ["missing (", "left over (module.model.embed_tokens.weight, ", "names begin with 'module.'"],
    ),
    "wrapped by peft": (
        lambda state: {f"base_model.model.{name}": tensor for name, tensor in state.items()},
        ["left over (base_model.model.model.embed_tokens.weight, ", "names begin with 'base_model.model.'"],
    ),
    "a layer left out": (
        lambda state: {name: tensor for name, tensor in state.items() if "layers.1." not in name},
        ["9 tensors missing (", "layers.1.input_layernorm.weight, ", " and 5 more)"],
    ),
    "a layer more": (
        lambda state: {
            **state,
            **{n.replace("layers.1.", "layers.2."): t.clone() for n, t in state.items() if "layers.1." in n},
        },
        ["9 tensors left over (", "layers.2.input_layernorm.weight, "],
    ),
    "another width": (
        lambda state: {**state, "model.layers.0.mlp.up_proj.weight": torch.zeros(5, 7)},
        ["1 tensor of another shape (", "layers.0.mlp.up_proj.weight [5, 7] in place of ["],
    ),
    "one of another model": (
        lambda state: {**state, "model.layers.0.mlp.extra.weight": torch.zeros(3)},
        ["1 tensor left over (", "layers.0.mlp.extra.weight)"],
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_weights_that_do_not_fit_are_refused(tiny_world: Path, tmp_path: Path, what: str) -> None:
    change, words = CHANGES[what]
    for kind, source in (("policy", tiny_world / "model"), ("score", tiny_world / "reward_model")):
        path = changed(tmp_path / kind, source, change)
        if kind == "policy":
            lines = [refused(path, lambda p=path: load_policy(p, torch.float32))]
            lines.append(refused(path, lambda p=path: check_folder(AutoModelForCausalLM, Path(p), p, False)))
        else:
            lines = [refused(path, lambda p=path: load_score_model(p, "reward", torch.float32))]
            lines.append(refused(path, lambda p=path: load_score_model(p, "critic", torch.float32, heads=["reward"])))
            lines.append(refused(path, lambda p=path: check_folder(AutoModel, Path(p), p, False, HEADS)))
        # Read from headers alone the answer is the same.
        assert len({*lines}) == 1
        wanted = words if kind == "policy" or "wrapped" not in what else ["names begin with '"]
        assert all(word in lines[0] for word in wanted), lines[0]


def test_no_weights(tmp_path: Path, tiny_world: Path) -> None:
    shutil.copy(tiny_world / "model" / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"has a config\.json and no weights; put model\.safetensors there"):
        check_folder(AutoModelForCausalLM, tmp_path, str(tmp_path), False)


def test_a_score_model_is_no_policy(tiny_world: Path, tmp_path: Path) -> None:
    path = str(tiny_world / "reward_model")
    line = refused(path, lambda: load_policy(path, torch.float32))
    assert "2 tensors left over (score_head.bias, score_head.weight)" in line
    # An untied head of words is missing, and is not made up.
    path = changed(tmp_path / "untied", tiny_world / "reward_model", lambda state: state, tie_word_embeddings=False)
    assert "1 tensor missing (lm_head.weight)" in refused(path, lambda: load_policy(path, torch.float32))


def test_a_trunk_leaves_over_a_head_of_words_and_nothing_else(tiny_world: Path, tmp_path: Path) -> None:
    def untied(state: State) -> State:
        return {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}

    path = changed(tmp_path / "untied", tiny_world / "model", untied, tie_word_embeddings=False)
    load_score_model(path, "critic", torch.float32, heads=["reward"])
    other = changed(tmp_path / "other", tmp_path / "untied", lambda s: {**s, "v_head.weight": torch.zeros(1, 32)})
    line = refused(other, lambda: load_score_model(other, "critic", torch.float32, heads=["reward"]))
    assert "1 tensor left over (v_head.weight)" in line


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["model.layers.{}.self_attn.rotary_emb.inv_freq"]),
        ("gpt2", ["transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"]),
        ("gpt_neox", ["gpt_neox.layers.{}.attention.bias", "gpt_neox.layers.{}.attention.rotary_emb.inv_freq"]),
    ],
)
def test_buffers_of_older_files_are_passed_over(tmp_path: Path, family: str, names: list[str]) -> None:
    tiny_model(family).save_pretrained(tmp_path / "new")
    more = {name.format(layer): torch.zeros(1) for name in names for layer in (0, 1)}
    path = changed(tmp_path / "old", tmp_path / "new", lambda state: {**state, **more})
    check_folder(AutoModelForCausalLM, Path(path), path, False)
    check_folder(AutoModel, Path(path), path, False, HEADS)
    load_policy(path, torch.float32)
    load_score_model(path, "critic", torch.float32, heads=["reward"])


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models_of_every_family_pass(tmp_path: Path, family: str) -> None:
    """Tied and untied heads, experts that are merged as they are loaded, texts inside a model of images."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "m")
    path = str(tmp_path / "m")
    check_folder(AutoModelForCausalLM, Path(path), path, False)
    check_folder(AutoModel, Path(path), path, False, HEADS)
    loaded = load_policy(path, torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    score = load_score_model(path, "reward", torch.float32, heads=["reward"])
    save_score_model(score, score.state_dict(), tmp_path / "rm")
    check_folder(AutoModel, tmp_path / "rm", "rm", False, HEADS)
    again = load_score_model(str(tmp_path / "rm"), "reward", torch.float32)
    for name, tensor in score.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "whole")
    path = changed(
        tmp_path / "m",
        tmp_path / "whole",
        lambda s: {n: t for n, t in s.items() if "layers.1" not in n or ".experts.1" not in n},
    )
    assert "experts" in refused(path, lambda: load_policy(path, torch.float32))
