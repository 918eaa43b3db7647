"""From rows of experience to packed rows on a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from beaver_ray import experience
from beaver_ray.packing import PackedBatch, pack, plan_micro_batches, response_positions


@dataclass(frozen=True)
class PackedResponses:
    """A micro-batch: some sequences in one packed row of L tokens, with T response tokens in all."""

    rows: list[int]
    """Rows of the experience; never empty, but `weight` is 0 where this only keeps the collectives in step."""
    weight: float
    packed: PackedBatch
    positions_T: Tensor
    """Places in the row whose logits or values belong to the response tokens."""
    targets_T: Tensor
    ends_B: Tensor
    """Place of each sequence's last token."""
    lengths_B: Tensor
    """Response tokens of each sequence."""
    loss_mask_T: Tensor
    """Which response tokens the policy wrote; the others are there to be read."""

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.packed.input_ids.device


class SequenceRows:
    """Random access to the sequences of an experience batch, and to its per-token columns."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        self.prompts = experience.rows(batch, "prompt_tokens")
        self.responses = experience.rows(batch, "response_tokens")
        self.response_lengths = experience.lengths(batch, "response_tokens")
        self.own_lengths = experience.own_lengths(batch)
        self.loss_mask_T = experience.loss_mask(batch)
        self.lengths = experience.lengths(batch, "prompt_tokens") + self.response_lengths
        self.starts = np.cumsum(self.response_lengths) - self.response_lengths

    def micro_batches(
        self, rows: Sequence[int], token_budget: int, rank: int, world: int, device: torch.device
    ) -> Iterator[PackedResponses]:
        """This rank's share of ``rows``, packed; every rank gets the same number of micro-batches."""
        chosen = np.asarray(rows)
        for bin_ in plan_micro_batches(self.lengths[chosen].tolist(), token_budget, world)[rank]:
            members = [int(chosen[i]) for i in bin_]
            yield self.pack(members or [int(chosen[0])], 1.0 if members else 0.0, device)

    def pack(self, rows: list[int], weight: float, device: torch.device) -> PackedResponses:
        """Pack these sequences into one row on ``device``."""
        packed = pack([np.concatenate([self.prompts[r], self.responses[r]]) for r in rows])
        positions = response_positions([len(self.prompts[r]) for r in rows], [len(self.responses[r]) for r in rows])
        return PackedResponses(
            rows=rows,
            weight=weight,
            packed=packed.to(device),
            positions_T=positions.to(device),
            targets_T=packed.input_ids[0, positions + 1].to(device),
            ends_B=(packed.cu_seqlens[1:].long() - 1).to(device),
            lengths_B=torch.from_numpy(self.response_lengths[rows]).to(device),
            loss_mask_T=torch.from_numpy(self.loss_mask_T[self.tokens_of(rows)]).to(device),
        )

    def tokens_of(self, rows: Sequence[int]) -> np.ndarray:
        """Indices into a flat per-token column of the response tokens of ``rows``, row after row."""
        lengths = self.response_lengths[list(rows)]
        before = np.cumsum(lengths) - lengths
        return np.repeat(self.starts[list(rows)] - before, lengths) + np.arange(lengths.sum())

    def column_T(self, name: str, micro_batch: PackedResponses) -> Tensor:
        """A per-token column at the micro-batch's response tokens.

        It is 0 in holes: whatever stands there, a weight of 0 would not keep a NaN out of a loss.
        """
        values = experience.flat(self.batch, name)[self.tokens_of(micro_batch.rows)]
        return torch.from_numpy(values).to(micro_batch.device).masked_fill(~micro_batch.loss_mask_T, 0.0)


def token_column(batch: pa.RecordBatch, name: str, parts: list[tuple[list[int], np.ndarray]]) -> pa.RecordBatch:
    """``sample_id`` and one per-token column from (rows, flat values) of several micro-batches."""
    ids = experience.scalars(batch, "sample_id")
    lengths = experience.lengths(batch, "response_tokens")
    rows = np.array([r for part, _ in parts for r in part], dtype=np.int64)
    values = np.concatenate([v for _, v in parts]) if parts else np.zeros(0, np.float32)
    return experience.make_batch(
        {"sample_id": ids[rows], name: experience.ragged(values.astype(np.float32), lengths[rows])}
    )


def minibatches(rows: int, count: int, seeds: tuple[int, ...]) -> list[np.ndarray]:
    """``count`` equal parts of all rows, shuffled by ``seeds``; a single part is left in its order.

    Of fewer rows there are as many parts as rows.
    """
    if count == 1:
        return [np.arange(rows)]
    return np.array_split(np.random.default_rng(seeds).permutation(rows), min(rows, count))
