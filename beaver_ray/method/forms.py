"""What of a cost a limit bounds: its mean, or a figure in which no answer makes up for another one.

A form says three things of a step's N answers, so that the multiplier, the policy and the figures mean the same: what
the multiplier compares with the limit (`episodes`, whose mean is the bounded figure), what of it the policy is trained
on (`per_answer`, whose policy gradient is that of the bounded figure), and how large the latter may become (`scale`).
``groups_N`` are equal for answers that were drawn together for one prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from beaver_ray.method.advantages import FloatArray, IntArray
from beaver_ray.options import rounded_up


class Episodes(NamedTuple):
    """What a step is judged by, E of them."""

    costs_E: FloatArray
    log_ratios_E: FloatArray
    """Policy to generator."""
    answers_E: IntArray
    """An answer that each is of, by its number."""


@dataclass(frozen=True)
class Form:
    """The mean: what one answer costs less than the limit, another may cost more."""

    @property
    def scale(self) -> float:
        """A unit of an answer's cost is at most so much of `per_answer`."""
        return 1.0

    @property
    def hit(self) -> float:
        """An answer that costs 1 among others that cost 0 is at most so much of `episodes`."""
        return 1.0

    def per_answer(self, costs_N: FloatArray, groups_N: IntArray, weights_N: FloatArray) -> FloatArray:
        """The cost [N] of each answer that the policy is trained on. weights_N: importance weights, of any mean."""
        return costs_N

    def episodes(
        self, costs_N: FloatArray, groups_N: IntArray, weights_N: FloatArray, log_ratios_N: FloatArray
    ) -> Episodes:
        """The costs whose mean is bounded."""
        return Episodes(self.per_answer(costs_N, groups_N, weights_N), log_ratios_N, np.arange(len(costs_N)))

    def deciding(self, costs_E: FloatArray) -> FloatArray:
        """The answers' own costs that the mean of these ``episodes`` is the mean of."""
        return costs_E


MEAN = Form()


@dataclass(frozen=True)
class Hinge(Form):
    """The mean of max(0, cost): RePO's {C(x, y)}+ (https://arxiv.org/abs/2410.19933)."""

    def per_answer(self, costs_N: FloatArray, groups_N: IntArray, weights_N: FloatArray) -> FloatArray:
        """max(0, cost)."""
        return np.maximum(costs_N, 0.0)


@dataclass(frozen=True)
class CVaR(Form):
    """The mean of the worst share 1 - level of the answers (Rockafellar and Uryasev 2000, theorem 1).

    With nu the level-quantile of the step's costs, the smallest that at least a share of level does not exceed, the
    mean of nu + max(0, cost - nu) / (1 - level) is exactly that of the step. As nu minimises it, its derivative by nu
    is 0, and the policy gradient is that with nu held (Tamar et al. 2015, https://arxiv.org/abs/1404.3862): consistent,
    and not unbiased, since a step's quantile is no expectation.
    """

    level: float

    @property
    def scale(self) -> float:
        """1 / (1 - level)."""
        return 1.0 / (1.0 - self.level)

    @property
    def hit(self) -> float:
        """1 / (1 - level)."""
        return self.scale

    def per_answer(self, costs_N: FloatArray, groups_N: IntArray, weights_N: FloatArray) -> FloatArray:
        """nu + max(0, cost - nu) / (1 - level), nu being the quantile under the importance weights."""
        if len(costs_N) == 0:
            return costs_N
        # By weights NumPy compares sums with the level itself: n * level would round to the next answer now and then.
        nu = np.quantile(costs_N, self.level, weights=weights_N, method="inverted_cdf")
        return nu + np.maximum(costs_N - nu, 0.0) * self.scale

    def deciding(self, costs_E: FloatArray) -> FloatArray:
        """The worst share 1 - level. Of several steps together, whose quantiles differ, it is that but nearly."""
        nu = costs_E.min()
        worst = max(1, rounded_up(len(costs_E) * (1.0 - self.level)))
        return np.sort(nu + (costs_E - nu) / self.scale)[-worst:]


@dataclass(frozen=True)
class WorstOfK(Form):
    """The mean over prompts of the largest cost among the answers to a prompt.

    The gradient of E[max c(y_j)] over k answers is E[sum over j of (max - b_j) grad log p(y_j)] for any b_j that does
    not depend on y_j; the largest of the other answers' costs is one, and then only the worst answer has a weight: by
    how much it is worse than the next. The policy's loss is a mean over answers and not a sum, hence the factor k.

    answers: those to a prompt; a step may have fewer of a prompt, and k is what it has. The policy's loss weighs such a
    prompt less, its reward as well, where what is bounded counts all prompts alike.
    """

    answers: int

    @property
    def scale(self) -> float:
        """k."""
        return float(self.answers)

    def per_answer(self, costs_N: FloatArray, groups_N: IntArray, weights_N: FloatArray) -> FloatArray:
        """k times what the answer adds to the largest of the others; an only answer adds what it costs."""
        worst = _Worst.of(costs_N, groups_N)
        return worst.counts_N * (worst.largest_G[worst.group_N] - worst.others_N)

    def episodes(
        self, costs_N: FloatArray, groups_N: IntArray, weights_N: FloatArray, log_ratios_N: FloatArray
    ) -> Episodes:
        """The largest cost of each prompt's answers, and the log-ratio of these answers together."""
        worst = _Worst.of(costs_N, groups_N)
        return Episodes(worst.largest_G, np.bincount(worst.group_N, log_ratios_N).astype(np.float64), worst.answer_G)

    def against_others(self, costs_N: FloatArray, groups_N: IntArray) -> tuple[FloatArray, FloatArray]:
        """(k times the largest cost among the answers to the prompt, k times what may be expected of it without the
        answer), both [N].

        The latter is what `leave_one_out_baselines` is to a mean: the largest cost among the k - 1 others, with the
        mean of the largest at the other prompts counted in by a share 1/k. Without that there would be no gradient
        where two answers are equally bad, as there often are where costs are 0 or 1.
        """
        worst = _Worst.of(costs_N, groups_N)
        largest_N, expected_N, elsewhere = worst.largest_G[worst.group_N], worst.others_N, len(worst.largest_G) - 1
        if elsewhere > 0:
            means_N = (worst.largest_G.sum() - largest_N) / elsewhere
            expected_N = expected_N + (means_N - expected_N) / worst.counts_N
        return worst.counts_N * largest_N, worst.counts_N * expected_N


@dataclass(frozen=True)
class _Worst:
    group_N: IntArray
    """Which of the G prompts an answer is to, by rising number."""
    largest_G: FloatArray
    """The largest cost among the answers to each."""
    answer_G: IntArray
    """The number of an answer that costs it."""
    counts_N: IntArray
    """Answers to the same prompt, this one among them."""
    others_N: FloatArray
    """The largest cost among the others of these, 0 where there are none."""

    @classmethod
    def of(cls, costs_N: FloatArray, groups_N: IntArray) -> _Worst:
        _, group_N = np.unique(groups_N, return_inverse=True)
        counts_G = np.bincount(group_N)
        order_N = np.lexsort((costs_N, group_N))  # by prompt, then by cost
        last_G = np.cumsum(counts_G) - 1
        answer_G = order_N[last_G]
        largest_G = costs_N[answer_G]
        others_N = largest_G[group_N]
        others_N[answer_G] = np.where(counts_G > 1, costs_N[order_N[last_G - 1]], 0.0)
        return cls(group_N, largest_G, answer_G, counts_G[group_N], others_N)


def make_form(text: str, answers: int) -> Form:
    """The form that a constraint's ``form`` names; ``answers`` are those to a prompt."""
    name, _, level = text.partition(":")
    if name == "cvar":
        return CVaR(float(level))
    return {"mean": MEAN, "hinge": Hinge(), "worst_of_k": WorstOfK(answers)}[name]


def bounded(form: Form, costs_N: FloatArray, groups_N: IntArray) -> float:
    """What the limit bounds, of these answers; NaN where there are none."""
    if len(costs_N) == 0:
        return float("nan")
    return float(form.episodes(costs_N, groups_N, np.ones(len(costs_N)), np.zeros(len(costs_N))).costs_E.mean())
