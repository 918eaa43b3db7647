"""Platt scaling against scipy's optimiser and a known sigmoid."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from beaver_ray.errors import UserError
from beaver_ray.method.calibration import Calibration, fit_platt


def sample(n, scale, bias, seed=0, location=-2.0, spread=6.0):
    rng = np.random.default_rng(seed)
    scores = rng.normal(location, spread, n)
    return scores, rng.random(n) < expit(scale * scores + bias)


def by_scipy(scores, unsafe):
    unsafe_count, safe_count = unsafe.sum(), (~unsafe).sum()
    targets = np.where(unsafe, (unsafe_count + 1) / (unsafe_count + 2), 1 / (safe_count + 2))

    def loss(weights):
        probability = np.clip(expit(weights[0] * scores + weights[1]), 1e-300, 1 - 1e-16)
        return -np.mean(targets * np.log(probability) + (1 - targets) * np.log1p(-probability))

    return minimize(loss, [0.1, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 4000}).x


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [30, 500])
def test_fit_is_scipys(seed, size):
    scores, unsafe = sample(size, 0.4, 0.3, seed)
    calibration = fit_platt(scores, unsafe)
    np.testing.assert_allclose([calibration.scale, calibration.bias], by_scipy(scores, unsafe), rtol=1e-4, atol=1e-5)


def test_fit_finds_the_sigmoid_that_made_the_labels():
    scores, unsafe = sample(200_000, 0.5, 1.2)
    calibration = fit_platt(scores, unsafe)
    assert calibration.scale == pytest.approx(0.5, rel=0.03)
    assert calibration.bias == pytest.approx(1.2, rel=0.03)
    assert calibration.ece < 0.01
    # Accuracy of the best rule: mean of max(p, 1 - p).
    probability = expit(0.5 * scores + 1.2)
    assert calibration.accuracy == pytest.approx(np.maximum(probability, 1 - probability).mean(), abs=0.005)
    np.testing.assert_allclose(calibration.probability(scores), probability, atol=0.02)


def test_scale_of_the_scores_does_not_matter():
    scores, unsafe = sample(400, 0.4, 0.3)
    small, large = fit_platt(scores, unsafe), fit_platt(1e6 * scores + 1e7, unsafe)
    np.testing.assert_allclose(small.probability(scores), large.probability(1e6 * scores + 1e7), rtol=1e-6)


def test_separable_scores_give_a_finite_fit():
    scores = np.concatenate([np.linspace(-9, -5, 30), np.linspace(3, 7, 20)])
    calibration = fit_platt(scores, scores > 0)
    assert 0 < calibration.scale < 10 and calibration.accuracy == calibration.sign_accuracy == 1.0
    # A free intercept makes the mean of P that of the targets, 21/22 and 1/32.
    assert calibration.probability(scores).mean() == pytest.approx((20 * 21 / 22 + 30 / 32) / 50, abs=1e-6)


def test_metrics_by_hand():
    # Probabilities of a known sigmoid: 20 scores at -1 (5 unsafe), 20 at +3 (16 unsafe).
    scores = np.repeat([-1.0, 3.0], 20)
    unsafe = np.concatenate([np.arange(20) < 5, np.arange(20) < 16])
    calibration = fit_platt(scores, unsafe)
    low, high = calibration.probability([-1.0, 3.0])
    # Two free parameters and two groups: the fit meets the mean of the smoothed targets in each.
    assert low == pytest.approx((5 * 22 / 23 + 15 / 21) / 20, abs=1e-6)
    assert high == pytest.approx((16 * 22 / 23 + 4 / 21) / 20, abs=1e-6)
    assert calibration.accuracy == calibration.sign_accuracy == pytest.approx(31 / 40)
    assert calibration.ece == pytest.approx((abs(low - 0.25) + abs(high - 0.8)) / 2)
    # Label less P: of the first twenty 1 - low (5 of them) or -low, of the others 1 - high (16) or -high.
    residuals = [1 - low] * 5 + [-low] * 15 + [1 - high] * 16 + [-high] * 4
    assert calibration.residual_std == pytest.approx(np.std(residuals))


def test_the_error_of_the_fit_by_differences():
    """The variances are the inverse of the log-likelihood's second derivatives, and the mean's error follows its slope
    in scale and bias."""
    scores, unsafe = sample(400, 0.7, -1.5)
    fit = fit_platt(scores, unsafe)

    def loss(scale, bias):
        logits = scale * scores + bias
        return np.sum(np.logaddexp(0.0, logits) - fit.probability(scores) * logits)

    h = 1e-3
    moved = {(i, j): loss(fit.scale + i * h, fit.bias + j * h) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    by_scale = (moved[1, 0] - 2 * moved[0, 0] + moved[-1, 0]) / h**2
    by_bias = (moved[0, 1] - 2 * moved[0, 0] + moved[0, -1]) / h**2
    by_both = (moved[1, 1] - moved[1, -1] - moved[-1, 1] + moved[-1, -1]) / (4 * h**2)
    variances = np.linalg.inv([[by_scale, by_both], [by_both, by_bias]])
    found = [[fit.scale_variance, fit.covariance], [fit.covariance, fit.bias_variance]]
    np.testing.assert_allclose(found, variances, rtol=1e-4)

    others = np.array([-3.0, 0.5, 2.0])
    mean = lambda scale, bias: (1 / (1 + np.exp(-(scale * others + bias)))).mean()  # noqa: E731
    slope = np.array(
        [
            (mean(fit.scale + h, fit.bias) - mean(fit.scale - h, fit.bias)) / (2 * h),
            (mean(fit.scale, fit.bias + h) - mean(fit.scale, fit.bias - h)) / (2 * h),
        ]
    )
    assert fit.mean_error(fit.probability(others)) == pytest.approx(math.sqrt(slope @ variances @ slope), rel=1e-4)
    assert fit.mean_error(np.array([0.0, 1.0, -0.1, 1.2])) < 1e-9, "there the sigmoid is flat"


def test_probability_does_not_overflow():
    calibration = Calibration(1.0, 0.0, 20, 1.0, 1.0, 0.0, 0.5, 0.1, 0.1, 0.0)
    assert calibration.probability([-1e6, 0.0, 1e6]).tolist() == [0.0, 0.5, 1.0]


def test_dict_round_trip():
    calibration = fit_platt(*sample(100, 0.4, 0.3))
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration


@pytest.mark.parametrize(
    ("scores", "unsafe", "message"),
    [
        (np.arange(10.0), np.arange(10) > 4, "at least 20"),
        (np.arange(40.0), np.ones(40, bool), "40 unsafe and 0 safe"),
        (np.ones(40), np.arange(40) > 20, "same cost score"),
        (-np.arange(40.0), np.arange(40) > 20, "cost > 0 means unsafe"),
        (np.full(40, np.nan), np.arange(40) > 20, "40 calibration scores are NaN"),
    ],
)
def test_data_that_cannot_be_calibrated(scores, unsafe, message):
    with pytest.raises(UserError, match=message):
        fit_platt(scores, unsafe)


def test_labels_must_match_the_scores():
    with pytest.raises(ValueError, match="one length"):
        fit_platt([1.0, 2.0], [True])
    with pytest.raises(ValueError, match="labels"):
        fit_platt([1.0, 2.0], np.array([1, -1]))
