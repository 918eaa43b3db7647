"""Statements from constructed answers, each compared with a literal loop over prompts and answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from beaver_ray.bounds import clopper_pearson, hoeffding
from beaver_ray.certificate import Judged, certify, jointly
from beaver_ray.verdicts import Statement


def judged(costs_NK: np.ndarray, **changes: object) -> Judged:
    settings = {"constraint": "harm", "target": 0.3, "unsafe_above": 0.0, "judged_by": "the test", "between": True}
    return Judged(costs_NK=costs_NK, **{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture
def answers() -> tuple[np.ndarray, np.ndarray]:
    """Costs and rewards [120, 4]; a tenth of the rewards are ties."""
    rng = np.random.default_rng(5)
    return rng.normal(-0.8, 1.0, (120, 4)), rng.integers(0, 10, (120, 4)).astype(float)


def test_one_best_and_worst_of_several_answers(answers: tuple[np.ndarray, np.ndarray]) -> None:
    costs, rewards = answers
    counts = {"one": 0, "best of 4": 0, "worst of 4": 0}
    for row in range(120):
        unsafe = [costs[row, k] > 0 for k in range(4)]
        best = 0
        for k in range(1, 4):
            best = k if rewards[row, k] > rewards[row, best] else best
        counts["one"] += unsafe[0]
        counts["best of 4"] += unsafe[best]
        counts["worst of 4"] += any(unsafe)
    found = {s.answers: s for s in certify(judged(costs), rewards, 0.95)}
    assert len(set(counts.values())) == 3 and found.keys() == counts.keys()
    for name, hits in counts.items():
        statement = found[name]
        upper = stats.binomtest(hits, 120, alternative="less").proportion_ci(0.95, method="exact").high
        lower = stats.binomtest(hits, 120, alternative="greater").proportion_ci(0.95, method="exact").low
        assert (statement.mean, statement.prompts) == (pytest.approx(hits / 120), 120)
        assert (statement.lower, statement.upper) == pytest.approx((lower, upper), abs=1e-10)
        assert statement.verdict == ("holds" if upper <= 0.3 else "fails" if lower > 0.3 else "undecided")
        assert statement.figure == "share unsafe" and statement.bound == "Clopper-Pearson"
    assert found["worst of 4"].verdict == "fails"


def test_one_answer_is_the_first_whatever_the_others_are(answers: tuple[np.ndarray, np.ndarray]) -> None:
    costs, rewards = answers
    alone = certify(judged(costs[:, :1]), rewards[:, :1], 0.9)
    assert [s.answers for s in alone] == ["one"]
    assert certify(judged(costs), rewards, 0.9)[0] == alone[0]


def test_calibrated_probabilities_are_bounded_by_share_and_by_mean() -> None:
    """All answers just below one half: none is called unsafe, and their mean is far above the target."""
    costs = np.full((200, 2), 0.4)
    found = certify(judged(costs, unsafe_above=0.5, probabilities=True), costs, 0.95)
    assert [(s.answers, s.figure, s.verdict) for s in found] == [
        ("one", "share unsafe", "holds"),
        ("one", "mean probability", "fails"),
        ("best of 2", "share unsafe", "holds"),
        ("worst of 2", "share unsafe", "holds"),
    ]
    assert found[1].mean == pytest.approx(0.4) and found[1].bound == "Hoeffding" and found[1].unsafe_above is None
    assert (found[1].lower, found[1].upper) == hoeffding(found[1].mean, 200, 0.95)


def test_mean_costs_are_bounded_as_they_are_seen() -> None:
    coins = np.array([[0.0, 1.0]] * 90 + [[1.0, 0.0]] * 10)
    rewards = np.zeros_like(coins)
    one, best, worst = certify(judged(coins, target=0.2, unsafe_above=None), rewards, 0.95)
    assert [s.bound for s in (one, best, worst)] == ["Clopper-Pearson"] * 3
    assert (one.mean, best.mean, worst.mean) == (0.1, 0.1, 1.0) and one.figure == "mean cost"
    assert (one.lower, one.upper) == clopper_pearson(0.1, 100, 0.95) and one.verdict == "holds"

    # One answer between 0 and 1, though it is not the first to its prompt, and coins are no longer what is known of.
    between = coins.copy()
    between[3, 1] = 0.5
    one = certify(judged(between, target=0.2, unsafe_above=None), rewards, 0.95)[0]
    assert one.bound == "Hoeffding" and (one.lower, one.upper) == hoeffding(0.1, 100, 0.95)

    beyond = coins.copy()
    beyond[3, 1] = -0.01
    one = certify(judged(beyond, target=0.2, unsafe_above=None), rewards, 0.95)[0]
    assert (one.bound, one.lower, one.upper, one.verdict) == (None, None, None, "not certified")


def test_a_score_without_bounds_is_not_certified_whatever_was_seen() -> None:
    scores = np.linspace(0.05, 0.3, 100)[:, None]
    for costs in (scores, np.round(scores)):
        bounded = certify(judged(costs, target=0.5, unsafe_above=None), costs, 0.95)[0]
        free = certify(judged(costs, target=0.5, unsafe_above=None, between=False), costs, 0.95)[0]
        assert (bounded.verdict, free.verdict, free.bound) == ("holds", "not certified", None)
        assert free.mean == bounded.mean


def shares(rates: dict[str, float]) -> list[Statement]:
    """A statement about 100 prompts for each share, each to be at most 0.1."""
    found = []
    for name, rate in rates.items():
        costs = np.where(np.arange(100) < round(100 * rate), 1.0, -1.0)[:, None]
        found += certify(judged(costs, constraint=name, target=0.1), costs, 0.95)
    return found


def test_jointly_each_is_shown_at_a_higher_confidence() -> None:
    # 4 of 100: upper bound 0.0892 at 0.95, 0.0993 at 0.975, 0.1057 at 1 - 0.05 / 3.
    assert stats.binomtest(4, 100, alternative="less").proportion_ci(0.975, method="exact").high < 0.1
    assert stats.binomtest(4, 100, alternative="less").proportion_ci(1 - 0.05 / 3, method="exact").high > 0.1
    assert jointly(shares({"a": 0.04}), 0.95) is None
    two, three = jointly(shares({"a": 0.04, "b": 0.04}), 0.95), jointly(shares(dict.fromkeys("abc", 0.04)), 0.95)
    assert two is not None and (two.each_at, two.verdict) == (pytest.approx(0.975), "holds")
    assert three is not None and (three.each_at, three.verdict) == (pytest.approx(1 - 0.05 / 3), "undecided")
    worst = jointly(shares({"a": 0.0, "b": 0.3, "c": 0.09}), 0.95)
    assert worst is not None and worst.verdict == "fails"


def test_jointly_counts_one_answer_and_what_has_bounds() -> None:
    costs = np.where(np.arange(100) < 4, 1.0, -1.0)[:, None]
    several = certify(judged(np.tile(costs, 2), target=0.1), np.tile(costs, 2), 0.95)
    free = certify(judged(costs - 1, constraint="free", unsafe_above=None), costs, 0.95)
    assert jointly([*several, *free], 0.95) is None
    both = jointly([*several, *shares({"b": 0.0})], 0.95)
    assert both is not None and both.each_at == pytest.approx(0.975)
