"""Put and get of one step's experience through Ray's object store: Arrow against a list of dicts of tensors.

The dicts are what a loop written in torch alone would send: one for each sample, one tensor for each column. Both
sides hold the same numbers, and what comes back is compared once.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from actors.machine.waits import fetch
from beaver_ray import experience
from launch.bench.measure import Figure, Goal, Outcome, copy_rate, interleave, local_ray, medians
from launch.bench.options import Options

PER_TOKEN = ("rollout_logprobs", "reference_logprobs", "logprobs", "values/reward", "values/harm")


def run(options: Options) -> Outcome:
    """Figures for 4,096 samples (64 where small)."""
    rows = 64 if options.small else 4096
    batch = make_experience(rows)
    dicts = as_dicts(batch)
    repetitions = options.repetitions or (2 if options.small else 5)
    times: dict[str, list[float]] = {f"{side} {what}": [] for side in ("arrow", "dicts") for what in ("put", "get")}
    with local_ray(cpus=1):
        _check(batch, dicts)
        interleave(
            {
                "arrow": lambda: put_and_get(batch, times, "arrow"),
                "dicts": lambda: put_and_get(dicts, times, "dicts"),
            },
            repetitions,
        )
    times = {name: values[1:] for name, values in times.items()}  # without the warm-up
    middle = medians(times)
    figures = []
    for what in ("put", "get"):
        ours, theirs = middle[f"arrow {what}"], middle[f"dicts {what}"]
        figures.append(Figure(f"{what}, Arrow", ours * 1e3, "ms", theirs / ours, "dicts of tensors, times faster"))
        figures.append(Figure(f"{what}, dicts of tensors", theirs * 1e3, "ms"))
    ours, theirs = (middle[f"{side} put"] + middle[f"{side} get"] for side in ("arrow", "dicts"))
    figures.append(Figure("put and get, Arrow", ours * 1e3, "ms", theirs / ours, "dicts, times faster", Goal(50)))
    copied = batch.nbytes / copy_rate(batch.nbytes, 5)
    figures.append(Figure("one warm copy of its bytes", copied * 1e3, "ms"))
    figures.append(Figure("put and get, Arrow, against memory", ours * 1e3, "ms", ours / copied, "one warm copy"))
    settings = {"samples": rows, "bytes": batch.nbytes, "columns": batch.schema.names, "repetitions": repetitions}
    return Outcome(figures, settings, times)


def make_experience(rows: int) -> pa.RecordBatch:
    """Samples with all the columns that a step trains on: prompts of 12 to 20 tokens, answers of 16 to 256."""
    rng = np.random.default_rng(0)
    prompts, answers = rng.integers(12, 21, rows), rng.integers(16, 257, rows)
    tokens = int(answers.sum())
    columns: dict[str, Any] = {
        "sample_id": np.arange(rows),
        "prompt_id": np.arange(rows),
        "prompt_tokens": experience.ragged(rng.integers(4, 1000, prompts.sum(), dtype=np.int32), prompts),
        "response_tokens": experience.ragged(rng.integers(4, 1000, tokens, dtype=np.int32), answers),
        "weight_version": np.zeros(rows, np.int64),
        "reward": rng.standard_normal(rows, dtype=np.float32),
        "cost/harm": rng.standard_normal(rows, dtype=np.float32),
    }
    columns |= {n: experience.ragged(rng.standard_normal(tokens, dtype=np.float32), answers) for n in PER_TOKEN}
    return experience.make_batch(columns)


def as_dicts(batch: pa.RecordBatch) -> list[dict[str, torch.Tensor]]:
    """One dict of tensors for each row, in memory of their own."""
    columns: dict[str, list[torch.Tensor]] = {}
    for name in batch.schema.names:
        if pa.types.is_list(batch.column(name).type):
            columns[name] = [torch.tensor(row) for row in experience.rows(batch, name)]
        else:
            columns[name] = [torch.tensor(number) for number in experience.scalars(batch, name)]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def put_and_get(thing: Any, times: dict[str, list[float]], side: str) -> Any:
    """Put `thing`, get it back, and note the seconds of both."""
    started = time.perf_counter()
    reference = ray.put(thing)
    put = time.perf_counter()
    back = fetch(reference, "the experience", 300)
    times[f"{side} get"].append(time.perf_counter() - put)
    times[f"{side} put"].append(put - started)
    return back


def _check(batch: pa.RecordBatch, dicts: list[dict[str, torch.Tensor]]) -> None:
    unused: dict[str, list[float]] = {f"x {what}": [] for what in ("put", "get")}
    tokens = experience.rows(put_and_get(batch, unused, "x"), "response_tokens")
    back = put_and_get(dicts, unused, "x")
    if not all(np.array_equal(a, b["response_tokens"].numpy()) for a, b in zip(tokens, back, strict=True)):
        raise RuntimeError("the two sides hold different tokens")
