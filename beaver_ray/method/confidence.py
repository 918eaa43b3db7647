"""How far below its bound a mean cost must be seen for it to be within the bound with a given probability."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import stats

from beaver_ray.method.calibration import Calibration


def safety_margin(
    costs_E: npt.NDArray[np.floating],
    prompts_E: npt.NDArray[np.integer],
    confidence: float,
    calibration: Calibration | None = None,
) -> float:
    """What is taken off the bound of a mean that is estimated by E `costs_E`: in their units, 0 or more.

    The one-sided bounds of Student's t on the error of that mean and, where costs are calibrated probabilities, on
    that of the calibration, the mean of label less probability on m labelled answers:

        t(confidence, G - 1) * error(costs)  +  t(confidence, m - 1) * std(label - P) / sqrt(m)

    as in HC-RLHF (https://arxiv.org/abs/2506.08266), with both of its constants 1. The error is clustered by the G
    prompts, as several answers to one tell less than as many answers to others; with one answer to each it is
    std(costs) / sqrt(E). Each bound holds with probability `confidence` by itself; that both errors are so large and
    point the same way is rarer. It says nothing of answers that are unlike the labelled ones. Of the answers to a
    single prompt nothing is known: infinite.
    """
    margin = mean_bound(costs_E, prompts_E, confidence)
    if calibration is not None:
        margin += _t(confidence, calibration.n) * calibration.residual_std / math.sqrt(calibration.n)
    return margin


def mean_bound(values_N: npt.NDArray[np.floating], cluster_N: npt.NDArray[np.integer], confidence: float) -> float:
    """How far a mean's true value may lie above it, at most with probability ``confidence``; infinite for one cluster.

    By Student's t, of values that are independent between clusters alone: sandwich variance with the G / (G - 1)
    correction, which for equal clusters is that of the clusters' means.
    """
    residuals_G = cluster_sums(values_N - np.mean(values_N, dtype=np.float64), cluster_N)
    clusters = len(residuals_G)
    if clusters < 2:
        return math.inf
    error = math.sqrt(clusters / (clusters - 1) * float(np.sum(residuals_G**2))) / len(values_N)
    return _t(confidence, clusters) * error


def _t(confidence: float, n: int) -> float:
    return float(stats.t.ppf(confidence, max(n - 1, 1)))


def cluster_sums(values_N: npt.NDArray[np.floating], cluster_N: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """The sum of each cluster's values, by rising number of the cluster."""
    _, index_N = np.unique(cluster_N, return_inverse=True)
    return np.asarray(np.bincount(index_N, weights=values_N.astype(np.float64)), dtype=np.float64)
