"""A power law through a learning curve: figure(n) = floor + scale n^-exponent, n rows of training data.

Held-out errors of deep networks fall so over orders of magnitude (Hestness et al. 2017, arXiv 1712.00409); floor is
what no amount of data takes away. For a given exponent both others are linear least squares, so the exponent alone is
searched, on a grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

EXPONENTS_G: Floats = np.geomspace(0.02, 4.0, 1500)
"""Neighbours differ by 0.4 %. Curves of many sizes in the literature have exponents from 0.05 to 0.5."""
SIZES = 4
"""Fewer different sizes say nothing of three parameters."""
REFITS = 1000


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} (95 %: {self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True)
class PowerLaw:
    """The least squares through the figures of runs, and what further samples of their scatter would have given."""

    floor: Estimate
    exponent: Estimate
    doubled: Estimate
    """The figure with twice as many rows as the largest run has."""
    curve: Floats
    """The fit itself (floor, scale / unit^-exponent, exponent, unit), for `at`."""

    @property
    def determined(self) -> bool:
        """Whether the interval of the exponent ends inside of what was searched."""
        return bool(EXPONENTS_G[0] < self.exponent.low and self.exponent.high < EXPONENTS_G[-1])

    def at(self, rows: Floats) -> Floats:
        """The fitted figure with so many rows."""
        floor, scale, exponent, unit = self.curve
        return np.asarray(floor + scale * (rows / unit) ** -exponent)

    def in_words(self) -> str:
        """One line."""
        if not self.determined:
            return f"no power law is determined by these runs (exponent {self.exponent}): take more sizes, or seeds"
        return f"exponent {self.exponent}, floor {self.floor}, with twice the rows {self.doubled}"


def fit_power_law(rows_N: Floats, figures_N: Floats) -> PowerLaw | None:
    """The power law through N runs; None of fewer than `SIZES` different sizes or five runs.

    Intervals are percentiles of refits to resampled residuals, which are widened by sqrt(N / (N - 3)) for the three
    parameters. They take the scatter of all runs to be alike and independent: that of seeds, not of the held-out rows
    that all runs share.
    """
    rows_N, figures_N = np.asarray(rows_N, dtype=np.float64), np.asarray(figures_N, dtype=np.float64)
    count = len(rows_N)
    if len(np.unique(rows_N)) < SIZES or count < 5:
        return None
    unit = float(np.exp(np.log(rows_N).mean()))
    powers_GN = (rows_N / unit) ** -EXPONENTS_G[:, None]
    ((floor, scale, exponent),) = _fit(powers_GN, figures_N[None])
    fitted_N = floor + scale * (rows_N / unit) ** -exponent
    residuals_N = (figures_N - fitted_N) * np.sqrt(count / (count - 3))
    drawn_SN = np.random.default_rng(0).choice(residuals_N, size=(REFITS, count))
    refits_SP = _fit(powers_GN, fitted_N + drawn_SN)
    further = 2 * rows_N.max() / unit
    doubled_S = refits_SP[:, 0] + refits_SP[:, 1] * further ** -refits_SP[:, 2]
    return PowerLaw(
        floor=_estimate(floor, refits_SP[:, 0]),
        exponent=_estimate(exponent, refits_SP[:, 2]),
        doubled=_estimate(floor + scale * further**-exponent, doubled_S),
        curve=np.array([floor, scale, exponent, unit]),
    )


def _fit(powers_GN: Floats, figures_SN: Floats) -> Floats:
    """(floor, scale, exponent) [S, 3] of the least squares through each of S sets of figures."""
    means_G, means_S = powers_GN.mean(1), figures_SN.mean(1)
    around_GN, around_SN = powers_GN - means_G[:, None], figures_SN - means_S[:, None]
    together_SG = around_SN @ around_GN.T
    squares_G = (around_GN**2).sum(1)
    # What a line through the powers takes off the sum of squares is together^2 / squares.
    best_S = np.argmax(together_SG**2 / squares_G, axis=1)
    scale_S = together_SG[np.arange(len(figures_SN)), best_S] / squares_G[best_S]
    return np.stack([means_S - scale_S * means_G[best_S], scale_S, EXPONENTS_G[best_S]], axis=1)


def _estimate(value: float, refits_S: Floats) -> Estimate:
    low, high = np.quantile(refits_S, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))
