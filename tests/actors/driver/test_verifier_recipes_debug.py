"""The recipes of configs/verifiers/ on a tiny policy, in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from beaver_ray.runs import read_evaluation, read_metrics
from launch.config_files import load_config
from launch.pipeline import run_stage

CONFIGS = Path(__file__).parents[3] / "configs" / "verifiers"


@pytest.mark.parametrize("name", ["code", "translation"])
def test_a_step(name: str, tiny_world: Path, tmp_path: Path) -> None:
    model = str(tiny_world / "model")
    changes = ["debug=true", "steps=1", f"workspace={tmp_path}", f"models.policy={model}", "models.lora_rank=2"]
    changes += ["rollout.samples_per_prompt=2", "rollout.max_new_tokens=8", "data.max_prompt_tokens=48"]
    if name == "code":
        changes += ["models.reward=python:beaver_ray/rules/programs.py:passes_tests(namespaces=False)"]
    else:
        changes += [f"models.reward=\"python:beaver_ray/rules/translation.py:by_model(model='{model}')\""]
    stage = load_config(CONFIGS / f"{name}.yaml", changes)
    run_stage(stage)
    ((figures,), evaluation) = read_metrics(stage.folder), read_evaluation(stage.folder)
    constraint = {"code": "length", "translation": "copied"}[name]
    assert 0 <= figures[f"cost/{constraint}/mean"] <= 1
    if name == "code":  # words of the small world are no programs
        assert figures["reward/mean"] == 0 == evaluation["reward"]["mean"]
    else:
        assert -12 < evaluation["reward"]["mean"] < 0 > figures["reward/mean"] > -12 and figures["reward/std"] > 0
