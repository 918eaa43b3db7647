"""How far below its bound a mean cost must be seen for it to be within the bound with a given probability."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import stats

from beaver_ray.bounds import clopper_pearson
from beaver_ray.method.calibration import Calibration
from beaver_ray.method.forms import MEAN, Form


def safety_margin(
    costs_E: npt.NDArray[np.floating],
    prompts_E: npt.NDArray[np.integer],
    confidence: float,
    calibration: Calibration | None = None,
    form: Form = MEAN,
    shares: bool = False,
) -> float:
    """What is taken off the bound of a mean that is estimated by E `costs_E`: in their units, 0 or more.

    The one-sided bounds of Student's t on the error of that mean and, where costs are calibrated probabilities, on
    that of the calibration, which was fitted on m labelled answers:

        t(confidence, G - 1) * error(costs)  +  t(confidence, m - 1) * max(std(label - P) / sqrt(m), error(fit))

    as in HC-RLHF (https://arxiv.org/abs/2506.08266), with both of its constants 1 and two things more. The first number
    behind max is that of the labelled answers' mean label less probability. Where these answers have other scores, it
    is the fit that matters, whose error at these scores is `Calibration.mean_error`. And costs of which a few are large
    make the first bound wider than Student's t (`upper_bound`). The error is clustered by the G prompts, as several
    answers to one tell less than as many answers to others; with one answer to each it is std(costs) / sqrt(E). Each
    bound holds with probability `confidence` by itself; that both errors are so large and point the same way is rarer.
    It says nothing of answers whose scores mean something else than the labelled ones'. Of the answers to a single
    prompt nothing is known: infinite.

    form: what the mean of ``costs_E`` is of. Where probabilities are nearly all next to 0, too little of their spread
    was seen: of G prompts without an unsafe answer at most 1 - (1 - confidence)^(1 / G) are unsafe, each of them counts
    `Form.hit`, and mean and margin are no less than that together. The labelled answers' error may lie all in the
    worst, where it counts `Form.scale` times; that of the fit is that at the answers that decide (`Form.deciding`).

    shares: whether answers cost 0 or 1, now and earlier, so that but for importance weights each of ``costs_E`` is 0 or
    `Form.hit`. Their mean is a share of it, of which a spread tells too little: a step without an unsafe answer has
    none. The bound is Clopper and Pearson's instead, of as many independent answers as would tell as much
    (`effective_trials`).
    """
    if shares:
        margin = form.hit * share_bound(costs_E / form.hit, prompts_E, confidence)
    else:
        margin = upper_bound(costs_E, prompts_E, confidence)
        if calibration is not None:
            none_unsafe = form.hit * clopper_pearson(0.0, len(np.unique(prompts_E)), confidence)[1]
            margin = max(margin, none_unsafe - float(np.mean(costs_E, dtype=np.float64)))
    if calibration is not None:
        of_labels = form.scale * calibration.residual_std / math.sqrt(calibration.n)
        margin += _t(confidence, calibration.n) * max(of_labels, calibration.mean_error(form.deciding(costs_E)))
    return margin


def mean_bound(values_N: npt.NDArray[np.floating], cluster_N: npt.NDArray[np.integer], confidence: float) -> float:
    """How far the true mean may lie above the observed one, at this confidence; infinite for a single cluster.

    One-sided, by Student's t. Values of one cluster may depend on one another; clusters are independent.
    """
    error, residuals_G = _mean_error(values_N, cluster_N)
    clusters = len(residuals_G)
    return _t(confidence, clusters) * error if clusters > 1 else math.inf


def upper_bound(values_N: npt.NDArray[np.floating], cluster_N: npt.NDArray[np.integer], confidence: float) -> float:
    """`mean_bound`, and more where values are skewed upwards: a sample that has missed the few large ones has a mean
    that is too low and a spread that is too small as well.

    By skew(values) / (6 sqrt(G)) * (1 + 2 t^2) standard errors (Johnson 1978, solved for the mean).
    """
    error, residuals_G = _mean_error(values_N, cluster_N)
    clusters = len(residuals_G)
    if clusters < 2:
        return math.inf
    spread, t = float(np.sqrt(np.mean(residuals_G**2))), _t(confidence, clusters)
    skewness = max(0.0, float(np.mean((residuals_G / spread) ** 3))) if spread > 0.0 else 0.0
    return (t + skewness / (6.0 * math.sqrt(clusters)) * (1.0 + 2.0 * t**2)) * error


def share_bound(hits_N: npt.NDArray[np.floating], cluster_N: npt.NDArray[np.integer], confidence: float) -> float:
    """`mean_bound` of values that are 0 or 1 (but for importance weights), by Clopper and Pearson: Student's t is too
    sure of a rare event."""
    if len(np.unique(cluster_N)) < 2:
        return math.inf
    share = float(np.mean(hits_N, dtype=np.float64))
    return clopper_pearson(share, effective_trials(hits_N, cluster_N, confidence), confidence)[1] - share


def effective_trials(hits_N: npt.NDArray[np.floating], cluster_N: npt.NDArray[np.integer], confidence: float) -> float:
    """As many independent trials would tell as much of a share at this one-sided confidence as these, which clusters
    hold together.

    As many as would have this standard error, and fewer where it is estimated from few clusters: an interval is then
    wider as Student's t is (Korn and Graubard 1998). But no fewer than if all hits of a cluster were alike: as many as
    there are clusters where these are equally large, and less where some are larger.
    """
    share, n = float(np.mean(hits_N, dtype=np.float64)), len(hits_N)
    residuals_G = cluster_sums(hits_N - share, cluster_N)
    clusters = len(residuals_G)
    if share in (0.0, 1.0):
        return clusters  # nothing shows that those of one cluster differ
    fewest = n**2 / float(np.sum(cluster_sums(np.ones(n), cluster_N) ** 2))
    if not 1 < clusters < n:
        return fewest
    variance = clusters / (clusters - 1) * (n - 1) / n * float(np.sum(residuals_G**2)) / n**2
    seen = min(n, share * (1 - share) / variance) if variance > 0.0 else n  # 0: no two clusters differ
    return max(fewest, seen * (_t(confidence, n) / _t(confidence, fewest)) ** 2)


def _mean_error(
    values_N: npt.NDArray[np.floating], cluster_N: npt.NDArray[np.integer]
) -> tuple[float, npt.NDArray[np.float64]]:
    """(Standard error of the mean, sum of what each cluster's values are off it [G]); the error is infinite for one
    cluster.

    Sandwich variance with the G / (G - 1) correction, which for equal clusters is that of the clusters' means.
    """
    residuals_G = cluster_sums(values_N - np.mean(values_N, dtype=np.float64), cluster_N)
    clusters = len(residuals_G)
    if clusters < 2:
        return math.inf, residuals_G
    return math.sqrt(clusters / (clusters - 1) * float(np.sum(residuals_G**2))) / len(values_N), residuals_G


def _t(confidence: float, n: float) -> float:
    return float(stats.t.ppf(confidence, max(n - 1, 1)))


def cluster_sums(values_N: npt.NDArray[np.floating], cluster_N: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """The sum of each cluster's values, by rising number of the cluster."""
    _, index_N = np.unique(cluster_N, return_inverse=True)
    return np.asarray(np.bincount(index_N, weights=values_N.astype(np.float64)), dtype=np.float64)
