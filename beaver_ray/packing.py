"""Micro-batches without padding: which sequences go together, and how they lie in one packed row.

A micro-batch is one row [1, T] in which the sequences follow one another. The forward call that keeps them
apart is

    model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)

with *no* attention mask and *no* cache. transformers (`masking_utils.find_packed_sequence_indices`) then
finds the borders where `position_ids` do not grow by one and makes a block-diagonal causal mask for "sdpa",
"eager" and "flex_attention"; the flash-attention kernels find the same borders from `position_ids`
themselves. An attention mask, even of ones, or a cache turns this off without a word, and the sequences then
see each other. So do the sequences of models that keep a running state (Mamba and hybrids such as Qwen3-Next)
and of those that build their mask without the positions (in transformers 5.19 OPT, Falcon, GPT-OSS, BLOOM and
MPT): `check_packing` finds that out for a loaded model.

With "sdpa" a row costs T^2 in attention, so the token budget bounds time as well as memory.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from beaver_ray.errors import UserError


@dataclass(frozen=True)
class PackedBatch:
    """Sequences 0 .. N-1, one after another, in a row of T tokens."""

    input_ids: torch.Tensor  # [1, T] int64
    position_ids: torch.Tensor  # [1, T] int64, from 0 in each sequence
    cu_seqlens: torch.Tensor  # [N + 1] int32, where each sequence starts; the last entry is T
    sequence_index: torch.Tensor  # [T] int64, the sequence that each token belongs to

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        return PackedBatch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.cu_seqlens.to(device),
            self.sequence_index.to(device),
        )


def pack(sequences: Sequence[ArrayLike]) -> PackedBatch:
    """Put token sequences (1-D, none empty) in one row.

    An empty list gives T = 0, which no model takes: a rank whose micro-batch is empty runs a row of one token
    and multiplies its loss by zero, so that its collectives match those of the other ranks.
    """
    arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    if any(array.ndim != 1 or array.size == 0 for array in arrays):
        raise ValueError("pack takes 1-D sequences of at least one token")
    lengths = np.array([array.size for array in arrays], dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    sequence_index = np.repeat(np.arange(len(arrays)), lengths)
    tokens = np.concatenate([np.empty(0, dtype=np.int64), *arrays])
    positions = np.arange(tokens.size) - starts[sequence_index]
    return PackedBatch(
        input_ids=torch.from_numpy(tokens)[None],
        position_ids=torch.from_numpy(positions)[None],
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        sequence_index=torch.from_numpy(sequence_index),
    )


def response_positions(prompt_lengths: ArrayLike, response_lengths: ArrayLike) -> torch.Tensor:
    """Where in a packed row the logits (or values) stand that belong to each response token.

    The token at place p of a sequence is predicted at place p - 1, so the response of a sequence that starts
    at s takes s + prompt - 1 .. s + prompt + response - 2. Every prompt has at least one token; a response
    may be empty.

    Returns:
        [sum of response_lengths] int64 positions in the row, sequence by sequence. The predicted tokens
        themselves stand at these positions + 1.
    """
    prompts = np.asarray(prompt_lengths, dtype=np.int64)
    responses = np.asarray(response_lengths, dtype=np.int64)
    if prompts.shape != responses.shape or prompts.ndim != 1:
        raise ValueError("prompt_lengths and response_lengths must be 1-D and of one length")
    if (prompts < 1).any() or (responses < 0).any():
        raise ValueError("a prompt has at least one token and a response at least none")
    lengths = prompts + responses
    first = np.cumsum(lengths) - lengths + prompts - 1
    before = np.cumsum(responses) - responses  # response tokens of earlier sequences
    within = np.arange(responses.sum()) - np.repeat(before, responses)
    return torch.from_numpy(np.repeat(first, responses) + within)


def plan_micro_batches(lengths: Sequence[int], token_budget: int, ranks: int) -> list[list[list[int]]]:
    """Share sequences among ranks and cut each rank's share into micro-batches.

    Every index comes exactly once, no micro-batch holds more than `token_budget` tokens, and every rank has
    the same number of micro-batches, so that collectives match. That number is the smallest for which
    longest-processing-time (which also evens the load) or best-fit-decreasing (which fits more) finds room.
    The result depends on the arguments alone. A micro-batch is empty only where there are fewer sequences
    than ranks x micro-batches.

    Returns:
        `[rank][micro_batch][sequence indices]`, micro-batches from the fullest to the emptiest, indices
        ascending; with no sequences, no micro-batches.

    Raises:
        UserError: a sequence is longer than the budget.
    """
    if token_budget < 1 or ranks < 1:
        raise ValueError("token_budget and ranks must be at least 1")
    sizes = [int(length) for length in lengths]
    for index, size in enumerate(sizes):
        if size < 1:
            raise ValueError(f"sequence {index} has {size} tokens")
        if size > token_budget:
            raise UserError(
                f"row {index} has {size} tokens but a micro-batch holds at most {token_budget}: raise "
                f"engine.micro_batch_tokens to {size} or more, or shorten the longest prompt plus response"
            )
    if not sizes:
        return [[] for _ in range(ranks)]
    longest_first = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    micro_batches = -(-sum(sizes) // (token_budget * ranks))
    while True:
        bins = _even_bins(sizes, longest_first, micro_batches * ranks, token_budget)
        if bins is None:
            bins = _tight_bins(sizes, longest_first, micro_batches * ranks, token_budget)
        if bins is not None:
            return _share_bins(bins, sizes, micro_batches, ranks)
        micro_batches += 1


def plan_padded(lengths: Sequence[int], token_budget: int, ranks: int) -> list[list[list[int]]]:
    """`plan_micro_batches` for models that are given padded batches: the padding counts too.

    Sequences of like length go together, the longest first; the batches are dealt to the ranks in turn.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    plan_micro_batches([lengths[index] for index in order[:1]], token_budget, 1)  # refuses one that is too long
    batches: list[list[int]] = []
    for index in order:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > token_budget:
            batches.append([])
        batches[-1].append(index)
    batches += [[] for _ in range(-len(batches) % ranks)]
    return [batches[rank::ranks] for rank in range(ranks)]


def _even_bins(sizes: list[int], order: list[int], count: int, budget: int) -> list[list[int]] | None:
    """Longest processing time: each sequence to the emptiest of `count` bins; None when one overflows."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for index in order:
        load, number = loads[0]
        if load + sizes[index] > budget:
            return None
        bins[number].append(index)
        heapq.heapreplace(loads, (load + sizes[index], number))
    return bins


def _tight_bins(sizes: list[int], order: list[int], count: int, budget: int) -> list[list[int]] | None:
    """Best fit decreasing: each sequence to the fullest bin that has room; None when more than `count` are
    needed."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), ascending
    for index in order:
        place = bisect_left(room, (sizes[index], -1))
        if place < len(room):
            free, number = room.pop(place)
        elif len(bins) < count:
            free, number = budget, len(bins)
            bins.append([])
        else:
            return None
        bins[number].append(index)
        insort(room, (free - sizes[index], number))
    # Each bin left over takes the shortest sequence of the fullest bin: no rank idles without need.
    for _ in range(count - len(bins)):
        donors = [group for group in bins if len(group) > 1]
        fullest = max(donors, key=lambda group: sum(sizes[i] for i in group), default=None)
        bins.append([fullest.pop()] if fullest else [])
    return bins


def _share_bins(bins: list[list[int]], sizes: list[int], micro_batches: int, ranks: int) -> list[list[list[int]]]:
    """Give each rank `micro_batches` bins, the fullest bin always to the rank with the fewest tokens so
    far."""
    loads = [sum(sizes[index] for index in group) for group in bins]
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for number in sorted(range(len(bins)), key=lambda number: (-loads[number], number)):
        free = [rank for rank in range(ranks) if len(plan[rank]) < micro_batches]
        rank = min(free, key=lambda rank: (tokens[rank], rank))
        plan[rank].append(sorted(bins[number]))
        tokens[rank] += loads[number]
    return plan


@torch.no_grad()
def check_packing(model: torch.nn.Module) -> None:
    """Refuse a model that does not keep packed sequences apart.

    Run once where the model is going to run: on its device, in its dtype and, where it is trained, inside its engine,
    on every rank. Another device may have another kernel. Five small forwards, token ids 0 to 9, give scores, or a
    language model's logits. Two things are measured, in units of the outputs' standard deviation: the most that an
    output of the last two sequences of a row changes when only the first one's tokens do (nothing may, in any dtype),
    and how far the row is from each sequence alone on the average (rounding only; the wide limit leaves room for dozens
    of layers in bfloat16, where single outputs of 152,000 are off by more).

    Raises:
        UserError: the sequences see each other or the positions do not start again, or outputs are not finite.
    """
    device = next(model.parameters()).device
    sequences: list[NDArray[np.int64]] = [np.arange(9), np.arange(5, 10), np.arange(3, 10)]
    training = model.training
    model.eval()
    try:
        packed = _packed_outputs(model, sequences, device)
        disturbed = _packed_outputs(model, [sequences[0][::-1], *sequences[1:]], device)
        alone = torch.cat([_packed_outputs(model, [sequence], device) for sequence in sequences])
    finally:
        model.train(training)
    check_finite(model, alone)
    scale = alone.std()
    behind_first = slice(sequences[0].size, None)
    leak = ((packed - disturbed)[behind_first].abs().max() / scale).item()
    deviation = ((packed - alone).square().mean().sqrt() / scale).item()
    if not (leak <= 1e-3 and deviation <= 0.2):  # a NaN fails too, where all outputs are alike
        raise UserError(
            f"{_name(model)} cannot train on packed rows: a sequence's outputs move by {leak:.1e} "
            f"standard deviations with its neighbour and by {deviation:.1e} against running alone; use a "
            "model family with plain attention such as Llama, Qwen, Mistral, Gemma or GPT-NeoX"
        )


def check_finite(model: torch.nn.Module, outputs: torch.Tensor) -> None:
    """UserError where a model's outputs on ordinary tokens are not all finite."""
    if not outputs.isfinite().all():
        raise UserError(
            f"{_name(model)} gives {outputs[~outputs.isfinite()][0].item()} on ordinary tokens: its weights hold "
            f"numbers that are not finite, or too large for {next(model.parameters()).dtype}; train it anew, or save "
            "it again"
        )


def _packed_outputs(model: torch.nn.Module, sequences: Sequence[ArrayLike], device: torch.device) -> torch.Tensor:
    """Scores or logits [T, ...] in float32 of one packed row."""
    batch = pack(sequences).to(device)
    outputs = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    found: torch.Tensor = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    return found[0].float()


def _name(model: torch.nn.Module) -> str:
    """The model's class, of an engine the class of what it holds; and the folder that it comes from, if it says so."""
    inner = getattr(model, "module", model)
    folder = getattr(getattr(getattr(inner, "trunk", inner), "config", None), "name_or_path", "")
    return type(inner).__name__ + (f" from {folder}" if folder else "")
