"""What a limit costs, known before training: the constrained optimum near a reference, on sampled answers.

The best policy that stays near a reference, max E r - beta KL(pi || ref) subject to E c_i <= d_i, is the reference
tilted by exp((r - sum_i l_i c_i) / beta), and its multipliers minimise the dual (Huang et al. 2024, "One-Shot Safety
Alignment", https://arxiv.org/abs/2405.19544)

    D(l) = mean_x beta_x log mean_y exp((r - sum_i l_i (c_i - d_i)) / beta_x),   l >= 0,

which is convex, with the gradient d_i - E c_i under the tilt. Here y runs over the answers that were sampled to prompt
x, as if these were all that the reference says. A cost with a scope counts 0, and its limit too, at the other prompts:
its l is then the price of a unit of cost at a prompt in scope, as in a run, and its limit one on the mean over these.

beta is what a run makes it. There the KL weighs kl_coefficient after the division by 1 + sum l (see
`beaver_ray.method.advantages.combine_advantages`), so that in r - sum l c it weighs

    beta_x = kl_coefficient (1 + sum of the l_i that count for x),

and the multipliers at rest are the l that minimise D under the betas that they make themselves. Under such betas no
multiplier tilts further than exp(-c / kl_coefficient): there are limits that answers allow and a run does not reach.
Where a run divides its scores (`beaver_ray.method.history`), the reward by s and each cost by s_i, the KL weighs
kl_coefficient beside what is divided, and beta_x = kl_coefficient (s + sum of l_i s_i).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import Bounds, linprog, minimize
from scipy.sparse import csr_array, hstack

from beaver_ray.method.advantages import BoolArray, FloatArray, IntArray
from beaver_ray.method.multipliers import FLOAT32

ROUNDS, LEAPS = 300, 60
"""Most times that the dual is solved for betas that agree with its multipliers; in the first so many the way is
extrapolated, which several constraints that are hard to keep together may not bear to the end."""
AGREED = 1e-6
"""Change of a multiplier in standard units (see `Reference.units_M`) below which they agree."""
KEPT = 1e-3
"""A limit is kept where the cost is above it by no more of the cost's standard deviation: solvers end near 0."""
INFINITE = 1e4
"""A multiplier in standard units beyond which the reward counts for nothing."""
RELAXED = 0.1
"""Of the way from the lowest cost back to that without limits: how far `start` stays from what is out of reach."""
FAR = 1e6
"""Standard deviations below all costs at which it does not matter how much lower a limit is."""
STEPS = 100
"""Multipliers that `lowest_of_a_run` tries."""
LIMITS, NEAREST = 16, 0.02
"""Limits of a sweep, and how near it comes to the lowest cost, at which no multiplier is enough, as a share of it."""


@dataclass(frozen=True)
class Reference:
    """Answers of a reference to N prompts with their scores as a run sees them, and M costs with limits.

    The B answers to all prompts lie end to end, cut by `offsets` [N + 1]; each prompt has at least one. Each cost
    counts for at least one prompt, and is 0 where it does not count.
    """

    offsets: IntArray
    rewards_B: FloatArray
    costs_MB: FloatArray
    inside_MN: BoolArray
    """For which prompts a cost counts."""
    limits_M: FloatArray
    kl_coefficient: float
    reward_scale: float = 1.0
    """What a run divides the reward by."""
    cost_scales_M: FloatArray | float = 1.0
    """What it divides each cost by."""

    @property
    def counts_N(self) -> IntArray:
        """Answers to each prompt."""
        return np.diff(self.offsets)

    @cached_property
    def prompts_B(self) -> IntArray:
        """The number of each answer's prompt."""
        return np.repeat(np.arange(len(self.counts_N)), self.counts_N)

    @cached_property
    def shares_M(self) -> FloatArray:
        """The share of prompts that each cost counts for."""
        return self.inside_MN.mean(axis=1)

    @cached_property
    def units_M(self) -> FloatArray:
        """Standard deviation of each cost where it counts; 1 where all answers cost the same."""
        counting_MB = self.inside_MN[:, self.prompts_B]
        counted = [costs_B[counts] for costs_B, counts in zip(self.costs_MB, counting_MB, strict=True)]
        return np.array([float(c.std()) if np.ptp(c) > 0 else 1.0 for c in counted])

    @cached_property
    def least_MN(self) -> FloatArray:
        """The cost of each prompt's cheapest answer."""
        return np.minimum.reduceat(self.costs_MB, self.offsets[:-1], axis=1)

    @cached_property
    def fixed_M(self) -> BoolArray:
        """Costs that no policy changes: those of which all answers to a prompt have the same."""
        most_MN = np.maximum.reduceat(self.costs_MB, self.offsets[:-1], axis=1)
        return np.all(self.least_MN == most_MN, axis=1)

    @cached_property
    def tolerances_M(self) -> FloatArray:
        """How far above its limit a mean cost may lie that keeps it; of a fixed one the rounding of its numbers."""
        return np.where(self.fixed_M, FLOAT32 * np.abs(self.costs_MB).max(axis=1), KEPT * self.units_M)

    @cached_property
    def infinite_M(self) -> FloatArray:
        """A multiplier of each cost beside which the reward counts for nothing, also in the KL's weight; 0 of those
        that none changes."""
        spread_M = (float(self.rewards_B.std()) or 1.0) / self.units_M
        scaled_M = np.maximum(spread_M, self.reward_scale / np.asarray(self.cost_scales_M))
        return np.where(self.fixed_M, 0.0, INFINITE * scaled_M)

    def means(self, values_B: FloatArray, weights_B: FloatArray) -> FloatArray:
        """Mean [N] of each prompt's answers under these weights, which are 1 in sum over a prompt."""
        return np.add.reduceat(weights_B * values_B, self.offsets[:-1])

    def mean_costs(self, weights_B: FloatArray) -> FloatArray:
        """Mean of each cost [M] over the prompts that it counts for."""
        means = [self.means(costs_B, weights_B).mean() for costs_B in self.costs_MB]
        return np.array(means) / self.shares_M if means else np.zeros(0)


@dataclass(frozen=True)
class Outcome:
    """A policy on the sampled answers: the reference tilted by these multipliers."""

    multipliers_M: FloatArray
    reward: float
    costs_M: FloatArray
    """Each over the prompts that it counts for."""
    kl: float
    """Of an answer to the reference, in nats; at most the logarithm of the number of answers."""
    effective_answers: float
    """How many answers to a prompt the policy rests on, 1 / sum of squared weights, in the mean."""
    alone: float
    """Share of prompts at which it rests on fewer than two answers."""
    kept_M: BoolArray
    """Which limits are kept."""

    @property
    def kept(self) -> bool:
        """Whether all limits are kept."""
        return bool(self.kept_M.all())


def tilted(reference: Reference, multipliers_M: FloatArray, betas_N: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(weights [B] of the answers in the reference tilted by exp((r - sum l c) / beta), logarithm [N] of the mean)."""
    beta_B = betas_N[reference.prompts_B]
    scores_B = (reference.rewards_B - multipliers_M @ reference.costs_MB) / beta_B
    starts = reference.offsets[:-1]
    most_N = np.maximum.reduceat(scores_B, starts)
    raised_B = np.exp(scores_B - most_N[reference.prompts_B])
    sums_N = np.add.reduceat(raised_B, starts)
    return raised_B / sums_N[reference.prompts_B], most_N + np.log(sums_N / reference.counts_N)


def dual(
    reference: Reference, multipliers_M: FloatArray, limits_M: FloatArray, betas_N: FloatArray
) -> tuple[float, FloatArray]:
    """D of the module's text, and its gradient [M]."""
    weights_B, logs_N = tilted(reference, multipliers_M, betas_N)
    shares_M = reference.shares_M
    value = float((betas_N * logs_N).mean() + (multipliers_M * shares_M) @ limits_M)
    return value, shares_M * (limits_M - reference.mean_costs(weights_B))


def minimise_dual(
    reference: Reference, limits_M: FloatArray, betas_N: FloatArray, most_M: FloatArray, start_M: FloatArray
) -> FloatArray:
    """The multipliers [M] from 0 to ``most_M`` that minimise D, by L-BFGS-B from ``start_M``."""
    units_M = reference.units_M

    def scaled(multipliers: FloatArray) -> tuple[float, FloatArray]:
        value, gradient_M = dual(reference, multipliers / units_M, limits_M, betas_N)
        return value, gradient_M / units_M

    found = minimize(
        scaled,
        start_M * units_M,
        jac=True,
        method="L-BFGS-B",
        bounds=Bounds(0.0, most_M * units_M),
        options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 500},
    )
    return np.clip(found.x / units_M, 0.0, most_M)


def betas(reference: Reference, multipliers_M: FloatArray) -> FloatArray:
    """The weight of the KL [N] at each prompt beside r - sum l c, as a run has it."""
    counting_N = (multipliers_M * reference.cost_scales_M) @ reference.inside_MN
    return reference.kl_coefficient * (reference.reward_scale + counting_N)


def outcome(reference: Reference, multipliers_M: FloatArray, limits_M: FloatArray) -> Outcome:
    """The policy at rest under these multipliers, held against ``limits_M``."""
    weights_B, _ = tilted(reference, multipliers_M, betas(reference, multipliers_M))
    costs_M = reference.mean_costs(weights_B)
    effective_N = 1.0 / np.add.reduceat(weights_B**2, reference.offsets[:-1])
    raised_B = np.maximum(weights_B * reference.counts_N[reference.prompts_B], np.finfo(np.float64).tiny)
    return Outcome(
        multipliers_M=multipliers_M,
        reward=float(reference.means(reference.rewards_B, weights_B).mean()),
        costs_M=costs_M,
        kl=float(reference.means(np.log(raised_B), weights_B).mean()),
        effective_answers=float(effective_N.mean()),
        alone=float((effective_N < 2.0).mean()),
        kept_M=costs_M <= limits_M + reference.tolerances_M,
    )


def solve(reference: Reference, limits_M: FloatArray | None = None, start_M: FloatArray | None = None) -> Outcome:
    """The policy at rest under these limits, or the reference's own; ``start_M`` is where the search begins.

    Where the limits cannot be kept the multipliers end at no meaningful place, and `Outcome.kept` says so.
    """
    limits_M = reference.limits_M if limits_M is None else limits_M
    most_M, units_M = reference.infinite_M, reference.units_M
    trail = [np.zeros(len(limits_M)) if start_M is None else start_M]
    share, last_M = 1.0, np.zeros(len(limits_M))
    for number in range(ROUNDS):
        trail.append(minimise_dual(reference, limits_M, betas(reference, trail[-1]), most_M, trail[-1]))
        step_M = (trail[-1] - trail[-2]) * units_M
        if (np.abs(step_M) <= AGREED * (1.0 + trail[-1] * units_M)).all():
            break
        if number >= LEAPS:
            # A large multiplier makes the KL weigh more, under which a small one would do: whole steps may circle.
            share = share / 2 if step_M @ last_M < 0 else share
            last_M = step_M
            trail = [trail[-2] + share * (trail[-1] - trail[-2])]
        elif len(trail) == 3:
            trail = [np.clip(_extrapolated(*trail), 0.0, most_M)]
    return outcome(reference, trail[-1], limits_M)


def lowest(reference: Reference) -> FloatArray:
    """The lowest mean of each cost [M] that any policy on the sampled answers has: that of the cheapest to each prompt.

    Of each cost alone, whatever the others and the reward are then.
    """
    return reference.least_MN.mean(axis=1) / reference.shares_M


def lowest_of_a_run(reference: Reference) -> FloatArray:
    """The lowest mean of each cost [M] that the KL of a run leaves under a multiplier of that cost alone.

    That is mostly an infinite one. But a multiplier lets the KL weigh more as well: where the reward is on the cost's
    side, and by more than the cost itself, a smaller one or none leaves less. The least of some `STEPS` is given.
    """
    shares = np.append(0.0, np.geomspace(1.0 / INFINITE**2, 1.0, STEPS))
    found_M = []
    for number, alone_M in enumerate(np.diag(reference.infinite_M)):
        ends = (outcome(reference, share * alone_M, reference.limits_M) for share in shares)
        found_M.append(min(float(end.costs_M[number]) for end in ends))
    return np.array(found_M)


def nearest_together(reference: Reference) -> FloatArray:
    """Mean costs [M] of the policy on the sampled answers whose largest excess over a limit is smallest.

    Excesses are compared in standard deviations of their cost. Below 0 they are room: no limit is exceeded.
    A linear program over the weights of all answers.
    """
    prompts, answers, costs = len(reference.counts_N), len(reference.rewards_B), len(reference.limits_M)
    of_prompt = csr_array((np.ones(answers), (reference.prompts_B, np.arange(answers))), shape=(prompts, answers))
    means_MB = reference.costs_MB / (prompts * reference.shares_M[:, None])
    # In standard deviations, and without limits that are far from any mean: HiGHS drops what is tiny and takes 1e20 for
    # infinite.
    units_M = reference.units_M
    least_M, most_M = reference.costs_MB.min(axis=1), reference.costs_MB.max(axis=1)
    limits_M = np.clip(reference.limits_M, least_M - FAR * units_M, most_M)
    found = linprog(
        np.append(np.zeros(answers), 1.0),
        A_ub=hstack([csr_array(means_MB / units_M[:, None]), csr_array(-np.ones((costs, 1)))]),
        b_ub=limits_M / units_M,
        A_eq=hstack([of_prompt, csr_array((prompts, 1))]),
        b_eq=np.ones(prompts),
        bounds=[*[(0.0, None)] * answers, (None, None)],
        method="highs",
    )
    if not found.success:
        raise RuntimeError(f"the linear program over {answers} answers and {costs} costs failed: {found.message}")
    return np.asarray(means_MB @ found.x[:answers])


def sweep(reference: Reference, number: int, low: float) -> list[tuple[float, Outcome]]:
    """(limit, policy at rest) for limits of one cost in rising order, from ``low``, the lowest of a run, up; the others
    stay.

    They end where the limit does not bind any more, or at the configured one, which is always among them.
    """
    configured, limits_M = float(reference.limits_M[number]), reference.limits_M.copy()
    limits_M[number] = reference.costs_MB[number].max()  # which no mean exceeds
    here = solve(reference, limits_M)
    high = max(float(here.costs_M[number]), configured)
    grid = np.linspace(low + NEAREST * (high - low), high, LIMITS)
    found, start_M = [], here.multipliers_M
    for limit in sorted({*grid.tolist(), configured}, reverse=True):
        limits_M[number] = limit
        here = solve(reference, limits_M, start_M)
        start_M = here.multipliers_M if here.kept else start_M
        found.append((limit, here))
    return found[::-1]


@dataclass(frozen=True)
class Study:
    """What the limits of a run cost near its reference."""

    names: list[str]
    """Of the M constraints."""
    reference: Reference
    rest: Outcome
    """The policy at rest under the limits."""
    free: Outcome
    """The one without limits."""
    lowest_M: FloatArray
    lowest_of_a_run_M: FloatArray
    together_M: FloatArray
    """Costs of the policy on the sampled answers that comes nearest to all limits."""
    sweeps: dict[str, list[tuple[float, Outcome]]]
    """Of each constraint the policies at rest under other limits, see `sweep`."""

    @property
    def missed_M(self) -> BoolArray:
        """Limits that no policy on the sampled answers keeps: each alone, or where each can be, all together."""
        within_M = self.reference.limits_M + self.reference.tolerances_M
        alone_M: BoolArray = self.lowest_M > within_M
        return alone_M if alone_M.any() else self.together_M > within_M


def study(reference: Reference, names: list[str]) -> Study:
    """All of `Study`; some seconds for 600 prompts with 16 answers and two constraints."""
    without_M = np.zeros(len(names))
    lowest_of_a_run_M = lowest_of_a_run(reference)
    return Study(
        names=names,
        reference=reference,
        rest=solve(reference),
        free=outcome(reference, without_M, reference.limits_M),
        lowest_M=lowest(reference),
        lowest_of_a_run_M=lowest_of_a_run_M,
        together_M=nearest_together(reference),
        sweeps={name: sweep(reference, number, float(lowest_of_a_run_M[number])) for number, name in enumerate(names)},
    )


def start(reference: Reference, most_M: FloatArray) -> tuple[Outcome, FloatArray]:
    """(the policy at rest, the multipliers [M] that a run may start from, at most ``most_M``).

    Where the limits cannot be kept (`Outcome.kept`), or one only as far as `Reference.tolerances_M` forgives, these are
    of the nearest limits that can be with some room: a finite weight that takes the costs most of the way there is.
    """
    rest = solve(reference)
    if rest.kept and (reference.fixed_M | (lowest_of_a_run(reference) <= reference.limits_M)).all():
        return rest, np.minimum(rest.multipliers_M, most_M)
    lowest_M = outcome(reference, reference.infinite_M, reference.limits_M).costs_M
    free_M = outcome(reference, np.zeros(len(lowest_M)), reference.limits_M).costs_M
    within_reach_M = lowest_M + RELAXED * np.maximum(free_M - lowest_M, 0.0)
    nearest = solve(reference, np.maximum(reference.limits_M, within_reach_M))
    return rest, np.minimum(nearest.multipliers_M, most_M)


def _extrapolated(first: FloatArray, second: FloatArray, third: FloatArray) -> FloatArray:
    """Where a sequence goes whose differences shrink by a constant factor (Aitken 1926); its end where they do not."""
    step, bend = third - second, third - 2.0 * second + first
    shrinks = (bend != 0.0) & (np.abs(step) < np.abs(second - first))
    return third - np.where(shrinks, step**2 / np.where(shrinks, bend, 1.0), 0.0)
