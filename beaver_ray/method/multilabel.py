"""Judging a classifier with several labels: a threshold for each, and how often it is right.

Labels are 1, 0 or below 0 for unknown; rows whose label is unknown are left out of that label's figures. Scores are
log-odds. An answer is flagged where any label is above its threshold; whether it should be is known where one of its
labels is true, or all are known to be false.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit
from scipy.stats import rankdata

from beaver_ray.evaluation import share_interval
from beaver_ray.method.calibration import expected_calibration_error

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.integer[Any]]

HIGHEST = 1000.0
"""More than any log-odds: a label that no threshold serves is never flagged."""


def best_threshold(odds_N: FloatArray, truth_N: BoolArray, precision: float | None = None) -> float | None:
    """The threshold of log-odds, above which a label counts, with the best F1; or, with a target, the lowest whose
    precision reaches it.

    Halfway between two scores of the data. None where no row is true, or no threshold reaches the precision.
    """
    if not truth_N.any():
        return None
    scores, ends, hits = _cuts(odds_N, truth_N)
    taken = ends + 1
    if precision is None:
        cut = int(np.argmax(2 * hits / (taken + truth_N.sum())))
    else:
        reached = np.flatnonzero((hits / taken >= precision) & (hits > 0))
        if not len(reached):
            return None
        cut = int(reached[-1])
    place = int(ends[cut])
    below = scores[place + 1] if place + 1 < len(scores) else scores[place] - 1.0
    return float((scores[place] + below) / 2)


def _cuts(scores_N: FloatArray, truth_N: BoolArray) -> tuple[FloatArray, npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Where a threshold may stand: (scores from the highest [N], the last place of each, true rows up to there)."""
    order = np.argsort(-scores_N, kind="stable")
    scores = scores_N[order]
    ends = np.flatnonzero(np.append(np.diff(scores) != 0, True))  # rows of one score are taken together
    return scores, ends, np.cumsum(truth_N[order], dtype=np.intp)[ends]


def thresholds(
    odds_NK: FloatArray, truth_NK: Labels, names: Sequence[str], precision: float | None, learned_K: BoolArray
) -> tuple[FloatArray, list[str]]:
    """(A threshold of log-odds for each label, what is to be said of those that could not be chosen).

    learned_K: which labels the model has learned; the odds of the others mean nothing, and they are never flagged.
    """
    found, notes = [], []
    for k, name in enumerate(names):
        known = truth_NK[:, k] >= 0
        best = best_threshold(odds_NK[known, k], truth_NK[known, k] > 0, precision)
        if not learned_K[k]:
            notes.append(f"{name}: the model has learned nothing of it, so it is never flagged")
            best = HIGHEST
        elif best is None and not (truth_NK[:, k] > 0).any():
            notes.append(f"{name}: no held-out row has it, so its threshold is a probability of 0.5")
            best = 0.0
        elif best is None:
            notes.append(f"{name}: no threshold has a precision of {precision:g}, so it is never flagged")
            best = HIGHEST
        found.append(best)
    return np.array(found), notes


def flag_margin(odds_NK: FloatArray, thresholds_K: FloatArray) -> FloatArray:
    """How far the label furthest above its threshold is above it [N]; an answer is flagged above 0."""
    margins: FloatArray = (odds_NK - thresholds_K).max(axis=1)
    return margins


def unsafe_truth(truth_NK: Labels) -> npt.NDArray[np.int8]:
    """1 where a label is true, 0 where all are known to be false, else -1 [N].

    A label of which no row says anything does not count: with it no row would be known to be safe.
    """
    some_NK = truth_NK[:, (truth_NK >= 0).any(axis=0)]
    positive, known = (some_NK > 0).any(axis=1), (some_NK >= 0).all(axis=1) & bool(some_NK.size)
    return np.where(positive, 1, np.where(known, 0, -1)).astype(np.int8)


def area_under_roc(scores_N: FloatArray, truth_N: BoolArray) -> float:
    """The probability that a true row scores higher than a false one, ties counting half (Mann-Whitney)."""
    positives, negatives = int(truth_N.sum()), int((~truth_N).sum())
    if not positives or not negatives:
        return math.nan
    ranks = rankdata(scores_N)
    return float((ranks[truth_N].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(scores_N: FloatArray, truth_N: BoolArray) -> float:
    """Precision at each score of the data, weighted by the recall that is gained there: the area under the
    precision-recall curve without interpolation."""
    if not truth_N.any():
        return math.nan
    _, ends, hits = _cuts(scores_N, truth_N)
    return float(np.sum(np.diff(hits, prepend=0) * hits / (ends + 1)) / truth_N.sum())


def binary_figures(flags_N: BoolArray, truth_N: BoolArray) -> dict[str, float]:
    """Accuracy, precision, recall and F1; NaN where nothing was flagged, or nothing is true."""
    hits, flagged, true = int((flags_N & truth_N).sum()), int(flags_N.sum()), int(truth_N.sum())
    return {
        "accuracy": float(np.mean(flags_N == truth_N)) if len(truth_N) else math.nan,
        "precision": hits / flagged if flagged else math.nan,
        "recall": hits / true if true else math.nan,
        "f1": 2 * hits / (flagged + true) if flagged + true else math.nan,
    }


def figures(
    odds_NK: FloatArray, truth_NK: Labels, above_NK: BoolArray, margin_N: FloatArray, names: Sequence[str]
) -> dict[str, Any]:
    """All figures of judged answers: ``flagged``, one entry for each of ``labels``, ``micro_f1`` and ``macro_f1``.

    above_NK: which labels are above their thresholds; margin_N: `flag_margin`. Macro-F1 is the mean over labels that
    known answers of both kinds have. Where all known answers are of one kind no flag could be wrong, or none right:
    precision and F1 are NaN then, and accuracy where all are unsafe.
    """
    labels: dict[str, dict[str, float]] = {}
    hits = flagged = true = 0
    for k, name in enumerate(names):
        known = truth_NK[:, k] >= 0
        truth, odds, above = truth_NK[known, k] > 0, odds_NK[known, k], above_NK[known, k]
        labels[name] = _scored(odds, truth, above)
        hits, flagged, true = hits + int((above & truth).sum()), flagged + int(above.sum()), true + int(truth.sum())
    unsafe = unsafe_truth(truth_NK)
    known = unsafe >= 0
    whole = _scored(margin_N[known], unsafe[known] > 0, margin_N[known] > 0)
    whole.pop("ece")  # a margin is no log-odds of being unsafe
    both_kinds = [one["f1"] for one in labels.values() if 0 < one["true"] < one["known"]]
    return {
        "flagged": whole,
        "labels": labels,
        "micro_f1": 2 * hits / (flagged + true) if both_kinds else math.nan,
        "macro_f1": float(np.mean(both_kinds)) if both_kinds else math.nan,
    }


def _scored(odds_N: FloatArray, truth_N: BoolArray, above_N: BoolArray) -> dict[str, float]:
    found = binary_figures(above_N, truth_N)
    if truth_N.all() or not truth_N.any():
        found |= {"precision": math.nan, "f1": math.nan}
    if truth_N.all():
        found["accuracy"] = math.nan
    return {
        **found,
        "auroc": area_under_roc(odds_N, truth_N),
        "auprc": average_precision(odds_N, truth_N),
        "ece": expected_calibration_error(expit(odds_N), truth_N) if len(truth_N) else math.nan,
        "known": len(truth_N),
        "true": int(truth_N.sum()),
    }


def shares_by(values: Sequence[Any], flags_N: BoolArray, prompts_N: npt.NDArray[Any]) -> dict[str, dict[str, Any]]:
    """The share of flagged answers for each value of a field, the largest first, with its interval (`share_interval`).

    Rows without the field are left out; one whose value is a list counts for each item of it. prompts_N: what is equal
    of answers to the same prompt.
    """
    rows: dict[str, list[int]] = {}
    for number, value in enumerate(values):
        items = value if isinstance(value, list | tuple) else [] if value is None else [value]
        for item in dict.fromkeys(map(str, items)):
            rows.setdefault(item, []).append(number)
    found = {item: share_interval(flags_N[numbers], prompts_N[numbers]) for item, numbers in rows.items()}
    return dict(sorted(found.items(), key=lambda entry: -entry[1]["mean"]))


def group_odds(odds_NK: FloatArray, thresholds_K: FloatArray, chosen: Sequence[int], combine: str) -> FloatArray:
    """One score [N] of some labels; above 0 counts as unsafe.

    combine: "max" is how far the label furthest above its threshold is above it, and above 0 exactly where one of them
    is flagged; "any" the log-odds of at least one label, as if each were independent of the others. Labels that are
    never flagged are left out of it; of these alone it is -HIGHEST.
    """
    if combine == "max":
        return flag_margin(odds_NK[:, list(chosen)], thresholds_K[list(chosen)])
    some_NG = odds_NK[:, [k for k in chosen if thresholds_K[k] < HIGHEST]]
    if not some_NG.size:
        return np.full(len(odds_NK), -HIGHEST)
    none_N = -np.logaddexp(0.0, some_NG).sum(axis=1)  # log P(no label) = sum of log(1 - p)
    # log(1 - exp(x)) for x < 0, without losing digits at either end.
    with np.errstate(divide="ignore"):  # of the branch that is not taken
        any_N = np.where(none_N > -math.log(2), np.log(-np.expm1(none_N)), np.log1p(-np.exp(none_N)))
    odds: FloatArray = any_N - none_N
    return odds
