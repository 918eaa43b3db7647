"""How far below its bound a mean must be seen: by hand, and how often the bound then really holds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from beaver_ray.method.calibration import Calibration
from beaver_ray.method.confidence import safety_margin


def test_by_hand():
    # Student's t of 0.9 with 3 degrees of freedom is 1.638 in printed tables; costs 0, 0, 0, 4 have std 2.
    assert safety_margin(np.array([0.0, 0.0, 0.0, 4.0]), 0.9) == pytest.approx(1.638 * 2 / 2, abs=1e-3)
    # With 9 degrees of freedom it is 1.383.
    calibration = Calibration(1.0, 0.0, 10, 1.0, 1.0, 0.0, residual_std=0.3)
    more = safety_margin(np.array([0.0, 0.0, 0.0, 4.0]), 0.9, calibration)
    assert more == pytest.approx(1.638 + 1.383 * 0.3 / math.sqrt(10), abs=1e-3)


def test_of_one_answer_nothing_is_known():
    assert safety_margin(np.array([0.2]), 0.9) == math.inf


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_mean_is_within_the_bound_as_often_as_it_says(confidence):
    rng = np.random.default_rng(0)
    means = rng.normal(0.3, 1.0, (4000, 30))
    held = [row.mean() + safety_margin(row, confidence) >= 0.3 for row in means]
    assert np.mean(held) == pytest.approx(confidence, abs=0.02)
