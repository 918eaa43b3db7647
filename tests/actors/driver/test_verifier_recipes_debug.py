"""The recipes of configs/verifiers/ on a tiny policy, in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from beaver_ray.rules.programs import passes_tests
from beaver_ray.runs import read_evaluation, read_metrics
from launch.config_files import load_config
from launch.pipeline import run_stage

CONFIGS = Path(__file__).parents[3] / "configs" / "verifiers"


SOLUTIONS = [
    "print(sum(map(int, input().split())))",
    "print(input().upper())",
    "print(max(int(input()) for _ in range(int(input()))))",
    "print(len(input().split()))",
    "for i in range(int(input())): print(i + 1)",
    "a, b = map(float, input().split()); print(a / b)",
    "a, b = map(int, input().split()); print(a * b)",
    "print(input()[::-1])",
]


def test_rows_of_whole_programs_are_passed_by_their_solutions() -> None:
    rows = [json.loads(line) for line in (CONFIGS / "programs.jsonl").read_text(encoding="utf-8").splitlines()]
    tests, ask = [row["tests"] for row in rows], [row["prompt"] for row in rows]
    assert passes_tests(ask, SOLUTIONS, tests=tests, namespaces=False) == [1.0] * len(rows)
    assert passes_tests(ask, [*SOLUTIONS[1:], SOLUTIONS[0]], tests=tests, namespaces=False) == [0.0] * len(rows)


@pytest.mark.parametrize("name", ["code", "programs", "translation"])
def test_a_step(name: str, tiny_world: Path, tmp_path: Path) -> None:
    model = str(tiny_world / "model")
    changes = ["debug=true", "steps=1", f"workspace={tmp_path}", f"models.policy={model}", "models.lora_rank=2"]
    changes += ["rollout.samples_per_prompt=2", "rollout.max_new_tokens=8", "data.max_prompt_tokens=48"]
    if name == "programs":
        changes += [f"{data}.prompts.0.path=configs/verifiers/programs.jsonl" for data in ("data", "evaluation")]
    if name != "translation":
        changes += ["models.reward=python:beaver_ray/rules/programs.py:passes_tests(namespaces=False)"]
    else:
        changes += [f"models.reward=\"python:beaver_ray/rules/translation.py:by_model(model='{model}')\""]
    stage = load_config(CONFIGS / f"{'code' if name == 'programs' else name}.yaml", changes)
    run_stage(stage)
    ((figures,), evaluation) = read_metrics(stage.folder), read_evaluation(stage.folder)
    constraint = "copied" if name == "translation" else "length"
    assert 0 <= figures[f"cost/{constraint}/mean"] <= 1
    if name != "translation":  # words of the small world are no programs
        assert figures["reward/mean"] == 0 == evaluation["reward"]["mean"]
    else:
        assert -12 < evaluation["reward"]["mean"] < 0 > figures["reward/mean"] > -12 and figures["reward/std"] > 0
