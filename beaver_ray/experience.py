"""Experience as Arrow: one row is one sequence, per-token columns are ragged lists without padding.

Every role returns ``sample_id`` and only the columns that it computed; `join` puts them side by side. A signal is
``reward`` or the name of a constraint. The columns, with N rows and n response tokens in a row:

    sample_id int64            unique in a run
    prompt_id int64            which prompt of the data
    prompt_tokens list<int32>
    response_tokens list<int32>        n, the EOS included unless finish_reason is "length"
    loss_mask list<bool>               n, whether the policy wrote the token; without the column it wrote all of them
    rollout_logprobs list<float32>     n, under the distribution that was sampled
    weight_version int64               version of the weights that its first own token was sampled under: its oldest
    token_versions list<int32>         n, version that each token was sampled under
    finish_reason string               "stop", "length" or "room"
    turns list<string>                 with an environment: what the user said in each hole, without its template
    prompt_texts list<string>          of answers that come as texts: the prompt's turns, user, ..., user,
    response_texts list<string>        all that was said behind it, answer, user, ..., answer,
    system string                      and the system text of the prompt's row, null where it has none
    reward, cost/NAME float32          scores of the whole answer
    reference_logprobs, logprobs list<float32>          n, of the reference and of the policy before its update
    scope/NAME bool                    whether cost NAME counts for the prompt; without the column it does for all
    advantages/SIGNAL list<float32>    n
    values/SIGNAL, returns/SIGNAL list<float32>         n, with critics; values[t] is that of the state before token t
    advantages list<float32>           n, what the policy climbs: those of all signals in one
    scores/SIGNAL float32              with ppo.replay: what the answer scored, as the constraint's form has it
    baselines/SIGNAL float32           with ppo.replay: what an answer to the prompt is expected to score, KL included

A response that was cut at its longest has finish reason "length"; "room" is that of a dialogue whose next turn would
not have left a token for an answer, so that it ended with the answer before.

A response is all that follows the prompt. Tokens of it that the policy did not write (a user's or a tool's turn) are a
hole: all models read them, but they are in no loss, no mean and no reward, and to GAE the next own token follows the
last one. Columns have a number for them all the same: rollout_logprobs and token_versions whatever the generator puts
there (0, say), logprobs, reference_logprobs and values what the models give, advantages and returns 0. None of it
counts, and it need not be finite. Each response has at least one token of the policy's own.

Texts stand beside tokens, or without any, where the policy's tokens may not keep them: who reads words takes the texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

TOKENS = pa.list_(pa.int32())
FLOATS = pa.list_(pa.float32())

_FIXED: dict[str, pa.DataType] = {
    "sample_id": pa.int64(),
    "prompt_id": pa.int64(),
    "prompt_tokens": TOKENS,
    "response_tokens": TOKENS,
    "loss_mask": pa.list_(pa.bool_()),
    "rollout_logprobs": FLOATS,
    "weight_version": pa.int64(),
    "token_versions": TOKENS,
    "finish_reason": pa.string(),
    "turns": pa.list_(pa.string()),
    "prompt_texts": pa.list_(pa.string()),
    "response_texts": pa.list_(pa.string()),
    "system": pa.string(),
    "reward": pa.float32(),
    "reference_logprobs": FLOATS,
    "logprobs": FLOATS,
    "advantages": FLOATS,
}


def column_type(name: str) -> pa.DataType:
    """The Arrow type of a column of the schema above; KeyError for a name that is not in it."""
    if name in _FIXED:
        return _FIXED[name]
    kind, _, signal = name.partition("/")
    if signal and kind == "scope":
        return pa.bool_()
    if signal and kind in ("cost", "scores", "baselines"):
        return pa.float32()
    if signal and kind in ("values", "advantages", "returns"):
        return FLOATS
    raise KeyError(f"no experience column is called {name!r}")


def make_batch(columns: dict[str, Sequence[object] | np.ndarray | pa.Array]) -> pa.RecordBatch:
    """A RecordBatch of the schema's types from plain sequences, NumPy arrays or Arrow arrays."""
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, type=column_type(name))
        for name, column in columns.items()
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema([(n, column_type(n)) for n in columns]))


def finished(written: Sequence[tuple[list[int], list[int]]], first: int = 0) -> pa.RecordBatch:
    """Whole answers as a generator would have given them, (prompt, answer) in tokens each; ids rise from ``first``."""
    return make_batch(
        {
            "sample_id": np.arange(first, first + len(written)),
            "prompt_tokens": [prompt for prompt, _ in written],
            "response_tokens": [answer for _, answer in written],
            "finish_reason": ["stop"] * len(written),
        }
    )


def ragged(flat: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """A list column from flat values and the length of each row; no copy of the values."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    if offsets[-1] != len(flat):
        raise ValueError(f"{len(flat)} values do not fill rows of {offsets[-1]} in all")
    return pa.ListArray.from_arrays(offsets, pa.array(flat))


def flat(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """The values of a list column, all rows after one another; without a copy, but for bools, which Arrow packs."""
    values = batch.column(name).flatten()
    return values.to_numpy(zero_copy_only=not pa.types.is_boolean(values.type))


def lengths(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """The length of each row of a list column, int64 [N]."""
    offsets = batch.column(name).offsets.to_numpy()
    return np.diff(offsets).astype(np.int64)


def rows(batch: pa.RecordBatch, name: str) -> list[np.ndarray]:
    """The rows of a list column as views of its `flat` values."""
    ends = np.cumsum(lengths(batch, name))
    return np.split(flat(batch, name), ends[:-1]) if len(ends) else []


def scalars(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """A column of numbers [N]."""
    return batch.column(name).to_numpy(zero_copy_only=False)


def loss_mask(batch: pa.RecordBatch) -> np.ndarray:
    """Which response tokens the policy wrote, all rows after one another, bool [T]."""
    lengths_N = lengths(batch, "response_tokens")
    if "loss_mask" not in batch.schema.names:
        return np.ones(int(lengths_N.sum()), dtype=bool)
    if not np.array_equal(lengths(batch, "loss_mask"), lengths_N):
        raise ValueError("a loss_mask must have as many entries as its response has tokens")
    return flat(batch, "loss_mask")


def own_lengths(batch: pa.RecordBatch) -> np.ndarray:
    """How many tokens of each response the policy wrote, int64 [N]."""
    rows_T = np.repeat(np.arange(batch.num_rows), lengths(batch, "response_tokens"))
    return np.bincount(rows_T[loss_mask(batch)], minlength=batch.num_rows)


def answers(batch: pa.RecordBatch) -> list[list[tuple[int, int]]]:
    """Where each response's answers begin and end, the tokens that the policy wrote one after another.

    One for each response but in dialogues, which have another behind each hole.
    """
    found = []
    ends = np.cumsum(lengths(batch, "response_tokens"))
    for mask in np.split(loss_mask(batch), ends[:-1]) if len(ends) else []:
        edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
        found.append([(int(start), int(end)) for start, end in edges.reshape(-1, 2)])
    return found


def answer_lengths(batch: pa.RecordBatch) -> np.ndarray:
    """Tokens of each of the `answers`, in order: without a loop, for what every step works out."""
    mask_T, lengths_N = loss_mask(batch), lengths(batch, "response_tokens")
    begins_T = mask_T & ~np.concatenate([[False], mask_T[:-1]])
    firsts = (np.cumsum(lengths_N) - lengths_N)[lengths_N > 0]
    begins_T[firsts] = mask_T[firsts]
    return np.diff(np.flatnonzero(begins_T[mask_T]), append=np.count_nonzero(mask_T))


def own(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """The values of a per-token column at the tokens that the policy wrote, all rows after one another."""
    return flat(batch, name)[loss_mask(batch)]


def with_holes(batch: pa.RecordBatch, values: np.ndarray) -> pa.ListArray:
    """What `own` was taken out of, as float32: ``values`` at the tokens that the policy wrote, 0 in holes."""
    mask_T = loss_mask(batch)
    whole_T = np.zeros(len(mask_T), dtype=np.float32)
    whole_T[mask_T] = values
    return ragged(whole_T, lengths(batch, "response_tokens"))


def inside(batch: pa.RecordBatch, name: str) -> np.ndarray | None:
    """Which answers a cost counts for, bool [N]; None where it counts for all."""
    return scalars(batch, f"scope/{name}").astype(bool) if f"scope/{name}" in batch.schema.names else None


def truncated(batch: pa.RecordBatch) -> np.ndarray:
    """Which answers were cut at their longest, bool [N]."""
    return np.array([reason == "length" for reason in batch.column("finish_reason").to_pylist()], dtype=bool)


def not_finite(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """Rows in which a column of numbers has NaN or infinity, or one of lists at an own token, bool [N]."""
    if not pa.types.is_list(batch.schema.field(name).type):
        return ~np.isfinite(scalars(batch, name))
    bad_T = ~np.isfinite(flat(batch, name)) & loss_mask(batch)
    rows_T = np.repeat(np.arange(batch.num_rows), lengths(batch, name))
    return np.bincount(rows_T, weights=bad_T, minlength=batch.num_rows) > 0


def concat(batches: Iterable[pa.RecordBatch]) -> pa.RecordBatch:
    """Batches of one schema concatenated, sorted by ``sample_id``.

    Sequences arrive in the order in which they finish, which no two runs repeat; sorted, a step's experience does
    not depend on it.
    """
    table = pa.Table.from_batches(list(batches)).combine_chunks()
    order = np.argsort(table.column("sample_id").to_numpy(), kind="stable")
    return table.take(pa.array(order)).combine_chunks().to_batches()[0]


def select(batch: pa.RecordBatch, sample_ids: Sequence[int]) -> pa.RecordBatch:
    """The rows of these samples, in the batch's order. Raises ValueError where one is not there."""
    mask = np.isin(scalars(batch, "sample_id"), np.asarray(sample_ids))
    if mask.sum() != len(sample_ids):
        raise ValueError(f"only {mask.sum()} of {len(sample_ids)} samples are in the batch")
    return batch if mask.all() else batch.take(pa.array(np.flatnonzero(mask)))


def join(left: pa.RecordBatch, *others: pa.RecordBatch) -> pa.RecordBatch:
    """Columns of ``others`` beside those of ``left``, matched by ``sample_id``.

    Raises ValueError where a batch holds other samples than ``left``.
    """
    names, arrays = list(left.schema.names), list(left.columns)
    ids = scalars(left, "sample_id")
    for other in others:
        other_ids = scalars(other, "sample_id")
        if not np.array_equal(ids, other_ids):
            order = np.argsort(other_ids, kind="stable")
            if not np.array_equal(np.sort(ids), other_ids[order]):
                raise ValueError(f"columns {other.schema.names} are of other samples than {left.schema.names}")
            other = other.take(pa.array(order[np.searchsorted(other_ids[order], ids)]))
        for name in other.schema.names:
            if name != "sample_id":
                names.append(name)
                arrays.append(other.column(name))
    return pa.RecordBatch.from_arrays(arrays, names=names)
