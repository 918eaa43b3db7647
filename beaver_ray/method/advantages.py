"""Per-token rewards and costs, advantages with critics and without, and the policy's combined advantage.

A batch of responses of unequal length is a flat array of T tokens plus `offsets` of B + 1 integers, as Arrow
keeps lists: response i is `flat[offsets[i]:offsets[i + 1]]`. Tokens that the policy did not write are no part of
these arrays: what comes after such a hole follows what comes before it. Arithmetic runs in the dtype of the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.integer]
BoolArray = npt.NDArray[np.bool_]

Sign = Literal[-1, 1]

REWARD: Sign = -1
"""Sign of the KL term in a reward: departing from the reference is paid for."""
COST: Sign = 1
"""Sign of the KL term in a cost: departing from the reference adds to the cost."""

CONSTANT = 1e-4
"""Scores with a smaller standard deviation are alike but for rounding, which must not be blown up."""

LOG_RATIO_BOUND = 20.0
"""Largest logarithm of a ratio of probabilities: exp(20) is far outside every clip range and cap, and an infinite ratio
would turn the zero gradient of a clipped token into NaN."""


def shape_rewards(
    scores_B: FloatArray,
    kl_terms_T: FloatArray,
    offsets: IntArray,
    kl_coefficient: float,
    clip: float | None,
    sign: Sign,
) -> FloatArray:
    """Per-token signal: `sign * beta * kl_t`, plus the score of the response at its last token.

    `kl_terms_T` is log pi_old - log pi_ref of every response token (the k1 estimator), in nats. `sign` is
    `REWARD` (-1) for the reward and `COST` (+1) for every cost: because costs enter the policy's advantage
    with weight -lambda, the KL penalty then weighs beta whatever the multipliers are. Each token, KL
    included, is clamped to +-`clip` (50 in the published method); None leaves it as it is, and only then is
    the KL weight exactly beta.

    Returns T values. Raises ValueError on a response without tokens: its score would be lost.
    """
    if sign not in (REWARD, COST):
        raise ValueError(f"sign must be -1 (reward) or +1 (cost), got {sign}")
    lengths_B = _lengths(offsets, len(kl_terms_T))
    if len(scores_B) != len(lengths_B):
        raise ValueError(f"{len(scores_B)} scores for {len(lengths_B)} responses")
    if np.any(lengths_B == 0):
        raise ValueError(f"response {int(np.argmin(lengths_B))} has no tokens")
    shaped_T = (sign * float(kl_coefficient)) * kl_terms_T
    shaped_T[np.asarray(offsets)[1:] - 1] += scores_B
    return shaped_T if clip is None else np.clip(shaped_T, -clip, clip)


def gae(
    rewards_T: FloatArray, values_T: FloatArray, offsets: IntArray, gamma: float, lam: float
) -> tuple[FloatArray, FloatArray]:
    """Generalised advantage estimation, eq. 16 of https://arxiv.org/abs/1506.02438, one response at a time.

    `values_T[t]` is the value of the state before token t. The value beyond the last token is 0, as
    published, also for truncated responses. Returns (advantages, returns), both of T values, with returns =
    advantages + values.
    """
    if len(rewards_T) != len(values_T):
        raise ValueError(f"{len(rewards_T)} rewards for {len(values_T)} values")
    lengths_B = _lengths(offsets, len(rewards_T))
    last_B = np.asarray(offsets)[1:] - 1
    next_values_T = np.zeros_like(values_T)
    next_values_T[:-1] = values_T[1:]
    next_values_T[last_B[lengths_B > 0]] = 0
    advantages_T = rewards_T + gamma * next_values_T - values_T  # the TD residuals, until the sweep below

    # One sweep from the ends towards the starts, all responses at once: sorted by length, those that still
    # have a token `back` places before their last one are a prefix.
    by_length_B = np.argsort(-lengths_B, kind="stable")
    last_by_length_B = last_B[by_length_B]
    alive_by_back = len(lengths_B) - np.searchsorted(np.sort(lengths_B), np.arange(lengths_B.max(initial=0)), "right")
    for back in range(1, len(alive_by_back)):
        here = last_by_length_B[: alive_by_back[back]] - back
        advantages_T[here] += gamma * lam * advantages_T[here + 1]
    return advantages_T, advantages_T + values_T


def leave_one_out_baselines(scores_B: FloatArray, prompts_B: IntArray) -> FloatArray:
    """What an answer may be expected to score, by the other answers of the step; its advantage is its score less that.

    The mean of the other answers to its prompt (Kool et al. 2019; for language models
    https://arxiv.org/abs/2402.14740), with the mean of all answers to other prompts counted in as one answer more. Of n
    answers to a prompt that is (1 - 1/n) times the leave-one-out mean and 1/n times the mean elsewhere: shrinkage
    (https://arxiv.org/abs/2511.03710), as much of it as suits prompts that differ from one another as answers to one
    prompt do. Without it a prompt whose answers all score alike would have no gradient, however bad they are.

    The policy gradient stays unbiased: neither the baseline of an answer nor the weights in it depend on that answer.
    To shrink only where all answers score alike would bias it, for whether they do depends on each of them.

    `prompts_B` is equal for answers to the same prompt. The only answer to its prompt has the mean elsewhere as
    baseline, answers to the only prompt the leave-one-out mean, and the only answer of a step 0. Returns B values.
    """
    _, group_B = np.unique(prompts_B, return_inverse=True)
    counts_G, sums_G = np.bincount(group_B), np.bincount(group_B, scores_B)
    elsewhere_G = len(scores_B) - counts_G
    means_G = (sums_G.sum() - sums_G) / np.maximum(elsewhere_G, 1)
    one_more_G = np.minimum(elsewhere_G, 1)
    sums_B = sums_G[group_B] - scores_B + (one_more_G * means_G)[group_B]
    return sums_B / np.maximum(counts_G - 1 + one_more_G, 1)[group_B]


def group_means(scores_B: FloatArray, prompts_B: IntArray) -> FloatArray:
    """The mean score of the answers to the same prompt, B values."""
    _, group_B = np.unique(prompts_B, return_inverse=True)
    means_B: FloatArray = (np.bincount(group_B, scores_B) / np.bincount(group_B))[group_B]
    return means_B


def standardize_groups(scores_B: FloatArray, prompts_B: IntArray) -> FloatArray:
    """Scores less their mean over the answers to the same prompt, by the standard deviation there plus CONSTANT.

    The advantages of GRPO (https://arxiv.org/abs/2402.03300, section 4.1.2). The standard deviation is that of the
    answers at hand (their number is the divisor); where they all score alike the advantages are 0. Returns B values.
    """
    centred_B, spreads_G, group_B = _centre(scores_B, prompts_B)
    return centred_B / (spreads_G[group_B] + CONSTANT)


def constant_share(scores_B: FloatArray, prompts_B: IntArray) -> float:
    """The share of prompts whose answers all score alike; an only answer does. NaN where there are no answers."""
    if len(scores_B) == 0:
        return float("nan")
    _, spreads_G, _ = _centre(scores_B, prompts_B)
    return float((spreads_G < CONSTANT).mean())


def _centre(scores_B: FloatArray, prompts_B: IntArray) -> tuple[FloatArray, FloatArray, IntArray]:
    """(scores less the mean of their prompt, standard deviation [G] of each prompt, which of the G prompts [B])."""
    _, group_B = np.unique(prompts_B, return_inverse=True)
    counts_G = np.bincount(group_B)
    centred_B = scores_B - (np.bincount(group_B, scores_B) / counts_G)[group_B]
    return centred_B, np.sqrt(np.bincount(group_B, centred_B**2) / counts_G), group_B


def combine_advantages(
    reward_advantages_T: FloatArray,
    cost_advantages: Mapping[str, FloatArray],
    multipliers: Mapping[str, float],
    inside: Mapping[str, BoolArray] = MappingProxyType({}),
) -> FloatArray:
    """A = (A_r - sum_i lambda_i A_ci) / (1 + sum_i lambda_i), over constraints by name.

    Where a constraint has an entry in `inside` both sums leave it out at the other tokens: each prompt is trained as
    under the constraints that count for it, and the weight of the KL, which stands in A_r and in every A_ci, stays.

    The policy gradient of the Lagrangian of Safe RLHF (https://arxiv.org/abs/2310.12773, section 3.3), scaled by
    1 / (1 + sum lambda) as published.

    Constraints whose multiplier is 0 are left out, so that with none active the result is A_r, bit for bit.
    """
    if cost_advantages.keys() != multipliers.keys():
        raise ValueError(f"cost advantages of {sorted(cost_advantages)} but multipliers of {sorted(multipliers)}")
    combined_T = reward_advantages_T.copy()
    total: float | FloatArray = 0.0
    for name, multiplier in multipliers.items():
        if not 0.0 <= multiplier < np.inf:
            raise ValueError(f"the multiplier of {name} must be finite and at least 0, got {multiplier}")
        if multiplier > 0.0 and name in inside:
            weights_T = np.where(inside[name], float(multiplier), 0.0)
            combined_T -= weights_T.astype(combined_T.dtype) * cost_advantages[name]
            total = total + weights_T
        elif multiplier > 0.0:
            combined_T -= float(multiplier) * cost_advantages[name]
            total = total + float(multiplier)
    if not np.any(total):
        return combined_T
    return combined_T / (1.0 + total if isinstance(total, float) else (1.0 + total).astype(combined_T.dtype))


def normalize(advantages_T: FloatArray) -> FloatArray:
    """Whiten over all tokens: mean 0, standard deviation 1 (0 where all are equal). Not published."""
    if len(advantages_T) == 0 or np.ptp(advantages_T) == 0:
        return np.zeros_like(advantages_T)
    wide_T = advantages_T.astype(np.float64)
    return ((wide_T - wide_T.mean()) / (wide_T.std() + 1e-8)).astype(advantages_T.dtype)


def explained_variance(values_T: FloatArray, returns_T: FloatArray) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 no better than a constant, below 0 worse.

    NaN where the returns do not vary: there is nothing to explain.
    """
    wide_T = returns_T.astype(np.float64)
    total = float(wide_T.var()) if len(wide_T) else 0.0
    return 1.0 - float((wide_T - values_T).var()) / total if total > 0.0 else float("nan")


def _lengths(offsets: IntArray, tokens: int) -> IntArray:
    """Lengths of the responses, after checking that `offsets` cuts exactly `tokens` tokens."""
    lengths_B = np.diff(np.asarray(offsets))
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != tokens or np.any(lengths_B < 0):
        raise ValueError(f"offsets must rise from 0 to the number of tokens, {tokens}")
    return lengths_B
