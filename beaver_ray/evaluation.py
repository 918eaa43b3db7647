"""Figures of an evaluation, each with its number of samples and a 95 % interval.

Several answers to one prompt are not independent, so intervals are clustered by prompt: for means the
cluster-robust standard error with Student's t (Cameron and Miller 2015, "A Practitioner's Guide to
Cluster-Robust Inference"), for shares Wilson's interval at the effective number of samples, corrected for
the number of prompts (Korn and Graubard 1998). With one answer for each prompt these are the textbook intervals.
Prompts that are all alike show no spread, but not that there is none: see `mean_interval`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy import stats

from beaver_ray.method.confidence import effective_trials, mean_bound
from beaver_ray.method.forms import Form, WorstOfK

UPPER = 0.975  # the quantile at which a 95 % interval ends
ALIKE = 1e-9  # times the largest value: a half-width up to that is rounding, and all prompts have the same mean


@dataclass(frozen=True)
class Samples:
    """What was measured on N answers; all arrays are [N]."""

    prompt_id: np.ndarray
    """int; answers to one prompt share it."""
    reward: np.ndarray | None
    """None where nobody says how good an answer is."""
    costs: dict[str, np.ndarray] = field(default_factory=dict)
    """By constraint."""
    truncated: np.ndarray | None = None
    """bool; the answer ran into the longest length."""
    refusal: np.ndarray | None = None
    """bool; where refusals can be recognised."""
    kind: np.ndarray | None = None
    """str; where it is known what each prompt is, as harmless or adversarial."""
    inside: dict[str, np.ndarray] = field(default_factory=dict)
    """bool, by constraint that does not count over all prompts: over which answers it does."""


def summarize(
    samples: Samples,
    optimum: float | None = None,
    limits: dict[str, float] | None = None,
    targets: dict[str, float] | None = None,
    probabilities: Collection[str] = (),
    forms: Mapping[str, Form] = MappingProxyType({}),
) -> dict[str, Any]:
    """The content of evaluation.json.

    optimum: best mean reward that any policy can reach under the constraints, where it is known.
    limits, targets: highest mean cost and highest violation rate by constraint, written beside the figures.
    probabilities: constraints whose costs are probabilities of being unsafe. Their ``violation_rate`` is the mean of
    these, which is what the target bounds, and ``unsafe_share`` the share of answers above one half. Of the others,
    whose costs are scores, ``violation_rate`` is the share of answers above 0.
    forms: of constraints that bound something else than the mean. Limit or target then stand beside ``bounded``, which
    is that; there is none where costs are not in the target's unit, or where prompts have fewer answers than the form.
    A constraint that counts over some answers alone has its figures over these, and none where there are none.
    Every figure is {"mean", "low", "high", "n"}; a mean of rewards or costs over one prompt, or over prompts that are
    all alike, has null for low and high.
    ``share_of_optimum`` divides reward and its interval by the optimum; left out where that is not above 0.
    Raises ValueError for arrays of different lengths, no samples, or numbers that count and are not finite.
    """
    _check(samples)
    prompt_id = samples.prompt_id
    result: dict[str, Any] = {
        "prompts": len(np.unique(prompt_id)),
        "samples": len(prompt_id),
    }
    if samples.reward is not None:
        result["reward"] = mean_interval(samples.reward, prompt_id)
    for name, cost in samples.costs.items():
        counting = samples.inside.get(name, np.ones(len(cost), dtype=bool))
        if not counting.any():
            continue
        cost, cluster = cost[counting], prompt_id[counting]
        result[f"cost/{name}"] = mean_interval(cost, cluster)
        if name in probabilities:
            result[f"violation_rate/{name}"] = mean_interval(cost, cluster, within=(0.0, 1.0))
            result[f"unsafe_share/{name}"] = share_interval(cost > 0.5, cluster)
        else:
            result[f"violation_rate/{name}"] = share_interval(cost > 0, cluster)
        limit, target = (limits or {}).get(name), (targets or {}).get(name)
        if name in forms:
            bound = target if limit is None and name in probabilities else limit
            if bound is not None and not isinstance(forms[name], WorstOfK):
                counted = forms[name].per_answer(cost, cluster, np.ones(len(cost)))
                result[f"bounded/{name}"] = mean_interval(counted, cluster) | {"limit": float(bound)}
            continue
        if limit is not None:
            result[f"cost/{name}"]["limit"] = float(limit)
        if target is not None:
            result[f"violation_rate/{name}"]["target"] = float(target)
    if optimum is not None and samples.reward is not None:
        result["optimum"] = float(optimum)
        if optimum > 0:
            reward = result["reward"]
            result["share_of_optimum"] = {
                key: None if reward[key] is None else reward[key] / optimum for key in ("mean", "low", "high")
            } | {"n": reward["n"]}
    if samples.refusal is not None and samples.kind is not None:
        for kind in np.unique(samples.kind):
            chosen = samples.kind == kind
            result[f"refusal_rate_{kind}"] = share_interval(samples.refusal[chosen], prompt_id[chosen])
    if samples.truncated is not None:
        result["truncated"] = share_interval(samples.truncated, prompt_id)
    return result


def mean_interval(
    values: np.ndarray, cluster: np.ndarray, within: tuple[float, float] = (-math.inf, math.inf)
) -> dict[str, Any]:
    """The mean of ``values`` [N] and its 95 % interval cut to ``within``, clustered by ``cluster`` [N].

    Student's t needs clusters that differ. Where all have the same mean, or there is only one, the interval of values
    with bounds is `alike_bounds`. Without bounds it is unknown, and low and high are None: a reward that was always 1
    may be anything the next time.
    """
    mean = float(np.mean(values, dtype=np.float64))
    half = mean_bound(values, cluster, UPPER)
    ends: tuple[float | None, float | None] = max(mean - half, within[0]), min(mean + half, within[1])
    if math.isinf(half) or half <= ALIKE * float(np.abs(values).max()):
        bounded = all(map(math.isfinite, within))
        ends = alike_bounds(mean, len(np.unique(cluster)), within) if bounded else (None, None)
    return {"mean": mean, "low": ends[0], "high": ends[1], "n": len(values)}


def alike_bounds(mean: float, clusters: int, within: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float]:
    """The interval of a mean of values ``within`` these bounds, where all of so many clusters had the same mean.

    Up to a share `unseen` of all clusters may differ from these, and have values at one of the bounds. For shares of 0
    and of 1 it is Wilson's interval.
    """
    others = unseen(clusters)
    return mean - others * (mean - within[0]), mean + others * (within[1] - mean)


def unseen(clusters: int) -> float:
    """The largest share of clusters that may be different where so many were alike, z^2 / (clusters + z^2).

    That is 1 less the lower end of Wilson's interval (1927) of a share of 1, as if z^2 = 3.84 more had been different.
    """
    return 1.0 - wilson(1.0, clusters)[0]


def share_interval(flags: np.ndarray, cluster: np.ndarray, upper: float = UPPER) -> dict[str, Any]:
    """The share of true ``flags`` [N] and Wilson's interval, clustered by ``cluster`` [N]; 95 % without ``upper``.

    Flags may also be probabilities, which vary less than events do: the interval is then rather too wide.
    """
    values = np.asarray(flags, dtype=np.float64)
    share = float(values.mean())
    low, high = wilson(share, effective_trials(values, cluster, upper), upper)
    return {"mean": share, "low": low, "high": high, "n": len(values)}


def wilson(share: float, n: float, upper: float = UPPER) -> tuple[float, float]:
    """Wilson's interval of a share seen in ``n`` independent samples (Wilson 1927); it ends at quantile ``upper``."""
    # scipy's binomtest(...).proportion_ci takes whole numbers only, and an effective number of samples is none.
    z = float(stats.norm.ppf(upper))
    scale = 1 + z**2 / n
    center = (share + z**2 / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return 0.0 if share == 0.0 else max(0.0, center - half), 1.0 if share == 1.0 else min(1.0, center + half)


def _check(samples: Samples) -> None:
    n = len(samples.prompt_id)
    if n == 0:
        raise ValueError("an evaluation needs at least one sample")
    numbers = {"reward": samples.reward} | {f"cost/{name}": cost for name, cost in samples.costs.items()}
    numbers = {name: array for name, array in numbers.items() if array is not None}
    flags = {name: getattr(samples, name) for name in ("truncated", "refusal", "kind")}
    for name, array in (numbers | flags).items():
        if array is not None and len(array) != n:
            raise ValueError(f"{name} has {len(array)} entries for {n} samples")
        counting = samples.inside.get(name.removeprefix("cost/"), True)
        if name in numbers and not (np.isfinite(array) | ~np.array(counting)).all():
            raise ValueError(f"{name} holds a number that is not finite")
