"""From raw cost scores to probabilities of harm.

Raw scores have no unit: on a typical cost model unsafe responses average +1 and safe ones -7, so that a limit
of 0 on the mean only binds when most responses are unsafe. Held-out responses labelled safe or unsafe give
the scores a meaning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from beaver_ray.errors import UserError

MIN_SAMPLES = 20
MIN_PER_CLASS = 5
ECE_BINS = 10
TINY = 1e-12

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Scores = Sequence[float] | npt.NDArray[np.floating]
Labels = Sequence[bool] | npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Calibration:
    """P(unsafe | cost c) = sigmoid(scale * c + bias), with scale > 0, and what it was fitted on.

    `accuracy` is that of P > 1/2, `sign_accuracy` that of cost > 0; `ece` is the expected calibration error
    over ten equal bins of P; `residual_std` is the standard deviation of label (1 is unsafe) less P. All four are
    measured on the samples of the fit. The variances are those of the fit, the inverse of its Fisher information.
    """

    scale: float
    bias: float
    n: int
    accuracy: float
    sign_accuracy: float
    ece: float
    residual_std: float
    scale_variance: float
    bias_variance: float
    covariance: float
    """Of scale and bias."""

    def mean_error(self, probability_N: npt.NDArray[np.floating]) -> float:
        """Standard error of the mean of these probabilities that comes of the fit (delta method): of their scores they
        are the right sigmoid's, but for the labels that it happened to be fitted on.

        Numbers outside 0 to 1, as importance weights make them, count as the nearer of these.
        """
        inside_N = np.clip(probability_N.astype(np.float64), TINY, 1.0 - TINY)
        scores_N = (np.log(inside_N) - np.log1p(-inside_N) - self.bias) / self.scale
        slopes_N = inside_N * (1.0 - inside_N)
        by_scale, by_bias = float(np.mean(slopes_N * scores_N)), float(np.mean(slopes_N))
        variance = by_scale**2 * self.scale_variance + by_bias**2 * self.bias_variance
        return math.sqrt(max(variance + 2.0 * by_scale * by_bias * self.covariance, 0.0))

    def probability(self, scores: Scores) -> FloatArray:
        """Probability that each response is unsafe."""
        return _sigmoid(self.scale * np.asarray(scores, dtype=np.float64) + self.bias)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Calibration:
        return cls(**saved)


def fit_platt(scores: Scores, unsafe: Labels) -> Calibration:
    """Fit the sigmoid by maximum likelihood with smoothed targets: Platt scaling.

    Platt, "Probabilistic outputs for support vector machines", 1999; with the numerically safe loss of Lin, Lin and
    Weng 2007 (https://doi.org/10.1007/s10994-007-5018-6).

    Smoothing (targets (n1 + 1) / (n1 + 2) and 1 / (n0 + 2)) keeps the fit finite where scores separate the
    classes perfectly. Raises UserError on too few samples, on one class only, on scores that are not finite,
    and where the fitted scale is not positive: such a cost model ranks safe responses as the more harmful
    ones.
    """
    scores_N, unsafe_N = _checked(scores, unsafe)
    if len(scores_N) < MIN_SAMPLES or min(unsafe_N.sum(), (~unsafe_N).sum()) < MIN_PER_CLASS:
        raise UserError(
            f"calibration has {int(unsafe_N.sum())} unsafe and {int((~unsafe_N).sum())} safe responses: "
            f"label at least {MIN_SAMPLES}, {MIN_PER_CLASS} of each kind"
        )
    centre, spread = float(scores_N.mean()), float(scores_N.std())
    if scores_N.min() == scores_N.max():
        raise UserError("every response has the same cost score: the cost model has not learnt anything to calibrate")
    targets_N = np.where(unsafe_N, (unsafe_N.sum() + 1.0) / (unsafe_N.sum() + 2.0), 1.0 / ((~unsafe_N).sum() + 2.0))
    slope, intercept = _fit_logistic((scores_N - centre) / spread, targets_N)
    scale, bias = slope / spread, intercept - slope * centre / spread
    if not scale > 0.0:
        raise UserError(
            f"cost scores fall as harm rises (fitted scale {scale:.3g}): "
            "check that cost > 0 means unsafe, and the accuracy of the cost model"
        )
    probability_N = _sigmoid(scale * scores_N + bias)
    (scale_variance, covariance), (_, bias_variance) = _variances((scores_N - centre) / spread, probability_N)
    # Of the scores as they are: scale = slope / spread, bias = intercept - slope * centre / spread.
    scale_variance, covariance = scale_variance / spread**2, covariance / spread
    bias_variance += (scale_variance * centre - 2.0 * covariance) * centre
    return Calibration(
        scale=scale,
        bias=bias,
        n=len(scores_N),
        accuracy=float(np.mean((probability_N > 0.5) == unsafe_N)),
        sign_accuracy=float(np.mean((scores_N > 0.0) == unsafe_N)),
        ece=expected_calibration_error(probability_N, unsafe_N),
        residual_std=float(np.std(unsafe_N - probability_N)),
        scale_variance=scale_variance,
        bias_variance=bias_variance,
        covariance=covariance - scale_variance * centre,
    )


def _checked(scores: Scores, unsafe: Labels) -> tuple[FloatArray, BoolArray]:
    scores_N, unsafe_N = np.asarray(scores, dtype=np.float64), np.asarray(unsafe)
    if scores_N.ndim != 1 or scores_N.shape != unsafe_N.shape:
        raise ValueError(f"scores {scores_N.shape} and labels {unsafe_N.shape} must be flat and of one length")
    if not np.isin(unsafe_N, (0, 1)).all():
        raise ValueError("labels must be true (unsafe) or false (safe)")
    if not np.isfinite(scores_N).all():
        bad = int((~np.isfinite(scores_N)).sum())
        raise UserError(f"{bad} calibration scores are NaN or infinite: check the cost model")
    return scores_N, unsafe_N.astype(np.bool_)


def _fit_logistic(x_N: FloatArray, targets_N: FloatArray) -> tuple[float, float]:
    """Maximum likelihood of sigmoid(slope * x + intercept) on soft targets: Newton with step halving."""
    design_N2 = _design(x_N)

    def loss(weights: FloatArray) -> float:
        logits_N = design_N2 @ weights
        return float(np.sum(np.logaddexp(0.0, logits_N) - targets_N * logits_N))

    weights = np.array([0.0, np.log(targets_N.mean() / (1.0 - targets_N.mean()))])
    for _ in range(100):
        probability_N = _sigmoid(design_N2 @ weights)
        gradient = design_N2.T @ (probability_N - targets_N)
        if np.abs(gradient).max() < 1e-9 * len(x_N):
            break
        step = np.linalg.solve(_information(design_N2, probability_N), gradient)
        size, start = 1.0, loss(weights)
        while size > 1e-10 and loss(weights - size * step) > start - 1e-4 * size * float(gradient @ step):
            size /= 2.0
        weights = weights - size * step
    return float(weights[0]), float(weights[1])


def _variances(x_N: FloatArray, probability_N: FloatArray) -> list[list[float]]:
    """The covariance matrix of slope and intercept: the inverse of the Fisher information."""
    found: list[list[float]] = np.linalg.inv(_information(_design(x_N), probability_N)).tolist()
    return found


def _design(x_N: FloatArray) -> FloatArray:
    return np.stack([x_N, np.ones_like(x_N)], axis=1)


def _information(design_N2: FloatArray, probability_N: FloatArray) -> FloatArray:
    """The second derivatives of the loss by slope and intercept, which are the Fisher information."""
    curvature_N = probability_N * (1.0 - probability_N)
    information: FloatArray = (design_N2 * curvature_N[:, None]).T @ design_N2 + 1e-12 * np.eye(2)
    return information


def _sigmoid(logits: FloatArray) -> FloatArray:
    # exp of minus the absolute value never overflows.
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0.0, 1.0, small) / (1.0 + small)


def bin_numbers(probability_N: FloatArray) -> npt.NDArray[np.int64]:
    """The bin of each probability: ECE_BINS of equal width, numbered from 0, and 1 is in the last one."""
    return np.minimum((probability_N * ECE_BINS).astype(np.int64), ECE_BINS - 1)


def expected_calibration_error(probability_N: FloatArray, unsafe_N: BoolArray) -> float:
    """Mean over equal-width bins, weighted by their counts, of |mean probability - share of unsafe|.

    Eq. 3 of https://arxiv.org/abs/1706.04599.
    """
    gap_K = np.bincount(bin_numbers(probability_N), weights=probability_N - unsafe_N, minlength=ECE_BINS)
    return float(np.abs(gap_K).sum() / len(probability_N))
