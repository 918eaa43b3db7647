"""Contrastive losses on the features of score models (https://arxiv.org/abs/2401.06080, section 3).

A feature is the hidden state at an answer's last token, before the heads; two passes with dropout give two
views of it. Axes: B pairs of answers, N = 2B features of D numbers, K prototypes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

EPSILON = 0.05
ITERATIONS = 3
"""Of Sinkhorn's algorithm, as in SwAV (https://arxiv.org/abs/2006.09882)."""


def paired(first_BD: Tensor, second_BD: Tensor, pairing: Literal["pair", "difference"]) -> Tensor:
    """The features [N, D] that are compared: of both answers of each pair, or their difference and its opposite."""
    if pairing == "difference":
        first_BD, second_BD = first_BD - second_BD, second_BD - first_BD
    return torch.cat([first_BD, second_BD])


def false_negatives(prompt_B: Tensor) -> Tensor:
    """Which features [N, N] are of two pairs on one prompt.

    These may well be alike, and no loss should push them apart. The two features of one pair are not among them:
    to tell them apart is what is wanted.
    """
    pair_N, prompt_N = torch.arange(len(prompt_B), device=prompt_B.device).repeat(2), prompt_B.repeat(2)
    return (prompt_N[:, None] == prompt_N) & (pair_N[:, None] != pair_N)


def simcse_loss(one_ND: Tensor, two_ND: Tensor, temperature: float, left_out_NN: Tensor) -> Tensor:
    """Minus the mean log-probability that a feature's other view is picked among all of them, by cosine / temperature.

    SimCSE (https://arxiv.org/abs/2104.08821), eq. 4. left_out_NN: of feature i (rows) those j that are no candidates.
    """
    one_ND, two_ND = functional.normalize(one_ND, dim=-1), functional.normalize(two_ND, dim=-1)
    similarity_NN = (one_ND @ two_ND.T / temperature).masked_fill(left_out_NN, -torch.inf)
    return functional.cross_entropy(similarity_NN, torch.arange(len(one_ND), device=one_ND.device))


@torch.no_grad()
def sinkhorn(scores_NK: Tensor, epsilon: float = EPSILON, iterations: int = ITERATIONS) -> Tensor:
    """Soft assignments [N, K] in float32, whose rows sum to 1 and whose columns are nearly of equal sums.

    exp(score / epsilon), with columns and rows scaled in turn (Cuturi 2013; SwAV, section 3.1).
    """
    # In logarithms: a column without mass, or scores far apart, would divide 0 by 0.
    logits_NK = scores_NK.float() / epsilon
    for _ in range(iterations):
        logits_NK = logits_NK.log_softmax(dim=0)
        logits_NK = logits_NK.log_softmax(dim=1)
    return logits_NK.exp()


def swav_loss(one_NK: Tensor, two_NK: Tensor, temperature: float) -> Tensor:
    """Each view's assignment is predicted from the other view: SwAV, eq. 2, mean over features and both directions.

    one_NK, two_NK: cosines of each view with every prototype.
    """
    terms_N = [
        -(sinkhorn(target_NK) * (seen_NK.float() / temperature).log_softmax(dim=1)).sum(dim=1)
        for target_NK, seen_NK in ((two_NK, one_NK), (one_NK, two_NK))
    ]
    return torch.cat(terms_N).mean()
