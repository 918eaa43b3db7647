"""Weak-to-strong generalisation (https://arxiv.org/abs/2312.09390): a strong model learns from a weak one's labels.

A weak label w is the probability that the weak model gives to "yes"; f = s(z) is what the student says, s the sigmoid.
Whatever the task, the student's loss is a cross-entropy against a target, which is fixed before the step:

    xent        w
    confidence  (1 - a) w + a h, with h = 1 where f is above a threshold at which as many of the batch are 1 as the
                weak labels say (section 4.3 and appendix A.4): the student may disagree with its supervisor
    product     proportional to f^beta w^alpha against (1 - f)^beta (1 - w)^alpha (the published code)

What is recovered: PGR = (student - weak) / (ceiling - weak), accuracies on the same test set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from beaver_ray.evaluation import share_interval
from beaver_ray.method.losses import Metrics

DRAWS = 2000
"""Of a bootstrap."""
TAIL = 2.5
"""Percent of the draws at each end of a 95 % interval."""


def confidence_weight(step: int, steps: int, most: float, warmup: float, published: bool = False) -> float:
    """The weight a of the student's own decisions at optimizer step ``step`` (0-based) of ``steps``.

    It rises linearly from 0 to ``most`` over the first ``warmup`` share of the steps. published: as the released code
    has it, which multiplies by the share of the steps that is done until that is above ``warmup``, and then by 1: with
    a warm-up of 0.1 it gets to a tenth of ``most`` and jumps.
    """
    done = step / steps
    if published:
        return most * (done if done <= warmup else 1.0)
    return most if warmup == 0 else most * min(1.0, done / warmup)


def hardened(logits_B: Tensor, weak_B: Tensor) -> Tensor:
    """The student's own decisions [B], of which as large a share is 1 as the mean weak label says, to the nearest one.

    Logits that are tied at the threshold share what is left among them, so that a head of zeros gives everybody the
    mean label, and the order in the batch does not matter.
    """
    positives = int(float(weak_B.double().sum()) + 0.5)
    if positives == 0:
        return torch.zeros_like(logits_B)
    threshold = logits_B.topk(positives).values[-1]
    above_B, tied_B = logits_B > threshold, logits_B == threshold
    share = (positives - above_B.sum()) / tied_B.sum()
    return above_B.to(logits_B) + share.to(logits_B) * tied_B


def mixed_target(weak_B: Tensor, logits_B: Tensor, weight: float) -> Tensor:
    """(1 - a) w + a h; one cross-entropy against it is the weighted sum of the two."""
    return (1 - weight) * weak_B + weight * hardened(logits_B, weak_B)


def product_target(weak_B: Tensor, logits_B: Tensor, alpha: float, beta: float) -> Tensor:
    """f^beta w^alpha, normalised over both answers; a weak label of exactly 0 or 1 stays what it is."""
    return torch.sigmoid(beta * logits_B.double() + alpha * torch.logit(weak_B.double())).to(weak_B)


def soft_label_loss(logits_BK: Tensor, targets_BK: Tensor, weights_B: Tensor) -> tuple[Tensor, Metrics]:
    """Sum over K questions of the cross-entropy against targets between 0 and 1, weighted over B rows.

    Of a pair with D = r(y_1) - r(y_2) as its logit that is -[y log s(D) + (1 - y) log s(-D)]. Metrics: agreement, the
    share of answers on the same side of one half as their target.
    """
    losses_BK = F.binary_cross_entropy_with_logits(logits_BK, targets_BK.to(logits_BK), reduction="none")
    agrees_BK = (logits_BK > 0) == (targets_BK > 0.5)
    agreement = (weights_B * agrees_BK.to(losses_BK).mean(dim=1)).sum()
    return (weights_B[:, None] * losses_BK).sum(), {"agreement": agreement.detach()}


# ---------------------------------------------------------------- what is recovered

Right = NDArray[np.bool_]
"""[N] whether a model is right about each test question."""


def recovered(weak: float, student: float, ceiling: float) -> float | None:
    """The performance gap recovered; None where there is no gap to speak of."""
    return (student - weak) / (ceiling - weak) if ceiling != weak else None


def recovery(
    weak_N: Right, student_N: Right, ceiling_N: Right, cluster_N: NDArray[Any], min_gap: float, seed: int = 0
) -> dict[str, Any]:
    """PGR with its 95 % bootstrap interval, and whether it may be read at all.

    Whole clusters (the questions of one prompt) are drawn, for all three models the same ones. ``valid`` is whether
    ceiling - weak is at least ``min_gap``: the ratio of two noises is a number too. The interval is None where more
    draws than it leaves out at one end have no gap above 0, as it then has no end.
    """
    _, number_N = np.unique(cluster_N, return_inverse=True)
    clusters = int(number_N.max()) + 1
    sums_3C = np.stack([np.bincount(number_N, right, clusters) for right in (weak_N, student_N, ceiling_N)])
    sizes_C = np.bincount(number_N, minlength=clusters)
    weak, student, ceiling = sums_3C.sum(axis=1) / sizes_C.sum()
    rng = np.random.default_rng(seed)
    draws_DC = rng.multinomial(clusters, np.full(clusters, 1 / clusters), DRAWS)
    weak_D, student_D, ceiling_D = (sums_3C @ draws_DC.T) / (sizes_C @ draws_DC.T)
    gap_D = ceiling_D - weak_D
    low = high = None
    if (gap_D <= 0).mean() <= TAIL / 100:
        ratios = (student_D - weak_D)[gap_D > 0] / gap_D[gap_D > 0]
        low, high = (float(end) for end in np.percentile(ratios, [TAIL, 100 - TAIL]))
    pgr = recovered(float(weak), float(student), float(ceiling))
    valid = bool(ceiling - weak >= min_gap)
    return {"pgr": pgr, "pgr_low": low, "pgr_high": high, "gap": float(ceiling - weak), "valid": valid}


def imitation(weak_N: Right, student_N: Right) -> dict[str, float | None]:
    """How far a student does as its supervisor does, on questions with two answers.

    agreement: the share of equal answers. copied: of the supervisor's mistakes, the share that the student makes too.
    spoilt: of what the supervisor has right, the share that the student has wrong; were mistakes not copied, both would
    be alike.
    """
    wrong = int((~weak_N).sum())
    right = len(weak_N) - wrong
    return {
        "agreement": float((weak_N == student_N).mean()),
        "copied": float((~weak_N & ~student_N).sum() / wrong) if wrong else None,
        "spoilt": float((weak_N & ~student_N).sum() / right) if right else None,
    }


def figures(
    right: Mapping[str, Right], students: list[str], cluster_N: NDArray[Any], min_gap: float, seed: int = 0
) -> dict[str, Any]:
    """Accuracy of each model with its interval, and for each of ``students`` what it recovers and what it copies.

    right: by model; "weak" and "ceiling" must be among them.
    """
    found: dict[str, Any] = {name: share_interval(right_N, cluster_N) for name, right_N in right.items()}
    for name in students:
        found[name] |= recovery(right["weak"], right[name], right["ceiling"], cluster_N, min_gap, seed)
        found[name] |= imitation(right["weak"], right[name])
    return found
