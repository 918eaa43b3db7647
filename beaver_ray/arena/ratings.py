"""Elo ratings: the Bradley-Terry model by maximum likelihood on all comparisons at once.

The probability that policy i beats j is 1 / (1 + 10^((R_j - R_i) / 400)) (Bradley and Terry 1952; the scale is Elo's).
A tie counts as half a win to either. Nothing depends on the order of the games, unlike with Elo's update rule. The
intervals are analytic: the cluster-robust (sandwich) covariance of the estimate, clustered by prompt, with Student's t,
as `beaver_ray.evaluation` has for means, and no narrower than what the prompts that were not seen allow: the ends of
the ratings that come of one policy winning, or losing, all its comparisons on a share `beaver_ray.evaluation.unseen` of
its prompts. Of two policies these are the ratings at the ends of `alike_bounds` of the win rate. Ratings are relative:
their mean is AVERAGE.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats
from scipy.sparse import csgraph

from beaver_ray.arena.comparisons import points
from beaver_ray.evaluation import UPPER, unseen

AVERAGE = 1000.0
SCALE = 400.0 / math.log(10.0)

Verdicts = tuple[NDArray[np.str_], NDArray[np.integer]]
"""Verdicts [M] on two policies, and the number of the prompt [M] of each."""


def elo(
    policies: list[str], pairs: Mapping[tuple[str, str], Verdicts], certain: Collection[tuple[str, str]] = ()
) -> dict[str, dict[str, Any]] | None:
    """The rating of each policy, {"mean", "low", "high", "n"}; n are its comparisons.

    certain: those pairs that would go no other way on any other prompt, as of a policy with itself.
    None where no finite ratings are the likeliest: where some policies lost to the others, or were compared with them,
    not once (Ford 1957). Verdicts that failed are left out.
    """
    place = {name: number for number, name in enumerate(policies)}
    games = [_game(place[first], place[second], *verdicts) for (first, second), verdicts in pairs.items()]
    design_QP = np.zeros((len(games), len(policies)))
    beats_PP = np.zeros((len(policies), len(policies)))
    for number, (i, j, earned, _) in enumerate(games):
        design_QP[number, [i, j]] = 1.0, -1.0
        beats_PP[i, j] += earned.sum()
        beats_PP[j, i] += (1.0 - earned).sum()
    if len(policies) < 2 or csgraph.connected_components(beats_PP, connection="strong")[0] > 1:
        return None
    wins_Q = np.array([earned.sum() for _, _, earned, _ in games])
    count_Q = np.array([float(len(earned)) for _, _, earned, _ in games])
    prompts_Q = [prompts for *_, prompts in games]
    free_QF = design_QP[:, 1:]  # the first policy's strength is 0 until all are centred
    centred_PF = np.vstack([np.zeros(len(policies) - 1), np.eye(len(policies) - 1)]) - 1.0 / len(policies)
    strength_F = _likeliest(free_QF, wins_Q, count_Q)
    chance_Q = special.expit(free_QF @ strength_F)
    covariance_FF = _covariance(free_QF, chance_Q, count_Q, [game[2:] for game in games])
    clusters = len(np.unique(np.concatenate(prompts_Q)))
    variance_P = np.einsum("pf,fg,pg->p", centred_PF, covariance_FF, centred_PF)
    half_P = SCALE * float(stats.t.ppf(UPPER, max(clusters - 1, 1))) * np.sqrt(np.maximum(variance_P, 0.0))
    ratings_P = AVERAGE + SCALE * (centred_PF @ strength_F)
    open_QP = design_QP * np.array([pair not in certain for pair in pairs])[:, None]
    others_EP = [
        AVERAGE + SCALE * (centred_PF @ _likeliest(free_QF, other_Q, count_Q))
        for other_Q in _other_wins(open_QP, wins_Q, count_Q, prompts_Q)
    ]
    low_P = np.min([ratings_P - half_P, *others_EP], axis=0)
    high_P = np.max([ratings_P + half_P, *others_EP], axis=0)
    played_P = np.abs(design_QP).T @ count_Q
    return {
        name: {"mean": float(ratings_P[p]), "low": float(low_P[p]), "high": float(high_P[p]), "n": int(played_P[p])}
        for name, p in place.items()
    }


def _other_wins(
    design_QP: NDArray[np.float64], wins_Q: NDArray, count_Q: NDArray, prompts_Q: list[NDArray[np.integer]]
) -> Iterator[NDArray[np.float64]]:
    """The wins [Q] if one policy, each in turn, had won all its comparisons on the prompts not seen, or lost them."""
    for side_Q in design_QP.T:
        seen = len(set().union(*(prompts.tolist() for prompts, side in zip(prompts_Q, side_Q, strict=True) if side)))
        if seen:
            share_Q = unseen(seen) * np.abs(side_Q)
            for winner in (1.0, -1.0):
                yield wins_Q + share_Q * (np.where(side_Q == winner, count_Q, 0.0) - wins_Q)


def _game(
    first: int, second: int, verdicts_M: NDArray[np.str_], prompts_M: NDArray[np.integer]
) -> tuple[int, int, NDArray[np.float64], NDArray[np.integer]]:
    earned_M = points(verdicts_M)
    counted = ~np.isnan(earned_M)
    return first, second, earned_M[counted], prompts_M[counted]


def _likeliest(design_QF: NDArray[np.float64], wins_Q: NDArray, count_Q: NDArray) -> NDArray[np.float64]:
    """The strengths under which the wins of each pair of policies are likeliest."""

    def loss(strength_F: NDArray[np.float64]) -> float:
        gap_Q = design_QF @ strength_F
        return float(-(wins_Q @ special.log_expit(gap_Q) + (count_Q - wins_Q) @ special.log_expit(-gap_Q)))

    def slope(strength_F: NDArray[np.float64]) -> NDArray[np.float64]:
        return -design_QF.T @ (wins_Q - count_Q * special.expit(design_QF @ strength_F))

    def curvature(strength_F: NDArray[np.float64]) -> NDArray[np.float64]:
        return _information(design_QF, special.expit(design_QF @ strength_F), count_Q)

    start_F = np.zeros(design_QF.shape[1])
    found = optimize.minimize(loss, start_F, jac=slope, hess=curvature, method="trust-exact", options={"gtol": 1e-9})
    return np.asarray(found.x, dtype=np.float64)


def _information(design_QF: NDArray[np.float64], chance_Q: NDArray, count_Q: NDArray) -> NDArray[np.float64]:
    return np.asarray(design_QF.T @ (design_QF * (count_Q * chance_Q * (1.0 - chance_Q))[:, None]), dtype=np.float64)


def _covariance(
    design_QF: NDArray[np.float64], chance_Q: NDArray, count_Q: NDArray, games: list[tuple[NDArray, NDArray]]
) -> NDArray[np.float64]:
    """The strengths' covariance, robust to what comparisons on one prompt have in common."""
    names_G = np.unique(np.concatenate([prompts for _, prompts in games]))
    surprise_GQ = np.zeros((len(names_G), len(games)))
    for number, (earned, prompts) in enumerate(games):
        np.add.at(surprise_GQ[:, number], np.searchsorted(names_G, prompts), earned - chance_Q[number])
    score_GF = surprise_GQ @ design_QF
    bread_FF = np.linalg.inv(_information(design_QF, chance_Q, count_Q))
    correction = len(names_G) / max(len(names_G) - 1, 1)
    return np.asarray(bread_FF @ (correction * score_GF.T @ score_GF) @ bread_FF, dtype=np.float64)
