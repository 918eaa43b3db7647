"""Objectives against hand work and against the method's formulas token by token, with 0, 1 and 2 constraints."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors.stages import stages
from beaver_ray.constraint_options import MultiplierConfig
from beaver_ray.method.advantages import COST, REWARD
from beaver_ray.method.forms import make_form
from beaver_ray.method.objective import (
    Answers,
    ConstrainedReward,
    Objective,
    RewardMaximization,
    RewardShaping,
    Settings,
)

NAMES = ("harm", "leak")


def constrained(settings: Settings, count: int) -> ConstrainedReward:
    """With the first ``count`` of NAMES, under different multipliers."""
    return ConstrainedReward(
        settings, {name: MultiplierConfig(initial=0.5 + i) for i, name in enumerate(NAMES[:count])}
    )


def objectives(settings: Settings, count: int) -> list[Objective]:
    """All three, with ``count`` costs in those that know costs."""
    weights = {name: 0.7 + i for i, name in enumerate(NAMES[:count])}
    return [RewardMaximization(settings), RewardShaping(settings, weights), constrained(settings, count)]


def by_hand(**changes: Any) -> Answers:
    """Two answers, of two tokens and of one, the second cut."""
    given = Answers(
        offsets=np.array([0, 2, 3]),
        prompts_B=np.array([8, 5]),
        rewards_B=np.array([3.0, 1.0]),
        costs={"harm": np.array([-2.0, 60.0]), "leak": np.array([1.0, -4.0])},
        truncated_B=np.array([False, True]),
        kl_terms_T=np.array([0.5, -1.0, 2.0]),
        log_ratios_T=np.zeros(3),
        values={
            "reward": np.array([0.5, 1.0, 0.0]),
            "harm": np.array([0.0, -1.0, 2.0]),
            "leak": np.array([1.0, 0.0, 0.0]),
        },
    )
    return replace(given, **changes)


def drawn(rows: int, seed: int) -> Answers:
    """Answers of 1 to 8 tokens, scores wide enough to be clipped."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, rows)
    tokens = int(lengths.sum())
    return Answers(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        prompts_B=np.arange(rows),
        rewards_B=rng.normal(0, 3, rows),
        costs={name: rng.normal(0, 3, rows) for name in NAMES},
        truncated_B=rng.random(rows) < 0.4,
        kl_terms_T=rng.normal(0, 0.5, tokens),
        log_ratios_T=rng.normal(0, 0.4, tokens),
        values={signal: rng.normal(0, 1, tokens) for signal in ("reward", *NAMES)},
    )


HAND = Settings(kl_coefficient=0.5, gae_lambda=0.5)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_what_is_shaped_valued_and_bounded(count: int) -> None:
    plain, shaped, safe = objectives(Settings(), count)
    for objective in (plain, shaped):
        assert objective.signals == {"reward": REWARD} and objective.critics == ("reward",)
        assert objective.bounded == () and objective.multipliers() == {}
    assert list(safe.signals.items()) == [("reward", REWARD), *((name, COST) for name in NAMES[:count])]
    assert safe.critics == ("reward", *NAMES[:count]) and safe.bounded == NAMES[:count]
    first, second = safe.multipliers(), safe.multipliers()
    assert {name: multiplier.value for name, multiplier in first.items()} == {n: 0.5 + NAMES.index(n) for n in first}
    for name, multiplier in first.items():
        multiplier.update([5.0], 0.0)
        assert second[name].value != multiplier.value, "each call makes them anew"
    for objective in (plain, shaped, safe):
        assert pickle.loads(pickle.dumps(objective)) == objective


def test_the_reward_alone_by_hand() -> None:
    """Fault 6 of the published code: cut answers can be penalised."""
    # Rewards [-0.25, 0.5 + 3], [-1 + 1]; deltas [-0.25 + 1 - 0.5, 3.5 - 1], [0].
    made = RewardMaximization(HAND).advantages(by_hand())
    assert made.advantages.keys() == made.returns.keys() == {"reward"}
    assert made.advantages["reward"].tolist() == [0.25 + 0.5 * 2.5, 2.5, 0.0]
    assert made.returns["reward"].tolist() == [2.0, 3.5, 0.0]
    assert made.figures.keys() == {"critic/reward/explained_variance"}
    # The cut answer's reward is 4 less.
    made = RewardMaximization(replace(HAND, truncation_penalty=4.0)).advantages(by_hand())
    assert made.advantages["reward"].tolist() == [1.5, 2.5, -4.0]


def test_shaped_rewards_by_hand() -> None:
    # Rewards 3 + 2 * 2 - 0.5 and 1 - 120 + 2, and with the KL [-0.25, 0.5 + 6.5], [-1 - 117], clipped at -50.
    made = RewardShaping(HAND, {"harm": 2.0, "leak": 0.5}).advantages(by_hand())
    assert made.returns.keys() == {"reward"}
    assert made.advantages["reward"].tolist() == [0.25 + 0.5 * 6.0, 6.0, -50.0]
    assert made.returns["reward"].tolist() == [3.75, 7.0, -50.0]


def test_constraints_by_hand() -> None:
    made = constrained(HAND, 2).advantages(by_hand())
    assert made.advantages["reward"].tolist() == [1.5, 2.5, 0.0]
    # harm [0.25, -0.5 - 2], [1 + 60 -> 50]; deltas [0.25 - 1 - 0, -2.5 + 1], [50 - 2]
    assert made.advantages["harm"].tolist() == [-0.75 + 0.5 * -1.5, -1.5, 48.0]
    assert made.returns["harm"].tolist() == [-1.5, -2.5, 50.0]
    # leak [0.25, -0.5 + 1], [1 - 4]; deltas [0.25 + 0 - 1, 0.5], [-3]
    assert made.advantages["leak"].tolist() == [-0.75 + 0.5 * 0.5, 0.5, -3.0]
    assert made.returns["leak"].tolist() == [0.5, 0.5, -3.0]
    # (A_r - 1 A_harm - 2 A_leak) / 4; one constraint is (A_r - 1 A_harm) / 2.
    combined = constrained(HAND, 2).combine(made.advantages, {"harm": 1.0, "leak": 2.0})
    assert combined.tolist() == [(1.5 + 1.5 + 1.0) / 4, (2.5 + 1.5 - 1.0) / 4, (0.0 - 48.0 + 6.0) / 4]
    one = constrained(HAND, 1)
    assert one.combine(one.advantages(by_hand()).advantages, {"harm": 1.0}).tolist() == [1.5, 2.0, -24.0]


def literal(answers: Answers, scores: np.ndarray, signal: str, sign: int, settings: Settings) -> list[list[float]]:
    """A signal's advantages by the definition, answer by answer: sum over k of lambda^k * delta."""
    found = []
    for b, (start, end) in enumerate(zip(answers.offsets[:-1], answers.offsets[1:], strict=True)):
        rewards = [sign * settings.kl_coefficient * kl for kl in answers.kl_terms_T[start:end]]
        rewards[-1] += scores[b]
        if settings.clip_score is not None:
            rewards = [min(max(r, -settings.clip_score), settings.clip_score) for r in rewards]
        values = [*answers.values[signal][start:end], 0.0]
        deltas = [r + values[t + 1] - values[t] for t, r in enumerate(rewards)]
        decay = settings.gae_lambda
        found.append([sum(decay**k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))])
    return found


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_all_by_loops(count: int, normalize: bool) -> None:
    settings = Settings(0.3, clip_score=2.5, gae_lambda=0.8, truncation_penalty=1.5, normalize=normalize)
    for seed, objective in enumerate(objectives(settings, count)):
        answers = drawn(17, seed)
        made = objective.advantages(answers)
        reward = answers.rewards_B - 1.5 * answers.truncated_B
        names = [name for name in made.advantages if name != "reward"]
        if isinstance(objective, RewardShaping):
            reward = reward - sum(w * answers.costs[name] for name, w in objective.weights.items())
        expected = {"reward": np.concatenate(literal(answers, reward, "reward", -1, settings))}
        for name in names:
            expected[name] = np.concatenate(literal(answers, answers.costs[name], name, 1, settings))
        for signal, advantages_T in expected.items():
            np.testing.assert_allclose(made.advantages[signal], advantages_T, atol=1e-12)
            returns_T = advantages_T + answers.values[signal]
            np.testing.assert_allclose(made.returns[signal], returns_T, atol=1e-12)
            explained = 1 - np.var(advantages_T) / np.var(returns_T)
            assert made.figures[f"critic/{signal}/explained_variance"] == pytest.approx(explained)
        multipliers = {name: 0.4 + 1.1 * i for i, name in enumerate(names)}
        combined_T = expected["reward"] - sum(multipliers[name] * expected[name] for name in names)
        combined_T = combined_T / (1 + sum(multipliers.values()))
        if normalize:
            combined_T = (combined_T - combined_T.mean()) / combined_T.std()
        np.testing.assert_allclose(objective.combine(made.advantages, multipliers), combined_T, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_without_weight_costs_change_no_bit(count: int, normalize: bool) -> None:
    """Multipliers of 0 are plain PPO, and so is shaping by weights of 0."""
    settings = Settings(truncation_penalty=0.5, normalize=normalize)
    answers = drawn(13, seed=7)
    plain, shaped = RewardMaximization(settings), RewardShaping(settings, dict.fromkeys(NAMES[:count], 0.0))
    safe = constrained(settings, count)
    wide = plain.advantages(answers).advantages
    for kind in (np.float64, np.float32):  # which is what advantages are kept as
        expected = plain.combine({s: a.astype(kind) for s, a in wide.items()}, {})
        for objective in (shaped, safe):
            made = {s: a.astype(kind) for s, a in objective.advantages(answers).advantages.items()}
            found = objective.combine(made, dict.fromkeys(objective.bounded, 0.0))
            assert found.dtype == kind and np.array_equal(found, expected)
    if not normalize:
        assert np.array_equal(plain.combine(wide, {}), wide["reward"])


def test_the_kl_weight_does_not_depend_on_multipliers() -> None:
    answers = drawn(9, seed=8)
    with_kl, without = (Settings(beta, clip_score=None, gae_lambda=0.9) for beta in (0.4, 0.0))
    nothing = replace(answers, values={"reward": np.zeros(len(answers.kl_terms_T))})
    expected = np.concatenate(literal(nothing, np.zeros(9), "reward", -1, with_kl))
    for count in (0, 1, 2):
        for harm, leak in ((0.0, 0.0), (0.3, 0.0), (7.0, 2.0), (0.0, 50.0)):
            multipliers = dict(list({"harm": harm, "leak": leak}.items())[:count])
            parts = []
            for settings in (with_kl, without):
                objective = constrained(settings, count)
                parts.append(objective.combine(objective.advantages(answers).advantages, multipliers))
            np.testing.assert_allclose(parts[0] - parts[1], expected, atol=1e-12)


def test_costs_for_the_multipliers() -> None:
    """Those of bounded costs alone; under staleness each answer weighs min(its ratio, cap), by their mean."""
    log_ratios = np.array([math.log(2.0), -math.log(8.0), math.log(5.0)])
    answers = by_hand(log_ratios_T=log_ratios)
    for count in (0, 1, 2):
        costs, figures = constrained(HAND, count).costs(answers)
        assert {name: c.costs_E.tolist() for name, c in costs.items()} == {
            n: answers.costs[n].tolist() for n in NAMES[:count]
        }
        assert figures == {}
    # Ratios 2 / 8 and 5 cut at 2, mean 9 / 8: weights 2 / 9 and 16 / 9. Means 478 / 9 and -31 / 9, from which each
    # cost's distance is weighed.
    costs, figures = constrained(replace(HAND, importance_cap=2.0), 2).costs(answers)
    assert figures == {"rollout/importance_weight_mean": pytest.approx(9 / 8)}
    np.testing.assert_allclose(costs["harm"].costs_E, [3310 / 81, 5294 / 81])
    np.testing.assert_allclose(costs["leak"].costs_E, [-199 / 81, -359 / 81])
    assert costs["harm"].prompts_E.tolist() == [8, 5]
    for objective in objectives(replace(HAND, importance_cap=2.0), 2)[:2]:
        assert objective.costs(answers) == ({}, figures)
    # However far off the policy is, nothing overflows.
    costs, _ = constrained(replace(HAND, importance_cap=1e12), 1).costs(by_hand(log_ratios_T=np.array([0.0, 0.0, 1e4])))
    assert np.isfinite(costs["harm"].costs_E).all()


def test_importance_weights_are_no_spread_of_the_cost() -> None:
    """What the multiplier's unit and the margin are made of: the spread of the costs, and not of the weights."""
    rng = np.random.default_rng(0)
    answers = replace(drawn(4000, seed=1), offsets=np.arange(4001), log_ratios_T=rng.normal(0, 0.3, 4000))
    answers = replace(answers, costs={name: rng.normal(-7.0, 1.0, 4000) for name in NAMES})
    found, _ = constrained(replace(HAND, importance_cap=2.0), 1).costs(answers)
    assert found["harm"].costs_E.mean() == pytest.approx(-7.0, abs=0.05)
    assert found["harm"].costs_E.std() == pytest.approx(1.0, abs=0.1)


def test_costs_of_0_and_1_are_known_for_that_under_weights_and_forms_too() -> None:
    none, one, score = np.zeros(2), np.array([0.0, 1.0]), np.array([0.0, 0.5])
    stale = np.array([0.1, 0.2, -0.3])
    for costs, known in ((none, True), (one, True), (score, False)):
        for form in ("mean", "hinge", "worst_of_k", "cvar:0.9"):
            settings = replace(HAND, importance_cap=2.0, forms={"harm": make_form(form, 2)})
            answers = by_hand(costs={"harm": costs, "leak": costs}, log_ratios_T=stale)
            assert constrained(settings, 1).costs(answers)[0]["harm"].shares is known


@pytest.mark.parametrize("form", ["mean", "hinge", "worst_of_k", "cvar:0.5"])
def test_weights_too_small_for_a_float_count_by_what_they_are_to_each_other(form):
    """exp(-800) is 0; a policy that has moved so far still has costs between those of its answers."""
    settings = replace(HAND, importance_cap=2.0, forms={"harm": make_form(form, 2)})
    costs = {name: np.array([0.0, 1.0]) for name in NAMES}
    answers = by_hand(costs=costs, log_ratios_T=np.array([-400.0, -400.0, -801.0]))
    found = constrained(settings, 1).costs(answers)[0]["harm"].costs_E
    assert np.isfinite(found).all() and 0.0 <= found.mean() <= 1.0
    assert np.isfinite(constrained(settings, 1).advantages(answers).advantages["harm"]).all()


def test_costs_that_count_for_some_answers_by_hand() -> None:
    """harm counts for the first answer, leak for the second; what stands elsewhere, a NaN say, does not matter."""
    costs = {"harm": np.array([-2.0, np.nan]), "leak": np.array([np.inf, -4.0])}
    inside = {"harm": np.array([True, False]), "leak": np.array([False, True])}
    answers = by_hand(costs=costs, inside=inside)
    made = constrained(HAND, 2).advantages(answers)
    whole = constrained(HAND, 2).advantages(by_hand()).advantages
    assert made.advantages["reward"].tolist() == whole["reward"].tolist() == [1.5, 2.5, 0.0]
    assert made.advantages["harm"].tolist() == [*whole["harm"][:2], 0.0] == [-1.5, -1.5, 0.0]
    assert made.advantages["leak"].tolist() == [0.0, 0.0, -3.0]
    # Where it does not count a critic's target is what it says already.
    assert made.returns["harm"].tolist() == [-1.5, -2.5, 2.0] and made.returns["leak"].tolist() == [1.0, 0.0, -3.0]
    explained = 1 - np.var([-1.5, -1.5]) / np.var([-1.5, -2.5])
    assert made.figures["critic/harm/explained_variance"] == pytest.approx(explained)
    # (A_r - 1 A_harm) / 2 at the first answer's tokens, (A_r - 3 A_leak) / 4 at the second's.
    tokens = {name: np.repeat(marks, [2, 1]) for name, marks in inside.items()}
    combined = constrained(HAND, 2).combine(made.advantages, {"harm": 1.0, "leak": 3.0}, tokens)
    assert combined.tolist() == [(1.5 + 1.5) / 2, (2.5 + 1.5) / 2, (0.0 + 9.0) / 4]
    narrow = {signal: a.astype(np.float32) for signal, a in made.advantages.items()}
    assert constrained(HAND, 2).combine(narrow, {"harm": 1.0, "leak": 3.0}, tokens).dtype == np.float32
    seen, _ = constrained(HAND, 2).costs(answers)
    assert {name: c.costs_E.tolist() for name, c in seen.items()} == {"harm": [-2.0], "leak": [-4.0]}
    # Shaped rewards leave it out: 3 + 2 * 2, and 1 + 0.5 * 4.
    scores = RewardShaping(HAND, {"harm": 2.0, "leak": 0.5}).scores(answers)
    assert scores["reward"].tolist() == [7.0, 3.0]


def test_importance_weights_are_normalised_over_what_counts() -> None:
    # Ratios 2 / 8 and 5 cut at 2.
    answers = by_hand(
        log_ratios_T=np.array([math.log(2.0), -math.log(8.0), math.log(5.0)]),
        inside={"harm": np.array([False, True]), "leak": np.array([False, False])},
    )
    costs, figures = constrained(replace(HAND, importance_cap=2.0), 2).costs(answers)
    assert costs["harm"].costs_E.tolist() == [60.0] and costs["leak"].costs_E.tolist() == []
    assert figures == {"rollout/importance_weight_mean": pytest.approx(9 / 8)}


def test_with_scopes_the_kl_weight_stays_and_a_prompt_is_trained_by_its_own_constraints() -> None:
    answers, rng = drawn(12, seed=5), np.random.default_rng(5)
    inside = {name: rng.random(12) < 0.5 for name in NAMES}
    scoped = replace(answers, inside=inside)
    tokens = {name: np.repeat(marks, np.diff(answers.offsets)) for name, marks in inside.items()}
    settings = Settings(0.4, clip_score=None, gae_lambda=0.9)
    multipliers = {"harm": 0.7, "leak": 2.5}
    made = constrained(settings, 2).advantages(scoped).advantages
    combined = constrained(settings, 2).combine(made, multipliers, tokens)
    whole = constrained(settings, 2).advantages(answers).advantages
    for harm in (False, True):
        for leak in (False, True):
            here = (tokens["harm"] == harm) & (tokens["leak"] == leak)
            alone = constrained(settings, 2).combine(whole, {"harm": 0.7 * harm, "leak": 2.5 * leak})
            np.testing.assert_allclose(combined[here], alone[here], atol=1e-12)
    # All inside is as without a scope, to the bit.
    everywhere = {name: np.ones(len(marks), bool) for name, marks in tokens.items()}
    np.testing.assert_array_equal(
        constrained(settings, 2).combine(whole, multipliers, everywhere),
        constrained(settings, 2).combine(whole, multipliers),
    )
    # None inside, or a multiplier of 0, is plain PPO.
    nowhere = {name: ~marks for name, marks in everywhere.items()}
    for none, weights in ((nowhere, multipliers), (tokens, dict.fromkeys(NAMES, 0.0))):
        assert np.array_equal(constrained(settings, 2).combine(made, weights, none), made["reward"])


def test_multipliers_of_anything_else_are_refused() -> None:
    made = constrained(HAND, 2).advantages(by_hand()).advantages
    for multipliers in ({"harm": 1.0}, {"harm": 1.0, "leak": 1.0, "bias": 1.0}, {}):
        with pytest.raises(ValueError, match="but multipliers of"):
            constrained(HAND, 2).combine(made, multipliers)
    with pytest.raises(ValueError, match="but multipliers of"):
        RewardMaximization(HAND).combine(made, {"harm": 1.0})


def test_from_the_configuration() -> None:
    tree: dict[str, Any] = {
        "name": "x",
        "steps": 1,
        "models": {"policy": "p", "reward": "r"},
        "data": {"prompts": ["x"]},
        "constraints": [
            {"name": "harm", "model": "m", "limit": 0.0, "multiplier": {"initial": 0.25}},
            {"name": "leak", "model": "m", "limit": 1.0},
        ],
        "ppo": {"kl_coefficient": 0.1, "gae_lambda": 0.7, "clip_score": 3.0, "truncation_penalty": 2.0},
    }
    settings = Settings(0.1, 3.0, 0.7, 2.0)

    def of(stage: str, **changes: Any) -> tuple[Any, Objective]:
        config: Any = stages()[stage].model_validate({"stage": stage, **tree, **changes})
        return config, config.objective()

    assert of("ppo")[1] == RewardMaximization(settings)
    assert of("reward_shaping")[1] == RewardShaping(settings, {"harm": 0.25, "leak": 1.0})
    config, objective = of("safe_ppo")
    assert objective == ConstrainedReward(settings, {c.name: c.multiplier for c in config.constraints})
    _, stale = of("safe_ppo", rollout={"staleness": 1}, ppo={"normalize_advantages": True})
    assert stale.settings == Settings(normalize=True, importance_cap=2.0)
    for rule in ("leave_one_out", "group_standardized"):
        for stage in ("ppo", "reward_shaping", "safe_ppo"):
            _, objective = of(stage, rollout={"samples_per_prompt": 2}, ppo={"advantage": rule})
            assert objective.settings == Settings(advantage=rule) and objective.critics == ()
            assert list(objective.signals) == (["reward", "harm", "leak"] if stage == "safe_ppo" else ["reward"])


def test_what_an_answer_scored_and_what_was_expected_of_its_prompt() -> None:
    made = constrained(HAND, 1).advantages(by_hand())
    assert made.scores["reward"].tolist() == [3.0, 1.0] and made.scores["harm"].tolist() == [-2.0, 60.0]
    # With critics the value before the first token.
    assert made.baselines["reward"].tolist() == [0.5, 0.0] and made.baselines["harm"].tolist() == [0.0, 2.0]
    alike = by_hand(prompts_B=np.array([8, 8]), values={}, inside={"harm": np.array([True, False])})
    free = constrained(replace(HAND, advantage="leave_one_out"), 1).advantages(alike)
    # Without: the mean of both answers, 3 - 0.5 (0.5 - 1) and 1 - 0.5 x 2, and the cost of the one that counts.
    assert free.baselines["reward"] == pytest.approx([1.625, 1.625])
    assert free.baselines["harm"] == pytest.approx([-2.25, 0.0])


def test_values_of_all_signals_are_weighed_before_whitening() -> None:
    values = {"reward": np.array([4.0, 1.0]), "harm": np.array([2.0, -1.0])}
    objective = constrained(replace(HAND, normalize=True), 1)
    assert objective.weighed(values, {"harm": 3.0}).tolist() == [(4 - 6) / 4, (1 + 3) / 4]
    assert objective.combine(values, {"harm": 3.0}) == pytest.approx([-1.0, 1.0])
