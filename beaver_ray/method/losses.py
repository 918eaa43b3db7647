"""The losses, over flat token tensors [T] or per-sequence and per-pair tensors [B], without padding.

Every loss is a weighted sum, and the weights say how it averages. `token_weights` makes them for tokens, 0 for
those that are masked; for sequences and pairs the default is 1 / B. Where an optimizer step is made of several
micro-batches, give weights that were divided by the number of sequences (or tokens, or pairs) of the whole step:
losses and metrics of the micro-batches then add up to those of the step. Only metrics whose name ends in
`_max_deviation` are combined by their maximum instead.

Each loss returns (loss, metrics): a scalar tensor with gradient, and detached scalars. Inputs should be
float32 or wider. Where nothing else is named they are the losses of Safe RLHF (https://arxiv.org/abs/2310.12773:
preference models in section 3.2, the constrained objective in 3.3) as its published code computes them.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from beaver_ray.method.advantages import LOG_RATIO_BOUND

Metrics = dict[str, Tensor]


def token_weights(
    lengths_B: Tensor,
    reduction: Literal["sequence", "token"],
    total: int | None = None,
    mask_T: Tensor | None = None,
) -> Tensor:
    """Weights of the tokens of B sequences laid end to end, float32, on the device of `lengths_B`.

    "sequence" is the published reduction: the mean over the tokens of each sequence, then the mean over
    sequences. "token" weighs all tokens alike. `total` is the number of sequences (or tokens) in the
    whole optimizer step; None stands for those given here. Tokens whose `mask_T` is false have weight 0 and are
    not counted; None stands for none of those. Raises ValueError on a sequence without tokens that count.
    """
    counts_B = lengths_B
    if mask_T is not None:
        sequence_T = torch.repeat_interleave(torch.arange(len(lengths_B), device=lengths_B.device), lengths_B)
        counts_B = torch.zeros_like(lengths_B).index_add_(0, sequence_T, mask_T.to(lengths_B.dtype))
    if torch.any(counts_B <= 0):
        raise ValueError("every sequence needs at least one token that counts")
    if reduction == "sequence":
        weights_B = 1.0 / (counts_B.to(torch.float64) * (total or len(counts_B)))
    elif reduction == "token":
        weights_B = torch.full_like(counts_B, 1.0 / (total or int(counts_B.sum())), dtype=torch.float64)
    else:
        raise ValueError(f"unknown reduction {reduction!r}; one of sequence, token")
    weights_T = torch.repeat_interleave(weights_B, lengths_B).to(torch.float32)
    return weights_T if mask_T is None else weights_T * mask_T


def policy_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    weights_T: Tensor,
    *,
    clip_ratio: float,
    rollout_logprobs_T: Tensor | None = None,
    importance_cap: float = 2.0,
) -> tuple[Tensor, Metrics]:
    """Clipped surrogate of PPO, eq. 7 of https://arxiv.org/abs/1707.06347.

    -sum w * min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A), ratio = exp(logprobs - old).
    `old_logprobs_T` are the trainer's before the update. With `rollout_logprobs_T`, those the generator
    sampled under, each token is also weighed by min(exp(old - rollout), importance_cap), without gradient:
    the decoupled objective (https://arxiv.org/abs/2110.00641), old being the proximal policy and the generator's
    the behaviour policy, with truncated importance weights.

    The k3 estimate of a KL is exp(x) - 1 - x (http://joschu.net/blog/kl-approx.html).

    Metrics: clip_fraction (tokens whose clipped branch is the smaller one), kl_update (k3 estimate of
    KL(old || new), nats), ratio_max_deviation (max |ratio - 1| of tokens that have a weight); with rollout
    log-probs also importance_weight_mean and kl_rollout_train (k3 estimate of KL(rollout || old)).
    """
    log_ratio_T = (logprobs_T - old_logprobs_T).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio_T = torch.exp(log_ratio_T)
    free_T = ratio_T * advantages_T
    clipped_T = ratio_T.clamp(1.0 - clip_ratio, 1.0 + clip_ratio) * advantages_T
    surrogate_T = torch.minimum(free_T, clipped_T)
    metrics: Metrics = {}
    if rollout_logprobs_T is not None:
        log_mismatch_T = (old_logprobs_T - rollout_logprobs_T).detach()
        log_mismatch_T = log_mismatch_T.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        importance_T = log_mismatch_T.exp().clamp(max=importance_cap)
        surrogate_T = surrogate_T * importance_T
        metrics["importance_weight_mean"] = (weights_T * importance_T).sum()
        metrics["kl_rollout_train"] = (weights_T * (torch.expm1(log_mismatch_T) - log_mismatch_T)).sum()
    loss = -(weights_T * surrogate_T).sum()
    with torch.no_grad():
        metrics["clip_fraction"] = (weights_T * (clipped_T < free_T)).sum()
        metrics["kl_update"] = (weights_T * (torch.expm1(log_ratio_T) - log_ratio_T)).sum()
        deviations_T = (ratio_T - 1.0).abs().where(weights_T > 0, 0.0)
        metrics["ratio_max_deviation"] = deviations_T.amax() if len(ratio_T) else torch.zeros(())
    return loss, metrics


def value_loss(
    values_T: Tensor, old_values_T: Tensor, returns_T: Tensor, weights_T: Tensor, *, clip: float | None
) -> tuple[Tensor, Metrics]:
    """Clipped value loss: sum w * 0.5 * max((V - G)^2, (clip(V, V_old +- eps) - G)^2); None = off.

    Metrics: clip_fraction (tokens whose clipped branch is the larger one).
    """
    error_T = (values_T - returns_T).square()
    if clip is None:
        return 0.5 * (weights_T * error_T).sum(), {"clip_fraction": error_T.new_zeros(())}
    clipped_values_T = torch.clamp(values_T, old_values_T - clip, old_values_T + clip)
    clipped_error_T = (clipped_values_T - returns_T).square()
    loss = 0.5 * (weights_T * torch.maximum(error_T, clipped_error_T)).sum()
    return loss, {"clip_fraction": (weights_T * (clipped_error_T > error_T)).sum().detach()}


def cross_entropy_loss(logprobs_T: Tensor, weights_T: Tensor) -> tuple[Tensor, Metrics]:
    """-sum w * log p(token): supervised fine-tuning and PTX. Published weights are the token mean."""
    return -(weights_T * logprobs_T).sum(), {}


def ranking_loss(difference_B: Tensor, margin_B: Tensor | None = None, smoothing_B: Tensor | None = None) -> Tensor:
    """Bradley-Terry loss [B] of the preferred score less the other: -(1 - a) log s(D - m) - a log s(m - D).

    margin_B: m, by how much the scores are to differ (below 0 it lets a doubtful pair off); smoothing_B: a, the weight
    of the opposite order. Without them -log s(D). Secrets of RLHF II, https://arxiv.org/abs/2401.06080, section 2.
    """
    wanted_B = difference_B if margin_B is None else difference_B - margin_B
    if smoothing_B is None:
        return -F.logsigmoid(wanted_B)
    return -(1.0 - smoothing_B) * F.logsigmoid(wanted_B) - smoothing_B * F.logsigmoid(-wanted_B)


def reward_model_loss(
    better_B: Tensor,
    worse_B: Tensor,
    *,
    regularization: float = 0.0,
    weights_B: Tensor | None = None,
    margin_B: Tensor | None = None,
    smoothing_B: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Sequence-wise ranking loss on end scores of B pairs (`ranking_loss`), + eta * mean(s^2).

    The regulariser is the mean over the 2B scores. Metrics: accuracy (share of pairs with s_b > s_w).
    """
    weights_B = _pair_weights(weights_B, better_B)
    ranking_B = ranking_loss(better_B - worse_B, margin_B, smoothing_B)
    losses_B = ranking_B + regularization * _mean_square(better_B, worse_B)
    return (weights_B * losses_B).sum(), {"accuracy": (weights_B * (better_B > worse_B)).sum().detach()}


def aligned_positions(
    better_tokens_T: Tensor, better_lengths_B: Tensor, worse_tokens_U: Tensor, worse_lengths_B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions the token-wise ranking loss compares: first differing token to the longer one's end.

    Tokens are those of prompt plus response, laid end to end. Beyond the end of the shorter sequence its last
    token is held; the published code reads the scores of padding there, which is had by giving padded
    sequences of equal length. Call it on the CPU, where the data are made. Raises ValueError on a pair of
    identical sequences.

    Returns, for P positions, (index into the better tokens, index into the worse tokens, weight 1 /
    (positions of its pair * B)).
    """
    pairs = len(better_lengths_B)
    longest_B = torch.maximum(better_lengths_B, worse_lengths_B)
    pair_Q = torch.repeat_interleave(torch.arange(pairs), longest_B)
    position_Q = torch.arange(len(pair_Q)) - (longest_B.cumsum(0) - longest_B)[pair_Q]
    better_starts_B = better_lengths_B.cumsum(0) - better_lengths_B
    worse_starts_B = worse_lengths_B.cumsum(0) - worse_lengths_B
    better_Q = better_starts_B[pair_Q] + torch.minimum(position_Q, better_lengths_B[pair_Q] - 1)
    worse_Q = worse_starts_B[pair_Q] + torch.minimum(position_Q, worse_lengths_B[pair_Q] - 1)

    one_ended_Q = position_Q >= torch.minimum(better_lengths_B, worse_lengths_B)[pair_Q]
    differs_Q = one_ended_Q | (better_tokens_T[better_Q] != worse_tokens_U[worse_Q])
    first_B = longest_B.scatter_reduce(0, pair_Q[differs_Q], position_Q[differs_Q], "amin")
    if torch.any(first_B == longest_B):
        raise ValueError(f"the responses of pair {int((first_B == longest_B).nonzero()[0])} are identical")
    kept_Q = position_Q >= first_B[pair_Q]
    weights_P = 1.0 / ((longest_B - first_B)[pair_Q[kept_Q]].to(torch.float64) * pairs)
    return better_Q[kept_Q], worse_Q[kept_Q], weights_P.to(torch.float32)


def token_wise_reward_model_loss(
    better_P: Tensor, worse_P: Tensor, weights_P: Tensor, *, regularization: float = 0.0
) -> tuple[Tensor, Metrics]:
    """Token-wise ranking loss over scores at `aligned_positions`, with its weights.

    Metrics: accuracy, the share of compared positions with s_b > s_w, averaged within each pair first.
    """
    losses_P = -F.logsigmoid(better_P - worse_P) + regularization * _mean_square(better_P, worse_P)
    return (weights_P * losses_P).sum(), {"accuracy": (weights_P * (better_P > worse_P)).sum().detach()}


def cost_model_loss(
    unsafer_B: Tensor,
    safer_B: Tensor,
    unsafer_sign_B: Tensor,
    safer_sign_B: Tensor,
    *,
    regularization: float = 0.0,
    weights_B: Tensor | None = None,
    margin_B: Tensor | None = None,
    smoothing_B: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Cost model loss on the end scores of B pairs (Safe RLHF, section 3.2).

    -log s(c_u - c_s) - log s(sign_s c_s) - log s(sign_u c_u) + eta * mean(c^2), s the sigmoid. Signs are +1
    for a response labelled unsafe and -1 for one labelled safe: a cost above 0 means unsafe. Margin and smoothing
    (`ranking_loss`) change the first term alone.

    Metrics: accuracy (share of pairs with c_u > c_s), sign_accuracy (share of the 2B responses whose sign is
    right; a cost of exactly 0 is wrong).
    """
    weights_B = _pair_weights(weights_B, unsafer_B)
    safer_signed_B, unsafer_signed_B = safer_sign_B * safer_B, unsafer_sign_B * unsafer_B
    ranking_B = ranking_loss(unsafer_B - safer_B, margin_B, smoothing_B)
    signs_B = -F.logsigmoid(safer_signed_B) - F.logsigmoid(unsafer_signed_B)
    losses_B = ranking_B + signs_B + regularization * _mean_square(unsafer_B, safer_B)
    right_B = 0.5 * ((safer_signed_B > 0).to(losses_B.dtype) + (unsafer_signed_B > 0))
    return (weights_B * losses_B).sum(), {
        "accuracy": (weights_B * (unsafer_B > safer_B)).sum().detach(),
        "sign_accuracy": (weights_B * right_B).sum().detach(),
    }


def dpo_loss(
    better_B: Tensor,
    worse_B: Tensor,
    reference_better_B: Tensor,
    reference_worse_B: Tensor,
    *,
    beta: float,
    offset_B: Tensor | None = None,
    weights_B: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Direct preference optimisation, eq. 7 of https://arxiv.org/abs/2305.18290.

    -log sigmoid(beta * [(pi - ref)(better) - (pi - ref)(worse)] - offset).
    Inputs are log-probs of whole responses, summed over their tokens (those before the first differing token
    cancel). offset_B: by how much the margin is to exceed 0, none without; SafeDPO's is Delta times the worse answer's
    unsafe label less the better one's (https://arxiv.org/abs/2505.20065).
    Metrics: accuracy (margin > 0), margin (beta times the bracket, without the offset).
    """
    weights_B = _pair_weights(weights_B, better_B)
    margin_B = beta * ((better_B - reference_better_B) - (worse_B - reference_worse_B))
    wanted_B = margin_B if offset_B is None else margin_B - offset_B
    return -(weights_B * F.logsigmoid(wanted_B)).sum(), {
        "accuracy": (weights_B * (margin_B > 0)).sum().detach(),
        "margin": (weights_B * margin_B).sum().detach(),
    }


def _pair_weights(weights_B: Tensor | None, like_B: Tensor) -> Tensor:
    return torch.full_like(like_B, 1.0 / max(len(like_B), 1)) if weights_B is None else weights_B


def _mean_square(first: Tensor, second: Tensor) -> Tensor:
    return 0.5 * (first.square() + second.square())


def masked_label_loss(
    logits_BK: Tensor, labels_BK: Tensor, *, positive_weight_K: Tensor, total: float
) -> tuple[Tensor, Metrics]:
    """Mean binary cross-entropy over the labels that are known: 1 true, 0 false, anything below unknown.

    positive_weight_K: w of each label, by which its true rows count; the loss is taken at logit + log w. A classifier
    that is as good as can be then has logit + log w = true log-odds + log w, so that its logits are the log-odds of the
    data whatever w is (King and Zeng 2001, section 4.2, the prior correction). total: known labels of the whole step.
    """
    known_BK = labels_BK >= 0
    truth_BK = labels_BK.clamp(min=0).to(logits_BK)
    weighted_BK = F.binary_cross_entropy_with_logits(
        logits_BK + positive_weight_K.log(), truth_BK, pos_weight=positive_weight_K, reduction="none"
    )
    right_BK = (logits_BK > 0) == (truth_BK > 0)
    loss = (weighted_BK * known_BK).sum() / total
    return loss, {"label_accuracy": (right_BK & known_BK).sum() / total}
