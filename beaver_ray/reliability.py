"""Calibrated probabilities against labels of the same answers: does the calibration still fit?

A calibration is fitted on labelled answers of other models. A policy under training moves away from these, and to
where the cost model errs in its favour; the limit on the mean probability then bounds something else.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from beaver_ray.evaluation import share_interval
from beaver_ray.method.calibration import ECE_BINS, bin_numbers, expected_calibration_error
from beaver_ray.method.confidence import cluster_sums
from beaver_ray.verdicts import Bin, Calibrated

UPPER = 0.995  # the quantile at which the interval of the observed share ends
ROUNDING = 1e-12  # the square of a difference that is none
FALSE_ALARMS = 0.01
"""How often a calibration that fits may be called otherwise: half of it by all answers, half by any of the bins."""


def compare(probability_N: np.ndarray, unsafe_N: np.ndarray, prompt_N: np.ndarray) -> Calibrated:
    """Probabilities [N] against labels [N] (bool); answers to one prompt share its number in ``prompt_N``.

    The calibration fits as long as the share that is unsafe is one that such probabilities lead to, of all answers and
    of those in each bin (`expected_share`): so that too low here and too high there does not fit either. A calibration
    that fits is called otherwise in at most one comparison of a hundred.
    """
    probability_N = np.asarray(probability_N, dtype=np.float64)
    share = share_interval(unsafe_N, prompt_N, UPPER)
    bins_N = bin_numbers(probability_N)
    numbers = np.unique(bins_N).tolist()
    residuals_N, bins = unsafe_N - probability_N, []
    for number in numbers:
        here, outside = bins_N == number, FALSE_ALARMS / 2 / len(numbers)
        effect = design_effect(residuals_N[here], prompt_N[here], outside)
        expected = expected_share(probability_N[here], effect, outside)
        bins.append(
            Bin(
                low=number / ECE_BINS,
                count=int(here.sum()),
                predicted=float(probability_N[here].mean()),
                observed=float(unsafe_N[here].mean()),
                expected_low=expected[0],
                expected_high=expected[1],
            )
        )
    effect = design_effect(residuals_N, prompt_N, FALSE_ALARMS / 2)
    low, high = expected_share(probability_N, effect, FALSE_ALARMS / 2)
    return Calibrated(
        answers=len(probability_N),
        predicted=float(probability_N.mean()),
        observed=share["mean"],
        low=share["low"],
        high=share["high"],
        expected_low=low,
        expected_high=high,
        ece=expected_calibration_error(probability_N, unsafe_N),
        bins=bins,
    )


def expected_share(probability_N: np.ndarray, effect: float, outside: float) -> tuple[float, float]:
    """Between which shares of N answers are unsafe where each is with its own probability, but for ``outside``.

    Quantiles of the sum of independent events (Poisson's binomial distribution), drawn out from its mean by the root of
    the design ``effect``.
    """
    if math.isinf(effect):
        return 0.0, 1.0
    n, mean, chances = len(probability_N), float(probability_N.mean()), np.cumsum(chances_of_sums(probability_N))
    ends = [float(np.searchsorted(chances, tail)) / n for tail in (outside / 2, 1.0 - outside / 2)]
    low, high = (mean + (end - mean) * math.sqrt(effect) for end in ends)
    return min(max(low, 0.0), mean), max(min(high, 1.0), mean)


def chances_of_sums(probability_N: np.ndarray) -> np.ndarray:
    """The probabilities of 0, 1, ..., N events of these, which are independent: the product of their polynomials."""
    rows = np.stack([1.0 - probability_N, probability_N], axis=1)
    while len(rows) > 1:
        if len(rows) % 2:
            rows = np.vstack([rows, np.eye(1, rows.shape[1])])  # an event that never is
        size = 2 * rows.shape[1] - 1
        rows = np.fft.irfft(np.fft.rfft(rows[::2], size) * np.fft.rfft(rows[1::2], size), size)
    found: np.ndarray = np.clip(rows[0, : len(probability_N) + 1], 0.0, 1.0)
    return found


def design_effect(residuals_N: np.ndarray, prompt_N: np.ndarray, outside: float) -> float:
    """How many times as much the mean of these residuals may vary as if answers to one prompt had nothing in common; at
    least 1, and more where few prompts say so, as Student's t is wider than the normal distribution.

    At most as if answers to one prompt were all alike. Infinite for several answers to a single prompt, of which
    nothing is known.
    """
    prompts = len(np.unique(prompt_N))
    if prompts == 1 < len(prompt_N):
        return math.inf
    alike = float(np.sum(cluster_sums(np.ones(len(prompt_N)), prompt_N) ** 2)) / len(prompt_N)
    centred_N = residuals_N - residuals_N.mean()
    alone, together = float(np.sum(centred_N**2)), float(np.sum(cluster_sums(centred_N, prompt_N) ** 2))
    if prompts == len(prompt_N) or alone < ROUNDING * len(prompt_N):
        return alike
    wider = float(stats.t.isf(outside / 2, prompts - 1) / stats.norm.isf(outside / 2)) ** 2
    return min(max(1.0, prompts / (prompts - 1) * together / alone * wider), alike)
