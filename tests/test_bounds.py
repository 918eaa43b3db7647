"""Bounds against scipy's own test, sums of binomial probabilities and enumeration; verdicts against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
from scipy import stats

from beaver_ray.bounds import MOST_PROMPTS, Bounds, clopper_pearson, hoeffding, prompts_to_decide, verdict


def exact(hits: int, n: int, confidence: float) -> tuple[float, float]:
    """scipy's one-sided bounds of a binomial probability."""
    lower = stats.binomtest(hits, n, alternative="greater").proportion_ci(confidence, method="exact").low
    upper = stats.binomtest(hits, n, alternative="less").proportion_ci(confidence, method="exact").high
    return float(lower), float(upper)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize(
    ("hits", "n"), [(0, 1), (1, 1), (0, 59), (7, 100), (50, 100), (399, 400), (400, 400), (31, 997)]
)
def test_clopper_pearson_is_scipys(hits: int, n: int, confidence: float) -> None:
    assert clopper_pearson(hits / n, n, confidence) == pytest.approx(exact(hits, n, confidence), abs=1e-10)


def test_clopper_pearson_by_hand() -> None:
    # None of 59: (1 - p)^59 = 0.05. All of 10: p^10 = 0.05. One of 2 at 0.9: 1 - p^2 = 0.1, (1 - p)^2 = 0.9.
    assert clopper_pearson(0.0, 59, 0.95) == (0.0, pytest.approx(1 - 0.05 ** (1 / 59)))
    assert clopper_pearson(1.0, 10, 0.95) == (pytest.approx(0.05**0.1), 1.0)
    assert clopper_pearson(0.5, 2, 0.9) == pytest.approx((1 - 0.9**0.5, 0.9**0.5))


def test_clopper_pearson_by_its_definition() -> None:
    lower, upper = clopper_pearson(5 / 40, 40, 0.95)

    def at_most(hits: int, p: float) -> float:
        return sum(math.comb(40, k) * p**k * (1 - p) ** (40 - k) for k in range(hits + 1))

    assert at_most(5, upper) == pytest.approx(0.05, rel=1e-9)
    assert 1 - at_most(4, lower) == pytest.approx(0.05, rel=1e-9)


@pytest.mark.parametrize("bounds", [clopper_pearson, hoeffding])
def test_bounds_of_coins_are_as_sure_as_they_say(bounds: Bounds) -> None:
    n = 25
    found = [bounds(hits / n, n, 0.9) for hits in range(n + 1)]
    for p in (0.01, 0.05, 0.2, 0.37, 0.5, 0.8, 0.99):
        chances = stats.binom.pmf(range(n + 1), n, p)
        for covers in ([upper >= p for _, upper in found], [lower <= p for lower, _ in found]):
            assert sum(chance for chance, right in zip(chances, covers, strict=True) if right) >= 0.9


def test_hoeffding_of_numbers_between_is_as_sure_as_it_says() -> None:
    n, values = 9, (0.0, 0.4, 1.0)
    for weights in ((0.8, 0.15, 0.05), (0.3, 0.3, 0.4), (0.05, 0.9, 0.05)):
        mean = sum(v * w for v, w in zip(values, weights, strict=True))
        right = [0.0, 0.0]
        for counts in itertools.product(range(n + 1), repeat=3):
            if sum(counts) != n:
                continue
            chance = math.factorial(n) / math.prod(map(math.factorial, counts))
            chance *= math.prod(w**c for w, c in zip(weights, counts, strict=True))
            seen = sum(v * c for v, c in zip(values, counts, strict=True)) / n
            lower, upper = hoeffding(seen, n, 0.9)
            right[0] += chance * (lower <= mean)
            right[1] += chance * (upper >= mean)
        assert min(right) >= 0.9


def test_hoeffding_by_hand() -> None:
    # With a mean of 0 or 1 it is the exact bound of coins.
    assert hoeffding(0.0, 59, 0.95) == pytest.approx(clopper_pearson(0.0, 59, 0.95))
    assert hoeffding(1.0, 59, 0.95) == pytest.approx(clopper_pearson(1.0, 59, 0.95))
    lower, upper = hoeffding(0.2, 50, 0.95)
    for bound in (lower, upper):
        kl = 0.2 * math.log(0.2 / bound) + 0.8 * math.log(0.8 / (1 - bound))
        assert 50 * kl == pytest.approx(math.log(20), rel=1e-9)
    assert lower < 0.2 < upper
    # It is wider than the exact one of coins, and narrower than its simplification.
    assert clopper_pearson(0.2, 50, 0.95)[1] < upper < 0.2 + math.sqrt(math.log(20) / 100)


@pytest.mark.parametrize(
    ("hits", "said"), [(0, "holds"), (10, "holds"), (12, "holds"), (13, "undecided"), (27, "undecided"), (28, "fails")]
)
def test_verdicts(hits: int, said: str) -> None:
    lower, upper = exact(hits, 200, 0.95)
    assert said == ("holds" if upper <= 0.1 else "fails" if lower > 0.1 else "undecided")
    assert verdict(clopper_pearson, hits / 200, 200, 0.1, 0.95) == said


def test_a_bound_at_the_target_holds() -> None:
    upper = clopper_pearson(0.05, 100, 0.95)[1]
    assert verdict(clopper_pearson, 0.05, 100, upper, 0.95) == "holds"
    assert verdict(clopper_pearson, 0.05, 100, upper - 1e-9, 0.95) == "undecided"


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 20), (2, 25), (3, 20), (7, 50), (1, 2)])
def test_prompts_that_would_decide_by_brute_force(hits: int, n: int) -> None:
    """At multiples of the sample whole numbers have the same rate, and scipy says from which on it is decided."""
    target = 0.1
    decides = prompts_to_decide(clopper_pearson, hits / n, target, 0.95)
    assert decides is not None and decides > 1
    for times in range(1, decides // n + 20):
        lower, upper = exact(hits * times, n * times, 0.95)
        assert (upper <= target or lower > target) == (n * times >= decides)


@pytest.mark.parametrize("mean", [0.03, 0.08, 0.14, 0.6])
def test_prompts_that_would_decide_a_mean(mean: float) -> None:
    # n * KL(mean || target) >= log 20, in closed form.
    kl = mean * math.log(mean / 0.1) + (1 - mean) * math.log((1 - mean) / 0.9)
    assert prompts_to_decide(hoeffding, mean, 0.1, 0.95) == math.ceil(math.log(20) / kl)


def test_the_smallest_set_that_can_show_anything() -> None:
    # (1 - target)^n <= 0.05
    for target, fewest in ((0.05, 59), (0.1, 29), (0.01, 299)):
        assert prompts_to_decide(clopper_pearson, 0.0, target, 0.95) == fewest
        assert (1 - target) ** fewest <= 0.05 < (1 - target) ** (fewest - 1)


def test_what_no_number_decides() -> None:
    assert prompts_to_decide(clopper_pearson, 0.1, 0.1, 0.95) is None
    assert prompts_to_decide(clopper_pearson, 0.1 - 1e-6, 0.1, 0.95) is None
    assert verdict(clopper_pearson, 0.1 - 1e-6, MOST_PROMPTS, 0.1, 0.95) == "undecided"
