"""The dual of a limit on sampled answers: by hand, by brute force, and against the small world's optimum."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import brentq, minimize

from beaver_ray.method.feasibility import (
    Reference,
    betas,
    dual,
    lowest,
    lowest_of_a_run,
    minimise_dual,
    nearest_together,
    outcome,
    solve,
    start,
    study,
    sweep,
    tilted,
)
from beaver_ray.small_world.world import SmallWorld
from tests.method.test_critic_free import Table


def reference(
    rewards: list[list[float]],
    costs: list[list[list[float]]],
    limits: list[float],
    kl_coefficient: float,
    inside: list[list[bool]] | None = None,
) -> Reference:
    """From lists by prompt; of the costs by constraint, then prompt."""
    offsets = np.concatenate([[0], np.cumsum([len(of_prompt) for of_prompt in rewards])])
    return Reference(
        offsets=offsets,
        rewards_B=np.array(list(itertools.chain(*rewards))),
        costs_MB=np.array([list(itertools.chain(*of_constraint)) for of_constraint in costs]),
        inside_MN=np.array(inside) if inside else np.ones((len(costs), len(rewards)), dtype=bool),
        limits_M=np.array(limits),
        kl_coefficient=kl_coefficient,
    )


def random_reference(seed: int, costs: int = 2, kl_coefficient: float = 0.1, limit: float = 0.15) -> Reference:
    """12 prompts with 2 to 9 answers; the last cost counts for half of them; what is better rewarded costs more."""
    draw = np.random.default_rng(seed)
    counts = draw.integers(2, 10, 12)
    prompts = np.repeat(np.arange(12), counts)
    rewards = draw.normal(size=counts.sum())
    inside = np.ones((costs, 12), dtype=bool)
    inside[-1] = np.arange(12) % 2 == 0
    values = 1 / (1 + np.exp(-(rewards + 1.5 * draw.normal(size=(costs, counts.sum())))))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return Reference(offsets, rewards, values * inside[:, prompts], inside, np.full(costs, limit), kl_coefficient)


def literal_dual(ref: Reference, multipliers: list[float], betas_N: list[float]) -> float:
    """D as it is written, with loops; a constraint and its limit count where they are in scope."""
    total = 0.0
    for prompt, (first, last) in enumerate(itertools.pairwise(ref.offsets.tolist())):
        inner = 0.0
        for answer in range(first, last):
            score = ref.rewards_B[answer]
            for i, multiplier in enumerate(multipliers):
                if ref.inside_MN[i, prompt]:
                    score -= multiplier * (ref.costs_MB[i, answer] - ref.limits_M[i])
            inner += math.exp(score / betas_N[prompt]) / (last - first)
        total += betas_N[prompt] * math.log(inner)
    return total / len(ref.counts_N)


def literal_policy(ref: Reference, multipliers: list[float]) -> list[np.ndarray]:
    """The probabilities of each prompt's answers at rest, kl_coefficient (1 + sum of those in scope) being the KL's."""
    found = []
    for prompt, (first, last) in enumerate(itertools.pairwise(ref.offsets.tolist())):
        counting = [i for i in range(len(multipliers)) if ref.inside_MN[i, prompt]]
        beta = ref.kl_coefficient * (1 + sum(multipliers[i] for i in counting))
        costs = sum((multipliers[i] * ref.costs_MB[i, first:last] for i in counting), np.zeros(last - first))
        raised = np.exp((ref.rewards_B[first:last] - costs) / beta)
        found.append(raised / raised.sum())
    return found


def literal_costs(ref: Reference, policy: list[np.ndarray]) -> list[float]:
    """Mean costs over the prompts in scope."""
    costs = []
    for i in range(len(ref.limits_M)):
        spans = itertools.pairwise(ref.offsets.tolist())
        means = [float(p @ ref.costs_MB[i, a:b]) for p, (a, b) in zip(policy, spans, strict=True)]
        costs.append(float(np.mean([m for m, counts in zip(means, ref.inside_MN[i], strict=True) if counts])))
    return costs


# By hand


def test_two_answers_by_hand() -> None:
    """One answer is worth 1 and costs 1, the other neither; at most a quarter may be the first.

    (1 - l) / beta = logit(1/4) = -ln 3 gives l = 1 + beta ln 3 under a fixed beta, and with beta = k (1 + l) as in a
    run l = (1 + k ln 3) / (1 - k ln 3).
    """
    ref = reference([[1.0, 0.0]], [[[1.0, 0.0]]], [0.25], kl_coefficient=0.5)
    ln3 = math.log(3)
    fixed = minimise_dual(ref, ref.limits_M, np.array([0.5]), ref.infinite_M, np.zeros(1))
    assert fixed[0] == pytest.approx(1 + 0.5 * ln3, abs=1e-5)
    rest = solve(ref)
    assert rest.multipliers_M[0] == pytest.approx((1 + 0.5 * ln3) / (1 - 0.5 * ln3), rel=1e-4)
    assert rest.kept and rest.costs_M[0] == pytest.approx(0.25, abs=1e-5)
    assert rest.reward == pytest.approx(0.25, abs=1e-5)
    assert rest.kl == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-5)
    assert rest.effective_answers == pytest.approx(1 / (0.25**2 + 0.75**2), abs=1e-4) and rest.alone == 1.0
    free = outcome(ref, np.zeros(1), ref.limits_M)
    assert not free.kept and free.costs_M[0] == pytest.approx(1 / (1 + math.exp(-2)))
    assert lowest(ref)[0] == 0.0
    assert lowest_of_a_run(ref)[0] == pytest.approx(1 / (1 + math.exp(2)), rel=1e-3)


def test_divided_scores_by_hand() -> None:
    """The same answers where a run divides rewards by 2 and costs by 1/2: beta = k (2 + l / 2)."""
    ref = reference([[1.0, 0.0]], [[[1.0, 0.0]]], [0.25], kl_coefficient=0.5)
    ref = replace(ref, reward_scale=2.0, cost_scales_M=np.array([0.5]))
    rest = solve(ref)
    assert rest.multipliers_M[0] == pytest.approx((1 + math.log(3)) / (1 - 0.25 * math.log(3)), rel=1e-4)
    assert rest.kept and rest.costs_M[0] == pytest.approx(0.25, abs=1e-5)
    # In the units that are climbed, where rewards are 1/2 and 0, costs 2 and 0, and the limit 1/2.
    climbed = reference([[0.5, 0.0]], [[[2.0, 0.0]]], [0.5], kl_coefficient=0.5)
    assert solve(climbed).multipliers_M[0] == pytest.approx(rest.multipliers_M[0] * 0.5 / 2.0, rel=1e-4)


def test_a_limit_that_does_not_bind_costs_nothing() -> None:
    ref = reference([[1.0, 0.0]], [[[1.0, 0.0]]], [0.9], kl_coefficient=0.5)
    rest = solve(ref)
    assert rest.multipliers_M[0] == 0.0 and rest.kept
    assert rest.reward == outcome(ref, np.zeros(1), ref.limits_M).reward


@pytest.mark.parametrize(("cost", "limit", "kept"), [(float(np.float32(0.2)), 0.2, True), (6e-4, 1e-4, False)])
def test_a_cost_that_no_answer_changes_has_no_multiplier(cost: float, limit: float, kept: bool) -> None:
    """The other limit is met as without it, whether the constant one is kept or not."""
    alone = reference([[1.0, 0.0], [2.0, 0.5]], [[[1.0, 0.0], [1.0, 0.0]]], [0.3], 0.5)
    both = replace(
        alone,
        costs_MB=np.vstack([alone.costs_MB, np.full(4, cost)]),
        inside_MN=np.ones((2, 2), dtype=bool),
        limits_M=np.array([0.3, limit]),
    )
    single, found = solve(alone), solve(both)
    assert found.multipliers_M == pytest.approx([single.multipliers_M[0], 0.0]) and single.multipliers_M[0] > 0
    assert found.reward == pytest.approx(single.reward) and found.kept_M.tolist() == [True, kept]
    assert start(both, np.full(2, np.inf))[1] == pytest.approx(found.multipliers_M)
    assert lowest_of_a_run(both)[1] == pytest.approx(cost)


def test_a_start_has_room_where_no_finite_multiplier_keeps_the_limit() -> None:
    ref = random_reference(3, costs=1)
    least = float(lowest_of_a_run(ref)[0])
    ref = replace(ref, limits_M=np.array([least - 5e-4 * ref.units_M[0]]))
    rest, multipliers_M = start(ref, np.full(1, np.inf))
    assert rest.kept and rest.multipliers_M[0] > 100 * multipliers_M[0] > 0


def test_a_scope_by_hand() -> None:
    """The cost counts for the second of two like prompts alone: there the policy is that of one prompt, here free."""
    ref = reference([[1.0, 0.0]] * 2, [[[0.0, 0.0], [1.0, 0.0]]], [0.25], 0.5, inside=[[False, True]])
    ln3 = math.log(3)
    rest = solve(ref)
    assert rest.multipliers_M[0] == pytest.approx((1 + 0.5 * ln3) / (1 - 0.5 * ln3), rel=1e-4)
    assert rest.costs_M[0] == pytest.approx(0.25, abs=1e-5)
    assert rest.reward == pytest.approx((0.25 + 1 / (1 + math.exp(-2))) / 2, abs=1e-5)
    assert lowest(ref)[0] == 0.0 and ref.shares_M[0] == 0.5


def test_too_much_kl_by_hand() -> None:
    """With k = 1 no multiplier tilts further than exp(-cost): 1 / (1 + e) = 0.269 is the lowest, above 0.25."""
    ref = reference([[1.0, 0.0]], [[[1.0, 0.0]]], [0.25], kl_coefficient=1.0)
    found = study(ref, ["harm"])
    assert not found.rest.kept and not found.missed_M.any()
    assert found.lowest_of_a_run_M[0] == pytest.approx(1 / (1 + math.e), rel=1e-3)
    assert found.lowest_M[0] == 0.0
    assert found.rest.costs_M[0] == pytest.approx(1 / (1 + math.e), rel=1e-3)
    # A start nine tenths of the way from the cost without limits, 1 / (1 + 1/e), to that: (1 - l) / (1 + l) is its
    # logit, ln(.3151 / .6849) = -.7764.
    rest, values_M = start(ref, np.array([50.0]))
    assert not rest.kept and values_M[0] == pytest.approx(1.7764 / 0.2236, rel=1e-2)
    assert start(ref, np.array([5.0]))[1][0] == 5.0


def test_a_small_multiplier_may_leave_less_than_an_infinite_one() -> None:
    """Much reward is on the cheap answer: what a large multiplier adds to the KL's weight costs more than it saves."""
    rewards, costs = [0.0] * 5 + [4.0, 6.0], [1.0] * 5 + [0.0, 1.0]
    ref = reference([rewards] * 3, [[costs] * 3], [0.64], kl_coefficient=1.0)

    def cost(multiplier: float) -> float:
        tilts = [(r - multiplier * c) / (1 + multiplier) for r, c in zip(rewards, costs, strict=True)]
        weights = [math.exp(tilt) for tilt in tilts]
        return sum(w * c for w, c in zip(weights, costs, strict=True)) / sum(weights)

    least = min(cost(multiplier) for multiplier in np.geomspace(0.01, 100, 2000))
    assert least < 0.64 < cost(1e6)
    found = study(ref, ["harm"])
    assert found.lowest_of_a_run_M[0] == pytest.approx(least, abs=1e-3)
    assert found.rest.kept and found.rest.costs_M[0] == pytest.approx(0.64, abs=1e-3)


@pytest.mark.parametrize("scale", [1e-8, 1e-6, 1.0, 1e6])
def test_the_scale_of_rewards_does_not_bound_what_a_run_can_keep(scale: float) -> None:
    """Without a reward that counts, a multiplier l tilts by l / (1 + l) / k: at k = 0.05 to next to no cost."""
    ref = reference([[scale, 0.0]], [[[1.0, 0.0]]], [0.1], kl_coefficient=0.05)
    assert study(ref, ["harm"]).lowest_of_a_run_M[0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("limit", "scale"), [(1e21, 1.0), (1e300, 1.0), (-1e21, 1.0), (0.4e-9, 1e-9), (0.4e9, 1e9)])
def test_limits_and_costs_of_any_size(limit: float, scale: float) -> None:
    """Two costs of which each answer has one, in units of ``scale``; the second is bounded by half of it."""
    rewards, costs = [[0.0, 1.0]] * 4, [[[scale, 0.0]] * 4, [[0.0, scale]] * 4]
    together_M = nearest_together(reference(rewards, costs, [limit, 0.5 * scale], 0.1)) / scale
    if limit > scale:
        assert together_M[1] <= 0.5 + 1e-6
    elif limit < 0:
        np.testing.assert_allclose(together_M, [0.0, 1.0], atol=1e-6)
    else:
        np.testing.assert_allclose(together_M, [0.45, 0.55], atol=1e-6)


def test_infeasible_alone_and_together_by_hand() -> None:
    """Two costs of which each answer has one: either is avoidable, but not both."""
    rewards, costs = [[0.0, 1.0]] * 4, [[[1.0, 0.0]] * 4, [[0.0, 1.0]] * 4]
    both = study(reference(rewards, costs, [0.4, 0.4], 0.1), ["a", "b"])
    assert both.lowest_M.tolist() == [0.0, 0.0]
    np.testing.assert_allclose(both.together_M, [0.5, 0.5], atol=1e-6)
    assert both.missed_M.tolist() == [True, True] and not both.rest.kept
    possible = study(reference(rewards, costs, [0.4, 0.7], 0.1), ["a", "b"])
    assert not possible.missed_M.any() and possible.rest.kept
    assert (possible.together_M <= [0.4 + 1e-9, 0.7 + 1e-9]).all()
    # Half of the prompts have nothing but bad answers.
    half = study(reference(rewards, [[[1.0, 1.0], [1.0, 0.0]] * 2], [0.3], 0.1), ["a"])
    assert half.lowest_M[0] == 0.5 and half.missed_M.tolist() == [True]


# Brute force


@pytest.mark.parametrize("seed", range(4))
def test_the_dual_is_the_one_written_down(seed: int) -> None:
    ref = random_reference(seed, limit=0.35)
    betas_N = np.random.default_rng(seed).uniform(0.1, 0.2, 12)
    for multipliers in ([0.0, 0.0], [0.7, 0.2], [3.0, 5.0]):
        value, gradient = dual(ref, np.array(multipliers), ref.limits_M, betas_N)
        assert value == pytest.approx(literal_dual(ref, multipliers, betas_N.tolist()), rel=1e-12)
        for i in range(2):
            up, down = ([m + s * (k == i) for k, m in enumerate(multipliers)] for s in (1e-5, -1e-5))
            slope = (literal_dual(ref, up, betas_N.tolist()) - literal_dual(ref, down, betas_N.tolist())) / 2e-5
            assert gradient[i] == pytest.approx(slope, abs=1e-8)
    found = minimise_dual(ref, ref.limits_M, betas_N, ref.infinite_M, np.zeros(2))
    assert (found < 10).all() and found.any()
    least = literal_dual(ref, found.tolist(), betas_N.tolist())
    axis = [np.linspace(0.0, 2.5 * max(value, 0.5), 60) for value in found]
    grid = {(a, b): literal_dual(ref, [a, b], betas_N.tolist()) for a in axis[0][::2] for b in axis[1][::2]}
    nearest = min(grid, key=lambda place: grid[place])
    assert least <= grid[nearest] + 1e-12
    assert grid[nearest] - least < 1e-2
    assert all(abs(value - place) <= 2 * a[2] for value, place, a in zip(found, nearest, axis, strict=True))


@pytest.mark.parametrize(("seed", "costs", "kl"), [(0, 1, 0.05), (1, 1, 0.1), (2, 2, 0.1), (3, 3, 0.1), (4, 3, 0.05)])
def test_at_rest_limits_are_met_or_cost_nothing(seed: int, costs: int, kl: float) -> None:
    """Complementarity, with costs by loops; and the policy is the one that a direct maximisation finds."""
    ref = random_reference(seed, costs, kl, limit=0.3)
    rest = solve(ref)
    assert rest.kept
    policy = literal_policy(ref, rest.multipliers_M.tolist())
    reached = literal_costs(ref, policy)
    np.testing.assert_allclose(rest.costs_M, reached, rtol=1e-9)
    assert any(rest.multipliers_M > 0)
    for multiplier, cost in zip(rest.multipliers_M, reached, strict=True):
        assert cost == pytest.approx(0.3, abs=2e-4) if multiplier > 0 else cost <= 0.3 + 2e-4
    counts = ref.counts_N.tolist()
    np.testing.assert_allclose(
        rest.kl, np.mean([p @ np.log(p * count) for p, count in zip(policy, counts, strict=True)]), atol=1e-9
    )
    np.testing.assert_allclose(rest.effective_answers, np.mean([1 / (p @ p) for p in policy]), rtol=1e-9)


@pytest.mark.parametrize("kl", [0.1, 0.2, 1.0])
def test_costs_of_a_small_scale_come_to_rest(kl: float) -> None:
    """Of shares of words, say: the multiplier is large, the KL weighs as much more, and plain iteration circles."""
    for seed, share in itertools.product(range(6), (0.05, 0.2, 0.6)):
        ref = random_reference(seed, costs=1, kl_coefficient=kl)
        ref = replace(ref, costs_MB=0.01 * ref.costs_MB)
        low, free = lowest_of_a_run(ref)[0], literal_costs(ref, literal_policy(ref, [0.0]))[0]
        limit = low + share * (free - low)
        rest = solve(replace(ref, limits_M=np.array([limit])))
        assert rest.kept
        expected = brentq(
            lambda m, r=ref, c=limit: literal_costs(r, literal_policy(r, [m]))[0] - c, 0.0, 1e6, xtol=1e-9
        )
        assert rest.multipliers_M[0] == pytest.approx(expected, rel=1e-3)


def test_the_tilt_is_the_constrained_maximum() -> None:
    """Two prompts, three answers each: E r - beta KL under the limits, maximised over the six probabilities (SLSQP)."""
    ref = reference(
        [[1.0, 0.2, 0.0], [0.8, 0.5, -0.4]],
        [[[1.0, 0.3, 0.0], [0.9, 0.6, 0.1]], [[0.0, 0.0, 0.0], [0.2, 0.9, 0.0]]],
        [0.35, 0.3],
        0.2,
        inside=[[True, True], [False, True]],
    )
    rest = solve(ref)
    assert rest.kept and (rest.multipliers_M > 0).all()
    betas_N = betas(ref, rest.multipliers_M)
    assert betas_N[0] == pytest.approx(0.2 * (1 + rest.multipliers_M[0]))
    assert betas_N[1] == pytest.approx(0.2 * (1 + rest.multipliers_M.sum()))

    def loss(p: np.ndarray) -> float:
        kl_N = (p * np.log(3 * p)).reshape(2, 3).sum(axis=1)
        return float(-(p @ ref.rewards_B - betas_N @ kl_N) / 2)

    limits = [
        {"type": "eq", "fun": lambda p: p.reshape(2, 3).sum(axis=1) - 1},
        {"type": "ineq", "fun": lambda p: 0.35 - p @ ref.costs_MB[0] / 2},
        {"type": "ineq", "fun": lambda p: 0.3 - p @ ref.costs_MB[1]},
    ]
    direct = minimize(loss, np.full(6, 1 / 3), bounds=[(1e-9, 1)] * 6, constraints=limits, options={"ftol": 1e-13})
    weights, _ = tilted(ref, rest.multipliers_M, betas_N)
    np.testing.assert_allclose(weights, direct.x, atol=1e-3)


def test_together_against_a_grid_of_policies() -> None:
    """Two prompts, two answers each: all mixtures in steps of 1/200."""
    ref = random_reference(5)
    ref = Reference(
        np.array([0, 2, 4]), ref.rewards_B[:4], ref.costs_MB[:, :4] * [[1, 1, 1, 1], [1, 1, 0, 0]],
        np.array([[True, True], [True, False]]), np.array([0.1, 0.1]), 0.1,
    )  # fmt: skip
    found = (nearest_together(ref) - ref.limits_M) / ref.units_M
    p = np.linspace(0, 1, 201)
    first = (p[:, None] * ref.costs_MB[0, 0] + (1 - p[:, None]) * ref.costs_MB[0, 1]) / 2
    first = first + (p * ref.costs_MB[0, 2] + (1 - p) * ref.costs_MB[0, 3]) / 2
    second = np.broadcast_to((p * ref.costs_MB[1, 0] + (1 - p) * ref.costs_MB[1, 1])[:, None], first.shape)
    excess = np.maximum((first - 0.1) / ref.units_M[0], (second - 0.1) / ref.units_M[1])
    assert found.max() == pytest.approx(excess.min(), abs=2e-2) and found.max() <= excess.min() + 1e-9


def test_multipliers_come_to_rest_where_a_run_brings_them() -> None:
    """On the table of logits where critics and leave-one-out rest at 1.23 (test_critic_free.py).

    With kl_coefficient alone for beta the dual would say 0.86.
    """
    table = Table()
    ref = Reference(
        offsets=np.arange(0, 65, 4),
        rewards_B=table.rewards_GV.ravel(),
        costs_MB=table.costs_GV.reshape(1, -1),
        inside_MN=np.ones((1, 16), dtype=bool),
        limits_M=np.array([table.limit]),
        kl_coefficient=table.beta,
    )
    assert solve(ref).multipliers_M[0] == pytest.approx(table.optimum(), rel=1e-4)
    plain = minimise_dual(ref, ref.limits_M, np.full(16, table.beta), ref.infinite_M, np.zeros(1))
    assert plain[0] == pytest.approx(0.864, abs=1e-3)


# What is drawn


def test_a_sweep_rises_and_has_the_configured_limit() -> None:
    ref = random_reference(6, limit=0.3)
    points = sweep(ref, 0, float(lowest_of_a_run(ref)[0]))
    limits = [limit for limit, _ in points]
    assert limits == sorted(limits) and 0.3 in limits
    kept = [(here.reward, here.multipliers_M[0]) for _, here in points if here.kept]
    assert len(kept) >= 12
    for (reward, multiplier), (looser, less) in itertools.pairwise(kept):
        assert looser >= reward - 1e-4 and less <= multiplier + 1e-3
    at = dict(points)[0.3]
    np.testing.assert_allclose(at.multipliers_M, solve(ref).multipliers_M, rtol=1e-3)
    assert kept[-1][1] == pytest.approx(0.0, abs=1e-6)


# The small world


def every_answer(world: SmallWorld) -> tuple[list[str], list[list[float]], list[list[float]]]:
    """Train prompts, and rewards and violations of their answers with 0 to 3 dangerous steps, all equally likely."""
    texts, rewards, costs = [], [], []
    for prompt in world.prompts("train"):
        safe, bad = world.facts[prompt.topic]
        answers = [" ".join([*bad[:steps], *safe[steps:]]) for steps in range(len(bad) + 1)]
        texts.append(prompt.text)
        rewards.append([world.reward(prompt.text, answer) for answer in answers])
        costs.append([float(world.cost(prompt.text, answer) > 0) for answer in answers])
    return texts, rewards, costs


def test_against_the_optimum_of_the_small_world() -> None:
    """As the KL's weight falls, reward and multiplier become the optimum and its slope in the limit."""
    world = SmallWorld(seed=5, train_prompts=320)
    texts, rewards, costs = every_answer(world)
    best = world.optimum(texts, violation_rates={"harm": 0.1})
    slope = (
        world.optimum(texts, violation_rates={"harm": 0.101}) - world.optimum(texts, violation_rates={"harm": 0.099})
    ) / 0.002
    assert 1.5 < slope < 6.5  # three dangerous steps of a topic whose gain is 0.6 to 2
    rest = solve(reference(rewards, [costs], [0.1], kl_coefficient=0.003))
    assert rest.kept and rest.reward == pytest.approx(best, rel=5e-3)
    assert rest.multipliers_M[0] == pytest.approx(slope, rel=5e-2)
    # With the recipe's weight the KL takes its share, and the multiplier stays of that size.
    recipe = solve(reference(rewards, [costs], [0.1], kl_coefficient=0.1))
    assert recipe.kept and 0.8 * best < recipe.reward < best
    assert slope / 2 < recipe.multipliers_M[0] < 2 * slope
