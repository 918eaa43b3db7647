"""Prompts go out as capacity frees and every answer is scored at once, whatever order generators finish in."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.driver.rollouts import Collected, Rollouts
from actors.driver.schedule import RolloutSchedule
from actors.machine.handles import Group, LocalHandle
from actors.roles.exchange import Exchange
from beaver_ray import experience
from beaver_ray.weights import Layout, PublishedWeights


class StandIn:
    """Obeys the generators' interface: finishes what was asked for, at times more, or all; in any order."""

    def __init__(self, seed: int, more: tuple[int, ...] = (0, 0, 1, 5)) -> None:
        self.random, self.more = random.Random(seed), more
        self.running: list[dict[str, Any]] = []
        self.taken: list[int] = []
        self.most = self.calls = self.version = 0

    def exchange(self, prompts: pa.RecordBatch | None, request: Exchange) -> tuple[dict[str, Any], pa.RecordBatch]:
        aborted = [row["sample_id"] for row in self.running if row["sample_id"] in request.abort]
        self.running = [row for row in self.running if row["sample_id"] not in aborted]
        if request.weights is not None:
            assert request.weights.version > self.version
            self.version = request.weights.version
        new = [row | {"version": self.version} for row in prompts.to_pylist()] if prompts is not None else []
        self.running += new
        self.taken += [row["sample_id"] for row in new]
        self.calls += 1
        self.most = max(self.most, len(self.running))
        assert request.min_finished >= 1
        assert prompts is None or prompts.num_rows > 0
        self.random.shuffle(self.running)
        count = min(len(self.running), request.min_finished + self.random.choice(self.more))
        done, self.running = self.running[:count], self.running[count:]
        answers = {
            "sample_id": [row["sample_id"] for row in done],
            "prompt_tokens": [row["prompt_tokens"] for row in done],
            "response_tokens": [[row["sample_id"], 2] for row in done],
            "weight_version": [row["version"] for row in done],
        }
        summary = {"sample_ids": answers["sample_id"], "versions": answers["weight_version"], "aborted": aborted}
        return summary | {"generated_tokens": 2 * count, "load_s": 0.0}, experience.make_batch(answers)


def group(generators: list[StandIn]) -> Group:
    return Group("rollout", [LocalHandle(f"rollout-{i}", g) for i, g in enumerate(generators)], 1.0)


def prompts(count: int, first: int = 50) -> pa.RecordBatch:
    rows = {"sample_id": list(range(first, first + count)), "prompt_id": [0] * count}
    return experience.make_batch({**rows, "prompt_tokens": [[i, 7] for i in range(first, first + count)]})


def rows_of(collected: Collected) -> list[dict[str, Any]]:
    chunks = [experience.select(chunk.sequences, sorted(chunk.wanted)) for chunk in collected.chunks]
    return experience.concat(chunks).to_pylist()


def weights(version: int) -> PublishedWeights:
    return PublishedWeights(version, Layout((), ()), ())


@given(
    workers=st.integers(1, 3),
    size=st.integers(1, 70),
    capacity=st.integers(1, 20),
    staleness=st.integers(0, 3),
    oversample=st.sampled_from([1.0, 1.5]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_every_prompt_is_trained_on_once_scored_and_fresh(
    workers: int, size: int, capacity: int, staleness: int, oversample: float, seed: int
) -> None:
    generators = [StandIn(seed + i) for i in range(workers)]
    scored: list[pa.RecordBatch] = []

    def score(sequences: pa.RecordBatch) -> list[Any]:
        scored.append(sequences)
        return [f"score {len(scored)}"]

    schedule = RolloutSchedule(4, staleness, oversample)
    rollouts = Rollouts(group(generators), capacity, 1.0, schedule, lambda step: prompts(size, step * size), score)
    trained: list[int] = []
    for step in range(1, 5):
        collected = rollouts.gather(step)
        rows = rows_of(collected)
        assert len(rows) == size and collected.seconds > 0
        for row in rows:
            assert row["prompt_tokens"] == [row["sample_id"], 7] and row["response_tokens"] == [row["sample_id"], 2]
            assert 0 <= step - 1 - row["weight_version"] <= staleness
        trained += [row["sample_id"] for row in rows]
        for chunk in collected.chunks:
            assert scored[int(chunk.columns[0].removeprefix("score ")) - 1] is chunk.sequences
        rollouts.offer(weights(step))
    assert sorted(trained) == list(range(size, 5 * size))
    if oversample == 1.0:
        assert sorted(i for g in generators for i in g.taken) == sorted(trained)
    assert not rollouts.prompts and not rollouts.chunks
    for generator in generators:
        # Besides those at work two chunks wait, so that no place is empty while the driver is told and answers.
        assert generator.most <= capacity + 2 * max(1, min(32, capacity // 4))


def test_a_generator_is_filled_up_as_answers_come() -> None:
    # Chunks of 25, a quarter of the places: 300 answers in 12 calls, and at most two that come too late.
    generator = StandIn(seed=0, more=(0,))
    rollouts = Rollouts(group([generator]), 100, 1.0)
    assert len(rows_of(rollouts.collect(prompts(300), lambda chunk: []))) == 300
    assert generator.most == 150 and 12 <= generator.calls <= 14


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("staleness", [0, 2])
def test_held_out_prompts_go_beside_training(staleness: int, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """late: calls of training come back when an evaluation has begun, with its answers in them, as on a cluster."""
    if late:
        monkeypatch.setattr("actors.driver.rollouts.ready_now", lambda references: [])
    generators = [StandIn(seed=i) for i in range(2)]
    judged: list[pa.RecordBatch] = []
    schedule = RolloutSchedule(3, staleness)
    rollouts = Rollouts(group(generators), 8, 1.0, schedule, lambda step: prompts(20, step * 20), lambda chunk: ["s"])
    trained = []
    for step in range(1, 4):
        trained += [row["sample_id"] for row in rows_of(rollouts.gather(step))]
        rollouts.offer(weights(step))
        held_out = rollouts.collect(prompts(30, 1000 * step), lambda chunk: judged.append(chunk) or ["j"])
        assert [row["sample_id"] for row in rows_of(held_out)] == list(range(1000 * step, 1000 * step + 30))
        assert all(row["weight_version"] == step for row in rows_of(held_out))
        assert all(chunk.columns == ["j"] for chunk in held_out.chunks), "training's scores may not be all of these"
    assert sorted(trained) == list(range(20, 80)) and judged


class Supply:
    """Starts nobody, and knows whom it stopped."""

    def __init__(self) -> None:
        self.stopped: list[str] = []

    def wanted(self) -> None:
        return None

    def stop(self, handle: LocalHandle) -> None:
        self.stopped.append(handle.name)


def test_who_is_leaving_when_the_run_rolls_back_goes_at_once() -> None:
    supply = Supply()
    rollouts = Rollouts(
        group([StandIn(seed=i) for i in range(2)]),
        8,
        1.0,
        RolloutSchedule(3, 1),
        lambda step: prompts(20, step * 20),
        lambda chunk: [],
        supply,  # type: ignore[arg-type]
    )
    rollouts.gather(1)
    rollouts.resize(1)
    assert supply.stopped == [] and len(rollouts.workers) == 2, "its answers are still to come"
    again = RolloutSchedule(3, 1)
    rollouts.restart(again, lambda step: prompts(20, step * 20), prompts(0), weights(0))
    assert supply.stopped == ["rollout-1"] and list(rollouts.workers) == list(again.generators) == ["rollout-0"]


def test_who_is_leaving_is_not_asked_held_out_prompts() -> None:
    generators = [StandIn(seed=i, more=(0,)) for i in range(2)]
    schedule = RolloutSchedule(3, 1)
    arguments: list[Any] = [lambda step: prompts(20, step * 20), lambda chunk: [], Supply()]
    rollouts = Rollouts(group(generators), 8, 1.0, schedule, *arguments)
    rollouts.gather(1)
    rollouts.offer(weights(1))
    rollouts.resize(1)
    rollouts.collect(prompts(30, 1000), lambda chunk: [])
    assert max(generators[0].taken) >= 1000 > max(generators[1].taken)
