"""Single steps in one process: a short one, one asked for again, bad samples, what is timed, the last by the guard."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from actors.driver.recovery import Recovery
from actors.driver.rollouts import Rollouts
from actors.driver.train import train
from actors.driver.training_state import TrainingState
from actors.machine.waits import WorkerDiedError
from actors.roles.experience_builder import ExperienceBuilder
from actors.roles.hf_generator import HFGenerator
from actors.roles.policy import PolicyTrainer
from beaver_ray.errors import UserError
from beaver_ray.runs import read_metrics
from beaver_ray.weights import PublishedWeights
from tests.actors.support import ppo_config, spoilt, untimed


def test_a_short_last_step_is_trained_and_said_also_after_resume(
    one_rank: None, tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 10 of the published code."""
    # 48 prompts, 45 a step: the second step has 3 for 5 minibatches.
    changes = {"steps": 2, "rollout": {"prompts_per_step": 45}, "ppo": {"minibatches": 5}, "save_every": 1}
    config = ppo_config(tiny_world, workspace=str(tmp_path), **changes)
    states: list[TrainingState] = []
    monkeypatch.setattr(TrainingState, "__init__", remembering(states, TrainingState.__init__))
    update = PolicyTrainer.update

    @functools.wraps(update)
    def break_off(self: PolicyTrainer, batch: Any, step: int, *more: Any) -> dict[str, float]:
        if step == 2 and len(states) == 1:
            raise KeyboardInterrupt
        return update(self, batch, step, *more)

    monkeypatch.setattr(PolicyTrainer, "update", break_off)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    folder = train(config.model_copy(update={"resume": True}))
    assert [row["policy/skipped_updates"] for row in read_metrics(folder)] == [0.0, 0.0]
    notes = (folder / "notes.log").read_text()
    assert "step 2 has 3 sample(s), fewer than ppo.minibatches (5): each makes one optimizer step" in notes
    # Nothing of what was trained on is remembered.
    assert not states[-1].prompts.prompt_of


def test_a_confidence_counts_the_answers_of_the_window_and_none_of_a_single_prompt(
    one_rank: None, tiny_world: Path, tmp_path: Path
) -> None:
    """Eight answers to one prompt a step: of the first prompt no error can be told, of the first two their own."""
    moves = {"rule": "projected", "initial": 1.0, "learning_rate": 0.5, "window": 32}
    harm = {"name": "harm", "model": str(tiny_world / "cost_model"), "limit": 0.0, "confidence": 0.9}
    rollout = {"prompts_per_step": 1, "samples_per_prompt": 8, "max_new_tokens": 8}
    changes = {"steps": 2, "trajectory_every": 1, "rollout": rollout, "ppo": {"minibatches": 2}}
    constraints = [harm | {"multiplier": moves}]
    folder = train(ppo_config(tiny_world, workspace=str(tmp_path), constraints=constraints, **changes))
    steps = [pq.read_table(folder / "trajectories" / f"step_{step:06d}.parquet") for step in (1, 2)]
    first, second = (np.array(step["cost/harm"].to_pylist(), dtype=np.float64) for step in steps)
    one, two = read_metrics(folder)
    assert "cost/harm/margin" not in one
    value = max(0.0, 1.0 + 0.5 * first.mean())
    assert one["multiplier/harm"] == pytest.approx(value, rel=1e-6)
    said = "step 1: all answers that harm compares with its limit are to one prompt"
    assert (folder / "notes.log").read_text().count("all answers that harm compares") == 1
    assert said in (folder / "notes.log").read_text()
    # Two clusters of eight: the standard error of their means' mean is half their difference. t of 0.9 is 3.078.
    margin = 3.078 * abs(first.mean() - second.mean()) / 2
    assert two["cost/harm/margin"] == pytest.approx(margin, rel=1e-3)
    value = max(0.0, value + 0.5 * ((first.mean() + second.mean()) / 2 + two["cost/harm/margin"]))
    assert two["multiplier/harm"] == pytest.approx(value, rel=1e-6)


def test_a_margin_of_a_window_is_not_that_of_the_last_steps_costs_alone(
    one_rank: None, tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step's costs are 0 and 5, the second's 0 and 1, which the same window holds: no shares of anything."""
    monkeypatch.setenv("BEAVER_RAY_SCORE_CODE", str(tmp_path))
    (tmp_path / "counts.py").write_text(
        "called = []\n"
        "def count(prompts, responses):\n"
        "    called.append(len(responses))\n"
        "    return [(5.0 if sum(called) <= 8 else 1.0) * (n % 4 == 0) for n in range(len(responses))]\n"
    )
    harm = {"name": "harm", "model": f"python:{tmp_path}/counts.py:count", "critic": str(tiny_world / "cost_model")}
    harm |= {"limit": 0.5, "confidence": 0.9, "multiplier": {"rule": "projected", "window": 32}}
    changes = {"steps": 2, "trajectory_every": 1, "ppo": {"minibatches": 2}}
    folder = train(ppo_config(tiny_world, workspace=str(tmp_path), constraints=[harm], **changes))
    costs = [
        np.array(pq.read_table(folder / "trajectories" / f"step_{step:06d}.parquet")["cost/harm"], dtype=np.float64)
        for step in (1, 2)
    ]
    assert sorted(set(costs[0])) == [0.0, 5.0] and sorted(set(costs[1])) == [0.0, 1.0]
    held = np.concatenate(costs)
    skew = np.mean(((held - held.mean()) / held.std()) ** 3)
    # Student's t of 0.9 with 15 degrees of freedom is 1.341 in printed tables.
    margin = (1.341 + skew / (6 * 4) * (1 + 2 * 1.341**2)) * held.std(ddof=1) / 4
    assert read_metrics(folder)[1]["cost/harm/margin"] == pytest.approx(margin, rel=1e-3)


def test_a_step_that_is_asked_for_again_moves_its_multipliers_once(
    one_rank: None, tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experience builder dies twice in the second step, when the multipliers have seen the costs already.

    Fault 9 of the published code.
    """
    undisturbed = train(ppo_config(tiny_world, name="undisturbed", workspace=str(tmp_path)))
    combine, deaths = ExperienceBuilder.combine, [2, 3]
    calls: list[int] = []

    @functools.wraps(combine)
    def dying(self: ExperienceBuilder, batch: Any, multipliers: dict[str, float]) -> Any:
        calls.append(len(calls) + 1)
        if calls[-1] in deaths:
            raise WorkerDiedError("killed")
        return combine(self, batch, multipliers)

    monkeypatch.setattr(ExperienceBuilder, "combine", dying)
    monkeypatch.setattr(Recovery, "_dead", lambda self, groups: [])
    monkeypatch.setattr(Recovery, "_restart_stateless", lambda self, error: ["experience"])
    monkeypatch.setattr(Rollouts, "renew", lambda self: False)
    disturbed = train(ppo_config(tiny_world, name="disturbed", workspace=str(tmp_path)))
    assert len(calls) == 3 + len(deaths)
    first, second = untimed(undisturbed), untimed(disturbed)
    assert first == second and len({row["multiplier/harm"] for row in first}) == 3


def remembering(made: list[Any], start: Any) -> Any:
    """An ``__init__`` that puts what it makes in a list."""

    def init(self: Any, *args: Any) -> None:
        made.append(self)
        start(self, *args)

    return init


def test_a_bad_sample_is_named_and_left_out_and_a_run_of_them_stops(
    one_rank: None, tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = str(spoilt(tiny_world, tmp_path / "spoilt", "reward_model", "lock car"))
    clean = str(tiny_world / "reward_model")
    changes: dict[str, Any] = {"models": {"reward": reward, "reward_critic": clean}, "steps": 5, "save_every": 0}
    changes |= {"rollout": {"prompts_per_step": 24}, "workspace": str(tmp_path), "trajectory_every": 1}
    with pytest.raises(UserError, match=r"step 3: reward of samples was not finite for 3 steps in a row"):
        train(ppo_config(tiny_world, **changes))
    folder = tmp_path / "safe_ppo"
    metrics = read_metrics(folder)
    assert len(metrics) == 3 and [p.name for p in (folder / "checkpoints").iterdir()] == ["step_3"]
    for step, row in enumerate(metrics, start=1):
        table = pq.read_table(folder / "trajectories" / f"step_{step:06d}.parquet")
        lost = row["rollout/unusable_samples"]
        assert 0 < lost < 24 and table.num_rows == 24 - lost
        assert row["policy/skipped_updates"] == row["critic/reward/skipped_updates"] == 0
        assert math.isfinite(row["reward/mean"]) and math.isfinite(row["policy/loss"])
        said = f"step {step}: {lost:g} of 24 sample(s) have no finite reward but nan, from the scorer reward ({reward})"
        assert said in capsys.readouterr().out + (folder / "notes.log").read_text()


def test_sync_is_the_generators_time(
    one_rank: None, tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[float] = []
    update_weights = HFGenerator.update_weights

    def watched(self: HFGenerator, weights: PublishedWeights) -> dict[str, Any]:
        result = update_weights(self, weights)
        loaded.append(result["seconds"])
        return result

    monkeypatch.setattr(HFGenerator, "update_weights", watched)
    metrics = read_metrics(train(ppo_config(tiny_world, workspace=str(tmp_path))))
    # A version is taken in with the prompts of the step after it.
    assert loaded and [row["time/sync"] for row in metrics][-2:] == loaded[-2:]
    assert all(0 < row["time/sync"] < row["time/generate"] for row in metrics[-2:])


def test_the_guard_stops_a_run_with_a_checkpoint(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    """Which complaint it was does not matter: answers that are all cut are one of the first step."""
    sections = {"workspace": str(tmp_path), "steps": 3, "save_every": 0}
    config = ppo_config(tiny_world, **sections, guard={"action": "stop"})
    said = r"step 1: 100% of the answers were cut .*; stopped with a checkpoint \(guard.action=stop\)"
    with pytest.raises(UserError, match=said):
        train(config)
    folder = config.folder
    assert [row["step"] for row in read_metrics(folder)] == [1] and (folder / "checkpoints" / "step_1").is_dir()
    assert not (folder / "final").exists()
    train(ppo_config(tiny_world, **sections).model_copy(update={"resume": True}))
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3] and (folder / "final" / "policy").is_dir()
    assert "resumed after step 1" in (folder / "notes.log").read_text()
