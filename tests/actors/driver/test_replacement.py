"""Generators that die or fail on a real Ray: their samples go to others, another one takes their place."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch

from actors.driver.rollouts import Rollouts
from actors.driver.schedule import RolloutSchedule
from actors.machine.cluster import RayHandle
from actors.machine.handles import Group, Handle
from actors.machine.waits import WeightsLostError
from beaver_ray import experience
from beaver_ray.weights import Layout, PublishedWeights
from tests.actors.light_roles import LightGenerator
from tests.packed_weights import pack

pytestmark = pytest.mark.cluster

SIZE = 40


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, log_to_driver=False, logging_level="ERROR")  # type: ignore[arg-type]
    yield
    ray.shutdown()


def generator(name: str, **behaviour: Any) -> RayHandle:
    return RayHandle(name, ray.remote(num_cpus=0)(LightGenerator).remote(**behaviour))


class Supply:
    """Starts generators that are as given, and counts them."""

    def __init__(self, **behaviour: Any) -> None:
        self.behaviour = behaviour
        self.started = 0
        self.stopped: list[str] = []

    def start(self) -> RayHandle:
        self.started += 1
        return generator(f"new-{self.started}", **self.behaviour)

    def stop(self, handle: Handle) -> None:
        self.stopped.append(handle.name)

    def wanted(self) -> Any:
        return ray.put(None)


class Source:
    """A policy whose weights go another way when that is asked for."""

    def __init__(self, gone: bool = False) -> None:
        self.is_gone, self.detours = gone, 0
        self.published: list[int] = []

    def gone(self) -> bool:
        return self.is_gone

    def detour(self) -> None:
        self.detours += 1

    def republish(self, version: int) -> PublishedWeights:
        self.published.append(version)
        return weights(version, direct=False)


def prompts(step: int) -> pa.RecordBatch:
    ids = list(range(step * SIZE, (step + 1) * SIZE))
    return experience.make_batch({"sample_id": ids, "prompt_id": ids, "prompt_tokens": [[1]] * SIZE})


def weights(version: int, direct: bool) -> PublishedWeights:
    """Weights that the blind cannot read, or none at all."""
    return pack([("w", torch.zeros(4))], version) if direct else PublishedWeights(version, Layout((), ()), ())


def trained_in(rollouts: Rollouts, step: int) -> list[int]:
    samples: list[int] = []
    for chunk in rollouts.gather(step).chunks:
        batch = ray.get(chunk.sequences, timeout=30)
        rows = experience.select(batch, sorted(chunk.wanted)).to_pylist()
        assert all(row["response_tokens"] == [row["sample_id"]] for row in rows)
        assert all(0 <= step - 1 - row["weight_version"] <= rollouts.schedule.staleness for row in rows)
        samples += [row["sample_id"] for row in rows]
    source: Any = rollouts.source
    rollouts.offer(weights(step, direct=not (source and source.detours)))
    return samples


def trained(rollouts: Rollouts, steps: int) -> list[int]:
    return [sample for step in range(1, steps + 1) for sample in trained_in(rollouts, step)]


@pytest.mark.parametrize(("staleness", "answers"), [(0, 1), (2, 1), (1, 4)])
def test_a_dead_generators_samples_are_neither_lost_nor_trained_twice(staleness: int, answers: int) -> None:
    group = Group("rollout", [generator("a", dies=True), generator("b")], 30.0)
    supply, notes = Supply(), []
    schedule = RolloutSchedule(4, staleness, group_size=answers)
    rollouts = Rollouts(group, 8, 30.0, schedule, prompts, lambda chunk: [], supply, notes.append)
    samples = trained(rollouts, 4)
    assert sorted(samples) == list(range(SIZE, 5 * SIZE))
    # A step has all answers to a prompt.
    assert len({(place // SIZE, sample // answers) for place, sample in enumerate(samples)}) == 4 * SIZE // answers
    assert supply.started == 1 and supply.stopped == ["a"]
    assert schedule.repeated > 0
    assert any(note.startswith("a is lost with") and "died" in note for note in notes)


def test_who_cannot_read_weights_is_replaced_while_the_policy_lives() -> None:
    group = Group("rollout", [generator("a", blind=True), generator("b")], 30.0)
    supply, notes = Supply(), []
    schedule = RolloutSchedule(3)
    rollouts = Rollouts(group, 8, 30.0, schedule, prompts, lambda chunk: [], supply, notes.append)
    assert sorted(trained(rollouts, 3)) == list(range(SIZE, 4 * SIZE))
    assert supply.stopped == ["a"] and any("no NIXL here" in note for note in notes)

    gone = Group("rollout", [generator("c", blind=True)], 30.0)
    rollouts = Rollouts(gone, 8, 30.0, RolloutSchedule(3), prompts, lambda chunk: [], Supply(), notes.append)
    rollouts.source = Source(gone=True)
    with pytest.raises(WeightsLostError, match="no NIXL here"):
        trained(rollouts, 3)


@pytest.mark.parametrize(("others", "staleness"), [(0, 0), (1, 2)])
def test_weights_that_a_generator_can_never_read_go_another_way(others: int, staleness: int) -> None:
    names = ["a", *(f"sees-{i}" for i in range(others))]
    group = Group("rollout", [generator(name, blind=name == "a") for name in names], 30.0)
    supply, source, notes = Supply(blind=True), Source(), []
    schedule = RolloutSchedule(10_000, staleness)
    rollouts = Rollouts(group, 8, 30.0, schedule, prompts, lambda chunk: [], supply, notes.append)
    rollouts.source = source
    samples, step, deadline = [], 0, time.monotonic() + 100
    while "new-3" not in rollouts.workers or not rollouts.workers["new-3"].version:
        step += 1
        samples += trained_in(rollouts, step)
        assert time.monotonic() < deadline, notes
    # Three that cannot read them, one after another; the fourth has those that do not stay with the policy.
    assert source.detours == 1 and supply.stopped == ["a", "new-1", "new-2"] and supply.started == 3
    assert rollouts.workers.keys() == {*names[1:], "new-3"} and not rollouts.unreadable
    assert len(set(samples)) == len(samples) == step * SIZE
    # Where nobody else could have gone on, they were published again.
    assert bool(source.published) or others or staleness


def test_three_failures_of_one_cause_end_the_run_with_it() -> None:
    group = Group("rollout", [generator("a", fails=True)], 30.0)
    notes: list[str] = []
    rollouts = Rollouts(group, 8, 30.0, RolloutSchedule(1), prompts, lambda chunk: [], Supply(fails=True), notes.append)
    with pytest.raises(RuntimeError, match=r"failed 3 times in a row, new-2 last: .*a bug in the engine"):
        rollouts.gather(1)
    assert len([note for note in notes if note.endswith("ZeroDivisionError: a bug in the engine")]) == 3
