"""The scheduler alone: `actors.rollouts` over generators that sleep instead of computing, and a trainer that sleeps.

A stand-in has the generator's interface and its continuous batching: a sequence of n tokens takes n ticks, and a tick
lasts as long whatever the batch. Lengths are log-normal, the longest 20 times the median. Many stand-ins share a
process, since they only sleep; each is its own thread and its own handle for the scheduler, with its own calls.

Two questions. How much longer is a step at staleness 1 than the longer of its two halves, generation and training
each alone? And what of the driver's core does the scheduler take per 1,000 samples/s, with 8 to 256 generators?
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from actors.exchange import FINISHED_SCHEMA, PROMPT_SCHEMA, Exchange
from actors.handles import Group
from actors.rollouts import Rollouts
from actors.schedule import RolloutSchedule
from actors.waits import fetch
from beaver_ray.weights import Manifest, PublishedWeights
from launch.bench.measure import Figure, Goal, Outcome, local_ray
from launch.bench.registry import Options
from launch.bench.rollouts import TAIL, tailed_lengths

WAIT_S = 300.0
PER_PROCESS = 32
CAPACITY = 16  # sequences in flight of one generator
MEDIAN_TOKENS = 20


class SleepingGenerator:
    """A continuous batch of `capacity` sequences; the clock, not a model, says when one ends."""

    def __init__(self, capacity: int, tick_s: float) -> None:
        self.capacity, self.tick_s = capacity, tick_s
        self.version = 0
        self.waiting: list[tuple[int, int, int]] = []
        self.running: list[tuple[float, int, int, int]] = []
        self.now = 0.0
        """Until when this generator was simulated, of time.perf_counter(); sequences start and end in that time."""

    def exchange(self, prompts: pa.RecordBatch | None, request: Exchange) -> tuple[dict[str, Any], pa.RecordBatch]:
        """As VllmGenerator.exchange; prompt_id holds a sequence's length in tokens."""
        if request.weights is not None:
            self.version = max(self.version, request.weights.version)
        if prompts is not None:
            ids, lengths = (prompts.column(name).to_pylist() for name in ("sample_id", "prompt_id"))
            self.waiting += [(sample, length, self.version) for sample, length in zip(ids, lengths, strict=True)]
        started = time.perf_counter()
        if not self.running:
            self.now = started  # it was idle
        end = started + (request.slice_s if request.slice_s is not None else WAIT_S)
        finished: list[tuple[int, int, int]] = []
        while self.waiting or self.running:
            free = self.capacity - len(self.running)
            for sample, length, version in self.waiting[:free]:
                self.running.append((self.now + length * self.tick_s, sample, length, version))
            del self.waiting[:free]
            self.running.sort()
            if len(finished) >= request.min_finished or self.running[0][0] > end:
                break
            self.now, sample, length, version = self.running.pop(0)
            finished.append((sample, length, version))
        if not finished and self.running:
            self.now = end
        time.sleep(max(0.0, self.now - time.perf_counter()))
        return self._answer(finished)

    def _answer(self, finished: list[tuple[int, int, int]]) -> tuple[dict[str, Any], pa.RecordBatch]:
        summary = {
            "finished": len(finished),
            "running": len(self.running),
            "free": self.capacity - len(self.running),
            "generated_tokens": sum(length for _, length, _ in finished),
            "busy_s": 0.0,
            "weight_version": self.version,
            "sample_ids": [sample for sample, _, _ in finished],
            "versions": [version for _, _, version in finished],
            "aborted": [],
        }
        return summary, EMPTY


EMPTY = pa.RecordBatch.from_pylist([], schema=FINISHED_SCHEMA)


class Sleepers:
    """A process of sleeping generators, each called in a concurrency group's thread of its own."""

    def __init__(self, count: int, capacity: int, tick_s: float) -> None:
        self.generators = [SleepingGenerator(capacity, tick_s) for _ in range(count)]

    def exchange(self, index: int, prompts: Any, request: Exchange) -> tuple[dict[str, Any], pa.RecordBatch]:
        """That generator's exchange."""
        return self.generators[index].exchange(prompts, request)
