"""A process that trains models one after another, each alone, and says how they score rows that it is given."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from actors.roles.score_losses import score_pairs
from actors.roles.trainer import Trainer


@dataclass(frozen=True, eq=False)
class Scored:
    """What a trained model makes of its held-out rows."""

    scores: np.ndarray
    """[N], or [N, K], in the order of the file: `TrainerStage.held_out_scores`."""
    loss: float
    """Of its last training step."""
    told: dict[str, Any] = field(default_factory=dict)
    """What else its stage has to say: `TrainerStage.told`."""


class EnsembleWorker:
    """Trains the models of an ensemble; the data that a model holds out are those that it scores."""

    def __init__(self, rank: int, threads: int) -> None:
        self.rank = rank
        torch.set_num_threads(threads)
        self.trainer: Trainer | None = None
        self.done, self.loss = 0, 0.0

    def work(self, member: Any, seconds: float) -> float | Scored:
        """Go on with a member for some ``seconds``: the share of its steps that is done, and at the end its scores.

        member: a stage that trains one model. One that this process knows nothing of, perhaps as another died with it,
        begins.
        """
        if self.trainer is None or self.trainer.config.name != member.name:
            self.trainer, self.done = None, 0
            gc.collect()  # an engine holds itself
            self.trainer = Trainer(member, 0, 1)
            self.trainer.setup(*self.trainer.rendezvous())
        until = time.monotonic() + seconds
        while self.done < self.trainer.steps:
            self.loss = self.trainer.train_step()["loss"]
            self.done += 1
            if member.ends_after(self.trainer, self.done):
                break
            if self.done < self.trainer.steps and time.monotonic() > until:
                return self.done / self.trainer.steps
        scored = Scored(member.held_out_scores(self.trainer), self.loss, member.told(self.trainer))
        self.trainer = None
        return scored


@torch.no_grad()
def score_differences(trainer: Trainer) -> np.ndarray:
    """End score [N] of each held-out pair's preferred answer less that of the other; for a trainer that is alone."""
    trainer.engine.module.eval()
    data = trainer.eval_data
    found_N = np.empty(len(data))
    for rows, _ in trainer.micro_batches(data, np.arange(len(data))):
        better, worse = ([side[int(row)] for row in rows] for side in trainer.task.sequences(data))
        first_BH, second_BH = score_pairs(trainer, better, worse, 1.0, len(rows)).ends_BH
        found_N[rows] = (first_BH - second_BH)[:, 0].double().cpu().numpy()
    return found_N
