"""How far below its bound a mean cost must be seen for it to be within the bound with a given probability."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import stats

from beaver_ray.bounds import clopper_pearson
from beaver_ray.method.calibration import Calibration


def safety_margin(
    costs_E: npt.NDArray[np.floating],
    prompts_E: npt.NDArray[np.integer],
    confidence: float,
    calibration: Calibration | None = None,
) -> float:
    """What is taken off the bound of a mean that is estimated by E `costs_E`: in their units, 0 or more.

    Where all costs are 0 or 1 it is what Clopper and Pearson's exact upper bound is above their share, of as many
    answers as `effective_number` counts: Student's t tells no error of a step without any, and too little near it.
    Else it is made up of the one-sided bounds of Student's t on the error of the mean and, where costs are calibrated
    probabilities, on that of the calibration, the mean of label less probability on m labelled answers:

        t(confidence, G - 1) * error(costs)  +  t(confidence, m - 1) * std(label - P) / sqrt(m)

    as in HC-RLHF (https://arxiv.org/abs/2506.08266), with both of its constants 1. The error is clustered by the G
    prompts, as several answers to one tell less than as many answers to others; with one answer to each it is
    std(costs) / sqrt(E). Each bound holds with probability `confidence` by itself; that both errors are so large and
    point the same way is rarer. It says nothing of answers that are unlike the labelled ones. Of the answers to a
    single prompt nothing is known: infinite.
    """
    if calibration is None and np.isin(costs_E, (0, 1)).all():
        return share_bound(costs_E, prompts_E, confidence)
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


def share_bound(flags_N: npt.NDArray[np.floating], cluster_N: npt.NDArray[np.integer], confidence: float) -> float:
    """How far the probability of a 1 may lie above the share of ones; infinite for one cluster."""
    if len(np.unique(cluster_N)) < 2:
        return math.inf
    share = float(np.mean(flags_N, dtype=np.float64))
    return clopper_pearson(share, effective_number(flags_N, cluster_N, confidence), confidence)[1] - share


def effective_number(
    values_N: npt.NDArray[np.floating], cluster_N: npt.NDArray[np.integer], confidence: float
) -> float:
    """How many independent flags tell as much of their share as these, of which those of one cluster may be alike.

    Korn and Graubard 1998: the number whose share has the variance that is seen, times the square of the ratio of
    Student's t at n - 1 and at G - 1 degrees of freedom (the variance is that of G clusters), but no more than n. And
    no fewer than if all flags of a cluster were the same; so many where nothing varies, and where there is one cluster.
    """
    share, n = float(np.mean(values_N, dtype=np.float64)), len(values_N)
    residuals_G = cluster_sums(values_N - share, cluster_N)
    clusters = len(residuals_G)
    if not 0 < share < 1:
        return clusters
    sizes_G = cluster_sums(np.ones(n), cluster_N)
    fewest = n**2 / float(np.sum(sizes_G**2))
    if not 1 < clusters < n:
        return fewest
    # The spread is 0 where no clusters differ.
    spread = clusters / (clusters - 1) * (n - 1) / n * float(np.sum(residuals_G**2)) / n**2
    seen = n if spread == 0 else min(n, share * (1 - share) / spread)
    return max(fewest, seen * (_t(confidence, n) / _t(confidence, clusters)) ** 2)


def _t(confidence: float, n: int) -> float:
    return float(stats.t.ppf(confidence, max(n - 1, 1)))


def cluster_sums(values_N: npt.NDArray[np.floating], cluster_N: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """The sum of each cluster's values, by rising number of the cluster."""
    _, index_N = np.unique(cluster_N, return_inverse=True)
    return np.asarray(np.bincount(index_N, weights=values_N.astype(np.float64)), dtype=np.float64)
