"""A critic: values of every response token for one signal or several, and their clipped regression to the returns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from actors.machine.engine import LossTerms, NotFiniteError, TrainingEngine
from actors.machine.ranks import TrainingRank
from actors.roles.micro_batches import PackedResponses, SequenceRows, minibatches, token_column
from beaver_ray import experience
from beaver_ray.data.tokenized import same_tokenizer
from beaver_ray.errors import UserError
from beaver_ray.method.losses import token_weights, value_loss
from beaver_ray.models.loading import DTYPES, load_tokenizer
from beaver_ray.models.lora import add_trunk_adapter
from beaver_ray.models.provenance import trained_with
from beaver_ray.models.score import load_score_model, save_score_model
from beaver_ray.packing import check_packing
from beaver_ray.policy_options import PolicyConfig
from beaver_ray.weights import AdapterInfo


class Critic(TrainingRank):
    """One rank of the critic of ``signals`` ("reward", names of constraints), with a head for each on one trunk."""

    def __init__(self, config: PolicyConfig, signals: Sequence[str], model: str, rank: int, world: int) -> None:
        super().__init__(rank, world, config.seed, config.cluster.threads)
        self.config, self.signals, self.model = config, signals, model

    def build(self) -> None:
        """Load the model; a signal that has no head there gets a fresh one."""
        config, trust = self.config, self.config.models.trust_remote_code
        self.tokenizer = load_tokenizer(self.model, trust)
        name = f"{' and '.join(self.signals)} critic"
        if not same_tokenizer(self.tokenizer, load_tokenizer(config.models.policy, trust)):
            raise UserError(
                f"the {name} ({self.model}) and the policy ({config.models.policy}) have different "
                f"tokenizers; start the critic from the policy's folder instead"
            )
        model = load_score_model(self.model, "critic", DTYPES[config.engine.dtype], trust, self.signals)
        models = config.models
        self.adapter: AdapterInfo | None = None
        if models.critic_lora_rank:
            self.adapter = AdapterInfo(models.critic_lora_rank, models.lora_alpha, self.model)
            add_trunk_adapter(model.trunk, models.critic_lora_rank, models.lora_alpha, config.seed, models.lora_targets)
        steps = config.total_steps(0) * config.ppo.epochs * config.ppo.minibatches
        self.engine = TrainingEngine(model, name, config.critic, config.engine, steps)
        check_packing(self.engine.engine)

    @torch.no_grad()
    def values(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """``sample_id`` and ``values/SIGNAL`` of every signal, of this rank's share."""
        self.engine.module.eval()
        parts: list[tuple[list[int], np.ndarray]] = []
        for micro_batch in self._micro_batches(SequenceRows(batch), range(batch.num_rows)):
            values_TH = self._values(micro_batch)
            if micro_batch.weight:
                parts.append((micro_batch.rows, values_TH.cpu().numpy()))
        columns = [
            token_column(batch, f"values/{signal}", [(rows, values_TH[:, head]) for rows, values_TH in parts])
            for head, signal in enumerate(self.signals)
        ]
        return experience.join(*columns)

    def update(self, batch: pa.RecordBatch, step: int) -> dict[str, float]:
        """All epochs and minibatches over one step's experience; returns metrics under ``critic/SIGNAL/``.

        Signals on one trunk descend the sum of their losses; gradient norm and learning rate are then those of all.
        """
        rows = SequenceRows(batch)
        figures: list[dict[str, float]] = []
        skipped = 0
        for epoch in range(self.config.ppo.epochs):
            seeds = (self.config.seed, step, epoch)
            for minibatch in minibatches(batch.num_rows, self.config.ppo.minibatches, seeds):
                totals = {signal: self._total(rows, minibatch, signal) for signal in self.signals}
                micro_batches = self._micro_batches(rows, minibatch)
                try:
                    figures.append(self.engine.step(micro_batches, partial(self._loss, rows, totals)))
                except NotFiniteError:
                    skipped += 1  # and the driver says so
        metrics = {f"critic/{signal}/skipped_updates": float(skipped) for signal in self.signals}
        if not figures:
            return metrics
        means = {name: float(np.mean([f[name] for f in figures])) for name in figures[0]}
        for signal in self.signals:
            metrics |= {f"critic/{signal}/{name}": means[f"{signal}/{name}"] for name in ("loss", "clip_fraction")}
            metrics |= {f"critic/{signal}/{name}": means[name] for name in ("grad_norm", "learning_rate")}
        return metrics

    def save_model(self, folder: str) -> None:
        """Write the critic, with any adapter added to its trunk, and its tokenizer as a Hugging Face folder.

        All ranks must call it.
        """
        state = self.engine.full_state_on_rank_0()
        if state is not None:
            model: Any = self.engine.module
            read_with = trained_with(self.tokenizer, self.config.data.template)
            save_score_model(model, state, Path(folder), read_with, self.adapter)
            self.tokenizer.save_pretrained(folder)

    def _total(self, rows: SequenceRows, minibatch: np.ndarray, signal: str) -> int:
        """How many sequences (or tokens) of a minibatch a signal's loss is the mean over: those that it counts for."""
        inside = experience.inside(rows.batch, signal)
        counting = minibatch if inside is None else minibatch[inside[minibatch]]
        sequences = self.config.ppo.loss_reduction == "sequence"
        return len(counting) if sequences else int(rows.own_lengths[counting].sum())

    def _weights(self, rows: SequenceRows, total: int, micro_batch: PackedResponses, signal: str) -> torch.Tensor:
        """Of the tokens in a signal's loss; 0 at answers that it does not count for."""
        reduction, mask_T = self.config.ppo.loss_reduction, micro_batch.loss_mask_T
        weights_T = micro_batch.weight * token_weights(micro_batch.lengths_B, reduction, total, mask_T)
        inside = experience.inside(rows.batch, signal)
        if inside is None:
            return weights_T
        inside_B = torch.from_numpy(inside[micro_batch.rows]).to(weights_T.device)
        return weights_T * torch.repeat_interleave(inside_B, micro_batch.lengths_B)

    def _loss(self, rows: SequenceRows, totals: dict[str, int], micro_batch: PackedResponses) -> LossTerms:
        values_TH = self._values(micro_batch)
        loss = values_TH.new_zeros(())
        sums: dict[str, torch.Tensor] = {}
        for head, signal in enumerate(self.signals):
            part, metrics = value_loss(
                values_TH[:, head],
                rows.column_T(f"values/{signal}", micro_batch),
                rows.column_T(f"returns/{signal}", micro_batch),
                self._weights(rows, totals[signal], micro_batch, signal),
                clip=self.config.ppo.clip_value,
            )
            loss = loss + part
            sums |= {f"{signal}/loss": part.detach(), f"{signal}/clip_fraction": metrics["clip_fraction"]}
        return LossTerms(loss, sums)

    def _values(self, micro_batch: PackedResponses) -> torch.Tensor:
        packed = micro_batch.packed
        return self.engine.engine(packed.input_ids, packed.position_ids)[0, micro_batch.positions_T]

    def _micro_batches(self, rows: SequenceRows, chosen: Any) -> list[PackedResponses]:
        budget = self.config.engine.micro_batch_tokens
        return list(rows.micro_batches(chosen, budget, self.rank, self.world, self.engine.device))
