"""Runs whose constraints bound something else than a mean, from their configuration to evaluation and report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from actors.driver.train import train
from beaver_ray.report.page import write_report
from beaver_ray.runs import read_evaluation, read_metrics
from tests.actors.driver.interruption import break_off
from tests.actors.driver.test_scopes_debug import with_kinds
from tests.actors.support import ppo_config, untimed

FORMS = {"harm": ("hinge", 0.1), "tail": ("cvar:0.75", 0.3), "worst": ("worst_of_k", 0.2)}


def config(world: Path, folder: Path, stage: str, rule: str, **changes: Any) -> Any:
    """Three steps of four prompts, each answered three times; the worst of them counts on some prompts alone."""
    prompts, _ = with_kinds(world, "train", folder)
    model = str(world / "cost_model")
    constraints: list[dict[str, Any]] = [
        {"name": name, "model": model, "limit": limit, "form": form, "multiplier": {"initial": 0.5}}
        for name, (form, limit) in FORMS.items()
        if not (stage == "reward_shaping" and form == "worst_of_k")
    ]
    if stage == "safe_ppo":
        constraints[2]["where"] = {"kind": ["benign", "rare"]}
    sections = {
        "workspace": str(folder / "runs"),
        "constraints": constraints,
        "data": {"prompts": [prompts]},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 3},
        "ppo": {"advantage": rule, "minibatches": 2, "kl_coefficient": 0.1},
        "evaluation": {"prompts": [with_kinds(world, "test", folder)[0]], "every": 3},
        "save_every": 1,
        "trajectory_every": 1,
    }
    return ppo_config(world, stage, **(sections | changes))


def episodes(name: str, costs: np.ndarray, prompts: np.ndarray) -> list[float]:
    """What the multiplier should see, by definition: numbers whose mean is bounded."""
    if name == "harm":
        return [max(0.0, cost) for cost in costs]
    if name == "tail":
        nu = sorted(costs)[int(np.ceil(0.75 * len(costs))) - 1]
        return [nu + max(0.0, cost - nu) / 0.25 for cost in costs]
    return [max(costs[prompts == prompt]) for prompt in sorted(set(prompts))]


@pytest.mark.parametrize("rule", ["gae", "leave_one_out"])
def test_multiplier_figures_and_report_go_by_the_form(
    one_rank: None, tiny_world: Path, tmp_path: Path, rule: str
) -> None:
    asked = config(tiny_world, tmp_path, "safe_ppo", rule)
    run, multipliers = train(asked), asked.objective().multipliers()
    for metrics in read_metrics(run):
        batch = pq.read_table(run / "trajectories" / f"step_{metrics['step']:06d}.parquet")
        prompts, total = batch["prompt_id"].to_numpy(), np.zeros(batch.num_rows)
        for name, (_, limit) in FORMS.items():
            costs = batch[f"cost/{name}"].to_numpy().astype(float)
            inside = np.array(batch["scope/worst"]) if name == "worst" else np.ones(len(costs), dtype=bool)
            assert inside.any(), "a step without a prompt in scope shows nothing"
            seen = episodes(name, costs[inside], prompts[inside])
            assert metrics[f"cost/{name}/bounded"] == pytest.approx(np.mean(seen), rel=1e-5)
            assert metrics[f"cost/{name}/mean"] == pytest.approx(costs[inside].mean(), rel=1e-4, abs=1e-6)
            multipliers[name].update(seen, limit, reward_std=metrics["reward/std"])
            assert metrics[f"multiplier/{name}"] == pytest.approx(multipliers[name].value, rel=1e-5)
            total += metrics[f"multiplier/{name}"] * inside
        for number, row in enumerate(batch.to_pylist()):
            expected = np.array(row["advantages/reward"])
            for name in FORMS:
                expected = expected - metrics[f"multiplier/{name}"] * np.array(row[f"advantages/{name}"])
            np.testing.assert_allclose(row["advantages"], expected / (1 + total[number]), rtol=1e-4, atol=1e-4)
    evaluation, last = read_evaluation(run), read_metrics(run)[-1]
    assert evaluation["bounded/harm"]["limit"] == 0.1 and evaluation["bounded/tail"]["limit"] == 0.3
    assert evaluation["bounded/tail"]["mean"] >= evaluation["cost/tail"]["mean"]
    assert "bounded/worst" not in evaluation and "limit" not in evaluation["cost/worst"]
    assert last["eval/bounded/harm"] >= max(0.0, last["eval/cost/harm"])
    page = write_report(asked, run).read_text()
    assert "Cost (worst_of_k): worst" in page and "Cost (cvar:0.75): tail" in page and "harm, hinge" in page


@pytest.mark.parametrize("stage", ["ppo", "reward_shaping"])
def test_where_nothing_is_bounded_it_is_measured(one_rank: None, tiny_world: Path, tmp_path: Path, stage: str) -> None:
    asked = config(tiny_world, tmp_path, stage, "leave_one_out", steps=1)
    run = train(asked)
    (metrics,) = read_metrics(run)
    batch = pq.read_table(run / "trajectories" / "step_000001.parquet")
    for constraint in asked.constraints:
        costs, prompts = batch[f"cost/{constraint.name}"].to_numpy().astype(float), batch["prompt_id"].to_numpy()
        expected = np.mean(episodes(constraint.name, costs, prompts))
        assert metrics[f"cost/{constraint.name}/bounded"] == pytest.approx(expected, rel=1e-5)
    assert not any(key.startswith("multiplier/") for key in metrics)


def test_a_resumed_run_is_the_whole_run(
    one_rank: None, tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(tiny_world, tmp_path, "safe_ppo", "leave_one_out")
    whole = train(asked.model_copy(update={"name": "whole"}))
    break_off(asked, 3, monkeypatch)
    resumed = train(asked.model_copy(update={"resume": True}))
    assert untimed(whole) == untimed(resumed)
