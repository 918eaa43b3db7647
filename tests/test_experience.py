"""Columns survive what is done to them: ragged round trips, sorting, joining and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beaver_ray import experience

FLOATS = st.floats(width=32, allow_nan=False)
RAGGED = st.lists(st.lists(FLOATS, max_size=5), min_size=1, max_size=8)


@st.composite
def samples(draw: st.DrawFn) -> list[dict[str, object]]:
    """Rows with distinct sample ids in any order."""
    ids = draw(st.lists(st.integers(0, 2**62), unique=True, min_size=1, max_size=8))
    return [
        {
            "sample_id": i,
            "prompt_tokens": draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4)),
            "rollout_logprobs": draw(st.lists(FLOATS, max_size=4)),
            "finish_reason": draw(st.sampled_from(["stop", "length"])),
            "cost/harm": draw(FLOATS),
        }
        for i in ids
    ]


def batch_of(rows: list[dict[str, object]]) -> pa.RecordBatch:
    return experience.make_batch({name: [row[name] for row in rows] for name in rows[0]})


@given(RAGGED)
def test_ragged_columns_round_trip(rows: list[list[float]]) -> None:
    lengths = np.array([len(row) for row in rows])
    values = np.array([v for row in rows for v in row], dtype=np.float32)
    column = experience.ragged(values, lengths)
    batch = experience.make_batch({"logprobs": column})
    assert batch.column("logprobs").to_pylist() == rows
    assert experience.flat(batch, "logprobs").tolist() == values.tolist()
    assert experience.lengths(batch, "logprobs").tolist() == lengths.tolist()
    assert [row.tolist() for row in experience.rows(batch, "logprobs")] == rows
    assert np.shares_memory(experience.flat(batch, "logprobs"), values) or not len(values)


@given(RAGGED, st.data())
def test_a_slice_shows_its_own_rows(rows: list[list[float]], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(rows) - 1))
    stop = data.draw(st.integers(start + 1, len(rows)))
    part = experience.make_batch({"logprobs": rows}).slice(start, stop - start)
    assert [row.tolist() for row in experience.rows(part, "logprobs")] == rows[start:stop]
    assert experience.lengths(part, "logprobs").tolist() == [len(row) for row in rows[start:stop]]


@given(samples(), st.data())
def test_concat_sorts_by_sample_whatever_the_chunks(rows: list[dict[str, object]], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(rows)))
    parts = [batch_of(part) for part in (rows[:cut], rows[cut:]) if part]
    assert experience.concat(parts).to_pylist() == sorted(rows, key=lambda row: row["sample_id"])  # type: ignore
    assert experience.concat(reversed(parts)).equals(experience.concat(parts))


@given(samples(), st.data())
def test_join_matches_in_any_order(rows: list[dict[str, object]], data: st.DataObject) -> None:
    left = batch_of([{k: row[k] for k in ("sample_id", "prompt_tokens", "rollout_logprobs")} for row in rows])
    shuffled = data.draw(st.permutations(rows))
    right = batch_of([{k: row[k] for k in ("finish_reason", "sample_id", "cost/harm")} for row in shuffled])
    assert experience.join(left, right).to_pylist() == rows


@pytest.mark.parametrize("foreign", [[1, 2], [1, 2, 4], [1, 2, 3, 4], [1, 1, 2], []])
def test_join_refuses_other_samples(foreign: list[int]) -> None:
    left = experience.make_batch({"sample_id": [3, 1, 2], "prompt_id": [30, 10, 20]})
    right = experience.make_batch({"sample_id": foreign, "reward": [float(i) for i in foreign]})
    with pytest.raises(ValueError, match="other samples"):
        experience.join(left, right)


def test_join_refuses_a_sample_given_twice_for_another() -> None:
    left = experience.make_batch({"sample_id": [1, 2, 2], "prompt_id": [0, 0, 0]})
    right = experience.make_batch({"sample_id": [1, 1, 2], "reward": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match="other samples"):
        experience.join(left, right)


@given(samples())
def test_parquet_round_trip(rows: list[dict[str, object]]) -> None:
    batch = experience.concat([batch_of(rows)])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_batches([batch]), sink)
    read = pq.read_table(pa.BufferReader(sink.getvalue()))
    assert read.combine_chunks().to_batches()[0].equals(batch)


def test_columns_have_the_schemas_types() -> None:
    batch = experience.make_batch(
        {"sample_id": [1], "response_tokens": [[5, 6]], "values/harm": [[0.5, 1]], "cost/harm": [2]}
    )
    types = [pa.int64(), pa.list_(pa.int32()), pa.list_(pa.float32()), pa.float32()]
    assert batch.schema.types == types
    for name in ("cost/", "values", "speed", "logprobs/harm"):
        with pytest.raises(KeyError, match="no experience column"):
            experience.column_type(name)
    with pytest.raises(ValueError, match="3 values do not fill rows of 4"):
        experience.ragged(np.zeros(3, np.float32), np.array([2, 2]))


def test_holes_are_taken_out_and_put_back() -> None:
    columns = {"sample_id": [2, 1], "response_tokens": [[5, 6, 7], [8]], "logprobs": [[1.0, np.nan, 3.0], [4.0]]}
    plain = experience.make_batch(columns)
    assert experience.loss_mask(plain).tolist() == [True] * 4
    assert experience.own_lengths(plain).tolist() == [3, 1]
    assert experience.not_finite(plain, "logprobs").tolist() == [True, False]

    holed = experience.make_batch(columns | {"loss_mask": [[True, False, True], [True]]})
    assert experience.own_lengths(holed).tolist() == [2, 1]
    assert experience.own(holed, "logprobs").tolist() == [1.0, 3.0, 4.0]
    assert experience.with_holes(holed, np.array([1.0, 3.0, 4.0])).to_pylist() == [[1.0, 0.0, 3.0], [4.0]]
    assert not experience.not_finite(holed, "logprobs").any()
    # A bool takes a bit, and a slice may start within a byte.
    assert experience.loss_mask(holed.slice(1, 1)).tolist() == [True]
    assert experience.loss_mask(experience.concat([holed])).tolist() == [True, True, False, True]
    nobody = experience.make_batch(columns | {"loss_mask": [[False] * 3, [True]]})
    assert experience.own_lengths(nobody).tolist() == [0, 1]
    for mask in ([[True, False], [True]], [[True, False], [True, True]], [None, [True]]):
        with pytest.raises(ValueError, match="as many entries as its response has tokens"):
            experience.loss_mask(experience.make_batch(columns | {"loss_mask": mask}))


def test_a_step_with_one_empty_answer_keeps_its_row(tmp_path: Path) -> None:
    batch = experience.make_batch({"sample_id": [2, 1], "logprobs": [[], [0.5]]})
    whole = experience.concat([batch])
    assert whole.to_pylist() == [{"sample_id": 1, "logprobs": [0.5]}, {"sample_id": 2, "logprobs": []}]


@given(st.lists(st.lists(st.booleans(), max_size=6), min_size=1, max_size=6))
def test_answers_are_as_long_as_their_places_say(masks: list[list[bool]]) -> None:
    """Responses that begin or end in holes, have several answers, or none."""
    rows = {"sample_id": range(len(masks)), "response_tokens": [[1] * len(m) for m in masks], "loss_mask": masks}
    batch = experience.make_batch(rows)
    places = [end - start for of_response in experience.answers(batch) for start, end in of_response]
    assert experience.answer_lengths(batch).tolist() == places
