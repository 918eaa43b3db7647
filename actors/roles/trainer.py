"""One rank that trains one model on a data set; what is trained, and by which loss, the stage says (`TrainerTask`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from actors.machine.engine import LossTerms, TrainingEngine
from actors.machine.ranks import TrainingRank
from beaver_ray.config import TrainerConfig
from beaver_ray.data.mixing import held_out_too
from beaver_ray.data.token_files import read_tokens
from beaver_ray.data.tokenized import BatchSampler, Ragged
from beaver_ray.models.classifier import check_apart
from beaver_ray.models.loading import DTYPES, load_tokenizer
from beaver_ray.options import rounded_up
from beaver_ray.packing import plan_micro_batches, plan_padded
from beaver_ray.weights import AdapterInfo

Rows = np.ndarray
"""Numbers of rows of a data set."""


class TrainerTask(Protocol):
    """What a stage tells the trainer."""

    @property
    def adapter(self) -> AdapterInfo | None:
        """The LoRA adapter that is trained alone; None where all parameters are."""
        ...

    @property
    def packed(self) -> bool:
        """Whether the model reads packed rows, and not padded batches."""
        ...

    def dataset(self) -> Any:
        """The class of its data sets (`beaver_ray.data.tokenized`), or another `RowKind`."""
        ...

    def sequences(self, data: Any) -> tuple[Ragged, ...]:
        """The sequences of each row: one, or the two of a pair."""
        ...

    def load(self, dtype: torch.dtype) -> torch.nn.Module:
        """The model to train."""
        ...

    def prepare(self, trainer: Trainer) -> Any:
        """Whatever must be known before the first step, kept as `Trainer.prepared`; called once on all ranks."""
        ...

    def work(self, trainer: Trainer, batch: Rows) -> tuple[Sequence[Any], Callable[[Any], LossTerms]]:
        """What a step on ``batch`` differentiates: this rank's micro-batches, and what says the loss of each."""
        ...

    def batch_loss(self, trainer: Trainer, data: Any, batch: Rows, rows: Rows, weight: float) -> LossTerms:
        """Loss and metrics of ``rows``, which are a micro-batch of ``batch``, as their part of the batch's mean.

        ``weight`` is 0 where the micro-batch only keeps the ranks in step.
        """
        ...

    def conclude(self, trainer: Trainer) -> Any:
        """Whatever is found out about the trained model, kept as `Trainer.concluded`; called on all ranks."""
        ...

    def save(self, trainer: Trainer, state: dict[str, Tensor], folder: Path) -> None:
        """Write the model as a Hugging Face folder; on rank 0 alone, with every tensor in host memory."""
        ...


class Trainer(TrainingRank):
    """One rank. All ranks read the same data and draw the same batches, and each takes its share of them.

    config: the stage, which is a `TrainerTask` as well.
    """

    def __init__(self, config: Any, rank: int, world: int) -> None:
        super().__init__(rank, world, config.seed, config.cluster.threads)
        self.config: TrainerConfig = config
        self.task: TrainerTask = config

    def build(self) -> None:
        """Load model and data."""
        config = self.config
        self.tokenizer = load_tokenizer(config.model, config.trust_remote_code)
        kind, both = self.task.dataset(), None
        train = read_tokens(kind, config.train, self.tokenizer, config.max_tokens, config.template)
        reports = train.reports
        if config.eval:
            held_out = read_tokens(kind, config.eval, self.tokenizer, config.max_tokens, config.template)
            reports = reports | held_out.reports
            both = held_out_too(train.keys, held_out.keys)
        else:
            train, held_out = train.split(config.eval_fraction, config.seed)
        self.train_data, self.eval_data = train.dataset(), held_out.dataset()
        self.notes = [f"{spec}: {report.line()}" for spec, report in reports.items()]
        self.notes += [
            f"{name} data: {len(data)} kept; {data.report.line()}"
            for name, data in (("training", self.train_data), ("held-out", self.eval_data))
        ]
        self.notes += [both] if both else []
        self.sampler = BatchSampler(len(self.train_data), config.batch_size, config.seed)
        self.steps = max(1, rounded_up(config.epochs * self.sampler.batches_per_epoch))
        model = self.task.load(DTYPES[config.engine.dtype])
        self.engine = TrainingEngine(
            model, config.stage, config.optimizer, config.engine, self.steps, dropout=config.dropout
        )
        self.packed = self.task.packed
        check_apart(self.engine.engine)
        self.model: Any = self.engine.engine
        self.prepared = self.task.prepare(self)

    def describe(self) -> tuple[int, int, list[str]]:
        """Optimizer steps in all, those of an epoch, and what became of the data in one line each."""
        return self.steps, self.sampler.batches_per_epoch, self.notes

    def held_out(self) -> int:
        """Rows of the held-out data."""
        return len(self.eval_data)

    def sizes(self) -> dict[str, float]:
        """How many rows are trained on, and how many numbers are trained."""
        # Of a parameter that ZeRO-3 has dealt to the ranks, numel() is 0.
        trained = [p for p in self.engine.module.parameters() if p.requires_grad]
        numbers = sum(getattr(p, "ds_numel", p.numel()) for p in trained)
        return {"data/rows": float(len(self.train_data)), "model/trained_parameters": float(numbers)}

    def train_step(self) -> dict[str, float]:
        """One optimizer step on the next global batch."""
        batch = self.sampler.next_batch()
        figures = self.engine.step(*self.task.work(self, batch))
        return {**figures, "tokens": float(self._lengths(self.train_data, batch).sum())}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and metrics on the held-out data, over this rank's share; weights add up over ranks."""
        self.engine.module.eval()
        everything = np.arange(len(self.eval_data))
        totals: dict[str, float] = {}
        for members in self.micro_batches(self.eval_data, everything):
            term = self.loss(self.eval_data, everything, members)
            for name, value in {"loss": term.loss, **term.sums}.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    def position(self) -> dict[str, Any]:
        """The position in the training data, for a checkpoint."""
        return {"train": self.sampler.state_dict()}

    def restore_position(self, position: dict[str, Any]) -> None:
        """Restore the position in the training data."""
        self.sampler.load_state_dict(position["train"])

    def save_model(self, folder: str) -> None:
        """Write model and tokenizer as a Hugging Face folder; all ranks must call it."""
        self.concluded = self.task.conclude(self)
        state = self.engine.full_state_on_rank_0()
        if state is None:
            return
        self.task.save(self, state, Path(folder))
        self.tokenizer.save_pretrained(folder)

    def micro_batches(self, data: Any, rows: Rows) -> list[tuple[Rows, float]]:
        """This rank's micro-batches of ``rows`` with their weight: 0 where one only keeps ranks in step."""
        budget, make = self.config.engine.micro_batch_tokens, plan_micro_batches if self.packed else plan_padded
        plan = make(self._lengths(data, rows).tolist(), budget, self.world)[self.rank]
        return [(rows[members], 1.0) if members else (rows[:1], 0.0) for members in plan]

    def _lengths(self, data: Any, rows: Rows) -> np.ndarray:
        """Tokens of each row, both sequences of a pair together."""
        return np.sum([side.lengths[rows] for side in self.task.sequences(data)], axis=0)

    def loss(self, data: Any, batch: Rows, members: tuple[Rows, float]) -> LossTerms:
        """Loss and metrics of a micro-batch of ``batch``, as its part of that one's mean."""
        rows, weight = members
        return self.task.batch_loss(self, data, batch, rows, weight)
