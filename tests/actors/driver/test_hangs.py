"""Each role of a running system is frozen once: the error comes within its deadline and names who is silent."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import ray
from ray.util.state import list_actors

from actors.driver.control import GeneratorSupply
from actors.driver.loop import make_rollouts, train_step
from actors.driver.policy_stage import PolicyStage
from actors.driver.processes import generator_spec, start_roles
from actors.driver.recovery import Recovery
from actors.driver.tracing import Clock
from actors.driver.training_state import TrainingState
from actors.machine.cluster import Cluster
from actors.machine.waits import WaitTimeoutError
from beaver_ray.data.mixing import load_mix
from beaver_ray.data.tokenized import PromptDataset
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.runs import RunFolder
from launch.config_files import load_config
from tests.tiny_ppo import build_workspace, write_stage

pytestmark = pytest.mark.cluster

DEADLINE_S = 8.0
ROLES = ["rollout", "reward", "reference", "policy", "critic-reward", "experience"]


@pytest.fixture(scope="module")
def recovery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recovery]:
    """A running system of one process for each role, with a checkpoint after its first step."""
    placement = {kind: {"cpus": 0.25} for kind in ("rollout", "reward", "reference", "policy", "reward_critic")}
    placement |= {"experience": {"cpus": 0.1}}
    folder = build_workspace(tmp_path_factory.mktemp("hangs"))
    path = write_stage(folder, stage="ppo", constraints=[], steps=100, trajectory_every=0)
    config = load_config(path)
    assert isinstance(config, PolicyStage)
    config.cluster = config.cluster.model_validate({"placement": placement, "threads": 1, "step_timeout": 300.0})
    tokenizer = load_tokenizer(config.models.policy)
    prompts = PromptDataset.build(load_mix(config.data.prompts)[0], tokenizer, 32, "auto")
    cluster = Cluster(config.cluster, {role.name: role.kind for role in config.roles()})
    with RunFolder(config) as run:
        try:
            roles = start_roles(config, cluster)
            state = TrainingState(config, prompts)
            supply = GeneratorSupply(cluster, generator_spec(config), config.name)
            rollouts = make_rollouts(config, roles, state, supply, run.note)
            recovery = Recovery(state, roles, rollouts, run, cluster)
            step(recovery)
            recovery.save()
            yield recovery
        finally:
            cluster.close()


@contextmanager
def short_deadlines(recovery: Recovery) -> Iterator[None]:
    """Every wait ends after DEADLINE_S; without this a step that nobody disturbs has all the time it needs."""
    roles = recovery.roles
    waiting: list[Any] = [roles.rollout, roles.reference, roles.policy, roles.experience, recovery.rollouts]
    waiting += [*roles.scorers.values(), *roles.critics.values()]
    before = [one.timeout_s for one in waiting]
    for one in waiting:
        one.timeout_s = DEADLINE_S
    yield
    for one, seconds in zip(waiting, before, strict=True):
        one.timeout_s = seconds


def step(recovery: Recovery) -> None:
    config = recovery.state.config
    train_step(config, recovery.roles, recovery.rollouts, recovery, Clock(), lambda step: {})


@pytest.mark.parametrize("role", ROLES)
def test_a_frozen_role_is_named_within_the_deadline(recovery: Recovery, role: str) -> None:
    step(recovery)
    address = ray.get_runtime_context().gcs_address
    actors = {a.name.split(":")[0]: a for a in list_actors(address=address, detail=True) if a.state == "ALIVE"}
    frozen = psutil.Process(actors[role].pid)
    began = time.monotonic()
    frozen.suspend()
    try:
        with short_deadlines(recovery), pytest.raises(WaitTimeoutError) as caught:
            step(recovery)
        seconds = time.monotonic() - began
    finally:
        os.kill(frozen.pid, signal.SIGCONT)
    message = str(caught.value)
    # It may have answered its call of this step before it was frozen; one deadline later it is missed. The rest is
    # the time to ask the cluster what it knows.
    assert seconds < 2 * DEADLINE_S + 10
    assert f"{role}:" in message.partition(f"within {DEADLINE_S:g} s; ")[2], message
    assert f"pid {frozen.pid}" in message and "node " in message and "was running" in message
    assert f"its log: ray logs actor --id {actors[role].actor_id}" in message
    checkpoint = recovery.run.checkpoints.newest()
    recovery._restore(checkpoint)
