"""Runs without critics from their configuration to their final folder, in one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from actors.driver.policy_stage import PolicyStage
from actors.driver.train import train
from beaver_ray.errors import UserError
from beaver_ray.report.page import write_report
from beaver_ray.runs import read_metrics
from beaver_ray.user_code import ALLOWED_CODE
from tests.actors.driver.interruption import break_off
from tests.actors.support import ppo_config, untimed

LENGTHS = "def lengths(prompts, responses):\n    return [len(response) / 10 - 2 for response in responses]\n"


@pytest.fixture
def cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A cost that no critic could start from."""
    (tmp_path / "costs.py").write_text(LENGTHS)
    monkeypatch.setenv(ALLOWED_CODE, str(tmp_path))
    return f"python:{tmp_path}/costs.py:lengths"


def config(world: Path, workspace: Path, stage: str, cost: str, rule: str, **changes: Any) -> PolicyStage:
    """Three steps of four prompts, each answered three times."""
    sections: dict[str, Any] = {
        "workspace": str(workspace),
        "constraints": [{"name": "harm", "model": cost, "limit": 0.0, "multiplier": {"initial": 1.5}}],
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 3},
        "ppo": {"advantage": rule, "minibatches": 2, "kl_coefficient": 0.2, "loss_reduction": "token"},
        "save_every": 1,
        "trajectory_every": 1,
    }
    return ppo_config(world, stage, **(sections | changes))


def literal(rows: list[dict[str, Any]], name: str, sign: int) -> list[float]:
    """A signal's leave-one-out advantages of a step."""
    returns = [row[name] + sign * 0.2 * sum(np.subtract(row["logprobs"], row["reference_logprobs"])) for row in rows]
    found = []
    for i, row in enumerate(rows):
        group = [returns[j] for j in range(len(rows)) if rows[j]["prompt_id"] == row["prompt_id"] and j != i]
        elsewhere = [returns[j] for j in range(len(rows)) if rows[j]["prompt_id"] != row["prompt_id"]]
        found.append(returns[i] - (sum(group) + np.mean(elsewhere)) / (len(group) + 1))
    return found


@pytest.mark.parametrize("stage", ["safe_ppo", "ppo", "reward_shaping"])
def test_a_run_without_critics(one_rank: None, tiny_world: Path, tmp_path: Path, cost: str, stage: str) -> None:
    asked = config(tiny_world, tmp_path / "runs", stage, cost, "leave_one_out")
    assert not any("critic" in role.name for role in asked.roles())
    folder = train(asked)
    metrics = read_metrics(folder)
    signals = ["reward", "harm"] if stage == "safe_ppo" else ["reward"]
    for row in metrics:
        assert not any(key.startswith("critic/") for key in row)
        figures = {f"baseline/{s}/{name}" for s in signals for name in ("explained_variance", "constant_share")}
        assert figures == {key for key in row if key.startswith("baseline/")}
        assert all(math.isfinite(value) for value in row.values())
        assert ("multiplier/harm" in row) == (stage == "safe_ppo")
    assert {path.name for path in (folder / "final").iterdir()} == {"policy"}
    assert {path.name for path in (folder / "checkpoints" / "step_2").iterdir()} == {"policy", "training", "state.json"}
    assert {path.name for path in (folder / "checkpoints" / "step_2" / "training").iterdir()} == {"policy"}
    start = load_file(tiny_world / "model" / "model.safetensors")
    trained = load_file(folder / "final" / "policy" / "model.safetensors")
    assert any(not torch.equal(trained[name], start[name]) for name in trained)
    page = write_report(asked, folder).read_text()
    assert "Baselines" in page and "Critics" not in page

    for step, row in enumerate(metrics, start=1):
        table = pq.read_table(folder / "trajectories" / f"step_{step:06d}.parquet")
        assert not [name for name in table.schema.names if name.startswith(("values/", "returns/"))]
        rows = table.to_pylist()
        assert len(rows) == 12 and len({r["prompt_id"] for r in rows}) == 4
        if stage == "reward_shaping":
            rows = [r | {"reward": r["reward"] - 1.5 * r["cost/harm"]} for r in rows]
        expected = np.array(literal(rows, "reward", -1))
        if stage == "safe_ppo":
            multiplier = row["multiplier/harm"]
            assert multiplier > 0
            expected = (expected - multiplier * np.array(literal(rows, "cost/harm", 1))) / (1 + multiplier)
        for found, each in zip(table.column("advantages").to_pylist(), expected, strict=True):
            np.testing.assert_allclose(found, [each] * len(found), atol=1e-4)


def test_standardized_groups(one_rank: None, tiny_world: Path, tmp_path: Path, cost: str) -> None:
    # With the generators' log-probs nobody but scorers and the reference has anything to add to the sequences.
    ppo = {"advantage": "group_standardized", "kl_coefficient": 0.0, "old_logprobs": "generator"}
    folder = train(config(tiny_world, tmp_path / "runs", "safe_ppo", cost, "group_standardized", ppo=ppo))
    multiplier = read_metrics(folder)[1]["multiplier/harm"]
    rows = pq.read_table(folder / "trajectories" / "step_000002.parquet").to_pylist()
    for row in rows:
        group = [r for r in rows if r["prompt_id"] == row["prompt_id"]]
        reward, harm = (
            (row[name] - np.mean([r[name] for r in group])) / (np.std([r[name] for r in group]) + 1e-4)
            for name in ("reward", "cost/harm")
        )
        np.testing.assert_allclose(row["advantages"], (reward - multiplier * harm) / (1 + multiplier), atol=1e-3)


def test_a_resumed_run_is_the_whole_run(
    one_rank: None, tiny_world: Path, tmp_path: Path, cost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(tiny_world, tmp_path / "runs", "safe_ppo", cost, "leave_one_out", steps=4)
    whole = train(asked.model_copy(update={"name": "whole"}))
    break_off(asked, 3, monkeypatch)
    # Critics cannot be had from a checkpoint without.
    with_critics = asked.model_dump() | {"resume": True, "ppo": {"minibatches": 2}}
    with_critics["constraints"][0]["critic"] = str(tiny_world / "cost_model")
    with pytest.raises(UserError, match=r"the checkpoint has no .*/training/reward_critic"):
        train(type(asked).model_validate(with_critics))
    resumed = train(asked.model_copy(update={"resume": True}))
    assert untimed(resumed) == untimed(whole)
    one, other = (load_file(folder / "final" / "policy" / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
