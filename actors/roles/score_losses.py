"""Losses of score models on pairs of whole sequences, each pair in one forward pass.

What is done about noisy labels (`beaver_ray.method.noise`) concerns the training pairs alone: held-out figures are of
the labels as they are, so that runs with different options compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from beaver_ray.data.sources import STRENGTHS
from beaver_ray.data.tokenized import Ragged
from beaver_ray.errors import UserError
from beaver_ray.json_files import write_json
from beaver_ray.method.losses import (
    aligned_positions,
    cost_model_loss,
    reward_model_loss,
    token_wise_reward_model_loss,
)
from beaver_ray.method.noise import Treatment, treat
from beaver_ray.models.provenance import trained_with
from beaver_ray.models.score import NOT_SAVED, save_score_model
from beaver_ray.noise_options import NoiseConfig
from beaver_ray.packing import PackedBatch, pack, response_positions

if TYPE_CHECKING:
    from actors.roles.trainer import Rows, Trainer

FEATURES = "features.json"
"""Beside a model with a contrastive loss: how far apart its held-out features are."""


@dataclass(frozen=True)
class TreatedRows:
    """What the ranking loss does with B of the training pairs."""

    flipped_B: np.ndarray
    margin_B: Tensor | None = None
    smoothing_B: Tensor | None = None

    @property
    def terms(self) -> dict[str, Any]:
        """As the losses take them."""
        return {"margin_B": self.margin_B, "smoothing_B": self.smoothing_B}


def treatments(trainer: Trainer, noise: NoiseConfig, labels: Sequence[str]) -> dict[str, Treatment]:
    """What is done with the training pairs, for each of the labels ("better", "safer"); nothing without options.

    Says in the trainer's notes what that comes to. Raises UserError where a strength is needed and not there.
    """
    if not (noise.needs_strength or noise.smoothing):
        return {}
    found = {}
    for label in labels:
        column = list(STRENGTHS).index(label)
        strength_N = trainer.train_data.strengths[:, column].astype(np.float64)
        if noise.needs_strength and (missing := int(np.isnan(strength_N).sum())):
            raise UserError(
                f"noise: {missing} of {len(strength_N)} training pairs have no {STRENGTHS[label]}, the strength of "
                f"label {label}; take data whose labels are graded, or let stage strength write it (label: {label}), "
                f"and train on the pairs that it leaves"
            )
        done = treat(strength_N, **noise.model_dump())
        said = [f"{done.flipped_N.sum()} flipped"]
        if noise.soft:
            said.append(f"labels sure to {1 - done.smoothing_N.mean():.3g} on average")
        else:
            said.append(f"{np.count_nonzero(done.smoothing_N)} smoothed")
        if noise.margin:
            said.append(f"margins of {done.margin_N.mean():.3g} on average")
        trainer.notes.append(f"noise, label {label}: of {len(strength_N)} training pairs {', '.join(said)}")
        found[label] = done
    return found


def treated_rows(trainer: Trainer, data: Any, rows: Rows, label: str) -> TreatedRows:
    """What is done with these rows: nothing where they are held out, or no option asks for anything."""
    prepared: Mapping[str, Treatment] = trainer.prepared
    if data is not trainer.train_data or label not in prepared:
        return TreatedRows(np.zeros(len(rows), dtype=np.bool_))
    done, device = prepared[label], trainer.engine.device
    margin, smoothing = (
        torch.from_numpy(values_N[rows]).to(device) if values_N.any() else None
        for values_N in (done.margin_N, done.smoothing_N)
    )
    return TreatedRows(done.flipped_N[rows], margin, smoothing)


def dealt(sides: tuple[Ragged, ...], rows: Rows, swapped_B: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The first and the second sequences of pairs, in their order or swapped."""
    first, second = sides
    chosen = list(zip(rows.tolist(), swapped_B.tolist(), strict=True))
    return (
        [(second if swapped else first)[row] for row, swapped in chosen],
        [(first if swapped else second)[row] for row, swapped in chosen],
    )


@dataclass(frozen=True)
class ScoredPairs:
    """B pairs in one packed row of L tokens, all first sequences before all second ones, and what H heads say."""

    packed: PackedBatch
    scores_LH: Tensor
    weights_B: Tensor
    """Of each pair in the batch's mean."""
    logprobs_T: Tensor | None = None
    """Of the tokens of the first sequences' answers, where the model speaks too."""
    answers_B: Tensor | None = None
    """Tokens of each of those answers."""

    @property
    def ends_BH(self) -> tuple[Tensor, Tensor]:
        """Scores at the last token of the first and of the second sequence of each pair."""
        first_BH, second_BH = self.scores_LH[self.packed.cu_seqlens[1:].long() - 1].chunk(2)
        return first_BH, second_BH


def score_pairs(
    trainer: Trainer,
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    weight: float,
    batch: int,
    prompts_B: np.ndarray | None = None,
) -> ScoredPairs:
    """A forward pass over B pairs, which are some of ``batch``; ``weight`` is 0 where they do not count.

    prompts_B: tokens of their prompts, where the log-probs of the first sequences' answers are asked for too.
    """
    packed = pack([*first, *second]).to(trainer.engine.device)
    ids, model = (packed.input_ids, packed.position_ids), trainer.model
    logprobs_T = answers_B = None
    if prompts_B is None:
        scores_LH = model(*ids)[0]
    else:
        lengths_B = np.array([len(sequence) for sequence in first]) - prompts_B
        places_T = response_positions(prompts_B, lengths_B).to(trainer.engine.device)
        scores, logprobs_T = model(*ids, places_T=places_T)
        scores_LH, answers_B = scores[0], torch.from_numpy(lengths_B).to(scores.device)
    weights_B = torch.full((len(first),), weight / batch, dtype=scores_LH.dtype, device=scores_LH.device)
    return ScoredPairs(packed, scores_LH, weights_B, logprobs_T, answers_B)


def with_language(
    pairs: ScoredPairs, loss: Tensor, metrics: dict[str, Tensor], weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """A ranking loss and ``weight`` times the language model's: minus the mean log-prob of an answer's tokens.

    Secrets of RLHF I (https://arxiv.org/abs/2307.04964), eq. 2, by token so that long answers weigh no more.
    """
    if pairs.logprobs_T is None or pairs.answers_B is None:
        return loss, metrics
    weights_T = torch.repeat_interleave(pairs.weights_B / pairs.answers_B, pairs.answers_B)
    language = -(weights_T * pairs.logprobs_T).sum()
    return loss + weight * language, {**metrics, "loss_lm": language.detach()}


def reward_loss(
    pairs: ScoredPairs, kind: str, regularization: float, treated: TreatedRows
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of the first head on pairs whose better sequence comes first.

    kind: "sequence" compares end scores, "token" those of every token from the first difference on.
    """
    better_BH, worse_BH = pairs.ends_BH
    weights_B = pairs.weights_B
    loss, metrics = reward_model_loss(
        better_BH[:, 0], worse_BH[:, 0], regularization=regularization, weights_B=weights_B, **treated.terms
    )
    if kind == "token":
        loss = _token_wise_loss(pairs, regularization)
    return loss, metrics


def cost_loss(
    data: Any,
    rows: Rows,
    costs: tuple[Tensor, Tensor],
    weights_B: Tensor,
    regularization: float,
    treated: TreatedRows,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of a cost model on these rows; an answer keeps its sign where its pair is flipped.

    costs: of the safer and of the more harmful answer, [B] each, as they stand after flipping.
    """
    safer_B, unsafer_B = costs
    signs_B2 = np.stack([data.sign_unsafer[rows], data.sign_safer[rows]], axis=1)
    signs_B2[treated.flipped_B] = signs_B2[treated.flipped_B, ::-1]
    return cost_model_loss(
        unsafer_B,
        safer_B,
        *torch.from_numpy(signs_B2).to(safer_B).unbind(1),
        regularization=regularization,
        weights_B=weights_B,
        **treated.terms,
    )


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
    state = {name: tensor for name, tensor in state.items() if not name.startswith(NOT_SAVED)}
    read_with = trained_with(trainer.tokenizer, trainer.config.template)
    save_score_model(model, state, folder, read_with, trainer.task.adapter)
    if trainer.concluded is not None:
        write_json(folder / FEATURES, trainer.concluded)
