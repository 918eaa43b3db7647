"""What the guard complains of, by figures whose mean and spread are plain to see."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from beaver_ray.method.divergence import PERSISTS, WINDOW, DivergenceGuard


def metrics(reward: float = 0.0, kl: float = 0.1, cost: float = 0.0, **more: float) -> dict[str, float]:
    return {"reward/mean": reward, "kl/reference": kl, "cost/harm/mean": cost, "cost/harm/limit": 0.5, **more}


def test_a_quiet_run_has_no_complaints() -> None:
    guard = DivergenceGuard(1.0, ["harm"])
    assert [c for step in range(100) for c in guard.observe(metrics(reward=step % 2, cost=step % 2))] == []


def test_updates_that_were_passed_over_are_said() -> None:
    guard = DivergenceGuard(None, ["harm"])
    skipped = {"policy/skipped_updates": 2.0, "critic/harm/skipped_updates": 0.0, "critic/reward/skipped_updates": 1.0}
    assert guard.observe(metrics(**skipped)) == [
        "2 update(s) of the policy were not finite and were passed over",
        "1 update(s) of the critic/reward were not finite and were passed over",
    ]


def test_kl_above_its_limit() -> None:
    """Fault 27 of the published code."""
    guard = DivergenceGuard(2.0, ["harm"])
    assert guard.observe(metrics(kl=2.0)) == []
    assert guard.observe(metrics(kl=2.5)) == ["the KL to the reference is 2.5, above guard.kl 2"]
    assert len(guard.observe(metrics(kl=math.nan))) == 1
    assert DivergenceGuard(None, ["harm"]).observe(metrics(kl=1e9)) == []


def test_what_cannot_be_right_is_said_without_any_limit() -> None:
    guard = DivergenceGuard(None, ["harm"])
    answers = {"rollout/response_tokens": 8.0, "rollout/truncated_fraction": 0.5, "rollout/staleness_max": 0.0}
    right = answers | {"kl/rollout_train": 0.001}
    # Each just inside its bounds: 2 nats a token of 8, 0.1 between generator and trainer, 95% cut.
    for sign in (-1, 1):
        inside = {"kl/rollout_train": sign * 0.0999, "rollout/truncated_fraction": 0.949}
        assert guard.observe(metrics(kl=sign * 15.99, **answers | inside)) == []
        outside = {"kl/rollout_train": sign * 0.1001, "rollout/truncated_fraction": 0.95}
        assert len(DivergenceGuard(None, ["harm"]).observe(metrics(kl=sign * 16.01, **answers | outside))) == 3
    (said,) = guard.observe(metrics(kl=47.0, **right))
    assert said.startswith("the KL to the reference is 47 nats over 8 tokens an answer, which cannot be right")
    # Once in so many steps of a row.
    again = [step for step in range(2, 45) if guard.observe(metrics(kl=-47.0, **right))]
    assert again == [1 + WINDOW, 1 + 2 * WINDOW]
    assert guard.observe(metrics(**right)) == [] and len(guard.observe(metrics(kl=47.0, **right))) == 1
    (said,) = guard.observe(metrics(**answers, **{"kl/rollout_train": 0.5}))
    assert said.startswith("generator and trainer differ by 0.5 nats a token under the same weights")
    stale = answers | {"kl/rollout_train": 0.5, "rollout/staleness_max": 1.0}
    assert guard.observe(metrics(**stale)) == []
    (said,) = guard.observe(metrics(**right | {"rollout/truncated_fraction": 1.0}))
    assert said.startswith("100% of the answers were cut before their end, at 8 tokens")


def test_a_margin_that_leaves_nothing_of_a_rate_is_said() -> None:
    guard = DivergenceGuard(None, ["harm"])
    rate = {"cost/harm/violation_rate": 0.1, "cost/harm/mean": 0.1}
    assert guard.observe(metrics(**rate, **{"cost/harm/margin": 0.4})) == []
    (said,) = guard.observe(metrics(**rate, **{"cost/harm/margin": 0.5}))
    assert said.startswith("the confidence of harm takes 0.5 off its limit 0.5, and nothing is left")
    # A mean of float32 costs is not quite the share of those above 0.
    rounded = {"cost/harm/mean": float(np.float32(2) / np.float32(40)), "cost/harm/violation_rate": 2 / 40}
    assert rounded["cost/harm/mean"] != rounded["cost/harm/violation_rate"]
    assert len(DivergenceGuard(None, ["harm"]).observe(metrics(**rounded, **{"cost/harm/margin": 0.5}))) == 1
    scores = rate | {"cost/harm/mean": -0.4, "cost/harm/margin": 0.5}
    assert DivergenceGuard(None, ["harm"]).observe(metrics(**scores)) == []  # a mean of scores may be negative
    # Steps without a counting answer begin nothing anew: 20 others are one complaint.
    empty = {key: math.nan for key in rate}
    guard = DivergenceGuard(None, ["harm"])
    said = [guard.observe(metrics(**(empty if n % 2 else rate | {"cost/harm/margin": 0.5}))) for n in range(40)]
    assert [n for n, found in enumerate(said) if found] == [0]
    # Without a confidence nothing is taken off, also not off a limit of 0.
    none = {"cost/harm/violation_rate": 0.0, "cost/harm/mean": 0.0, "cost/harm/limit": 0.0}
    assert DivergenceGuard(None, ["harm"]).observe(metrics(**none)) == []


def test_numbers_that_are_not_finite_may_not_last() -> None:
    guard = DivergenceGuard(None, [])
    found = []
    for bad in ("", "reward", "reward", "policy", "reward", "policy", "policy", "policy", ""):
        guard.miss(["reward"] if bad == "reward" else [])
        guard.observe(metrics(**({"policy/skipped_updates": 1.0} if bad == "policy" else {})))
        found.append(guard.lasting())
    assert found == [None] * 7 + ["updates of the policy were not finite", None]
    for _ in range(PERSISTS):
        assert guard.lasting() is None
        guard.miss(["cost/harm"])
        assert guard.observe(metrics()) == []
    assert guard.lasting() == "cost/harm of samples was not finite"


def test_a_cost_that_is_only_measured_has_no_limit_to_keep() -> None:
    guard = DivergenceGuard(None, ["leak"])
    more = {"cost/leak/mean": 0.0, "cost/leak/limit": 0.5}
    assert not any(guard.observe(metrics(cost=0.6, **more)) for _ in range(45))


def test_a_cost_above_its_limit_for_long_is_said_once_in_a_window() -> None:
    guard = DivergenceGuard(None, ["harm"])
    said = [step for step in range(1, 46) if guard.observe(metrics(cost=0.6))]
    assert said == [WINDOW, 2 * WINDOW]
    assert guard.observe(metrics(cost=0.5)) == []
    assert [step for step in range(1, WINDOW + 1) if guard.observe(metrics(cost=0.6))] == [WINDOW]
    # At the limit exactly, but for float32.
    at_limit = {"cost/harm/limit": 0.05}
    assert not any(guard.observe(metrics(cost=float(np.float32(0.05)), **at_limit)) for _ in range(2 * WINDOW))


def test_what_is_bounded_is_compared_with_the_limit() -> None:
    guard = DivergenceGuard(None, ["harm"])
    assert not any(guard.observe(metrics(cost=0.6, **{"cost/harm/bounded": 0.4})) for _ in range(45))
    said = [guard.observe(metrics(cost=0.1, **{"cost/harm/bounded": 0.75})) for _ in range(WINDOW)]
    assert said[-1] == [f"the cost harm (0.75) is above its limit 0.5 for {WINDOW} steps"] and sum(map(len, said)) == 1


def test_steps_without_a_counting_answer_are_neither_above_nor_below() -> None:
    guard = DivergenceGuard(None, ["harm"])
    said = [guard.observe(metrics(cost=1.0 if step % 2 else math.nan)) for step in range(2 * WINDOW)]
    assert sum(map(len, said)) == 1 and said[-1] and guard.above == {"harm": WINDOW}


def test_a_fallen_reward() -> None:
    guard, inside = DivergenceGuard(None, ["harm"]), DivergenceGuard(None, ["harm"])
    # Rewards of 1 and 3 in turns: mean 2, standard deviation 1. A mean of the last window below 0 has fallen.
    for step in range(WINDOW):
        assert guard.observe(metrics(reward=1.0 + 2.0 * (step % 2))) == []
        assert inside.observe(metrics(reward=1.0 + 2.0 * (step % 2))) == []
    assert not any(inside.observe(metrics(reward=0.01)) for _ in range(2 * WINDOW))
    said = []
    for step in range(1, 61):
        if found := guard.observe(metrics(reward=-0.01)):
            said.append((step, found))
    text = f"the reward fell to -0.01 over {WINDOW} steps, from 2 at the start"
    assert said == [(WINDOW, [text]), (2 * WINDOW, [text]), (3 * WINDOW, [text])]


def test_rewards_that_did_not_vary_at_first_may_vary_later() -> None:
    """Twenty rewards of 1: by less than 2 % nothing has fallen."""
    guard = DivergenceGuard(None, [])
    for step in range(4 * WINDOW):
        assert guard.observe(metrics(reward=1.0 if step < WINDOW else 0.981)) == []
    said = [guard.observe(metrics(reward=0.97)) for _ in range(WINDOW)]
    assert any(said), "but then it has"


def test_a_resumed_guard_goes_on() -> None:
    guard, other = DivergenceGuard(None, ["harm"]), DivergenceGuard(None, ["harm"])

    def observed(guard: DivergenceGuard, steps: range) -> list[Any]:
        return [guard.observe(metrics(reward=1.0 if step < WINDOW else -5.0, cost=0.6)) for step in steps]

    observed(guard, range(33))
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert observed(other, range(33, 60)) == observed(guard, range(33, 60))
