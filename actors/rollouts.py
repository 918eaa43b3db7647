"""Generators kept full: prompts handed out as capacity frees, finished sequences scored at once, scaling in mid-run.

`Rollouts` does what its `RolloutSchedule` decides. It has no thread of its own: it serves the generators whenever the
training loop waits for anybody (`while_waiting` is what every `Group` of the loop waits with).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from actors.exchange import Exchange
from actors.handles import Group, Handle
from actors.schedule import RolloutSchedule
from actors.waits import fetch, ready_now, wait_any
from beaver_ray.weights import PublishedWeights

OUTSTANDING = 2  # calls waiting at each generator, so that its engine never waits for the driver
CHUNK = 32  # finished sequences that are worth a forward of the scorers
SLICE_S = 1.0  # a generator that is to load new weights in mid-flight answers at least so often

Score = Callable[[Any], list[Any]]


@dataclass
class Chunk:
    """Finished sequences and what is being computed of them, by reference; `wanted` are the samples not used yet."""

    sequences: Any
    columns: list[Any]
    wanted: set[int]


@dataclass
class Collected:
    """What one step trains on: `sample_ids`, and the chunks that hold them (perhaps among others)."""

    sample_ids: list[int]
    chunks: list[Chunk]
    generated_tokens: int = 0
    seconds: float = 0.0


@dataclass
class Worker:
    """A generator as the driver sees it."""

    handle: Handle
    version: int = 0
    """The newest weights that it was sent."""
    calls: int = 0
    """Exchanges that it has not answered."""
    held_out: set[int] = field(default_factory=set)
    """Samples in flight that belong to an evaluation."""


class Rollouts:
    """The generators of a run. `next_samples` draws the prompts of a step (1, 2, ...)."""

    def __init__(
        self,
        generators: Group,
        capacity: int,
        timeout_s: float,
        schedule: RolloutSchedule | None = None,
        next_samples: Callable[[int], pa.RecordBatch] | None = None,
        score: Score | None = None,
    ) -> None:
        self.capacity, self.timeout_s = capacity, timeout_s
        self.schedule = schedule or RolloutSchedule(steps=0)
        self.next_samples, self.score = next_samples, score
        self.workers: dict[str, Worker] = {}
        self.weights: PublishedWeights | None = None
        self.prompts: dict[int, tuple[pa.RecordBatch, int]] = {}
        """Where the prompt of each sample lies until the sample is trained on: a batch, and its row."""
        self.chunks: list[Chunk] = []
        self.generated_tokens = 0
        self.since = time.perf_counter()
        self._hungry: dict[str, Worker] = {}
        """Generators that could be given another call."""
        self._calls: dict[Any, tuple[Worker, Any, Any]] = {}
        self._evaluation: tuple[RolloutSchedule, Score] | None = None
        self._evaluated: list[Chunk] = []
        for handle in generators.workers:
            self.join(handle)

    def join(self, handle: Handle) -> None:
        """A generator takes part from now on; it loads the newest weights with its first prompts."""
        self.workers[handle.name] = self._hungry[handle.name] = Worker(handle)
        self.schedule.join(handle.name, self.capacity)
        if self._evaluation:
            self._evaluation[0].join(handle.name, self.capacity)

    def take(self, step: int) -> Collected:
        """The samples of ``step``, finished and on their way through the scorers; waits until they are there."""
        if self.schedule.staleness == 0:
            self.since = time.perf_counter()
        self._serve_until(lambda: self.schedule.ready(step), f"the samples of step {step}")
        chosen = self.schedule.take(step)
        wanted = set(chosen)
        used = [chunk for chunk in self.chunks if not wanted.isdisjoint(chunk.wanted)]
        for chunk in used:
            chunk.wanted -= wanted
        self.chunks = [chunk for chunk in self.chunks if chunk.wanted]
        for sample in chosen:
            del self.prompts[sample]
        now = time.perf_counter()
        result = Collected(chosen, used, self.generated_tokens, now - self.since)
        self.generated_tokens, self.since = 0, now
        return result

    def publish(self, weights: PublishedWeights) -> None:
        """New weights: each generator loads them with its next call, and what they allow is started."""
        self.weights = weights
        self.schedule.publish(weights.version)
        if self.schedule.staleness:
            self._serve_ready()

    def collect(self, prompts: pa.RecordBatch, judge: Score) -> Collected:
        """One answer for every row of ``prompts`` beside training, which starts nothing new meanwhile."""
        schedule = RolloutSchedule(steps=1)
        schedule.publish(self.schedule.version)
        for name in self.workers:
            schedule.join(name, self.capacity)
        ids = self._remember(prompts)
        schedule.draw(ids)
        self._evaluation, self._evaluated = (schedule, judge), []
        self._serve_until(lambda: len(schedule.finished) == len(ids), "held-out prompts")
        self._evaluation = None
        for sample in ids:
            del self.prompts[sample]
        return Collected(ids, self._evaluated)

    def while_waiting(self, references: Sequence[Any], what: str, timeout_s: float) -> None:
        """Serve the generators until ``references`` are all there, or the time is up (which the caller will see)."""
        if self.schedule.staleness == 0:
            return  # synchronous: nothing is generated while anything else goes on
        deadline = time.monotonic() + timeout_s
        late = list(references)
        self._fill()
        while late and time.monotonic() < deadline:
            ready = wait_any([*self._summaries(), *late], what, max(0.0, deadline - time.monotonic()))
            if _key(ready) in self._calls:
                self._receive(ready)
            else:
                late = [reference for reference in late if reference is not ready]

    def _serve_until(self, done: Callable[[], bool], what: str) -> None:
        self._fill()
        while not done():
            if not self._calls:
                raise RuntimeError(f"no generator is at work on {what}, and they are not there")
            self._receive(wait_any(self._summaries(), f"rollout generators ({what})", self.timeout_s))

    def _serve_ready(self) -> None:
        """Start what may start and take in what is there, without waiting."""
        self._fill()
        while ready := ready_now(self._summaries()):
            for summary in ready:
                self._receive(summary)

    def _summaries(self) -> list[Any]:
        return [summary for _, summary, _ in self._calls.values()]

    def _remember(self, prompts: pa.RecordBatch) -> list[int]:
        ids: list[int] = prompts.column("sample_id").to_pylist()
        self.prompts.update((sample, (prompts, row)) for row, sample in enumerate(ids))
        return ids

    def _fill(self) -> None:
        while self.next_samples is not None and self.schedule.wants_samples:
            self.schedule.draw(self._remember(self.next_samples(self.schedule.drawn + 1)))
        for name, worker in list(self._hungry.items()):
            while worker.calls < OUTSTANDING and self._send(worker):
                pass
            if worker.calls == OUTSTANDING:
                del self._hungry[name]

    def _send(self, worker: Worker) -> bool:
        """One more exchange with this generator; False where it would have nothing to do."""
        name = worker.handle.name
        schedule = self._evaluation[0] if self._evaluation else self.schedule
        samples = schedule.hand_out(name)
        if self._evaluation:
            worker.held_out.update(samples)
        in_flight = len(self.schedule.generators[name].in_flight) + len(worker.held_out)
        if not samples and not in_flight:
            return False
        weights = None
        if self.weights is not None and worker.version < self.weights.version:
            weights, worker.version = self.weights, self.weights.version
        new = self._rows(samples) if samples else None
        chunk = min(CHUNK, in_flight)
        # Where weights may arrive in mid-flight a call must end now and then; otherwise its end is the work's own.
        slice_s = SLICE_S if self.schedule.staleness else None
        request = Exchange(chunk, weights, self.schedule.to_abort(name), slice_s)
        call = worker.handle.call("exchange", new, request, returns=2)
        self._calls[_key(call[0])] = (worker, *call)
        worker.calls += 1
        return True

    def _rows(self, samples: list[int]) -> pa.RecordBatch:
        """The prompts of these samples, which mostly lie side by side in one batch."""
        parts, start = [], 0
        places = [self.prompts[sample] for sample in samples]
        for end in range(1, len(places) + 1):
            if end == len(places) or places[end][0] is not places[start][0]:
                rows = pa.array([row for _, row in places[start:end]])
                parts.append(places[start][0].take(rows))
                start = end
        return parts[0] if len(parts) == 1 else pa.Table.from_batches(parts).combine_chunks().to_batches()[0]

    def _receive(self, summary_reference: Any) -> None:
        worker, _, sequences = self._calls.pop(_key(summary_reference))
        worker.calls -= 1
        self._hungry[worker.handle.name] = worker
        summary = fetch(summary_reference, f"{worker.handle.name} (exchange)", self.timeout_s)
        name = worker.handle.name
        self.schedule.aborted(name, summary["aborted"])
        ids = np.array(summary["sample_ids"], dtype=np.int64)
        versions = np.array(summary["versions"], dtype=np.int64)
        held_out = np.array([sample in worker.held_out for sample in ids], dtype=bool)
        kept = self.schedule.finish(name, ids[~held_out].tolist(), versions[~held_out].tolist())
        columns: list[Any] = []
        if kept and self.score is not None:
            columns = self.score(sequences)
        if held_out.any() and self._evaluation:
            schedule, judge = self._evaluation
            answered = schedule.finish(name, ids[held_out].tolist(), versions[held_out].tolist())
            worker.held_out.difference_update(answered)
            self._evaluated.append(Chunk(sequences, columns or judge(sequences), set(answered)))
        if kept:
            self.chunks.append(Chunk(sequences, columns, set(kept)))
            self.generated_tokens += summary["generated_tokens"]
        self._fill()


def _key(reference: Any) -> Any:
    """References of Ray are hashable; what a call in this process returns is known by its identity."""
    return reference if hasattr(reference, "hex") else id(reference)
