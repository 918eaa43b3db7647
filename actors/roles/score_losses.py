"""Losses of score models on pairs of whole sequences, each pair in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from beaver_ray.method.losses import aligned_positions, reward_model_loss, token_wise_reward_model_loss
from beaver_ray.models.provenance import trained_with
from beaver_ray.models.score import save_score_model
from beaver_ray.packing import PackedBatch, pack

if TYPE_CHECKING:
    from actors.roles.trainer import Trainer


@dataclass(frozen=True)
class ScoredPairs:
    """B pairs in one packed row of L tokens, all first sequences before all second ones, and what H heads say."""

    packed: PackedBatch
    scores_LH: Tensor
    weights_B: Tensor
    """Of each pair in the batch's mean."""

    @property
    def ends_BH(self) -> tuple[Tensor, Tensor]:
        """Scores at the last token of the first and of the second sequence of each pair."""
        first_BH, second_BH = self.scores_LH[self.packed.cu_seqlens[1:].long() - 1].chunk(2)
        return first_BH, second_BH


def score_pairs(
    trainer: Trainer, first: Sequence[np.ndarray], second: Sequence[np.ndarray], weight: float, batch: int
) -> ScoredPairs:
    """A forward pass over B pairs, which are some of ``batch``; ``weight`` is 0 where they do not count."""
    packed = pack([*first, *second]).to(trainer.engine.device)
    scores_LH = trainer.engine.engine(packed.input_ids, packed.position_ids)[0]
    weights_B = torch.full((len(first),), weight / batch, dtype=scores_LH.dtype, device=scores_LH.device)
    return ScoredPairs(packed, scores_LH, weights_B)


def reward_loss(pairs: ScoredPairs, kind: str, regularization: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of the first head on pairs whose better sequence comes first.

    kind: "sequence" compares end scores, "token" those of every token from the first difference on.
    """
    better_BH, worse_BH = pairs.ends_BH
    weights_B = pairs.weights_B
    loss, metrics = reward_model_loss(
        better_BH[:, 0], worse_BH[:, 0], regularization=regularization, weights_B=weights_B
    )
    if kind == "token":
        loss = _token_wise_loss(pairs, regularization)
    return loss, metrics


def _token_wise_loss(pairs: ScoredPairs, regularization: float) -> Tensor:
    packed, scores_L, count = pairs.packed, pairs.scores_LH[:, 0], len(pairs.weights_B)
    lengths = torch.diff(packed.cu_seqlens).long().cpu()
    cut = int(packed.cu_seqlens[count])
    tokens = packed.input_ids[0].cpu()
    better, worse, weights = aligned_positions(tokens[:cut], lengths[:count], tokens[cut:], lengths[count:])
    # aligned_positions averages over the pairs it is given; these are a part of the step's.
    weights = weights.to(scores_L) * pairs.weights_B.sum()
    better, worse = better.to(scores_L.device), worse.to(scores_L.device)
    loss, _ = token_wise_reward_model_loss(
        scores_L[:cut][better], scores_L[cut:][worse], weights, regularization=regularization
    )
    return loss


def save_scores(trainer: Trainer, state: dict[str, Tensor], folder: Path) -> None:
    """Write the score model, with any adapter added to its trunk, and what it was trained to read with."""
    model: Any = trainer.engine.module
    read_with = trained_with(trainer.tokenizer, trainer.config.template)
    save_score_model(model, state, folder, read_with, trainer.task.adapter)
