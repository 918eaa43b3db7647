"""How a model learns soft labels, and what is seen of it meanwhile; see `actors.driver.arms.SoftArm`.

A row asks K questions, each with a logit and a label between 0 and 1: of a preference pair whether the first answer is
the better one (K = 1, the logit is the difference of rewards); of a cost pair whether the first answer is safer, and
whether each is unsafe (K = 3); of a single text whether it has the label (K = 1). Order: `QUESTIONS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actors.machine.engine import LossTerms
from actors.roles.score_losses import save_scores, score_pairs
from beaver_ray.method.losses import cross_entropy_loss
from beaver_ray.method.weak_to_strong import confidence_weight, mixed_target, product_target, soft_label_loss
from beaver_ray.models.classifier import classify, save_classifier
from beaver_ray.models.logprobs import response_logprobs
from beaver_ray.models.moderator import Settings
from beaver_ray.models.provenance import trained_with
from beaver_ray.packing import pack, response_positions
from beaver_ray.weak_to_strong_options import QUESTIONS

if TYPE_CHECKING:
    from actors.roles.trainer import Rows, Trainer


@dataclass
class SoftState:
    """What a model in training knows besides its texts."""

    labels_NK: Tensor
    targets_NK: Tensor
    """Of the rows of the present batch."""
    watched_NK: np.ndarray | None
    seen: list[dict[str, Any]] = field(default_factory=list)
    """Of each look: the epochs by then, agreement and loss by the held-out weak labels, the tests' answers."""
    best: int | None = None
    scores_NK: np.ndarray | None = None
    """Of all held-out rows, by the model that is kept: the best so far, or the last."""

    @classmethod
    def of(cls, arm: Any, trainer: Trainer) -> SoftState:
        """The state before the first step. RuntimeError where labels and rows do not belong together."""
        labels_NK = torch.from_numpy(np.load(arm.labels)).float()
        if len(labels_NK) != len(trainer.train_data):
            raise RuntimeError(f"{arm.name}: {len(labels_NK)} labels of {len(trainer.train_data)} training rows")
        watched = np.load(arm.watched_labels) if arm.watched_labels else None
        return cls(labels_NK, labels_NK.clone(), watched)

    def told(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"seen": self.seen, "best": self.best}


def logits_of(arm: Any, trainer: Trainer, data: Any, rows: Rows) -> tuple[Tensor, Tensor | None]:
    """(Logits [B, K] of some rows in one forward pass, end scores [B, 2] of pairs)."""
    if not arm.of_pairs:
        model: Any = trainer.engine.module
        texts = [data.tokens[int(row)] for row in rows]
        return classify(model, trainer.engine.engine, texts, trainer.engine.device), None
    first, second = ([side[int(row)] for row in rows] for side in arm.sequences(data))
    ends = score_pairs(trainer, first, second, 1.0, len(rows)).ends_BH
    first_B, second_B = (end_BH[:, 0] for end_BH in ends)
    scores_B2 = torch.stack([first_B, second_B], dim=1)
    if arm.task == "preference":
        return (first_B - second_B)[:, None], scores_B2
    return torch.cat([(second_B - first_B)[:, None], scores_B2], dim=1), scores_B2


@torch.no_grad()
def all_logits(arm: Any, trainer: Trainer, data: Any, rows: Rows) -> np.ndarray:
    """Logits [N, K] of these rows, without dropout."""
    trainer.engine.module.eval()
    found_NK = np.empty((len(rows), trainer.prepared.labels_NK.shape[1]))
    places = {int(row): place for place, row in enumerate(rows)}
    for members, _ in trainer.micro_batches(data, rows):
        logits_BK = logits_of(arm, trainer, data, members)[0].double().cpu().numpy()
        found_NK[[places[int(row)] for row in members]] = logits_BK
    return found_NK


def set_targets(arm: Any, trainer: Trainer, batch: Rows) -> None:
    """Fix what the rows of a batch are to learn, in `SoftState.targets_NK`."""
    state: SoftState = trainer.prepared
    labels_BK = state.labels_NK[batch]
    state.targets_NK[batch] = labels_BK
    done, steps = trainer.engine.steps_done, trainer.steps
    weight = confidence_weight(done, steps, arm.alpha, arm.warmup, arm.schedule == "published")
    if arm.loss == "xent" or (arm.loss == "confidence" and weight == 0):
        return
    logits_BK = torch.from_numpy(all_logits(arm, trainer, trainer.train_data, batch)).float()
    for columns in QUESTIONS[arm.task].values():
        labels, logits = labels_BK[:, columns], logits_BK[:, columns]
        if arm.loss == "product":
            state.targets_NK[batch[:, None], columns] = product_target(labels, logits, arm.alpha, arm.beta)
        else:
            mixed = mixed_target(labels.flatten(), logits.flatten(), weight)
            state.targets_NK[batch[:, None], columns] = mixed.view_as(labels)


def soft_loss(arm: Any, trainer: Trainer, data: Any, batch: Rows, rows: Rows, weight: float) -> LossTerms:
    """Cross-entropy of these rows against their targets, and the mean squared score of pairs."""
    logits_BK, scores_B2 = logits_of(arm, trainer, data, rows)
    targets_BK = trainer.prepared.targets_NK[rows].to(logits_BK.device)
    weights_B = torch.full((len(rows),), weight / len(batch), dtype=logits_BK.dtype, device=logits_BK.device)
    loss, metrics = soft_label_loss(logits_BK, targets_BK, weights_B)
    if scores_B2 is not None:
        loss = loss + arm.regularization * (weights_B * 0.5 * scores_B2.square().sum(dim=1)).sum()
    return LossTerms(loss, metrics)


def look(arm: Any, trainer: Trainer, done: int) -> bool:
    """See what the model makes of held-out rows where it is time to, and keep it where it is the best so far.

    The truth has no part in it. Returns whether nothing better was seen for ``patience`` looks.
    """
    if not arm.looks:
        return False
    every = max(1, math.ceil(trainer.sampler.batches_per_epoch / arm.looks))
    if done % every and done < trainer.steps:
        return False
    state: SoftState = trainer.prepared
    start, stop = arm.watched
    data, last = trainer.eval_data, done >= trainer.steps
    rows = np.arange(len(data))
    if not last:
        rows = np.concatenate([rows[start:stop], rows[arm.tested :]])
    logits_NK = all_logits(arm, trainer, data, rows)
    seen: dict[str, Any] = {"epochs": done / trainer.sampler.batches_per_epoch}
    if stop > start:
        assert state.watched_NK is not None
        watched_WK, labels_WK = logits_NK[np.isin(rows, np.arange(start, stop))], state.watched_NK
        seen["agreement"] = float(((watched_WK > 0) == (labels_WK > 0.5)).mean())
        seen["loss"] = float((np.logaddexp(0.0, watched_WK) - labels_WK * watched_WK).mean())
    seen["says"] = (logits_NK[rows >= arm.tested] > 0).astype(int).tolist()
    state.seen.append(seen)
    if arm.stop == "none":
        if last:
            _keep(arm, trainer, logits_NK)
        return False
    sign = -1.0 if arm.stop == "loss" else 1.0
    if state.best is None or sign * seen[arm.stop] > sign * state.seen[state.best][arm.stop]:
        state.best = len(state.seen) - 1
        _keep(arm, trainer, logits_NK if last else all_logits(arm, trainer, data, np.arange(len(data))))
    return bool(arm.patience) and len(state.seen) - 1 - state.best >= arm.patience


def _keep(arm: Any, trainer: Trainer, scores_NK: np.ndarray) -> None:
    trainer.prepared.scores_NK = scores_NK
    if arm.save_to:
        trainer.save(arm.save_to)


def finish(arm: Any, trainer: Trainer) -> np.ndarray:
    """Logits [N, K] of all held-out rows by the model that is kept, which is saved where it is not yet."""
    state: SoftState = trainer.prepared
    if state.scores_NK is None:
        _keep(arm, trainer, all_logits(arm, trainer, trainer.eval_data, np.arange(len(trainer.eval_data))))
    assert state.scores_NK is not None
    return state.scores_NK


def save(arm: Any, trainer: Trainer, state: dict[str, Tensor], folder: Path) -> None:
    """Write a score model, or a classifier that flags at a probability of one half."""
    if arm.of_pairs:
        save_scores(trainer, state, folder)
        return
    model: Any = trainer.engine.module
    save_classifier(model, state, folder, trained_with(trainer.tokenizer, arm.template), arm.adapter)
    Settings(
        labels=[arm.label], input=arm.input, max_tokens=arm.max_tokens, template=arm.template, thresholds=[0.0]
    ).write(folder)


def language_loss(arm: Any, trainer: Trainer, data: Any, batch: Rows, rows: Rows, weight: float) -> LossTerms:
    """Cross-entropy of these rows' tokens behind the first, over those of the batch."""
    sides = arm.sequences(data)
    texts = [side[int(row)] for side in sides for row in rows]
    lengths = np.array([len(text) for text in texts])
    packed = pack(texts).to(trainer.engine.device)
    positions = response_positions(np.ones_like(lengths), lengths - 1).to(trainer.engine.device)
    logprobs_T, _ = response_logprobs(
        trainer.model, packed.input_ids, packed.position_ids, positions, packed.input_ids[0, positions + 1]
    )
    total = float(sum((side.lengths[batch] - 1).sum() for side in sides))
    loss, _ = cross_entropy_loss(logprobs_T, torch.full_like(logprobs_T, weight / total))
    return LossTerms(loss)
