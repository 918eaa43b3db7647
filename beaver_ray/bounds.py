"""One-sided bounds of a share or a mean from independent prompts, and what they say of a limit.

A bound at confidence c is wrong with probability 1 - c at most, whatever the truth is and however few prompts there
are. The lower and the upper one hold each by itself at that confidence, not both at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from scipy import optimize, special, stats

MOST_PROMPTS = 10_000_000
"""Sets that are larger are not asked for."""

Verdict = Literal["holds", "fails", "undecided"]
Bounds = Callable[[float, float, float], tuple[float, float]]
"""(mean of what was seen, number of prompts, confidence) -> (lower, upper)."""


def clopper_pearson(rate: float, n: float, confidence: float) -> tuple[float, float]:
    """Exact one-sided bounds of a probability, where a share ``rate`` of ``n`` independent trials was true.

    Clopper and Pearson 1934, as quantiles of beta distributions; these know what lies between whole numbers too.
    """
    hits = rate * n
    lower = float(stats.beta.ppf(1 - confidence, hits, n - hits + 1)) if rate > 0 else 0.0
    upper = float(stats.beta.ppf(confidence, hits + 1, n - hits)) if rate < 1 else 1.0
    return lower, upper


def hoeffding(mean: float, n: float, confidence: float) -> tuple[float, float]:
    """One-sided bounds of the mean of numbers from 0 to 1, where ``n`` independent ones had this ``mean``.

    The means m at which n * KL(mean || m) = -log(1 - confidence), KL of two Bernoulli distributions: Hoeffding 1963
    (https://doi.org/10.1080/01621459.1963.10500830), theorem 1, equation 2.1, before it is made simpler and wider.
    """
    return 1.0 - _hoeffding_upper(1.0 - mean, n, confidence), _hoeffding_upper(mean, n, confidence)


def _hoeffding_upper(mean: float, n: float, confidence: float) -> float:
    if mean >= 1.0:
        return 1.0
    room = -math.log(1 - confidence) / n

    def missing(bound: float) -> float:
        return float(special.rel_entr(mean, bound) + special.rel_entr(1 - mean, 1 - bound)) - room

    end = float(np.nextafter(1.0, 0.0))
    return float(optimize.brentq(missing, mean, end, xtol=1e-14)) if missing(end) > 0 else 1.0


def verdict(bounds: Bounds, mean: float, n: float, target: float, confidence: float) -> Verdict:
    """``holds`` where the upper bound is at or below ``target``, ``fails`` where the lower one is above it."""
    lower, upper = bounds(mean, n, confidence)
    return "holds" if upper <= target else "fails" if lower > target else "undecided"


def prompts_to_decide(bounds: Bounds, mean: float, target: float, confidence: float) -> int | None:
    """The fewest prompts that would not leave it undecided, if ``mean`` was seen on them; None above MOST_PROMPTS.

    With a mean of 0 these are the fewest that can show anything: a smaller set holds nothing, whatever is seen.
    """

    def decides(n: int) -> bool:
        return verdict(bounds, mean, n, target, confidence) != "undecided"

    if mean == target or not decides(MOST_PROMPTS):
        return None
    too_few, enough = 0, MOST_PROMPTS
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if decides(middle) else (middle, enough)
    return enough
