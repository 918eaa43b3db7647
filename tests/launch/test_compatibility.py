"""Architectures that cannot work are refused by the plan in one line, and those that the tests hold are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import CpmAntConfig, MambaConfig, PretrainedConfig, StableLmConfig

from beaver_ray.errors import UserError
from beaver_ray.models.folders import read_config
from launch.bench.family_models import FAMILIES, write_family
from launch.compatibility import TRIED, architecture_problem
from launch.config_files import load_config
from launch.planning import plan
from launch.resources import Resources

StageFile = Callable[..., Path]
ROOMY = Resources("the test", memory_gib=64.0)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}


def saved(config: PretrainedConfig, folder: Path, architecture: str) -> Path:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return folder


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        plan(load_config(path, list(overrides)), ROOMY).check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_work_is_refused(stage_file: StageFile, tmp_path: Path) -> None:
    mamba = saved(MambaConfig(**SMALL, state_size=8), tmp_path / "mamba", "MambaForCausalLM")
    ppo, sft = stage_file(), stage_file("sft")
    assert "mamba keeps a running state" in refusal(ppo, f"models.policy={mamba}")
    assert "mamba keeps a running state" in refusal(sft, f"model={mamba}")
    ant = saved(CpmAntConfig(hidden_size=32, num_hidden_layers=1), tmp_path / "ant", "CpmAntForCausalLM")
    assert "vLLM has no model of type cpmant" in refusal(ppo, f"models.policy={ant}")
    encoder = tmp_path / "unheard"
    encoder.mkdir()
    (encoder / "config.json").write_text('{"model_type": "unheard_of"}')
    assert "cannot read the configuration" in refusal(ppo, f"models.policy={encoder}")


def test_lora_of_transposed_layers_is_refused(stage_file: StageFile, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "gpt2", "GPT-2")
    path = stage_file()
    assert architecture_problem(load_config(path, [f"models.policy={folder}"])) is None
    assert "no LoRA for a model of type gpt2" in refusal(path, f"models.policy={folder}", "models.lora_rank=4")


def test_a_second_copy_of_gemmas_head_is_refused(stage_file: StageFile, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "gemma", "Gemma 2")
    state = load_file(folder / "model.safetensors")
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    path = stage_file()
    assert "holds lm_head.weight" in refusal(path, f"models.policy={folder}")
    plan(load_config(path, [f"models.policy={folder}", "debug=true"]), ROOMY).check()


def test_families_that_are_tried_pass(stage_file: StageFile, tmp_path: Path) -> None:
    path = stage_file()
    kinds = set()
    for name in FAMILIES:
        folder = write_family(tmp_path / name, name)
        kinds.add(read_config(folder)["model_type"])
        plan(load_config(path, [f"models.policy={folder}"]), ROOMY).check()
    assert kinds == TRIED


def test_others_are_asked_about(stage_file: StageFile, tmp_path: Path) -> None:
    """A family that nobody has tried here, and that vLLM has."""
    known = saved(StableLmConfig(**SMALL), tmp_path / "stablelm", "StableLmForCausalLM")
    assert architecture_problem(load_config(stage_file(), [f"models.policy={known}"])) is None
