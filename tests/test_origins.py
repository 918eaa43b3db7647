"""Where a model comes from: how its run wrote prompts, and who judged what it has learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from beaver_ray.origins import identity, run_of, template_of, trained_against


def a_model(folder: Path, weight: float) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    save_file({"w": torch.tensor([weight])}, folder / "model.safetensors")
    return str(folder)


def test_a_run_says_how_it_was_asked_and_by_whom_it_was_judged(tmp_path: Path) -> None:
    reward = a_model(tmp_path / "then" / "reward" / "final", 1.0)
    (tmp_path / "link").symlink_to(reward)
    cost = a_model(tmp_path / "cost", 2.0)
    run = {
        "workspace": str(tmp_path / "then"),
        "name": "run",
        "models": {"policy": "x", "reward": reward},
        "constraints": [
            {"name": "harm", "model": {"folder": "org/guard", "guard": "wildguard"}},
            {"name": "length", "model": "python:rules.py:length"},
            {"name": "cost", "model": cost},
        ],
        "data": {"template": {"system": "Be kind."}},
    }
    home = tmp_path / "then" / "run"
    policy = home / "final" / "policy"
    policy.mkdir(parents=True)
    (home / "config.yaml").write_text(yaml.safe_dump(run))
    assert run_of(str(policy)) == run_of(str(home)) == run
    assert run_of(str(home / "checkpoints" / "step_20" / "policy")) == run
    assert run_of(str(home / "final")) == run_of(str(tmp_path)) == {}
    judges = {identity(str(tmp_path / "link")), identity(cost), "org/guard", "python:rules.py:length"}
    assert trained_against(str(policy)) == judges and len(judges) == 4
    assert trained_against(str(home / "checkpoints" / "step_20" / "policy")) == judges
    assert trained_against(cost) == set()
    assert template_of(run).system == "Be kind."
    assert template_of({"stage": "sft", "template": "beaver"}).style == "beaver"

    (tmp_path / "then").rename(tmp_path / "now")
    assert trained_against(str(tmp_path / "now" / "run")) == judges, "found beside the run, wherever both have gone"


def a_run(home: Path, **config: Any) -> Path:
    home.mkdir(parents=True)
    (home / "config.yaml").write_text(yaml.safe_dump({"workspace": str(home.parent), "name": home.name, **config}))
    return home


def test_a_policy_is_judged_by_whoever_judged_what_it_has_learned(tmp_path: Path) -> None:
    """A policy that was trained on labels of its own answers, which it began with and which others learned from."""
    helpful, harmful, later = (a_model(tmp_path / name, n) for n, name in enumerate(("helpful", "harmful", "later")))
    best = a_run(tmp_path / "best", models={"policy": "x", "reward": helpful}, constraints=[{"model": harmful}])
    entry = {"path": f"{best}/final/answers.jsonl", "prompt": "prompt", "answer": "response"}
    sft = a_run(tmp_path / "sft", stage="sft", model="x", train=["alpaca", entry])
    a_model(sft / "final" / "policy", 3.0)
    label = a_run(tmp_path / "label", reward=later, cost="python:rules.py:harm", policy=str(sft / "final" / "policy"))
    pairs = f"PKU-SafeRLHF:1/2:{label}/final/train.jsonl"
    dpo = a_run(
        tmp_path / "dpo", stage="dpo", model=f"{sft}/final/policy", train=[pairs, f"x:1:{tmp_path}/dpo/final/x"]
    )
    merged = Path(a_model(tmp_path / "merged", 4.0))
    parts = [{"folder": folder, "hash": "h"} for folder in (f"{sft}/final/policy", f"{tmp_path}/gone")]
    (merged / "config.json").write_text(json.dumps({"merged_from": {"policies": parts, "weights": [0.5, 0.5]}}))
    picked, labelled = {identity(helpful), identity(harmful)}, {identity(later), "python:rules.py:harm"}
    assert len(picked) == len(labelled) == 2
    assert trained_against(f"{best}/final/held_out.jsonl") == trained_against(str(sft)) == picked
    assert trained_against(str(merged)) == picked
    assert trained_against(f"{dpo}/final/policy") == picked | labelled
    assert trained_against(f"{dpo}/export/sequence-classification") == picked | labelled
    both = a_run(tmp_path / "arena", policies={"first": f"{dpo}/final/policy", "second": helpful})
    assert trained_against(f"{both}/final/answers/first.jsonl") == picked | labelled
    assert trained_against(f"{both}/final/answers/second.jsonl") == set()
    answers = a_run(tmp_path / "answers", policies=[f"{dpo}/final/policy"])
    taught = a_run(tmp_path / "taught", model="x", train=[f"demonstrations:1:{answers}/final/answers.jsonl"])
    assert trained_against(str(taught)) == picked | labelled, "as one was whose answers it has learned"
    assert trained_against(f"{tmp_path}/held_out.jsonl") == trained_against(helpful) == set()
