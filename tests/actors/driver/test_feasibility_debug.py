"""What limits cost near a reference, sampled in one process; and runs whose multipliers start from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.driver.feasibility import FIRST_SAMPLE_ID, feasibility, sample
from actors.driver.policy_stage import PolicyStage
from actors.driver.processes import start_judging_roles
from actors.driver.rollouts import Rollouts
from actors.driver.train import train
from beaver_ray.data.mixing import load_mix
from beaver_ray.data.tokenized import PromptDataset
from beaver_ray.errors import UserError
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.runs import read_metrics
from tests.actors.driver.test_resume import assert_same, killed
from tests.actors.driver.test_scopes_debug import scoped
from tests.actors.support import ppo_config
from tests.tiny_ppo import build_workspace

LONG = "python:beaver_ray/rules/text.py:over_length(budget=3, most=5)"
STARTS = {"rule": "projected", "learning_rate": 1e-9, "initial": "auto", "max": 5.0}


def configured(world: Path, workspace: Path, **changes: Any) -> PolicyStage:
    """Long answers cost, by a function; the policy is the tiny world's, whose answers are of many lengths."""
    constraint = {"name": "long", "model": LONG, "critic": str(world / "model"), "limit": 1.5}
    sections: dict[str, Any] = {
        "workspace": str(workspace),
        "constraints": [constraint],
        "ppo": {"kl_coefficient": 0.1},
    }
    return ppo_config(world, **(sections | changes))


def sampled(config: PolicyStage, prompts: int, answers: int) -> Any:
    tokenizer = load_tokenizer(config.models.policy)
    rows, _ = load_mix(config.data.prompts)
    known = PromptDataset.build(rows, tokenizer, config.data.max_prompt_tokens, "auto", config.scopes)
    roles = start_judging_roles(config, config.judging_roles(), None)
    return sample(config, known, roles, Rollouts(roles.rollout, 8, 10.0), prompts, answers)


def test_answers_are_scored_as_in_a_run(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    """The penalty of answers that were cut, the clipped scores, and each prompt drawn once."""
    free = sampled(configured(tiny_world, tmp_path, ppo={"clip_score": None}), 12, 4)
    penalised = sampled(configured(tiny_world, tmp_path, ppo={"clip_score": None, "truncation_penalty": 2.0}), 12, 4)
    clipped = sampled(configured(tiny_world, tmp_path, ppo={"clip_score": 0.5}), 12, 4)
    normalized = {"clip_score": 0.5, "kl_coefficient": 0.1, "normalize_rewards": 0.8}
    by_history = sampled(configured(tiny_world, tmp_path, ppo=normalized), 12, 4)
    # What a run divides by: the deviation of the rewards, and the size of the costs.
    rewards, (costs,) = free.reference.rewards_B, free.reference.costs_MB
    assert by_history.reference.kl_coefficient == 0.1
    assert by_history.reference.reward_scale == pytest.approx(rewards.std())
    assert by_history.reference.cost_scales_M == pytest.approx([np.sqrt(np.mean(costs**2))])
    np.testing.assert_array_equal(by_history.reference.rewards_B, rewards)
    assert free.names == ["long"] and free.remarks == []
    assert free.reference.counts_N.tolist() == [4] * 12
    taken = free.reference.rewards_B - penalised.reference.rewards_B
    cut = np.isclose(taken, 2.0)
    assert 0 < cut.sum() < 48 and np.isclose(taken[~cut], 0.0).all()
    np.testing.assert_array_equal(free.reference.costs_MB, penalised.reference.costs_MB)
    np.testing.assert_array_equal(clipped.reference.rewards_B, np.clip(free.reference.rewards_B, -0.5, 0.5))
    beyond = int((np.abs(free.reference.rewards_B) > 0.5).sum())
    assert f"reward: {beyond} scores are beyond ppo.clip_score 0.5 and count as that" in clipped.remarks
    # A run's limit is on costs as they are.
    np.testing.assert_array_equal(clipped.reference.costs_MB, free.reference.costs_MB)
    beyond = int((free.reference.costs_MB > 0.5).sum())
    said = f"long: {beyond} scores are beyond ppo.clip_score 0.5 and count as they are, as under a run's limit"
    assert beyond and any(line.startswith(said) for line in clipped.remarks)
    # The hinge of a cost that is never below 0 is that cost.
    long = {"name": "long", "model": LONG, "critic": str(tiny_world / "model"), "limit": 1.5, "form": "hinge"}
    hinged = sampled(configured(tiny_world, tmp_path, ppo={"clip_score": None}, constraints=[long]), 12, 4)
    np.testing.assert_array_equal(free.reference.costs_MB, hinged.reference.costs_MB)
    careful = sampled(configured(tiny_world, tmp_path, constraints=[long | {"confidence": 0.9}]), 2, 2)
    assert careful.remarks[0].startswith("constraints.long.confidence is left out: a run aims below the limit")
    everything = sampled(configured(tiny_world, tmp_path), 600, 1)
    assert everything.reference.counts_N.tolist() == [1] * 48, "as many prompts as there are"


def test_costs_are_the_probabilities_that_a_run_sees(tmp_path: Path) -> None:
    folder = build_workspace(tmp_path)
    pairs = [f"PKU-SafeRLHF:1:{folder}/world/preferences/test.jsonl"]
    harm = {"name": "harm", "model": str(folder / "harm"), "violation_rate": 0.3, "calibration": pairs}
    models = {"policy": str(folder / "world/model"), "reward": str(folder / "reward")}
    prompts = {"prompts": [f"prompts:1:{folder}/world/prompts/train.jsonl"]}
    config = ppo_config(folder, models=models, constraints=[harm], data=prompts, ppo={"kl_coefficient": 0.01})
    found = feasibility(config, 20, 4)
    assert found.folder == folder / "runs" / "safe_ppo-feasibility"
    costs = found.study.reference.costs_MB
    assert (costs > 0).all() and (costs < 1).all() and len(np.unique(costs)) > 20
    assert any(line.startswith("calibration of harm") for line in found.remarks())
    figures = json.loads((found.folder / "feasibility.json").read_text())
    assert figures["limits"] == {"harm": 0.3}
    assert figures["as_sampled"]["cost/harm"]["mean"] == pytest.approx(costs.mean())


def test_it_repeats_bit_for_bit_and_leaves_the_run_alone(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    config = configured(tiny_world, tmp_path)
    for name in ("one", "two"):
        found = feasibility(config, 16, 12, tmp_path / name)
    assert (tmp_path / "one/feasibility.json").read_bytes() == (tmp_path / "two/feasibility.json").read_bytes()
    assert not config.folder.exists()
    other = feasibility(config.model_copy(update={"seed": 7}), 16, 12, tmp_path / "other")
    assert other.figures()["as_sampled"] != found.figures()["as_sampled"]
    figures = json.loads((tmp_path / "one/feasibility.json").read_text())
    assert figures["kept"] and figures["prompts"] == 16 and figures["samples"] == 192
    at, free = figures["at_the_limits"], figures["without_limits"]
    assert at["costs"]["long"] == pytest.approx(1.5, abs=2e-3) and at["multipliers"]["long"] > 0
    assert free["costs"]["long"] > 1.5 and free["reward"] > at["reward"]
    page = (tmp_path / "one/feasibility.html").read_text()
    assert "Limit of long" in page and page.count("<svg") == 1 and found.verdict() in page


def test_the_reference_is_what_is_sampled(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    """models.reference answers in the policy's place; without a limit or a KL there is nothing to ask."""
    models = {"policy": "/nowhere", "reward": str(tiny_world / "reward_model"), "reference": str(tiny_world / "model")}
    found = feasibility(configured(tiny_world, tmp_path, models=models), 4, 2, tmp_path)
    assert found.policy == str(tiny_world / "model")
    with pytest.raises(UserError, match="there are no constraints"):
        feasibility(configured(tiny_world, tmp_path, stage="ppo", constraints=[]), 4, 2)
    with pytest.raises(UserError, match=r"ppo.kl_coefficient is 0"):
        feasibility(configured(tiny_world, tmp_path, ppo={"kl_coefficient": 0.0}), 4, 2)


def test_scopes_and_what_is_out_of_reach(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    """Each cost over its own prompts; a scope that no sampled prompt is in is left out, and said."""
    config = scoped(tiny_world, tmp_path, ppo={"minibatches": 2, "kl_coefficient": 0.1})
    draw = np.random.default_rng(np.random.SeedSequence((config.seed, FIRST_SAMPLE_ID))).permutation(48)
    found = feasibility(config, 20, 3, tmp_path / "found")
    rare = next(i for i, row in enumerate(map(json.loads, (tmp_path / "train.jsonl").open())) if row["kind"] == "rare")
    assert ("odd" in found.study.names) == (rare in draw[:20])
    if rare not in draw[:20]:
        assert "odd is left out: no sampled prompt has kind: rare" in found.remarks()
    prompts = found.figures()["prompts_in_scope"]
    assert prompts["harm"] + prompts["long"] == 20 and min(prompts.values()) > 0
    assert any("counts for" in line and "raise --samples" in line for line in found.remarks())
    hard = configured(tiny_world, tmp_path)
    hard.constraints[0].limit = -0.5
    verdict = feasibility(hard, 8, 4, tmp_path / "hard").verdict()
    assert verdict.startswith("no policy near the reference keeps this limit: long <= -0.5, the lowest reachable is")


# multiplier.initial: auto


def with_start(world: Path, workspace: Path, name: str, **multiplier: Any) -> PolicyStage:
    constraint = {"name": "long", "model": LONG, "critic": str(world / "model"), "limit": 1.5}
    constraints = [constraint | {"multiplier": STARTS | multiplier}]
    return configured(world, workspace, name=name, steps=2, constraints=constraints, save_every=1)


def start_of(folder: Path) -> float:
    """The multiplier that notes.log names, which is where the first step's stands."""
    lines = [line for line in (folder / "notes.log").read_text().splitlines() if "long starts at" in line]
    assert len(lines) == 1
    first = read_metrics(folder)[0]["multiplier/long"]
    assert float(lines[0].rsplit(" ", 1)[1]) == pytest.approx(first, rel=1e-3)
    return float(first)


@pytest.fixture(scope="module")
def automatic(one_rank: None, tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(with_start(tiny_world, tmp_path_factory.mktemp("auto"), "auto"))


def test_a_run_starts_where_the_dual_says(automatic: Path, tiny_world: Path, tmp_path: Path) -> None:
    began = start_of(automatic)
    found = feasibility(with_start(tiny_world, tmp_path, "asked"), 128, 8, tmp_path / "found")
    assert 0 < began < 5 and began == pytest.approx(found.study.rest.multipliers_M[0], rel=1e-6)
    assert "48 prompts" in (automatic / "notes.log").read_text()


def test_sampling_disturbs_no_number_of_the_run(automatic: Path, tiny_world: Path, tmp_path: Path) -> None:
    """The same run with that number as its start is the same bit for bit."""
    state = json.loads(next((automatic / "checkpoints").glob("step_1/**/state.json")).read_text())
    exact = state["multipliers"]["long"]["state"]["value"]
    # A step of 1e-9 times the gap apart, which rounds to the same multiplier in float32 advantages.
    given = train(with_start(tiny_world, tmp_path, "given", initial=exact))
    one, other = read_metrics(automatic)[0], read_metrics(given)[0]
    timed = ("time/", "throughput/", "rollout/tokens_per_second", "multiplier/")
    assert {k: v for k, v in one.items() if not k.startswith(timed)} == {
        k: v for k, v in other.items() if not k.startswith(timed)
    }


def test_a_resumed_run_does_not_sample_again(automatic: Path, tiny_world: Path, tmp_path: Path) -> None:
    stage = with_start(tiny_world, tmp_path, "run")
    killed(stage, "step", 1)
    folder = train(stage.model_copy(update={"resume": True}))
    start_of(folder)
    assert_same(automatic, folder)


def test_starts_that_cannot_be_kept_are_finite_and_bounded(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    stage = with_start(tiny_world, tmp_path, "hard", max=1.25)
    stage.constraints[0].limit = -0.5
    assert start_of(train(stage)) == pytest.approx(1.25)
    assert "no policy near it keeps all limits" in (stage.folder / "notes.log").read_text()
    # log_sgd cannot begin at 0, where a limit that does not bind would have it.
    easy = with_start(tiny_world, tmp_path, "easy", rule="log_sgd")
    easy.constraints[0].limit = 40.0
    assert start_of(train(easy)) == pytest.approx(0.1)
