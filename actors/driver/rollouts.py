"""Generators kept full: prompts handed out as capacity frees, finished sequences scored at once, scaling in mid-run.

`Rollouts` does what its `RolloutSchedule` decides. It has no thread of its own: it serves the generators whenever the
training loop waits for anybody (`while_waiting` is what every `Group` of the loop waits with).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from ray.exceptions import RayTaskError

from actors.driver.schedule import RolloutSchedule
from actors.driver.sources import Source, Supply
from actors.machine.handles import Group, Handle, Startable
from actors.machine.waits import (
    WeightsLostError,
    WeightsMissingError,
    WeightsUnreadableError,
    WorkerDiedError,
    fetch,
    find_lost,
    ready_now,
    wait_some,
)
from actors.roles.exchange import Exchange, Generator
from beaver_ray.errors import cause
from beaver_ray.weights import PublishedWeights

OUTSTANDING = 2  # calls waiting at each generator, so that its engine never waits for the driver
CHUNK = 32  # finished sequences that are worth a forward of the scorers, where a generator holds many
SLICE_S = 1.0  # a generator that is to load new weights in mid-flight answers at least so often
CALL_S = 0.02  # and seldom enough that with many generators there are at most 1 / CALL_S such answers a second
POLL_S = 2.0  # how often it is asked how many generators are wanted
FAILURES = 3  # so many failures one after another, with nothing finished in between, end the run

Score = Callable[[Any], list[Any]]


@dataclass
class Chunk:
    """Finished sequences and what is being computed of them, by reference; `wanted` are the samples not used yet."""

    sequences: Any
    columns: list[Any]
    wanted: set[int]


@dataclass
class Collected:
    """What one step trains on: the `wanted` samples of these chunks, which may hold others too.

    Where some of them are lost before the step's weights are published, `Rollouts.renew` puts others in their place.
    """

    chunks: list[Chunk]
    generated_tokens: int = 0
    seconds: float = 0.0
    load_s: float = 0.0
    """The longest that a generator spent on new weights since the step before, waiting for their buckets included."""


@dataclass
class Worker:
    """The driver's record of one generator: version sent, open calls, samples in flight."""

    handle: Handle
    version: int = 0
    """The newest weights that it was sent."""
    calls: int = 0
    """Exchanges that it has not answered."""
    held_out: set[int] = field(default_factory=set)
    """Samples in flight that belong to an evaluation."""
    to_drop: list[int] = field(default_factory=list)
    """Samples that it was at work on before a restart."""


class Rollouts:
    """The generators of a run, each with ``capacity`` places; `next_samples` draws the prompts of a step (from 1)."""

    def __init__(
        self,
        generators: Group,
        capacity: int,
        timeout_s: float,
        schedule: RolloutSchedule | None = None,
        next_samples: Callable[[int], pa.RecordBatch] | None = None,
        score: Score | None = None,
        supply: Supply | None = None,
        note: Callable[[str], None] = print,
        late: Sequence[Handle] = (),
    ) -> None:
        self.timeout_s = timeout_s
        self.chunk = max(1, min(CHUNK, capacity // 4))
        # What finishes while an answer and the prompts for its places are on their way waits in the engine already.
        self.capacity = capacity + OUTSTANDING * self.chunk
        self.schedule = schedule or RolloutSchedule(steps=0)
        self.next_samples, self.score = next_samples, score
        self.supply, self.note = supply, note
        self.failures: Counter[str] = Counter()
        """Of each generator: those of the ones that it replaced, until it finishes a sequence."""
        self._starting: set[str] = set()
        self._wanted = len(generators.workers) + len(late)
        self._asked_at = time.monotonic()
        self.workers: dict[str, Worker] = {}
        self.weights: PublishedWeights | None = None
        self.prompts: dict[int, tuple[pa.RecordBatch, int]] = {}
        """Where the prompt of each sample lies until the sample is trained on: a batch, and its row."""
        self.chunks: list[Chunk] = []
        self._taken: tuple[int, Collected] | None = None
        """The step that is being trained, and what it trains on."""
        self.paused = False
        """While a run is put together again nothing is served."""
        self.source: Source | None = None
        """Asked where a generator could not read weights where the policy has them."""
        self.unreadable = False
        """Nobody new is sent `weights`: they are to be published again, or newer ones come before."""
        self.generated_tokens, self.load_s = 0, 0.0
        self.since = time.perf_counter()
        self._hungry: dict[str, Worker] = {}
        """Generators that could be given another call."""
        self._calls: dict[Any, tuple[Any, Callable[[Any], None]]] = {}
        """What is waited for: a reference, and what is done with it when it is ready."""
        self._evaluation: tuple[RolloutSchedule, Score] | None = None
        self._evaluated: list[Chunk] = []
        for handle in generators.workers:
            self.join(handle)
        for handle in late:
            self._expect(handle)

    def restart(
        self,
        schedule: RolloutSchedule,
        next_samples: Callable[[int], pa.RecordBatch],
        pending: pa.RecordBatch,
        weights: PublishedWeights,
    ) -> None:
        """Reset to ``schedule`` after a rollback; ``pending`` are the prompts of its unanswered samples.

        What the generators are at work on is dropped, and answers to earlier calls are passed over. Who was to leave
        goes at once.
        """
        for worker in [w for name, w in self.workers.items() if self.schedule.generators[name].leaving]:
            self._dismiss(worker)
        for name, worker in self.workers.items():
            busy = [*worker.to_drop, *self.schedule.generators[name].in_flight, *worker.held_out]
            self.workers[name] = self._hungry[name] = Worker(worker.handle, version=-1, to_drop=busy)
            schedule.join(name, self.capacity)
        self.schedule, self.next_samples, self.weights, self._evaluation = schedule, next_samples, weights, None
        self.unreadable, self._taken = False, None
        self.prompts, self.chunks, self.generated_tokens = {}, [], 0
        self._remember(pending)

    def join(self, handle: Handle) -> None:
        """Add a generator; it loads the newest weights with its first prompts."""
        self.workers[handle.name] = self._hungry[handle.name] = Worker(handle)
        self.schedule.join(handle.name, self.capacity)
        if self._evaluation:
            self._evaluation[0].join(handle.name, self.capacity)

    def gather(self, step: int) -> Collected:
        """The samples of ``step``, finished and on their way through the scorers; waits until they are there."""
        if self.schedule.staleness == 0:
            self.since = time.perf_counter()
        self._serve_until(lambda: self.schedule.complete(step), f"the samples of step {step}")
        chosen = self.schedule.select(step)
        wanted = set(chosen)
        used = [replace(chunk, wanted=wanted & chunk.wanted) for chunk in self.chunks]
        for chunk in self.chunks:
            # What was trained on is used up, what grew too old will come again in another chunk.
            chunk.wanted &= self.schedule.finished.keys()
        self.chunks = [chunk for chunk in self.chunks if chunk.wanted]
        now = time.perf_counter()
        used = [chunk for chunk in used if chunk.wanted]
        result = Collected(used, self.generated_tokens, now - self.since, self.load_s)
        self.generated_tokens, self.since, self.load_s = 0, now, 0.0
        self._taken = step, result
        return result

    def renew(self) -> bool:
        """Ask again for finished sequences that are lost with the node that they lay on; whether there were any.

        Until its weights are published a step's are among them: it then trains on what is finished first, as ever.
        """
        step, taken = self._taken or (0, Collected([]))
        known = [*taken.chunks, *self.chunks]
        lost = find_lost(list({chunk.sequences: None for chunk in known}), self.timeout_s)
        if not lost:
            return False
        samples = sorted(sample for chunk in known if chunk.sequences in lost for sample in chunk.wanted)
        self.note(f"{len(samples)} finished samples are lost with their node and asked for again")
        if self._taken:
            self.schedule.give_back()
        self.schedule.lose(samples)
        self.chunks = [chunk for chunk in known if chunk.sequences not in lost]
        if self._taken:
            again = self.gather(step)
            taken.chunks, taken.load_s = again.chunks, max(taken.load_s, again.load_s)
            taken.generated_tokens += again.generated_tokens
            taken.seconds += again.seconds
            self._taken = step, taken
        return True

    def offer(self, weights: PublishedWeights) -> None:
        """New weights: each generator loads them with its next call, and what they allow is started."""
        for chunk in self._taken[1].chunks if self._taken else ():
            for sample in chunk.wanted:
                del self.prompts[sample]
        self._taken = None
        self.weights, self.unreadable = weights, False
        self.schedule.advance(weights.version)
        if self.schedule.staleness:
            self.serve()

    def collect(self, prompts: pa.RecordBatch, judge: Score) -> Collected:
        """One answer for every row of ``prompts`` beside training, which starts nothing new meanwhile."""
        schedule = RolloutSchedule(steps=1)
        schedule.advance(self.schedule.version)
        for name in self.workers:
            schedule.join(name, self.capacity)
            if self.schedule.generators[name].leaving:
                schedule.retire(name)
        ids = self._remember(prompts)
        schedule.draw(ids)
        self._evaluation, self._evaluated = (schedule, judge), []
        self._serve_until(lambda: len(schedule.finished) == len(ids), "held-out prompts")
        self._evaluation = None
        for sample in ids:
            del self.prompts[sample]
        return Collected(self._evaluated)

    def while_waiting(self, references: Sequence[Any], what: str, timeout_s: float) -> None:
        """Serve the generators until ``references`` are all there, or the time is up (which the caller will see)."""
        if self.schedule.staleness == 0 or self.paused:
            return  # synchronous: nothing is generated while anything else goes on
        deadline = time.monotonic() + timeout_s
        late = list(references)
        self._fill()
        while late and time.monotonic() < deadline:
            patience = max(0.0, deadline - time.monotonic())
            ready = {_key(r): r for r in wait_some([*self._references(), *late], what, patience)}
            late = [reference for reference in late if _key(reference) not in ready]
            self._receive_all(list(ready.values()))

    def _serve_until(self, done: Callable[[], bool], what: str) -> None:
        self._fill()
        while not done():
            if self.unreadable:
                assert self.source and self.weights
                self.weights, self.unreadable = self.source.republish(self.weights.version), False
                self._fill()
            if not self._calls:
                raise RuntimeError(f"no generator is at work on {what}, and they are not there")
            needs = [self.weights.buckets] if self.weights else ()
            self._receive_all(wait_some(self._references(), f"rollout generators ({what})", self.timeout_s, needs))

    def serve(self) -> None:
        """Start what may start and take in what is there, without waiting."""
        self._ask()
        self._fill()
        while ready := ready_now(self._references()):
            self._receive_all(ready)

    def _references(self) -> list[Any]:
        return [reference for reference, _ in self._calls.values()]

    def _await(self, reference: Any, then: Callable[[Any], None]) -> None:
        self._calls[_key(reference)] = (reference, then)

    def _receive_all(self, references: Sequence[Any]) -> None:
        for reference in references:
            # Others than generators' calls may be among them, and calls that a lost one has taken with it.
            if call := self._calls.pop(_key(reference), None):
                call[1](reference)
        self._ask()
        self._fill()

    def _remember(self, prompts: pa.RecordBatch) -> list[int]:
        ids: list[int] = prompts.column("sample_id").to_pylist()
        self.prompts.update((sample, (prompts, row)) for row, sample in enumerate(ids))
        return ids

    def _fill(self) -> None:
        while self.next_samples is not None and self._evaluation is None and self.schedule.wants_samples:
            self.schedule.draw(self._remember(self.next_samples(self.schedule.drawn + 1)))
        for name, worker in list(self._hungry.items()):
            while worker.calls < OUTSTANDING and self._send(worker):
                pass
            if worker.calls == OUTSTANDING:
                del self._hungry[name]

    def _send(self, worker: Worker) -> bool:
        """One more exchange with this generator; False where it would have nothing to do."""
        name = worker.handle.name
        weights = self.weights if self.weights and worker.version < self.weights.version else None
        if weights and self.unreadable:
            return False
        schedule = self._evaluation[0] if self._evaluation else self.schedule
        samples = schedule.hand_out(name)
        if self._evaluation:
            worker.held_out.update(samples)
        in_flight = self._in_flight(worker)
        if not samples and not in_flight:
            return False
        if weights:
            worker.version = weights.version
        new = self._rows(samples) if samples else None
        chunk = min(self.chunk, in_flight)
        # Where weights may arrive in mid-flight a call must end now and then; otherwise its end is the work's own.
        slice_s = max(SLICE_S, CALL_S * len(self.workers)) if self.schedule.staleness else None
        dropped, worker.to_drop = worker.to_drop, []
        request = Exchange(chunk, weights, [*dropped, *self.schedule.to_abort(name)], slice_s)
        summary, sequences = worker.handle.call(Generator.exchange, new, request, returns=2)
        self._await(summary, partial(self._receive, worker, sequences, dropped))
        worker.calls += 1
        return True

    def _in_flight(self, worker: Worker) -> int:
        return len(self.schedule.generators[worker.handle.name].in_flight) + len(worker.held_out)

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

    def _receive(self, worker: Worker, sequences: Any, dropped: list[int], reference: Any) -> None:
        """Take in what an exchange has brought; nobody waits for the samples that it ``dropped``."""
        name = worker.handle.name
        if self.workers.get(name) is not worker:
            return  # an answer of a generator that is gone; its samples are with others
        try:
            summary = fetch(reference, f"{name} (exchange)", self.timeout_s)
        except WeightsUnreadableError as error:
            if self.source and self.source.gone():
                raise WeightsLostError(str(error)) from None
            if self.source and self.failures[name] + 1 == FAILURES:
                self.source.detour()
                self.unreadable = True
                del self.failures[name]  # the way is given up, not the generators
            self._lose(worker, error)
            return
        except WeightsMissingError:
            raise  # what failed is the policy, or the way from it: another generator would fare no better
        except (WorkerDiedError, RayTaskError) as error:
            self._lose(worker, error)
            return
        worker.calls -= 1
        self._hungry[name] = worker
        self.load_s = max(self.load_s, summary["load_s"])
        if summary["sample_ids"]:
            self.failures.pop(name, None)
        self.schedule.aborted(name, [sample for sample in summary["aborted"] if sample not in dropped])
        ids = np.array(summary["sample_ids"], dtype=np.int64)
        versions = np.array(summary["versions"], dtype=np.int64)
        held_out = np.array([sample in worker.held_out for sample in ids], dtype=bool)
        kept = self.schedule.finish(name, ids[~held_out].tolist(), versions[~held_out].tolist())
        if held_out.any() and self._evaluation:
            schedule, judge = self._evaluation
            answered = schedule.finish(name, ids[held_out].tolist(), versions[held_out].tolist())
            worker.held_out.difference_update(answered)
            # Also where training's answers are among them, whose scores need not be all that an evaluation reads.
            self._evaluated.append(Chunk(sequences, judge(sequences), set(answered)))
        if kept:
            self.chunks.append(Chunk(sequences, self.score(sequences) if self.score else [], set(kept)))
            self.generated_tokens += summary["generated_tokens"]
        if self.schedule.generators[name].leaving and not worker.calls and not self._in_flight(worker):
            self._dismiss(worker)

    # Generators come and go.

    def resize(self, count: int) -> None:
        """Have ``count`` generators: new ones join when they have started, the last ones hand their prompts back."""
        if self.supply is None or count == self._wanted:
            return
        self.note(f"rollout workers: {self._wanted} -> {count}")
        self._wanted = count
        staying = [w for n, w in self.workers.items() if not self.schedule.generators[n].leaving]
        for _ in range(count - len(staying) - len(self._starting)):
            self._start()
        for worker in staying[count:]:
            self.schedule.retire(worker.handle.name)
            if self._evaluation:
                self._evaluation[0].retire(worker.handle.name)
            self._hungry[worker.handle.name] = worker
            if not self._in_flight(worker) and not worker.calls:
                self._dismiss(worker)

    def _start(self) -> str:
        assert self.supply is not None
        handle = self.supply.start()
        self._expect(handle)
        return handle.name

    def _expect(self, handle: Handle) -> None:
        """Wait in the background for a generator's constructor; it joins when that has ended."""
        self._starting.add(handle.name)
        self._await(handle.call(Startable.started), partial(self._welcome, handle))

    def _welcome(self, handle: Handle, started: Any) -> None:
        """Take in a generator whose constructor has ended, or replace it where that failed."""
        assert self.supply is not None
        self._starting.remove(handle.name)
        try:
            fetch(started, f"start of {handle.name}", self.timeout_s)
        except (WorkerDiedError, RayTaskError) as error:
            self.supply.stop(handle)
            self._replace(handle.name, error)
            return
        staying = [name for name in self.workers if not self.schedule.generators[name].leaving]
        if len(staying) >= self._wanted:
            self.supply.stop(handle)
            return
        self.join(handle)
        self.note(f"{handle.name} has joined; {len(self.workers)} rollout worker(s)")

    def _lose(self, worker: Worker, error: Exception) -> None:
        """A generator failed: its prompts go to the others at once, and another one starts in its place."""
        if self.supply is None:
            raise error
        name, lost = worker.handle.name, self._in_flight(worker)
        self._dismiss(worker)
        self.note(f"{name} is lost with {lost} samples in flight, which others start anew: {cause(error)}")
        self._replace(name, error)

    def _dismiss(self, worker: Worker) -> None:
        assert self.supply is not None
        name = worker.handle.name
        self.schedule.leave(name)
        if self._evaluation:
            self._evaluation[0].leave(name)
        del self.workers[name]
        self._hungry.pop(name, None)
        self.supply.stop(worker.handle)
        self.note(f"{name} has left; {len(self.workers)} rollout worker(s)")

    def _replace(self, name: str, error: Exception) -> None:
        failures = self.failures.pop(name, 0) + 1
        if failures == FAILURES:
            raise RuntimeError(f"rollout generators failed {FAILURES} times in a row, {name} last: {cause(error)}")
        self.failures[self._start()] = failures

    def _ask(self) -> None:
        """Every POLL_S seconds, ask how many generators were ordered."""
        if self.supply is not None and time.monotonic() - self._asked_at > POLL_S:
            self._asked_at = time.monotonic()
            self._await(self.supply.wanted(), self._told)

    def _told(self, answer: Any) -> None:
        try:
            count = fetch(answer, "the wanted number of rollout workers", self.timeout_s)
        except WorkerDiedError:
            return  # started anew by then, and asked again soon
        if count is not None:
            self.resize(count)


def _key(reference: Any) -> Any:
    """References of Ray are hashable; what a call in this process returns is known by its identity."""
    return reference if hasattr(reference, "hex") else id(reference)
