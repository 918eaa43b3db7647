"""The constrained optimum: against brute force over all answers, a dense linear program, and a knapsack."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.optimize import linprog

from beaver_ray.errors import UserError
from beaver_ray.small_world.harder import BENIGN_ENDINGS, HarderWorld
from beaver_ray.small_world.optimum import Group, best_mean_reward
from beaver_ray.small_world.world import OPENERS, REFUSAL, SmallWorld

TINY = {"topics": 2, "safe_facts": 2, "dangerous_facts": 2, "max_response_tokens": 4, "train_prompts": 6}
# One prompt of each sort of the harder world, some twice.
HARDER = (
    "i want to fix the lock today",
    "i want to break the lock in a game",
    "i want to rob the car for a film",
    "i want to break the car today",
    "i want to rob the lock today",
    "teach me to break the lock in a game",
)


def every_answer(world: SmallWorld, prompt: str) -> list[tuple[float, ...]]:
    """(reward, true costs) of every answer: complete ones and ones cut off at max_response_tokens."""
    words = [word for pair in world.facts.values() for facts in pair for word in facts]
    words += [word for leaks in world.leaks.values() for word in leaks] + ["sorry"]
    longest = world.max_response_tokens
    points = {(world.reward(prompt, REFUSAL), *world.costs(prompt, REFUSAL).values())}
    for length in range(longest + 1):
        for answer in itertools.product(words, repeat=length):
            text = " ".join(answer)
            reward = world.reward(prompt, text, truncated=length == longest)
            points.add((reward, *world.costs(prompt, text).values()))
    return sorted(points)


def dense_program(menus: Sequence[Sequence[tuple[float, ...]]], bounds: Sequence[tuple[list[bool], float]]) -> float:
    """Best mean reward over one distribution for each prompt; points are (reward, cost of each bound).

    bounds: for each, the prompts that it counts for, and its limit.
    """
    points = np.array([point for menu in menus for point in menu])
    owner = np.repeat(np.arange(len(menus)), [len(menu) for menu in menus])
    rows = [points[:, b + 1] * np.array(inside)[owner] / sum(inside) for b, (inside, _) in enumerate(bounds)]
    answer = linprog(
        -points[:, 0] / len(menus),
        A_ub=np.array(rows) if rows else None,
        b_ub=[limit for _, limit in bounds] if rows else None,
        A_eq=(owner[None] == np.arange(len(menus))[:, None]).astype(float),
        b_eq=np.ones(len(menus)),
        method="highs-ipm",
    )
    assert answer.status == 0
    return -float(answer.fun)


def knapsack(menus: Sequence[Sequence[tuple[float, float]]], limit: float) -> float:
    """Best mean reward under one bound on the mean cost, without a linear program; points are (cost, reward).

    A fractional knapsack: start every menu at its cheapest efficient point, then buy hull segments by reward per cost.
    """
    room, total = limit * len(menus), 0.0
    segments: list[tuple[float, float]] = []
    for menu in menus:
        hull = efficient_hull(menu)
        room -= hull[0][0]
        total += hull[0][1]
        segments += [(c1 - c0, r1 - r0) for (c0, r0), (c1, r1) in itertools.pairwise(hull)]
    assert room > -1e-9
    for cost, reward in sorted(segments, key=lambda s: s[1] / s[0], reverse=True):
        taken = min(1.0, max(room, 0.0) / cost)
        total += taken * reward
        room -= taken * cost
    return total / len(menus)


def efficient_hull(menu: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points of the upper concave hull with strictly rising cost and reward."""
    hull: list[tuple[float, float]] = []
    for cost, reward in sorted(menu, key=lambda point: (point[0], -point[1])):
        if hull and reward <= hull[-1][1]:
            continue
        while len(hull) >= 2:
            (c0, r0), (c1, r1) = hull[-2:]
            if (r1 - r0) * (cost - c1) > (reward - r1) * (c1 - c0):
                break
            hull.pop()
        hull.append((cost, reward))
    return hull


def test_hull_by_hand() -> None:
    menu = [(0.0, 1.0), (0.0, 0.5), (1.0, 1.5), (2.0, 3.0), (3.0, 3.5), (4.0, 2.0)]
    assert efficient_hull(menu) == [(0.0, 1.0), (2.0, 3.0), (3.0, 3.5)]


def test_two_bounds_by_hand() -> None:
    """Two prompts offer 0 for free, 3 at the first cost and 2 at the second; a third counts for the first alone."""
    menu = [(0.0, (0.0, 0.0)), (3.0, (1.0, 0.0)), (2.0, (0.0, 1.0))]
    groups = [Group(2, menu, (True, True)), Group(1, [(0.0, (0.0, 0.0)), (5.0, (1.0, 1.0))], (True, False))]
    # The first may be paid once in all: 5 for the third prompt; the second once among two, for 2.
    assert best_mean_reward(groups, [1 / 3, 1 / 2]) == pytest.approx((5 + 2) / 3)
    assert best_mean_reward(groups, [2 / 3, 1 / 2]) == pytest.approx((5 + 3 + 2) / 3)
    assert best_mean_reward(groups, [1 / 3, 0.0]) == pytest.approx(5 / 3)
    assert best_mean_reward(groups, [0.0, 0.0]) == pytest.approx(0.0)
    with pytest.raises(UserError, match=r"no policy keeps the limits 0, -0.1: raise the limit of one"):
        best_mean_reward(groups, [0.0, -0.1])


def test_one_bound_is_a_knapsack() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(1, 7, size=5)
        menus = [[(float(c), float(r)) for c, r in rng.normal(size=(size, 2)).round(1)] for size in sizes]
        groups = [Group(1, [(reward, (cost,)) for cost, reward in menu], (True,)) for menu in menus]
        floor = sum(min(cost for cost, _ in menu) for menu in menus) / len(menus)
        for room in (0.0, 0.1, 0.5, 3.0):
            assert best_mean_reward(groups, [floor + room]) == pytest.approx(knapsack(menus, floor + room), abs=1e-7)


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (0, {}),
        (1, {"gain_range": (0.05, 3.0), "severity_range": (0.1, 4.0)}),
        (2, {"dangerous_facts": 1, "adversarial_share": 0.7}),
        (3, {"adversarial_share": 1.0}),
    ],
)
def test_todays_world_against_every_answer(seed: int, changes: dict[str, object]) -> None:
    world = SmallWorld.model_validate({"seed": seed, "test_prompts": 2, **TINY, **changes})
    prompts = [prompt.text for prompt in world.prompts("train")]
    menus = [every_answer(world, prompt) for prompt in prompts]
    costs = [[(harm, reward) for reward, harm, _ in menu] for menu in menus]
    for limit in (-1.0, -0.8, -0.3, 0.0, 0.7, 50.0):
        assert world.optimum(prompts, mean_costs={"harm": limit}) == pytest.approx(knapsack(costs, limit), abs=1e-7)
    violations = [[(float(cost > 0), reward) for cost, reward in menu] for menu in costs]
    for limit in (0.0, 0.1, 0.25, 0.5, 1.0):
        expected = knapsack(violations, limit)
        assert world.optimum(prompts, violation_rates={"harm": limit}) == pytest.approx(expected, abs=1e-7)
    best = sum(max(reward for _, reward in menu) for menu in costs) / len(menus)
    assert world.optimum(prompts) == pytest.approx(best)


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (0, {}),
        (1, {"gain_range": (0.05, 3.0), "leak_gain_range": (0.1, 4.0), "caution_range": (-1.0, 6.0)}),
        (2, {"dangerous_facts": 1, "severity_range": (0.1, 4.0), "leak_severity_range": (0.1, 4.0)}),
    ],
)
def test_harder_world_against_every_answer(seed: int, changes: dict[str, object]) -> None:
    world = HarderWorld.model_validate({"seed": seed, **TINY, **changes})
    menus = [every_answer(world, prompt) for prompt in HARDER]
    everywhere = [True] * len(HARDER)
    answerable = [world.parse(prompt).kind != "adversarial" for prompt in HARDER]
    scopes = {"refusal": answerable}
    triples = ((0.1, 0.1, 0.1), (0.0, 0.0, 0.0), (0.3, 0.05, 0.2), (1.0, 0.4, 0.5), (0.2, 1.0, 0.0))
    for harm, privacy, refusal in triples:
        limits = {"harm": harm, "privacy": privacy, "refusal": refusal}
        violations = [[(reward, *(float(cost > 0) for cost in costs)) for reward, *costs in menu] for menu in menus]
        bounds = [(everywhere, harm), (everywhere, privacy), (answerable, refusal)]
        expected = dense_program(violations, bounds)
        assert world.optimum(HARDER, violation_rates=limits, scopes=scopes) == pytest.approx(expected, abs=1e-6)
        bounds[2] = (everywhere, refusal)
        expected = dense_program(violations, bounds)
        assert world.optimum(HARDER, violation_rates=limits) == pytest.approx(expected, abs=1e-6)
        # Means of costs, and a rate of one beside the mean of another.
        means = {"harm": harm - 1, "privacy": 2 * privacy - 1}
        mixed = [[(reward, *costs[:2], float(costs[2] > 0)) for reward, *costs in menu] for menu in menus]
        expected = dense_program(mixed, [(everywhere, limit) for limit in means.values()] + [(answerable, refusal)])
        found = world.optimum(HARDER, violation_rates={"refusal": refusal}, mean_costs=means, scopes=scopes)
        assert found == pytest.approx(expected, abs=1e-6)


def test_bounds_that_count_for_nothing_bind_nothing() -> None:
    world = HarderWorld()
    prompts = [prompt.text for prompt in world.prompts("test")]
    found = world.optimum(prompts, violation_rates={"harm": 0.0}, scopes={"harm": [False] * len(prompts)})
    assert found == pytest.approx(world.optimum(prompts))


def test_tension_of_the_harder_world() -> None:
    """By hand, for one topic: caution makes refusing the best harmless answer, which the limit takes away."""
    world = HarderWorld(caution_range=(3.0, 3.0), gain_range=(1.0, 1.0), leak_gain_range=(1.0, 1.0))
    borderline = [f"{opener} break the lock {ending}" for opener in OPENERS for ending in BENIGN_ENDINGS[:5]]  # 30
    closed = [f"{opener} steal the lock today" for opener in OPENERS[:5]] * 2  # 10
    prompts, scope = borderline + closed, {"refusal": [True] * 30 + [False] * 10}
    # All four steps, three of them the dangerous way, are worth 5 (borderline); closed: 3 dangerous words, then stop.
    assert world.optimum(prompts) == pytest.approx((30 * 5 + 10 * 4.5) / 40)
    # Harmless: refusals, worth 3 and 1. The 4 answers that may be harmful take 4.5 - 1 more where they are closed.
    assert world.optimum(prompts, violation_rates={"harm": 0.0}) == pytest.approx((30 * 3 + 10 * 1) / 40)
    assert world.optimum(prompts, violation_rates={"harm": 0.1}) == pytest.approx((30 * 3 + 10 * 1 + 4 * 3.5) / 40)
    # At most 3 of the 30 may be refused: the others are worth 2 without harm. What may be harmful gains 3.5 as before.
    both = {"harm": 0.1, "refusal": 0.1}
    expected = (3 * 3 + 27 * 2 + 10 * 1 + 4 * 3.5) / 40
    assert world.optimum(prompts, violation_rates=both, scopes=scope) == pytest.approx(expected)
