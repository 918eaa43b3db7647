"""The scheduler alone: `Rollouts` over generators that sleep instead of computing, and a trainer that sleeps.

A stand-in has the generator's interface and its continuous batching: a sequence of n tokens takes n ticks, and a tick
lasts as long whatever the batch. Lengths are log-normal, the longest 20 times the median. Many stand-ins share a
process, since they only sleep; each is its own thread and its own handle for the scheduler, with its own calls.

Two questions. How much longer is a step at staleness 1 than the longer of its two halves: the generation of one step's
samples from the first prompt to the last answer, and its training? (With a tail of 20:1 the longest answer alone can
take longer than all work divided by all places; a strict bound on staleness leaves it at most two steps less one
training.) And what of the driver's core does the scheduler take per 1,000 samples/s, with 8 to 256 generators?
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from actors.driver.rollouts import Rollouts
from actors.driver.schedule import RolloutSchedule
from actors.machine.cluster import RayHandle
from actors.machine.handles import Group, Method
from actors.roles.exchange import FINISHED_SCHEMA, PROMPT_SCHEMA, Exchange
from beaver_ray.weights import Layout, PublishedWeights
from launch.bench.measure import Figure, Goal, Outcome, local_ray
from launch.bench.options import Options
from launch.bench.rollouts import TAIL, tailed_lengths

WAIT_S = 300.0
PER_PROCESS = 32
CAPACITY = 16  # sequences in flight of one generator where 64 share a step's few thousand samples
MANY = 128  # and where the driver's cost is measured
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
            "generated_tokens": sum(length for _, length, _ in finished),
            "load_s": 0.0,
            "sample_ids": [sample for sample, _, _ in finished],
            "versions": [version for _, _, version in finished],
            "aborted": [],
        }
        return summary, EMPTY


EMPTY = pa.RecordBatch.from_pylist([], schema=FINISHED_SCHEMA)


class Sleepers:
    """A process of sleeping generators, each called in a thread of its own (a concurrency group)."""

    def __init__(self, count: int, capacity: int, tick_s: float) -> None:
        self.generators = [SleepingGenerator(capacity, tick_s) for _ in range(count)]

    def exchange(self, index: int, prompts: Any, request: Exchange) -> tuple[dict[str, Any], pa.RecordBatch]:
        """That generator's exchange."""
        return self.generators[index].exchange(prompts, request)


@dataclass
class SleeperHandle:
    """One generator of a process of many."""

    name: str
    actor: Any
    index: int

    def call(self, method: Method, *args: Any, returns: int = 1) -> Any:
        """Start an exchange; calls of one generator keep their order."""
        options = {"num_returns": returns, "concurrency_group": f"g{self.index}"}
        return getattr(self.actor, method.__name__).options(**options).remote(self.index, *args)


def start_generators(count: int, tick_s: float, capacity: int = CAPACITY) -> Group:
    """`count` of them, up to PER_PROCESS in a process."""
    handles: list[Any] = []
    for first in range(0, count, PER_PROCESS):
        here = min(PER_PROCESS, count - first)
        groups = {f"g{i}": 1 for i in range(here)}
        options: dict[str, Any] = {"num_cpus": 0.01, "concurrency_groups": groups}
        actor: Any = ray.remote(**options)(Sleepers).remote(here, capacity, tick_s)
        handles += [SleeperHandle(f"rollout-{first + i}", actor, i) for i in range(here)]
    group = Group("rollout", handles, WAIT_S)
    group.run(Sleepers.exchange, None, Exchange())
    return group


def stop_generators(group: Group) -> None:
    """End their processes."""
    for actor in {id(handle.actor): handle.actor for handle in group.workers}.values():
        ray.kill(actor)


class Trainer:
    """A trainer that sleeps."""

    def update(self, seconds: float) -> None:
        """Take so long."""
        time.sleep(seconds)


@dataclass
class Run:
    """What some steps took: wall and the driver's CPU seconds of each step after the warm-up, and their samples."""

    step_s: list[float]
    cpu_s: float
    samples: int


def steps_of(
    generators: Group,
    trainer: Group,
    lengths: np.ndarray,
    steps: int,
    staleness: int,
    train_s: float,
    capacity: int = CAPACITY,
) -> Run:
    """Steps of a run: take, train, publish. The first `staleness + 1` warm up, the last are left out as well.

    Near the end of a run nothing more is started, so that its last steps do not wait for generation.
    """
    size = len(lengths)

    def draw(step: int) -> pa.RecordBatch:
        ids = np.arange(size) + step * size
        columns = {"sample_id": ids, "prompt_id": lengths, "prompt_tokens": [[1]] * size}
        return pa.RecordBatch.from_pydict(columns, schema=PROMPT_SCHEMA)

    warmups, total = staleness + 1, steps + 2 * staleness + 1
    rollouts = Rollouts(generators, capacity, WAIT_S, RolloutSchedule(total, staleness), draw, lambda _: [])
    trainer.meanwhile = rollouts.while_waiting
    seconds: list[float] = []
    cpu = 0.0
    for step in range(1, total + 1):
        started, cpu_started = time.perf_counter(), time.process_time()
        rollouts.gather(step)
        if train_s:
            trainer.run(Trainer.update, train_s)
        rollouts.offer(PublishedWeights(step, Layout((), ()), ()))
        if warmups < step <= warmups + steps:
            seconds.append(time.perf_counter() - started)
            cpu += time.process_time() - cpu_started
    trainer.meanwhile = None
    return Run(seconds, cpu, size * steps)


def run(options: Options) -> Outcome:
    """Overlap with 64 generators, and the driver's cost from 8 to 256 (2 and 4 generators where small)."""
    outcome = Outcome([], {})
    with local_ray(cpus=4, store_gib=0.5):
        trainer = Group("policy", [RayHandle("policy", ray.remote(num_cpus=0.01)(Trainer).remote())], WAIT_S)
        if options.wants("overlap"):
            measure_overlap(options, trainer, outcome)
        if options.wants("cost"):
            measure_cost(options, trainer, outcome)
    return outcome


def measure_overlap(options: Options, trainer: Group, outcome: Outcome) -> None:
    """Staleness 1 against the longer of its halves, where training takes half, as long, and twice as long."""
    outcome.settings |= {"overlap: sequences of a generator": CAPACITY, "overlap: longest over median length": TAIL}
    count, rounds, steps = (2, 4, 1) if options.small else (64, 4, options.repetitions or 4)
    lengths = tailed_lengths(count * CAPACITY * rounds, MEDIAN_TOKENS, TAIL)
    ideal = 0.1 if options.small else 2.5  # seconds of a step's generation with every place taken all the time
    tick_s = ideal * count * CAPACITY / float(lengths.sum())
    generators = start_generators(count, tick_s)
    alone = steps_of(generators, trainer, lengths, steps, staleness=0, train_s=0.0)
    generation = float(np.median(alone.step_s))
    outcome.samples["generation alone"] = alone.step_s
    what = f"{count} generators"
    outcome.figures += [
        Figure(f"{what}: generation of one step's samples alone", generation, "s"),
        Figure(f"{what}: its longest answer", float(lengths.max()) * tick_s, "s"),
        Figure(f"{what}: its work, no place ever empty", ideal, "s"),
    ]
    for share in (1.0,) if options.small else (0.5, 1.0, 2.0):
        found = steps_of(generators, trainer, lengths, steps, staleness=1, train_s=share * generation)
        step = float(np.median(found.step_s))
        longer = max(generation, share * generation)
        name = f"{what}: step, training {share:g} times generation"
        goal = Goal(1.05, at_most=True)
        outcome.figures.append(Figure(name, step, "s", step / longer, "the longer half alone", goal))
        outcome.samples[name] = found.step_s
    stop_generators(generators)


def measure_cost(options: Options, trainer: Group, outcome: Outcome) -> None:
    """CPU of the driver's process per sample, at about 1,000 samples a second.

    Lengths have no tail here: with one, the bound on staleness would hold many generators back to a lower rate.
    """
    outcome.settings["cost: sequences of a generator"] = MANY
    counts = (2, 4) if options.small else (8, 32, 128, 256)
    rate, steps = (200.0, 1) if options.small else (1000.0, options.repetitions or 2)
    costs: dict[int, float] = {}
    for count in counts:
        # Two steps fill every place at least once.
        size = 64 if options.small else max(4096, count * MANY)
        lengths = np.random.default_rng(0).integers(MEDIAN_TOKENS // 2, 2 * MEDIAN_TOKENS, size)
        tick_s = count * MANY / rate / float(lengths.mean())
        generators = start_generators(count, tick_s, MANY)
        found = steps_of(generators, trainer, lengths, steps, staleness=1, train_s=0.0, capacity=MANY)
        stop_generators(generators)
        costs[count] = found.cpu_s / found.samples
        name = f"{count} generators: driver's core at 1,000 samples/s"
        last = count == counts[-1]
        goal = Goal(0.1, at_most=True) if last else None
        outcome.figures.append(Figure(name, 100 * 1000 * costs[count], "%", 1000 * costs[count], "one core", goal))
        done = found.samples / sum(found.step_s)
        outcome.figures.append(Figure(f"{count} generators: samples finished", done, "samples/s"))
    first, last_count = counts[0], counts[-1]
    growth = costs[last_count] / costs[first]
    name = f"cost of a sample with {last_count} generators"
    outcome.figures.append(Figure(name, 1e6 * costs[last_count], "us", growth, f"that with {first}"))
