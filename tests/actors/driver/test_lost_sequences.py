"""Finished sequences that lie on their generator's node alone are asked for again where the node is lost with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.exceptions import ObjectLostError

from actors.driver.rollouts import Collected, Rollouts
from actors.driver.schedule import RolloutSchedule
from actors.machine.cluster import RayHandle
from actors.machine.handles import Group
from beaver_ray import experience
from tests.actors.driver.test_replacement import SIZE, Supply, prompts, weights
from tests.actors.light_roles import LightGenerator

pytestmark = pytest.mark.cluster

TOKENS = 30_000  # of each answer: 120 KB, which Ray leaves where they are made


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A node for the driver, and one that is to be lost, which Ray notices soon."""
    health = {"health_check_period_ms": 500, "health_check_failure_threshold": 2, "health_check_initial_delay_ms": 0}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "_system_config": health})
    cluster.add_node(num_cpus=2, resources={"lost": 1})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")  # type: ignore[arg-type]
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def generator(name: str, resources: dict[str, float]) -> RayHandle:
    """One that is up, so that no other makes all sequences before its first."""
    actor: Any = ray.remote(num_cpus=0, resources=resources)(LightGenerator)
    started = actor.remote(tokens=TOKENS)
    ray.get(started.__ray_ready__.remote(), timeout=120)
    return RayHandle(name, started)


def samples_of(collected: Collected) -> list[int]:
    found: list[int] = []
    for chunk in collected.chunks:
        rows = experience.select(ray.get(chunk.sequences, timeout=30), sorted(chunk.wanted)).to_pylist()
        assert all(row["response_tokens"] == [row["sample_id"]] * TOKENS for row in rows)
        found += [row["sample_id"] for row in rows]
    return found


@pytest.mark.parametrize("staleness", [0, 2])
def test_sequences_that_die_with_their_node_are_asked_for_again(nodes: Cluster, staleness: int) -> None:
    group = Group("rollout", [generator("a", {"lost": 0.1}), generator("b", {})], 60.0)
    notes: list[str] = []
    schedule = RolloutSchedule(3, staleness)
    scored: list[Any] = []

    def score(sequences: Any) -> list[Any]:
        scored.append(sequences)
        return []

    rollouts = Rollouts(group, 8, 60.0, schedule, prompts, score, Supply(tokens=TOKENS), notes.append)
    trained = samples_of(rollouts.gather(1))
    assert not rollouts.renew(), "nothing is lost yet"
    rollouts.offer(weights(1, direct=False))
    collected = rollouts.gather(2)
    nodes.remove_node(nodes.worker_nodes.copy().pop(), allow_graceful=False)
    with pytest.raises(ObjectLostError):
        ray.get([chunk.sequences for chunk in collected.chunks], timeout=60)
    assert rollouts.renew()
    assert any("finished samples are lost with their node" in note for note in notes)
    assert {chunk.sequences for chunk in collected.chunks} <= set(scored)
    trained += samples_of(collected)
    rollouts.offer(weights(2, direct=False))
    last = rollouts.gather(3)
    rollouts.renew()  # some may have been finished before
    trained += samples_of(last)
    rollouts.offer(weights(3, direct=False))
    assert sorted(trained) == list(range(SIZE, 4 * SIZE)) and not rollouts.prompts and not rollouts.chunks
    assert any(note.startswith("a is lost with") for note in notes)
