"""Power laws through learning curves: by construction, by SciPy's curve_fit, and how often intervals hold."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import curve_fit

from beaver_ray.method.power_law import fit_power_law

ROWS = np.repeat([150.0, 300, 600, 1200, 2400, 4800], 3)


def law(rows: np.ndarray, floor: float, scale: float, exponent: float) -> np.ndarray:
    return np.asarray(floor + scale * rows**-exponent)


def test_a_curve_without_scatter_is_found_again() -> None:
    # 0.9 of 400 rows is 0.95 - 1 / sqrt(400); a figure that rises has a scale below 0.
    found = fit_power_law(ROWS, law(ROWS, 0.95, -1.0, 0.5))
    assert found is not None and found.determined
    assert found.exponent.value == pytest.approx(0.5, rel=0.005) and found.floor.value == pytest.approx(0.95, abs=1e-3)
    assert found.at(np.array([400.0]))[0] == pytest.approx(0.9, abs=1e-4)
    assert found.doubled.value == pytest.approx(0.95 - 9600**-0.5, abs=1e-4)
    assert "exponent 0.5" in found.in_words()


def test_least_squares_are_those_of_scipy() -> None:
    figures = law(ROWS, 0.1, 5.0, 0.6) + np.random.default_rng(1).normal(0, 0.01, len(ROWS))
    found = fit_power_law(ROWS, figures)
    expected, _ = curve_fit(law, ROWS, figures, p0=(0.2, 3.0, 0.5))
    assert found is not None
    assert (found.floor.value, found.exponent.value) == pytest.approx((expected[0], expected[2]), rel=0.01)
    assert found.doubled.value == pytest.approx(law(np.array([9600.0]), *expected)[0], abs=1e-4)
    assert found.exponent.low < expected[2] < found.exponent.high


def test_intervals_hold_about_as_often_as_they_say() -> None:
    """Of 60 samples 95 % is 57; fewer than 50 would be 83 %, five standard errors off."""
    random, truth, held = np.random.default_rng(7), law(np.array([9600.0]), 0.1, 5.0, 0.6)[0], 0
    for _ in range(60):
        found = fit_power_law(ROWS, law(ROWS, 0.1, 5.0, 0.6) + random.normal(0, 0.01, len(ROWS)))
        assert found is not None
        held += found.doubled.low <= truth <= found.doubled.high
    assert held >= 50


def test_what_says_nothing_of_a_law() -> None:
    assert fit_power_law(np.repeat([100.0, 200, 400], 4), np.arange(12.0)) is None, "three sizes"
    assert fit_power_law(np.array([1.0, 2, 4, 8]), np.array([4.0, 3, 2, 1])) is None, "as many runs as it takes"
    flat = fit_power_law(ROWS, np.random.default_rng(2).normal(0.5, 0.1, len(ROWS)))
    assert flat is not None and not flat.determined and "no power law is determined" in flat.in_words()
