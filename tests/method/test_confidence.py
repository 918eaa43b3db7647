"""How far below its bound a mean must be seen: by hand, and how often the bound then really holds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from beaver_ray.method.calibration import Calibration
from beaver_ray.method.confidence import safety_margin


def test_by_hand():
    # Student's t of 0.9 with 3 degrees of freedom is 1.638 in printed tables; costs 0, 0, 0, 4 have std 2.
    costs, prompts = np.array([0.0, 0.0, 0.0, 4.0]), np.arange(4)
    assert safety_margin(costs, prompts, 0.9) == pytest.approx(1.638 * 2 / 2, abs=1e-3)
    # With 9 degrees of freedom it is 1.383.
    calibration = Calibration(1.0, 0.0, 10, 1.0, 1.0, 0.0, residual_std=0.3)
    more = safety_margin(costs, prompts, 0.9, calibration)
    assert more == pytest.approx(1.638 + 1.383 * 0.3 / math.sqrt(10), abs=1e-3)
    # Two answers to each of four prompts, alike: as of one answer to each.
    assert safety_margin(np.repeat(costs, 2), np.repeat(prompts, 2), 0.9) == pytest.approx(1.638, abs=1e-3)


def test_of_one_prompt_nothing_is_known():
    assert safety_margin(np.array([0.2]), np.array([7]), 0.9) == math.inf
    assert safety_margin(np.array([0.2, 0.3, 0.1]), np.array([7, 7, 7]), 0.9) == math.inf


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_the_mean_is_within_the_bound_as_often_as_it_says(confidence, shared):
    """Three answers to each of 30 prompts, of whose variance the prompt has the ``shared`` part."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(30), 3)
    of_prompts = math.sqrt(shared) * rng.normal(0, 1.0, (4000, 30)).repeat(3, axis=1)
    costs = 0.3 + of_prompts + math.sqrt(1 - shared) * rng.normal(0, 1.0, (4000, 90))
    held = [row.mean() + safety_margin(row, prompts, confidence) >= 0.3 for row in costs]
    assert np.mean(held) == pytest.approx(confidence, abs=0.02)
