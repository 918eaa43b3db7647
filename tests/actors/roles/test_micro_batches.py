"""Packed rows give what each sequence gives alone, and columns stay with their tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.roles.micro_batches import SequenceRows, minibatches, token_column
from actors.roles.scorer import Reference
from beaver_ray import experience
from beaver_ray.models.loading import load_policy
from beaver_ray.models.score import load_score_model
from tests.actors.support import (
    LiteralScoreModel,
    literal_logprobs,
    random_sequences,
    whole_sequences,
    with_columns,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@torch.no_grad()
def test_packed_log_probs_are_those_of_a_padded_forward(tiny_world: Path, temperature: float) -> None:
    batch = random_sequences(23, seed=1)
    folder = str(tiny_world / "model")
    found = Reference(folder, "float32", 40, temperature, 1).logprobs(batch)
    assert found.schema.names == ["sample_id", "reference_logprobs"]
    joined = experience.join(batch, found)
    expected = literal_logprobs(load_policy(folder, torch.float32), batch, temperature)
    for row, alone in zip(experience.rows(joined, "reference_logprobs"), expected, strict=True):
        np.testing.assert_allclose(row, alone.numpy(), atol=1e-5)


@torch.no_grad()
def test_packed_values_are_those_of_a_padded_forward(tiny_world: Path) -> None:
    batch = random_sequences(23, seed=2)
    folder = tiny_world / "reward_model"
    model = load_score_model(str(folder), "critic", torch.float32).eval()
    padded = LiteralScoreModel(folder)(whole_sequences(batch))
    seen = []
    for part in SequenceRows(batch).micro_batches(range(23), 50, 0, 1, CPU):
        values_L = model(part.packed.input_ids, part.packed.position_ids)[0, :, 0]
        flat = values_L[part.positions_T]
        assert part.weight == 1.0 and part.packed.input_ids.shape[1] <= 50
        for row, values in zip(part.rows, flat.split(part.lengths_B.tolist()), strict=True):
            data = batch.slice(row, 1).to_pylist()[0]
            prompt, response = len(data["prompt_tokens"]), len(data["response_tokens"])
            # The value of the state before the first response token stands at the prompt's last one.
            torch.testing.assert_close(values, padded[row, prompt - 1 : prompt + response - 1], atol=1e-5, rtol=0)
        for row, end in zip(part.rows, part.ends_B.tolist(), strict=True):
            last = len(whole_sequences(batch)[row]) - 1
            assert float(values_L[end]) == pytest.approx(float(padded[row, last]), abs=1e-5)
        seen += part.rows
    assert sorted(seen) == list(range(23))


def test_columns_and_targets_stay_with_their_tokens() -> None:
    batch = random_sequences(17, seed=3)
    lengths = experience.lengths(batch, "response_tokens")
    # The number of a token says its row and its place.
    numbers = [[1000.0 * i + t for t in range(n)] for i, n in enumerate(lengths)]
    batch = with_columns(batch, logprobs=numbers)
    rows = SequenceRows(batch)
    for part in rows.micro_batches([16, 3, 9, 4, 11], 30, 0, 1, CPU):
        assert rows.column_T("logprobs", part).tolist() == [v for r in part.rows for v in numbers[r]]
        responses = batch.column("response_tokens").to_pylist()
        assert part.targets_T.tolist() == [t for r in part.rows for t in responses[r]]
        assert part.lengths_B.tolist() == [lengths[r] for r in part.rows]
    # Columns in the order of the micro-batches come back to their samples.
    parts = [([5, 2], np.array(numbers[5] + numbers[2])), ([7], np.array(numbers[7]))]
    column = token_column(batch, "values/harm", parts)
    assert column.column("sample_id").to_pylist() == [105, 102, 107]
    assert column.column("values/harm").to_pylist() == [numbers[5], numbers[2], numbers[7]]
    assert token_column(batch, "values/harm", []).num_rows == 0


def test_holes_stay_in_the_row_and_out_of_columns() -> None:
    """Positions, targets and lengths are those of whole responses; the mask says where numbers count."""
    batch = random_sequences(15, seed=6)
    lengths = experience.lengths(batch, "response_tokens")
    rng = np.random.default_rng(6)
    masks = [(rng.random(n) < 0.5).tolist() for n in lengths]
    numbers = [[1000.0 * i + t if m else np.nan for t, m in enumerate(mask)] for i, mask in enumerate(masks)]
    holed = SequenceRows(with_columns(batch, loss_mask=masks, logprobs=numbers))
    assert holed.own_lengths.tolist() == [sum(mask) for mask in masks]
    parts = [list(rows.micro_batches(range(15), 40, 0, 1, CPU)) for rows in (holed, SequenceRows(batch))]
    assert len(parts[0]) > 1
    for part, whole in zip(*parts, strict=True):
        assert part.rows == whole.rows and torch.equal(part.packed.input_ids, whole.packed.input_ids)
        for name in ("positions_T", "targets_T", "ends_B", "lengths_B"):
            assert torch.equal(getattr(part, name), getattr(whole, name)), name
        assert part.loss_mask_T.tolist() == [m for r in part.rows for m in masks[r]] and whole.loss_mask_T.all()
        expected = [0.0 if np.isnan(v) else v for r in part.rows for v in numbers[r]]
        assert holed.column_T("logprobs", part).tolist() == expected


@pytest.mark.parametrize(("rows", "count"), [(1, 4), (3, 4), (4, 4), (5, 4), (3, 1)])
def test_no_minibatch_is_empty(rows: int, count: int) -> None:
    parts = minibatches(rows, count, (7, 1, 0))
    assert len(parts) == min(rows, count) and all(len(part) for part in parts)
    assert sorted(row for part in parts for row in part.tolist()) == list(range(rows))


@pytest.mark.parametrize(("count", "world"), [(17, 1), (17, 2), (17, 3), (1, 3), (2, 5)])
def test_ranks_share_the_rows_and_keep_in_step(count: int, world: int) -> None:
    batch = random_sequences(20, seed=4)
    chosen = np.random.default_rng(0).permutation(20)[:count]
    shares = [list(SequenceRows(batch).micro_batches(chosen, 30, rank, world, CPU)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    real = [row for share in shares for part in share if part.weight == 1.0 for row in part.rows]
    assert sorted(real) == sorted(chosen.tolist())
    fillers = [part for share in shares for part in share if part.weight != 1.0]
    assert all(part.weight == 0.0 and part.rows == [chosen[0]] for part in fillers)
