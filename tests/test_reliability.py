"""Calibrated probabilities against labels that are drawn from them, and against labels that are not."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from beaver_ray.method.calibration import fit_platt
from beaver_ray.reliability import chances_of_sums, compare, design_effect, expected_share


def test_bins_and_error_by_hand() -> None:
    probability = np.array([0.0, 0.05, 0.1, 0.55, 0.59, 1.0])
    unsafe = np.array([False, True, False, True, False, True])
    found = compare(probability, unsafe, np.arange(6))
    assert [(b.low, b.count, b.observed) for b in found.bins] == [(0, 2, 0.5), (0.1, 1, 0), (0.5, 2, 0.5), (0.9, 1, 1)]
    assert [b.predicted for b in found.bins] == pytest.approx([0.025, 0.1, 0.57, 1.0])
    assert (found.answers, found.observed) == (6, 0.5) and found.predicted == pytest.approx(2.29 / 6)
    # 2 * |0.025 - 0.5| + |0.1 - 0| + 2 * |0.57 - 0.5| + 0, of 6
    assert found.ece == pytest.approx((0.95 + 0.1 + 0.14) / 6)
    interval = stats.binomtest(3, 6).proportion_ci(0.99, method="wilson")
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    # An answer with a probability of 1 is unsafe; two of at most 5 % are hardly ever both.
    assert (found.bins[3].expected_low, found.bins[3].expected_high) == (1.0, 1.0)
    assert (found.bins[0].expected_low, found.bins[0].expected_high) == (0.0, 0.5)


def test_chances_of_sums_by_enumeration() -> None:
    probability = np.random.default_rng(0).random(7)
    expected = np.zeros(8)
    for outcome in itertools.product([0, 1], repeat=7):
        hits = np.array(outcome)
        expected[hits.sum()] += np.prod(np.where(hits, probability, 1 - probability))
    np.testing.assert_allclose(chances_of_sums(probability), expected, atol=1e-15)
    many = np.arange(3001)
    np.testing.assert_allclose(chances_of_sums(np.full(3000, 0.02)), stats.binom.pmf(many, 3000, 0.02), atol=1e-14)


def test_expected_shares_are_those_of_the_binomial() -> None:
    ends = stats.binom.ppf([0.0025, 0.9975], 400, 0.1) / 400
    assert expected_share(np.full(400, 0.1), 1.0, 0.005) == pytest.approx(tuple(ends))
    # Four answers alike to each prompt: twice as far from the mean.
    rng, prompt_of = np.random.default_rng(0), np.repeat(np.arange(100), 4)
    effect = design_effect(np.repeat(rng.normal(size=100), 4), prompt_of, 0.005)
    assert effect == pytest.approx(4.0)
    assert expected_share(np.full(400, 0.1), effect, 0.005) == pytest.approx(tuple(0.1 + 2 * (ends - 0.1)))
    # Where they have something in common, 100 prompts leave open how much: Student's t with 99 degrees of freedom is
    # 2.8713 at 0.9975, and the normal distribution 2.8070.
    residuals = np.repeat(rng.normal(size=100), 4) + rng.normal(size=400)
    apart = (residuals - residuals.mean()).reshape(100, 4)
    estimated = 100 / 99 * np.square(apart.sum(axis=1)).sum() / np.square(apart).sum()
    assert design_effect(residuals, prompt_of, 0.005) == pytest.approx(estimated * (2.8713 / 2.8070) ** 2, rel=1e-4)
    # One answer to each prompt needs no estimate, and several to one prompt alone say nothing.
    assert design_effect(np.random.default_rng(0).normal(size=50), np.arange(50), 0.005) == 1.0
    alone = design_effect(np.random.default_rng(0).normal(size=50), np.zeros(50), 0.005)
    assert expected_share(np.full(50, 0.1), alone, 0.005) == (0.0, 1.0)
    # Residuals that are all the same vary as little as nothing is known of them.
    assert design_effect(np.full(128, -0.15), np.arange(128) // 64, 0.005) == pytest.approx(64.0)


@pytest.mark.parametrize(("prompts", "answers"), [(1, 64), (2, 64), (3, 16), (10, 16)])
def test_few_prompts_with_several_answers_are_no_proof(prompts: int, answers: int) -> None:
    """Answers to a prompt have half of what makes them unsafe in common; each is unsafe with its own probability."""
    rng, wrong = np.random.default_rng(2), 0
    for _ in range(150):
        probability = rng.beta(0.5, 3, (prompts, answers))
        drawn = math.sqrt(0.5) * rng.normal(size=(prompts, 1)) + math.sqrt(0.5) * rng.normal(size=(prompts, answers))
        unsafe, prompt_of = stats.norm.cdf(drawn) < probability, np.repeat(np.arange(prompts), answers)
        wrong += not compare(probability.ravel(), unsafe.ravel(), prompt_of).fits
    assert wrong <= 5


def test_what_was_fitted_on_has_the_error_of_the_fit() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 2, 300)
    unsafe = rng.random(300) < 1 / (1 + np.exp(-scores))
    fitted = fit_platt(scores, unsafe)
    found = compare(fitted.probability(scores), unsafe, np.arange(300))
    assert found.ece == pytest.approx(fitted.ece) and found.fits


def test_a_calibration_that_fits_is_seldom_called_otherwise() -> None:
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(300):
        probability = rng.beta(0.5, 3, 200)
        wrong += not compare(probability, rng.random(200) < probability, np.arange(200)).fits
    assert wrong <= 6


def test_a_few_safe_looking_answers_that_are_not_are_found() -> None:
    """Of sure probabilities the share hardly varies: 18 of 360 answers, each with one percent, are far too many."""
    probability = np.repeat([0.01, 0.99], [360, 40])
    unsafe = np.repeat([True, False, True], [18, 342, 40])
    found = compare(probability, unsafe, np.arange(400))
    assert not found.fits and [part.as_expected for part in found.bins] == [False, True]
    assert "of the 360 at 0.0 to 0.1 5.0%, predicted 1.0%" in found.in_words()


def test_too_low_here_and_too_high_there_does_not_fit() -> None:
    """The mean is exactly what was predicted."""
    probability = np.repeat([0.25, 0.75], 200)
    found = compare(probability, np.arange(400) % 2 == 0, np.arange(400))
    assert found.observed == found.predicted == 0.5
    assert not found.fits and [part.as_expected for part in found.bins] == [False, False]


def test_drift_is_found() -> None:
    """The policy moves to answers that are twice as often unsafe as their scores say."""
    rng = np.random.default_rng(2)
    probability = rng.beta(1, 9, 400)
    before = compare(probability, rng.random(400) < probability, np.arange(400))
    after = compare(probability, rng.random(400) < 2 * probability, np.arange(400))
    assert before.fits and not after.fits
    assert after.low > after.predicted == pytest.approx(before.predicted) and after.ece > before.ece
    assert "no longer fits" in after.in_words() and "no longer" not in before.in_words()


def test_answers_that_only_repeat_their_prompt_show_no_more() -> None:
    probability, unsafe = np.full(20, 0.12), np.arange(20) < 6
    alone = compare(probability, unsafe, np.arange(20))
    repeated = compare(np.repeat(probability, 9), np.repeat(unsafe, 9), np.repeat(np.arange(20), 9))
    independent = compare(np.repeat(probability, 9), np.repeat(unsafe, 9), np.arange(180))
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high))
    ends = [(found.expected_low, found.expected_high) for found in (alone, repeated)]
    assert ends[0][1] > 0.3 and ends[1] == pytest.approx(ends[0], abs=0.02)
    assert alone.fits and repeated.fits and not independent.fits
