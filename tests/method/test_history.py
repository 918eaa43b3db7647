"""Running moments against numpy over all scores at once, and objectives in their units against plain arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from beaver_ray.method.forms import CVaR, WorstOfK
from beaver_ray.method.history import Moments, Unit, cost_unit, reward_unit
from beaver_ray.method.objective import RewardMaximization, RewardShaping, Settings
from beaver_ray.ppo_options import PpoConfig
from launch.config_files import load_config
from tests.method.test_objective import NAMES, by_hand, constrained, drawn

CLIP = 0.8
PLAIN = Settings(kl_coefficient=0.3, clip_score=None, gae_lambda=0.9)
NORMALIZED = replace(PLAIN, normalize_rewards=CLIP)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_moments_of_parts_are_those_of_the_whole(scale: float) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(1e4, scale, size).astype(np.float32) for size in (1, 7, 0, 128, 3)]
    moments = Moments()
    for part in parts:
        moments = Moments.of_state(moments.and_of(part).state())
    whole = np.concatenate(parts).astype(np.float64)
    assert moments.count == 139 and moments.mean == pytest.approx(whole.mean(), rel=1e-12)
    assert moments.deviation == pytest.approx(whole.std(), rel=1e-9, abs=1e-12)
    assert moments.size == pytest.approx(np.sqrt(np.mean(whole**2)), rel=1e-12)


def test_units_by_hand() -> None:
    moments = Moments().and_of(np.array([1.0, 3.0])).and_of(np.array([8.0]))
    # Mean 4, squares 9 + 1 + 16; mean square (1 + 9 + 64) / 3.
    assert (moments.count, moments.mean) == (3, 4.0) and moments.deviation == pytest.approx(np.sqrt(26 / 3))
    unit = reward_unit(moments, 1.0)
    assert unit.of(np.array([4.0, 2.0, 8.0])) == pytest.approx([0.0, -2 / np.sqrt(26 / 3), 1.0])
    # A cost keeps its zero and is not cut.
    assert cost_unit(moments).of(np.array([-74.0, 0.0, 74.0])) == pytest.approx(np.array([-3, 0, 3]) * np.sqrt(74 / 3))
    # However small the unit, none is left.
    tiny = 1e-6 * np.array([1.0, 3.0, -2.0, 5.0])
    assert reward_unit(Moments().and_of(tiny), 9.0).of(tiny).std() == pytest.approx(1.0)
    assert np.square(cost_unit(Moments().and_of(tiny)).of(tiny)).mean() == pytest.approx(1.0)
    # One answer, or answers that are all alike, have no spread to divide by.
    assert reward_unit(Moments().and_of(np.array([5.0])), CLIP) == Unit(5.0, 1.0, CLIP)
    assert cost_unit(Moments().and_of(np.zeros(9))) == cost_unit(Moments()) == Unit()


def test_advantages_are_those_of_scores_divided_beforehand() -> None:
    """Two steps, with a critic and against other answers: the second one's units are of both."""
    pairs = [drawn(12, seed) for seed in (1, 2)]
    pairs = [replace(answers, prompts_B=np.repeat(np.arange(4), 3)) for answers in pairs]
    forms = {"harm": CVaR(0.5), "leak": WorstOfK(3)}
    for changes in (
        {},
        {"advantage": "leave_one_out"},
        {"forms": forms},
        {"advantage": "leave_one_out", "forms": forms},
    ):
        given: dict[str, Any] = changes
        for count in (0, 1, 2):
            plain, made_of = (constrained(replace(s, **given), count) for s in (PLAIN, NORMALIZED))
            first = made_of.advantages(pairs[0])
            second = made_of.advantages(pairs[1], first.history)
            scores = [plain.scores(answers) for answers in pairs]
            both = {signal: np.concatenate([s[signal] for s in scores]) for signal in plain.signals}
            reward = both["reward"]
            sizes = {name: np.sqrt(np.mean(both[name] ** 2)) for name in NAMES[:count]}
            divided = replace(
                pairs[1],
                rewards_B=np.clip((pairs[1].rewards_B - reward.mean()) / reward.std(), -CLIP, CLIP),
                costs={**pairs[1].costs, **{name: pairs[1].costs[name] / size for name, size in sizes.items()}},
            )
            expected = plain.advantages(divided)
            for signal in plain.signals:
                np.testing.assert_allclose(second.advantages[signal], expected.advantages[signal], atol=1e-12)
                np.testing.assert_array_equal(second.scores[signal], scores[1][signal])
            for signal in plain.critics:
                np.testing.assert_allclose(second.returns[signal], expected.returns[signal], atol=1e-12)
            cut = np.abs(pairs[1].rewards_B - reward.mean()) > CLIP * reward.std()
            assert second.figures["unit/reward_clipped"] == pytest.approx(cut.mean())
            assert second.figures["unit/reward"] == pytest.approx(reward.std())
            # The constraint is what it was.
            for name, costs in made_of.costs(pairs[1])[0].items():
                np.testing.assert_array_equal(costs.costs_E, plain.costs(pairs[1])[0][name].costs_E)


def test_a_multiplier_means_what_it_means_without() -> None:
    """What is climbed is reward less multiplier times cost, whatever the units; the KL weighs the same throughout."""
    answers = replace(drawn(12, seed=3), prompts_B=np.repeat(np.arange(4), 3))
    costly = replace(answers, costs={"harm": answers.costs["harm"] * 70, "leak": answers.costs["leak"] / 9})
    uncut = replace(NORMALIZED, normalize_rewards=1e9, advantage="leave_one_out")
    for given in (answers, costly):
        for harm, leak in ((0.0, 0.0), (0.3, 0.0), (7.0, 2.0)):
            multipliers = {"harm": harm, "leak": leak}
            parts = []
            for kl in (0.0, 0.4):
                objective = constrained(replace(uncut, kl_coefficient=kl), 2)
                made = objective.advantages(given)
                weights = objective.in_units(multipliers, objective.units(made.history))
                parts.append(objective.combine(made.advantages, weights))
            plain = constrained(replace(uncut, kl_coefficient=0.0, normalize_rewards=None), 2)
            raw = plain.combine(plain.advantages(given).advantages, multipliers) * (1 + harm + leak)
            spread = given.rewards_B.std()
            np.testing.assert_allclose(parts[0] * (1 + sum(weights.values())), raw / spread, atol=1e-10)
            # The KL alone: its sum over an answer, less what the other answers' are.
            alone = RewardMaximization(replace(plain.settings, kl_coefficient=0.4))
            nothing = alone.advantages(replace(given, rewards_B=np.zeros(12))).advantages["reward"]
            np.testing.assert_allclose(parts[1] - parts[0], nothing, atol=1e-10)


def test_without_it_nothing_is_kept_or_divided() -> None:
    for objective in (RewardMaximization(PLAIN), constrained(PLAIN, 2)):
        made = objective.advantages(by_hand())
        assert made.history == {} and objective.units({}) == {} and not any("unit/" in key for key in made.figures)
        assert objective.in_units({"harm": 3.0}, {}) == {"harm": 3.0}


def test_what_does_not_count_is_no_part_of_the_history() -> None:
    inside = {"harm": np.array([True, False])}
    made = constrained(NORMALIZED, 1).advantages(by_hand(inside=inside))
    assert made.history["harm"] == Moments(1, -2.0, 0.0) and made.history["reward"] == Moments(2, 2.0, 2.0)
    # A fixed weight's costs are in the reward before it is divided: 3 + 2 * 2, and 1 as that cost does not count.
    shaped = RewardShaping(NORMALIZED, {"harm": 2.0}).advantages(by_hand(inside=inside))
    assert shaped.history == {"reward": Moments(2, 4.0, 18.0)}


def test_three_of_a_kind_are_said() -> None:
    stacked = {"normalize_rewards": 0.8, "normalize_advantages": True}
    assert "two of them at most" in PpoConfig(**stacked, clip_value=0.2).remarks[0]
    for fewer in ({"clip_value": None}, {"normalize_advantages": False}, {"advantage": "leave_one_out"}):
        given: dict[str, Any] = stacked | fewer
        assert PpoConfig(**given).remarks == []
    assert PpoConfig(normalize_advantages=True).remarks == []
    config = load_config("configs/local/safe_ppo.yaml", ["ppo.normalize_rewards=0.8", "ppo.clip_value=0.2"])
    assert config.announcements() == config.ppo.remarks != []  # type: ignore[attr-defined]
