"""Best-of-n under a gate: of an answer's n rivals that keep all limits the one with the best reward, else a refusal.

Without the gate this is rejection sampling by a reward model as in Nakano et al. 2021
(https://arxiv.org/abs/2112.09332). Axes: N prompts, K answers to each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


def chosen(rewards_NK: FloatArray, kept_NK: BoolArray) -> NDArray[np.int64]:
    """The number [N] of the answer with the best reward among those that are ``kept``; -1 where none is.

    Of equals the first.
    """
    best_N = np.argmax(np.where(kept_NK, rewards_NK, -np.inf), axis=1)
    return np.where(kept_NK.any(axis=1), best_N, -1)


def chances(rewards_NK: FloatArray, kept_NK: BoolArray, n: int) -> FloatArray:
    """How likely each answer [N, K] is what best-of-n gives, where n of the K are drawn without replacement.

    An answer that i kept ones surpass is given where it is drawn and none of those is: C(K - 1 - i, n - 1) of the
    C(K, n) draws. What a row lacks to 1 is the chance of a refusal (`refusal_chances`).
    """
    answers = kept_NK.shape[1]
    if not 1 <= n <= answers:
        raise ValueError(f"n must be from 1 to the {answers} answers that there are, not {n}")
    order_NK = np.argsort(np.where(kept_NK, -rewards_NK, np.inf), axis=1, kind="stable")
    by_rank_K = all_among(answers - 1 - np.arange(answers), n - 1, answers - 1) * n / answers
    chances_NK = np.empty(kept_NK.shape)
    np.put_along_axis(chances_NK, order_NK, np.broadcast_to(by_rank_K, kept_NK.shape), axis=1)
    return np.where(kept_NK, chances_NK, 0.0)


def refusal_chances(kept_NK: BoolArray, n: int) -> FloatArray:
    """How likely [N] none of n answers is kept, exactly 0 where fewer than n are not."""
    answers = kept_NK.shape[1]
    return all_among(answers - kept_NK.sum(axis=1), n, answers)


def all_among(some_M: NDArray[np.integer], drawn: int, answers: int) -> FloatArray:
    """How likely all of ``drawn`` answers are among ``some`` [M] of them: C(some, drawn) / C(answers, drawn).

    By logarithms: C(1100, 550) is more than a float holds.
    """
    left_M = np.maximum(some_M - drawn, 0)
    logs_M = gammaln(some_M + 1.0) - gammaln(answers + 1.0) + (gammaln(answers - drawn + 1.0) - gammaln(left_M + 1.0))
    return np.where(some_M < drawn, 0.0, np.exp(logs_M))


def sizes(answers: int) -> list[int]:
    """1, 2, 4, ... below the number of answers, and that number: where a curve over n has its points."""
    return [*(1 << power for power in range((answers - 1).bit_length())), answers]
