"""Weights that generators read where the policy has packed them: real NIXL between processes of a real Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from actors.driver.policy_stage import PolicyStage
from actors.driver.train import train
from actors.machine.cluster import RayHandle
from actors.machine.handles import Group
from actors.machine.waits import WeightsUnreadableError, fetch
from actors.weights.direct import obstacle
from actors.weights.publishing import publish
from beaver_ray.policy_options import DIRECT_WEIGHTS
from beaver_ray.runs import read_metrics
from beaver_ray.weights import PublishedWeights
from launch.config_files import load_config
from tests.actors.blind_generator import LAST_READ, BlindedGenerator
from tests.actors.light_roles import BlindPublisher, BlindReader, Publisher, Reader
from tests.actors.support import ppo_config
from tests.tiny_ppo import CRITIC_FREE, build_workspace, write_stage

pytestmark = pytest.mark.cluster

PART = 2**18  # numbers in a bucket


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    ray.init(address="local", num_cpus=6, log_to_driver=False, logging_level="ERROR")  # type: ignore[arg-type]
    yield
    ray.shutdown()


def actor(role: type, *arguments: Any, **more: Any) -> Any:
    return ray.remote(num_cpus=0)(role).remote(*arguments, **more)


def policy(buckets: int = 3) -> Group:
    return Group("policy", [RayHandle("policy", actor(Publisher, buckets))], 60.0)


def readers(*workers: Any) -> Group:
    return Group("rollout", [RayHandle(f"rollout-{i}", worker) for i, worker in enumerate(workers)], 60.0)


@pytest.mark.timeout(600)
def test_readers_come_when_they_are_ready_and_the_policy_holds_only_what_may_be_read() -> None:
    publisher = policy(64)
    generators = readers(actor(Reader), actor(Reader))
    held = []
    for version in range(1, 7):
        weights = publish(publisher, version, direct=True)
        assert generators.run(Reader.read, weights) == [64.0 * PART * version] * 2
        held.append(publisher.run(Publisher.process)[0][1])
    # MiB, two versions being there from the second on: what nobody can ask for any more is gone. From the third on,
    # as parts of the second may not be in memory yet.
    assert held[-1] < held[2] + 64
    assert fetch(actor(Reader).read.remote(weights), "a late reader", 120) == 64.0 * PART * 6


@pytest.mark.timeout(600)
def test_a_policy_that_dies_takes_its_buckets_along(tmp_path: Path) -> None:
    publisher = policy()
    weights = publish(publisher, 5, direct=True)
    assert fetch(actor(Reader).read.remote(weights), "reading", 120) == 3.0 * PART * 5
    # Not in this process, where NIXL would keep a core busy for the rest of all tests.
    gate = tmp_path / "gate"
    reading = actor(Reader, gate=str(gate)).read.remote(weights)
    while not (tmp_path / "gate.half").exists():
        time.sleep(0.05)
    process = psutil.Process(publisher.run(Publisher.process)[0][0])
    ray.kill(publisher.workers[0].actor)
    process.wait(60)
    gate.touch()
    with pytest.raises(WeightsUnreadableError, match="weights version 5, bucket 1 of 3 cannot be read where it lies"):
        fetch(reading, "the rest", 120)


@pytest.mark.parametrize(
    ("policy_gpus", "rollout_gpus", "debug", "expected"),
    [
        (1, 1, False, True),
        (1, 0.5, False, True),
        (0, 1, False, False),
        (1, 0, False, False),
        (1, 2, False, False),  # tensor parallelism
        (1, 1, True, False),
    ],
)
def test_when_weights_go_direct(
    tiny_world: Path,
    policy_gpus: float,
    rollout_gpus: float,
    debug: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(DIRECT_WEIGHTS, raising=False)
    placement = {"policy": {"gpus": policy_gpus}, "rollout": {"gpus": rollout_gpus}}
    config = ppo_config(tiny_world, debug=debug, cluster={"placement": placement})
    assert isinstance(config, PolicyStage) and config.direct_weights == expected
    monkeypatch.setenv(DIRECT_WEIGHTS, "0")
    assert not config.direct_weights


def test_room_for_direct_weights_by_hand(tiny_world: Path) -> None:
    placement = {"policy": {"gpus": 0.5}, "rollout": {"gpus": 0.5}}
    config = ppo_config(tiny_world, cluster={"placement": placement}, rollout={"staleness": 1})
    assert isinstance(config, PolicyStage)
    assert config.direct_room(10 * 2**30, 240 * 2**30) == 30 * 2**30  # three versions, a quarter of half a GPU
    with pytest.raises(ValueError, match=r"33.0 GiB of weights .* more than 25% of the 120.0 GiB of GPU"):
        config.direct_room(11 * 2**30, 240 * 2**30)


@pytest.mark.timeout(600)
def test_the_way_is_taken_only_where_every_generator_has_just_gone_it() -> None:
    publisher = policy()
    assert obstacle(publisher, readers(actor(Reader), actor(Reader))) is None
    blind = obstacle(publisher, readers(actor(Reader), actor(BlindReader)))
    assert blind and blind.startswith("weights version 0, bucket 0 of 1 cannot be read where it lies: ModuleNotFound")
    dying = obstacle(publisher, readers(actor(Reader, ends=True), actor(Reader)))
    assert dying and dying.startswith("rollout (reading a trial of weights from the policy's device): its process died")
    assert publisher.run(Publisher.layout), "the policy lives"


@pytest.mark.timeout(600)
def test_a_policy_that_cannot_put_weights_on_its_device_sends_them() -> None:
    publisher = Group("policy", [RayHandle("policy", actor(BlindPublisher, 3))], 60.0)
    reader = readers(actor(Reader))
    assert (obstacle(publisher, reader) or "").startswith("ModuleNotFoundError")
    assert reader.run(Reader.read, publish(publisher, 4, direct=True)) == [3.0 * PART * 4]


@pytest.mark.timeout(900)
def test_a_run_whose_weights_go_direct_as_long_as_they_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PolicyStage, "direct_weights", property(lambda self: True))
    monkeypatch.setattr("actors.roles.generator.VllmGenerator", BlindedGenerator)
    taken: list[PublishedWeights] = []

    def announced(group: Group, version: int, direct: bool) -> PublishedWeights:
        taken.append(publish(group, version, direct))
        return taken[-1]

    monkeypatch.setattr("actors.driver.loop.publish", announced)
    monkeypatch.setattr("actors.driver.recovery.publish", announced)
    placement = {role: {"cpus": 0.1} for role in ("reward", "reference", "experience")}
    placement |= {"rollout": {"cpus": 0.5}, "policy": {"cpus": 0.5}}
    stage = {"stage": "ppo", "constraints": [], "steps": 4, "cluster": {"placement": placement}}
    path = write_stage(build_workspace(tmp_path), **stage, **CRITIC_FREE)
    metrics = read_metrics(train(load_config(path)))
    assert len(metrics) == 4
    said = capsys.readouterr().out
    assert "weights go from GPU to GPU" in said and "weights go through the object store from now on" in said
    # Of each version, as it was published last: what the next ones could not read came again by the other way.
    for version, weights in {weights.version: weights for weights in taken}.items():
        buckets = [fetch(reference, "a bucket", 30) for reference in weights.buckets]
        assert all(isinstance(bucket.data, ray.ObjectRef) == (version <= LAST_READ) for bucket in buckets)
    assert max(weights.version for weights in taken) == 4 and len({weights.version for weights in taken}) >= 4
    # The generator's log-probs are the trainer's, so it has every update.
    assert all(row["kl/rollout_train_max"] < 1e-4 for row in metrics)
    assert max(abs(row["policy/ratio_max_deviation"]) for row in metrics) > 0
    assert os.path.isdir(tmp_path / "run" / "final")
