"""Preference strength, and what is made of it where labels are noisy (https://arxiv.org/abs/2401.06080, section 2).

The strength of a pair is the mean mu, over an ensemble of score models, of the preferred answer's score less the
other's; sigma is their standard deviation. Below 0 the models disagree with the label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import rankdata


def strength(differences_MN: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(mu [N], sigma [N]) of the score differences by M models; sigma divides by M."""
    return differences_MN.mean(axis=0), differences_MN.std(axis=0)


@dataclass(frozen=True)
class Treatment:
    """What the ranking loss does with each of N pairs."""

    flipped_N: NDArray[np.bool_]
    """The two answers change places."""
    margin_N: NDArray[np.float32]
    """By how much the scores of the pair, as it then stands, are to differ."""
    smoothing_N: NDArray[np.float32]
    """Weight of the opposite order."""


def treat(
    strength_N: NDArray[np.floating],
    *,
    flip: float = 0.0,
    smoothing: float = 0.0,
    smooth: Literal["all", "negative"] = "all",
    margin: float = 0.0,
    soft: float = 0.0,
) -> Treatment:
    """The ``flip`` share of lowest strength changes places, and its strength its sign; then margin and smoothing.

    margin: times the strength. soft, instead of all others: times the strength, the log-odds of the preferred order, so
    that the opposite one has weight 1 / (1 + exp(soft * strength)) and the loss is least where the scores differ by
    soft * strength. Of equal strengths the first ones are flipped. Strengths that nothing needs may be nan.
    """
    count = len(strength_N)
    flipped_N = np.zeros(count, dtype=np.bool_)
    flipped_N[np.argsort(strength_N, kind="stable")[: int(flip * count + 0.5)]] = True
    now_N = np.where(flipped_N, -strength_N, strength_N)
    smoothed_N = np.ones(count, dtype=np.bool_) if smooth == "all" else now_N < 0
    smoothing_N = expit(-soft * now_N) if soft else smoothing * smoothed_N
    margin_N = margin * now_N if margin else np.zeros(count)
    return Treatment(flipped_N, margin_N.astype(np.float32), smoothing_N.astype(np.float32))


@dataclass(frozen=True)
class Quantile:
    """Pairs of neighbouring strength."""

    count: int
    lowest: float
    mean: float
    deviation: float
    """Mean sigma."""
    flipped: float | None
    """Share of labels that are known to be wrong; None where nothing is known."""


def quantiles(
    mean_N: NDArray[np.float64],
    deviation_N: NDArray[np.float64],
    wrong_N: NDArray[np.bool_] | None = None,
    parts: int = 20,
) -> list[Quantile]:
    """The pairs by rising strength, in ``parts`` of nearly equal size (fewer where there are fewer pairs)."""
    order = np.argsort(mean_N, kind="stable")
    return [
        Quantile(
            len(some),
            float(mean_N[some[0]]),
            float(mean_N[some].mean()),
            float(deviation_N[some].mean()),
            None if wrong_N is None else float(wrong_N[some].mean()),
        )
        for some in np.array_split(order, min(parts, len(order)))
    ]


def u_shape(parts: list[Quantile]) -> float | None:
    """How much sigma at both ends exceeds that of the middle: mean of the outer fifths over that of the inner fifth.

    Above 1 is the published shape (0.33, 0.21, 0.55 from weak to strong); None with fewer than five parts.
    """
    fifth = len(parts) // 5
    if not fifth:
        return None
    sigma = np.array([part.deviation for part in parts])
    start = (len(parts) - fifth) // 2
    middle = sigma[start : start + fifth].mean()
    ends = np.concatenate([sigma[:fifth], sigma[-fifth:]]).mean()
    return float(ends / middle) if middle > 0 else None


def detection(mean_N: NDArray[np.float64], wrong_N: NDArray[np.bool_]) -> float | None:
    """Area under the ROC curve of -mu as a detector of wrong labels; None where all are alike.

    The probability that a wrong label has the lower strength of two, ties counting half (Mann and Whitney).
    """
    wrong = int(wrong_N.sum())
    right = len(wrong_N) - wrong
    if not wrong or not right:
        return None
    ranks_N = rankdata(-mean_N)
    return float((ranks_N[wrong_N].sum() - wrong * (wrong + 1) / 2) / (wrong * right))


@dataclass(frozen=True)
class Decay:
    """Held-out accuracy that was higher before the end of training."""

    best: float
    step: int
    last: float

    def in_words(self) -> str:
        """One sentence."""
        return f"held-out accuracy fell from {self.best:.3f} at step {self.step} to {self.last:.3f} at the end"


def decay(steps: list[int], accuracies: list[float], pairs: int) -> Decay | None:
    """Whether accuracy on ``pairs`` held-out pairs ended below its best by more than chance would have it.

    That is a standard error of a share, and 0.01 at least.
    """
    if not accuracies:
        return None
    place = max(range(len(accuracies)), key=lambda n: (accuracies[n], -n))
    best, last = accuracies[place], accuracies[-1]
    error = (best * (1 - best) / max(1, pairs)) ** 0.5
    return Decay(best, steps[place], last) if best - last > max(0.01, error) else None
