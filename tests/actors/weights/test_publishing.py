"""New weights on a real Ray: a bucket can be had before the next is made, and one that never comes is explained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.driver.loop import send_weights
from actors.driver.processes import Roles
from actors.driver.rollouts import Rollouts
from actors.driver.schedule import RolloutSchedule
from actors.machine.cluster import RayHandle
from actors.machine.handles import Group
from actors.machine.waits import WeightsLostError, WeightsMissingError, WorkerDiedError, all_here, fetch, ready_now
from actors.weights.publishing import checked_buckets, publish
from beaver_ray.weights import unpack
from tests.actors.driver.test_replacement import Supply, generator, prompts
from tests.actors.light_roles import Publisher

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, log_to_driver=False, logging_level="ERROR")  # type: ignore[arg-type]
    yield
    ray.shutdown()


def policy(**behaviour: Any) -> Group:
    return Group("policy", [RayHandle("policy", ray.remote(num_cpus=0)(Publisher).remote(3, **behaviour))], 60.0)


def test_a_bucket_can_be_had_before_the_next_is_made(tmp_path: Path) -> None:
    weights = publish(policy(gate=str(tmp_path / "gate")), 7)
    buckets = checked_buckets(weights, 60)
    first = next(buckets)
    assert len(ready_now(weights.buckets)) == 1 and not all_here(weights.buckets)
    (tmp_path / "gate").touch()
    found = [first, *buckets]
    assert [bucket.index for bucket in found] == [0, 1, 2] and all_here(weights.buckets)
    for bucket in found:
        assert not bucket.data.flags.writeable, "shared memory, not a copy"
        assert all((tensor == 7).all() for _, tensor in unpack(weights.layout, bucket))


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ({"ends": True}, "its process died"),
        ({"fails": True}, "a bug in the policy"),
        ({}, r"the answer did not come within 2 s; .* was running .*bucket"),
    ],
)
def test_a_bucket_that_does_not_come_is_named_with_its_reason(
    behaviour: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    publisher = policy(gate=str(tmp_path / "gate"), **behaviour)
    weights = publish(publisher, 3)
    buckets = checked_buckets(weights, 60 if behaviour else 2)
    fetch(weights.buckets[0], "the first bucket", 60)
    next(buckets)
    if behaviour:
        (tmp_path / "gate").touch()
    with pytest.raises(WeightsMissingError, match=rf"(?s)weights version 3, bucket 1 of 3.*: .*{reason}") as caught:
        next(buckets)
    assert isinstance(caught.value, WeightsLostError) == ("ends" in behaviour)
    # What was made before is there, whatever became of its maker.
    assert next(checked_buckets(weights, 2)).index == 0
    ray.kill(publisher.workers[0].actor)


def test_a_policy_that_dies_is_not_taken_for_a_generators_failure() -> None:
    supply, nobody = Supply(), Group("none", [], 0.0)
    generators = Group("rollout", [generator("a"), generator("b")], 30.0)
    schedule = RolloutSchedule(2)
    rollouts = Rollouts(generators, 8, 30.0, schedule, prompts, lambda chunk: [], supply, lambda note: None)
    rollouts.gather(1)
    roles = Roles(generators, {}, nobody, policy(ends=True), {}, nobody, {})
    assert send_weights(roles, rollouts, 1) == {"sync/bytes": 3 * 2**20}
    # What `Recovery` takes for a reason to go back to the last checkpoint.
    with pytest.raises(WorkerDiedError, match=r"weights version 1, bucket [01] of 3: its process died"):
        rollouts.gather(2)
    assert supply.started == 0 and not supply.stopped
