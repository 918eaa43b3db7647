"""How far below its bound a mean cost must be seen for it to be within the bound with a given probability."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import stats

from beaver_ray.method.calibration import Calibration


def safety_margin(
    costs_B: npt.NDArray[np.floating], confidence: float, calibration: Calibration | None = None
) -> float:
    """What is taken off the bound of a mean that is estimated by B `costs_B`: in their units, 0 or more.

    The one-sided bounds of Student's t on the error of that mean and, where costs are calibrated probabilities, on
    that of the calibration, the mean of label less probability on the labelled answers:

        t(confidence, B - 1) * std(costs) / sqrt(B)  +  t(confidence, m - 1) * std(label - P) / sqrt(m)

    as in HC-RLHF (https://arxiv.org/abs/2506.08266), with both of its constants 1. Each holds with probability
    `confidence` by itself; that both errors are so large and point the same way is rarer. It says nothing of answers
    that are unlike the labelled ones. Of a single answer nothing is known: infinite.
    """
    margin = _error_bound(float(np.std(costs_B, ddof=1)) if len(costs_B) > 1 else math.inf, len(costs_B), confidence)
    if calibration is not None:
        margin += _error_bound(calibration.residual_std, calibration.n, confidence)
    return margin


def _error_bound(std: float, n: int, confidence: float) -> float:
    return float(stats.t.ppf(confidence, max(n - 1, 1))) * std / math.sqrt(n)
