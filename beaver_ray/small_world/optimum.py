"""The best mean reward that any stochastic policy can reach under bounds on mean costs, as a linear program.

A policy answers each prompt with a mixture of what the prompt offers. All bounds are on means over prompts, so the best
mixtures solve a linear program with one variable for each prompt and answer (an occupation measure, Altman 1999,
"Constrained Markov Decision Processes"). Prompts that offer the same are alike: one group of them takes one mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beaver_ray.errors import UserError


@dataclass(frozen=True)
class Group:
    """Prompts that offer the same answers and count for the same bounds."""

    count: int
    menu: Sequence[tuple[float, Sequence[float]]]
    """(reward, cost for each of the bounds) of each answer that is worth considering."""
    counts_for: Sequence[bool]
    """For each of the bounds, whether its mean is over these prompts too."""


def best_mean_reward(groups: Sequence[Group], limits: Sequence[float]) -> float:
    """Highest mean reward over all prompts, with the mean of each cost over those it counts for within its limit.

    Raises UserError where there are no prompts, or no mixture keeps all limits.
    """
    return float(-_solved(groups, limits).fun / sum(group.count for group in groups))


def best_mixture(groups: Sequence[Group], limits: Sequence[float]) -> NDArray[np.float64]:
    """The share of all prompts that the best policy gives each answer to, [A] over the menus of all groups in a row.

    Errors are those of `best_mean_reward`.
    """
    return np.asarray(_solved(groups, limits).x / sum(group.count for group in groups), dtype=np.float64)


def _solved(groups: Sequence[Group], limits: Sequence[float]) -> Any:
    """scipy's solution; x_A is how many of its group's prompts an answer is given to."""
    from scipy import optimize, sparse

    if not groups:
        raise UserError("the optimum of no prompts is undefined: pass at least one prompt")
    count_G = np.array([group.count for group in groups], dtype=np.float64)
    owner_A = np.repeat(np.arange(len(groups)), [len(group.menu) for group in groups])
    reward_A = np.array([reward for group in groups for reward, _ in group.menu])
    cost_AB = np.array([costs for group in groups for _, costs in group.menu]).reshape(len(owner_A), len(limits))
    counts_for_GB = np.array([group.counts_for for group in groups], dtype=bool).reshape(len(groups), len(limits))
    # In a bound without prompts nothing is left to bound.
    each_group_GA = sparse.csr_array((np.ones(len(owner_A)), (owner_A, np.arange(len(owner_A)))))
    solved = optimize.linprog(
        -reward_A,
        A_ub=sparse.csr_array((cost_AB * counts_for_GB[owner_A]).T) if limits else None,
        b_ub=np.array(limits) * (count_G @ counts_for_GB) if limits else None,
        A_eq=each_group_GA,
        b_eq=count_G,
        method="highs",
    )
    if solved.status == 2:
        raise UserError(f"no policy keeps the limits {', '.join(f'{x:g}' for x in limits)}: raise the limit of one")
    if solved.status != 0:
        raise UserError(f"the constrained optimum cannot be worked out: {solved.message}")
    return solved
