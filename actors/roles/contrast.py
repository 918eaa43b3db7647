"""A contrastive loss beside the ranking of pairs, and how far apart held-out features are once a model is trained.

The loss is of the training pairs alone, so held-out figures compare with those of other options. What an answer is told
apart from are the other answers of its micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.roles.score_losses import ScoredPairs
from beaver_ray.contrastive_options import ContrastiveConfig
from beaver_ray.errors import UserError
from beaver_ray.feature_figures import MOST_PAIRS, PairFeatures, overlap
from beaver_ray.method.contrastive import false_negatives, paired, simcse_loss, swav_loss
from beaver_ray.packing import PackedBatch, pack

if TYPE_CHECKING:
    from actors.roles.trainer import Rows, Trainer


def negatives(trainer: Trainer, options: ContrastiveConfig) -> str:
    """One line on how many answers of this data a micro-batch holds."""
    config, data = trainer.config, trainer.train_data
    tokens = sum(float(side.lengths.mean()) for side in trainer.task.sequences(data))
    pairs = max(1, int(min(config.engine.micro_batch_tokens / tokens, config.batch_size / trainer.world, len(data))))
    said = f"contrastive: a micro-batch holds about {2 * pairs} answers of this data"
    few = 2 * pairs <= options.prototypes if options.kind == "swav" else pairs == 1
    if not few:
        return said
    what = f"no more than the {options.prototypes} prototypes" if options.kind == "swav" else "those of one pair"
    return f"{said}, {what}: little is learnt of so few; raise engine.micro_batch_tokens (or batch_size)"


def contrastive_loss(trainer: Trainer, data: Any, rows: Rows, pairs: ScoredPairs, options: ContrastiveConfig) -> Tensor:
    """The loss of these training pairs as their part of the batch's mean, from two more passes with dropout."""
    model: Any = trainer.engine.module
    with dropped(model.trunk.get_input_embeddings(), options.dropout):
        one_ND, two_ND = (paired(*_features(trainer, pairs.packed), options.pairing) for _ in range(2))
    if options.kind == "swav":
        # One call for both: under ZeRO-3 the prototypes are gathered for it.
        one_NK, two_NK = model.prototypes(torch.cat([one_ND, two_ND])).chunk(2)
        loss = swav_loss(one_NK, two_NK, options.sharpness)
    else:
        prompt_B = torch.from_numpy(prompts_of(trainer, data, rows)).to(trainer.engine.device)
        loss = simcse_loss(one_ND, two_ND, options.sharpness, false_negatives(prompt_B))
    return loss * pairs.weights_B.sum()


@contextmanager
def dropped(embeddings: nn.Module, rate: float) -> Iterator[None]:
    """Drop this share of the numbers that the embeddings give, whatever dropout the model's configuration has.

    Only there: what layers compute may be computed again for the backward pass, when this is over. Raises UserError
    where the model has not asked these embeddings meanwhile.
    """
    asked = []

    def drop(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        asked.append(True)
        return nn.functional.dropout(output, rate)

    handle = embeddings.register_forward_hook(drop)
    try:
        yield
    finally:
        handle.remove()
    if not asked:
        raise UserError(
            "contrastive: this model does not ask its input embeddings, so two views are alike; set it null"
        )


def prompts_of(trainer: Trainer, data: Any, rows: Rows) -> np.ndarray:
    """A number [B] for the prompt of each of these pairs, equal where the prompts are."""
    first = trainer.task.sequences(data)[0]
    keys = [first[row][:length].tobytes() for row, length in zip(rows, data.prompt_length[rows], strict=True)]
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def _features(trainer: Trainer, packed: PackedBatch) -> tuple[Tensor, Tensor]:
    """Features [B, D] of the first and of the second sequences of B pairs."""
    ends_N = packed.cu_seqlens[1:].long() - 1
    found: Tensor = trainer.engine.engine(packed.input_ids, packed.position_ids, ends_N=ends_N)
    first_BD, second_BD = found.chunk(2)
    return first_BD, second_BD


@torch.no_grad()
def held_out_overlap(trainer: Trainer, heads: Sequence[str]) -> dict[str, Any]:
    """The content of evaluation.json: how far apart the features of preferred and other answers are, by head.

    Of the first held-out pairs; all ranks must call it.
    """
    trainer.engine.module.eval()
    data, sides = trainer.eval_data, trainer.task.sequences(trainer.eval_data)
    chosen = np.arange(min(len(data), MOST_PAIRS))
    own = []
    for rows, weight in trainer.micro_batches(data, chosen):
        packed = pack([side[row] for side in sides for row in rows]).to(trainer.engine.device)
        first, second = (found_BD.cpu().numpy() for found_BD in _features(trainer, packed))
        # Without weight the row only keeps the ranks in step.
        own += list(zip(rows.tolist(), first, second, strict=True)) if weight else []
    everyone: list[Any] = [None] * trainer.world
    dist.all_gather_object(everyone, own)
    pairs = sorted((pair for part in everyone for pair in part), key=lambda pair: pair[0])
    first_PD, second_PD = (np.stack([pair[side] for pair in pairs]) for side in (1, 2))
    prompt_P = prompts_of(trainer, data, chosen)
    found: dict[str, Any] = {"prompts": len(np.unique(prompt_P)), "samples": 2 * len(chosen)}
    for head in heads:
        # With two heads the safer answer comes first, which need not be the better one.
        ordered_P = data.safer_is_better[chosen] if head == "reward" and len(heads) > 1 else chosen >= 0
        preferred_PD = np.where(ordered_P[:, None], first_PD, second_PD)
        other_PD = np.where(ordered_P[:, None], second_PD, first_PD)
        figures = overlap(PairFeatures(preferred_PD, other_PD, prompt_P))
        found |= {f"features/{head}/{name}": figure for name, figure in figures.items()}
    return found
