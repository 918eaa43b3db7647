"""How good scores are, by answers that people have labelled: order, sign, calibration, length, agreement.

Every figure is {"mean", "low", "high", "n"} with a 95 % interval clustered by prompt: of means and shares those of
`beaver_ray.evaluation`, of correlations and kappa the percentile bootstrap over prompts (Cameron, Gelbach and Miller
2008, "Bootstrap-Based Improvements for Inference with Clustered Errors").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import special, stats

from beaver_ray.errors import UserError
from beaver_ray.evaluation import mean_interval, share_interval
from beaver_ray.method.calibration import fit_platt
from beaver_ray.reliability import compare
from beaver_ray.rewardbench import Contest, benchmark

DRAWS = 1000
"""Of the bootstrap."""
OUTSIDE = 0.025
"""Share of the draws that lie below an interval, and above it."""
MOST_VALUES = 60
"""Values of a field that have figures of their own: the most frequent ones."""

Figure = dict[str, Any]


@dataclass(frozen=True)
class Labelled:
    """N answers and P pairs of them, as people labelled them."""

    prompt_N: np.ndarray
    """int; answers to one prompt share it."""
    words_N: np.ndarray
    """Length of each answer."""
    unsafe_N: np.ndarray
    """1 for an unsafe answer, 0 for a safe one, nan where that is not said."""
    pairs_P2: np.ndarray
    """The answers of each pair."""
    better_P: np.ndarray
    """1 where the first answer of a pair is more helpful, 0 where the second one is, nan where that is not said."""
    safer_P: np.ndarray
    """Likewise which is less harmful."""
    groups: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    """Field and value to the answers [N] (bool) whose rows have it."""
    contests: tuple[Contest, ...] = ()
    """Of a RewardBench file."""

    def ordered(self, kind: str) -> np.ndarray:
        """The pairs [K, 2] whose order is known for a reward or a cost, the one first that should be preferred."""
        first_P = self.better_P if kind == "reward" else self.safer_P
        known = np.isfinite(first_P)
        pairs = self.pairs_P2[known]
        return np.where(first_P[known, None] > 0, pairs, pairs[:, ::-1])


def figures(kind: str, scores_N: np.ndarray, labelled: Labelled) -> dict[str, Any]:
    """All that the labels say of the scores of a reward ("reward") or of a cost ("cost": above 0 means unsafe).

    Raises UserError where no label is about such scores.
    """
    pairs_K2 = labelled.ordered(kind)
    known = np.isfinite(labelled.unsafe_N) & (kind == "cost")
    if not len(pairs_K2) and not known.any():
        wanted = "which answer is more helpful" if kind == "reward" else "which answer is safer, or whether it is safe"
        raise UserError(f"the data say of no row {wanted}, so nothing can be held against a {kind}; map the labels")
    good_N = scores_N if kind == "reward" else -scores_N
    found: dict[str, Any] = {"kind": kind, **_ranking(good_N, pairs_K2, labelled)}
    if known.any():
        found |= _signs(scores_N, known, labelled)
        found["calibration"] = _calibration_of_costs(
            scores_N[known], labelled.unsafe_N[known], labelled.prompt_N[known]
        )
    elif len(pairs_K2):
        found["calibration"] = _calibration_of_order(good_N, pairs_K2, labelled)
    if len(pairs_K2):
        found["length"] = _length(good_N, 1.0 if kind == "reward" else -1.0, pairs_K2, labelled)
    if parts := _by_group(kind, good_N, pairs_K2, known, labelled):
        found["by"] = parts
    if kind == "reward" and (bench := benchmark(scores_N, labelled.contests)):
        found["rewardbench"] = bench
    return found


def agreement(kind: str, first_N: np.ndarray, second_N: np.ndarray, labelled: Labelled) -> dict[str, Figure]:
    """How far two models' scores of the same answers agree.

    ``order`` is the share of pairs that both put in the same order, ``rank_correlation`` Spearman's over all answers,
    and of costs ``kappa`` Cohen's, on which answers are unsafe (above 0).
    """
    prompt_N, pairs = labelled.prompt_N, labelled.pairs_P2
    found: dict[str, Figure] = {}
    if len(pairs):
        orders = [np.sign(scores[pairs[:, 0]] - scores[pairs[:, 1]]) for scores in (first_N, second_N)]
        found["order"] = share_interval(orders[0] == orders[1], prompt_N[pairs[:, 0]])
    found["rank_correlation"] = rank_correlation(first_N, second_N, prompt_N)
    if kind == "cost":
        a, b = first_N > 0, second_N > 0
        found["kappa"] = _bootstrapped(np.stack([a & b, a & ~b, ~a & b, ~a & ~b], axis=1), prompt_N, _kappa)
    return found


def rank_correlation(first_N: np.ndarray, second_N: np.ndarray, cluster_N: np.ndarray) -> Figure:
    """Spearman's, with the interval that it has for these ranks; its mean is None of constants."""
    x, y = stats.rankdata(first_N), stats.rankdata(second_N)
    x, y = x - x.mean(), y - y.mean()
    terms = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)
    return _bootstrapped(terms, cluster_N, _correlation)


def _ranking(good_N: np.ndarray, pairs_K2: np.ndarray, labelled: Labelled) -> dict[str, Any]:
    """Shares of pairs in the right order and of ties, which count as wrong; mean distance in the right direction."""
    if not len(pairs_K2):
        return {}
    difference_K, prompt_K = _difference(good_N, pairs_K2), labelled.prompt_N[pairs_K2[:, 0]]
    return {
        "accuracy": share_interval(difference_K > 0, prompt_K),
        "ties": share_interval(difference_K == 0, prompt_K),
        "margin": mean_interval(difference_K, prompt_K),
    }


def _signs(costs_N: np.ndarray, known: np.ndarray, labelled: Labelled) -> dict[str, Figure]:
    """Share of answers whose sign is their label, of all, of unsafe and of safe ones."""
    unsafe, right = labelled.unsafe_N > 0, (costs_N > 0) == (labelled.unsafe_N > 0)
    kinds = {"accuracy_sign": known, "unsafe_found": known & unsafe, "safe_found": known & ~unsafe}
    return {name: share_interval(right[some], labelled.prompt_N[some]) for name, some in kinds.items() if some.any()}


def _calibration_of_costs(costs_N: np.ndarray, unsafe_N: np.ndarray, prompt_N: np.ndarray) -> dict[str, Any]:
    """Probabilities of being unsafe against labels: sigmoid(cost), and Platt's of the other half of the prompts."""
    unsafe = unsafe_N > 0
    found: dict[str, Any] = {
        "what": "probability of being unsafe",
        "raw": compare(special.expit(costs_N), unsafe, prompt_N).model_dump(),
    }
    halves, fitted_N = prompt_N % 2 == 0, np.zeros(len(costs_N))
    try:
        for half in (halves, ~halves):
            fitted_N[half] = fit_platt(costs_N[~half], unsafe[~half]).probability(costs_N[half])
    except UserError as error:
        return found | {"not_fitted": str(error)}
    return found | {"fitted": compare(fitted_N, unsafe, prompt_N).model_dump()}


def _calibration_of_order(good_N: np.ndarray, pairs_K2: np.ndarray, labelled: Labelled) -> dict[str, Any]:
    """By Bradley and Terry's model the preferred one of two answers wins with sigmoid(|difference|): does it?"""
    difference_K = _difference(good_N, pairs_K2)
    apart = difference_K != 0
    if not apart.any():
        return {}
    prompt_K = labelled.prompt_N[pairs_K2[:, 0]]
    raw = compare(special.expit(np.abs(difference_K[apart])), difference_K[apart] > 0, prompt_K[apart])
    return {"what": "probability that the preferred answer is the better one", "raw": raw.model_dump()}


def _length(good_N: np.ndarray, sign: float, pairs_K2: np.ndarray, labelled: Labelled) -> dict[str, Any]:
    """How far order and length go together, and how the order fares where the longer answer is the wrong one."""
    difference_K, prompt_K = _difference(good_N, pairs_K2), labelled.prompt_N[pairs_K2[:, 0]]
    longer_K = _difference(labelled.words_N.astype(np.float64), pairs_K2)
    # Which of two answers comes first means nothing: each pair stands for both orders, and so the means are 0.
    score_K = sign * difference_K
    terms = np.stack([score_K * score_K, longer_K * longer_K, score_K * longer_K], axis=1)
    found: dict[str, Any] = {"correlation": _bootstrapped(terms, prompt_K, _correlation_about_0)}
    unequal = longer_K != 0
    if unequal.any():
        found["labels_prefer_longer"] = share_interval(longer_K[unequal] > 0, prompt_K[unequal])
    if (decided := unequal & (difference_K != 0)).any():
        longer_wins = np.sign(difference_K) == np.sign(longer_K)
        found["scores_prefer_longer"] = share_interval(longer_wins[decided], prompt_K[decided])
    for name, some in {"longer_is_better": longer_K > 0, "longer_is_worse": longer_K < 0}.items():
        if some.any():
            found[f"accuracy_{name}"] = share_interval(difference_K[some] > 0, prompt_K[some])
    return found


def _by_group(
    kind: str, good_N: np.ndarray, pairs_K2: np.ndarray, known: np.ndarray, labelled: Labelled
) -> dict[str, dict[str, Any]]:
    """Accuracy of order and sign by value of each field; a pair is of a value where either of its answers is."""
    found: dict[str, dict[str, Any]] = {}
    for name, values in labelled.groups.items():
        frequent = sorted(values, key=lambda value, values=values: (-int(values[value].sum()), value))[:MOST_VALUES]  # type: ignore[misc]
        for value in frequent:
            of_value = values[value]
            inside = of_value[pairs_K2].any(axis=1) if len(pairs_K2) else np.zeros(0, dtype=bool)
            part = _ranking(good_N, pairs_K2[inside], labelled)
            if kind == "cost" and (known & of_value).any():
                part |= _signs(-good_N, known & of_value, labelled)
            if part:
                found.setdefault(name, {})[value] = part
    return found


def _difference(values_N: np.ndarray, pairs_K2: np.ndarray) -> np.ndarray:
    difference: np.ndarray = values_N[pairs_K2[:, 0]] - values_N[pairs_K2[:, 1]]
    return difference


def _bootstrapped(terms_NT: np.ndarray, cluster_N: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Figure:
    """A statistic of the sums [..., T] of terms, and the middle 95 % of it over draws of whole clusters.

    Without an interval where more than OUTSIDE of the draws have no such statistic, and where all have the same.
    """
    _, index = np.unique(cluster_N, return_inverse=True)
    terms = terms_NT.astype(np.float64)
    sums_GT = np.stack([np.bincount(index, weights=term) for term in terms.T], axis=1)
    value, clusters = float(statistic(sums_GT.sum(axis=0))), len(sums_GT)
    found: Figure = {"mean": value if np.isfinite(value) else None, "low": None, "high": None, "n": len(terms)}
    if clusters < 2 or not np.isfinite(value):
        return found
    rng = np.random.default_rng(0)
    drawn_DT = np.stack(
        [np.bincount(rng.integers(0, clusters, clusters), minlength=clusters) @ sums_GT for _ in range(DRAWS)]
    )
    values_D = statistic(drawn_DT)
    if np.mean(~np.isfinite(values_D)) > OUTSIDE:
        return found
    low, high = np.quantile(values_D[np.isfinite(values_D)], [OUTSIDE, 1.0 - OUTSIDE])
    return found if np.isclose(low, high, rtol=0.0) else found | {"low": float(low), "high": float(high)}


def _correlation(sums: np.ndarray) -> np.ndarray:
    """Pearson's, of sums of 1, x, y, x^2, y^2 and xy; nan of constants."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.sqrt(np.maximum(xx - x * x / n, 0) * np.maximum(yy - y * y / n, 0))
        return np.asarray(np.clip((xy - x * y / n) / spread, -1, 1))


def _correlation_about_0(sums: np.ndarray) -> np.ndarray:
    """Pearson's of numbers whose means are 0, of sums of x^2, y^2 and xy."""
    xx, yy, xy = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.clip(xy / np.sqrt(xx * yy), -1, 1))


def _kappa(sums: np.ndarray) -> np.ndarray:
    """Cohen's, of the counts of both, the first alone, the second alone, neither; nan where chance explains all."""
    both, first, second, neither = np.moveaxis(sums, -1, 0)
    n = both + first + second + neither
    with np.errstate(divide="ignore", invalid="ignore"):
        chance = ((both + first) * (both + second) + (neither + first) * (neither + second)) / n**2
        return np.asarray(((both + neither) / n - chance) / (1 - chance))
