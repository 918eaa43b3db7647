"""Which processes a PPO run is made of, and how each is started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors.cluster import Cluster
from actors.critic import Critic
from actors.experience_builder import ExperienceBuilder
from actors.generator import GeneratorSpec, VllmGenerator, read_eos_token_ids
from actors.handles import Group, LocalHandle
from actors.hf_generator import HFGenerator
from actors.policy import PolicyTrainer
from actors.scorer import Reference, Scorer
from beaver_ray.config import SafePpoConfig
from beaver_ray.models.loading import context_length

Start = Callable[[str, type, Sequence[tuple[Any, ...]]], Group]


@dataclass
class Roles:
    """The groups of a run; ``critics`` by signal, ``costs`` by constraint. An evaluation has no training ones."""

    rollout: Group
    reward: Group
    costs: dict[str, Group]
    reference: Group
    policy: Group
    critics: dict[str, Group]
    experience: Group


def role_kinds(config: SafePpoConfig) -> dict[str, str]:
    """Every role of the run by its name, with the kind that names it under cluster.placement."""
    kinds = {"rollout": "rollout", "reward": "reward", "reference": "reference"}
    kinds |= {f"cost-{c.name}": "cost" for c in config.constraints}
    kinds |= {"policy": "policy", "critic-reward": "reward_critic", "experience": "experience"}
    if config.stage == "safe_ppo":
        kinds |= {f"critic-{c.name}": "cost_critic" for c in config.constraints}
    return kinds


def start_local(name: str, role: type, arguments: Sequence[tuple[Any, ...]]) -> Group:
    """All workers of a role in this process."""
    return Group(name, [LocalHandle(name, role(*args)) for args in arguments], timeout_s=0.0)


def start_roles(config: SafePpoConfig, cluster: Cluster | None) -> Roles:
    """Start every role, on ``cluster`` or, where that is None, in this process."""
    start: Start = cluster.start if cluster else start_local

    def critic(name: str, kind: str, signal: str, model: str) -> Group:
        world = config.cluster.of(kind).workers if cluster else 1
        return start(name, Critic, [(config, signal, model, rank, world) for rank in range(world)])

    # The constructors run side by side: all are started before any is waited for.
    roles = _start_frozen(config, cluster)
    world = config.cluster.of("policy").workers if cluster else 1
    put = ray.put if cluster else None
    roles.policy = start("policy", PolicyTrainer, [(config, rank, world, put) for rank in range(world)])
    reward_critic = config.models.reward_critic or config.models.reward
    roles.critics["reward"] = critic("critic-reward", "reward_critic", "reward", reward_critic)
    if config.stage == "safe_ppo":
        for c in config.constraints:
            roles.critics[c.name] = critic(f"critic-{c.name}", "cost_critic", c.name, c.critic or c.model)
    roles.experience = start("experience", ExperienceBuilder, [(config,)])
    _wait_started(roles, cluster)
    connect([roles.policy, *roles.critics.values()])
    _calibrate(config, roles)
    return roles


def start_frozen_roles(config: SafePpoConfig, cluster: Cluster | None) -> Roles:
    """Only what an evaluation needs: generators, scorers and the reference."""
    roles = _start_frozen(config, cluster)
    _wait_started(roles, cluster)
    _calibrate(config, roles)
    return roles


def _start_frozen(config: SafePpoConfig, cluster: Cluster | None) -> Roles:
    start: Start = cluster.start if cluster else start_local
    budget, threads = config.engine.micro_batch_tokens, config.cluster.threads
    dtype, trust, policy = config.engine.dtype, config.models.trust_remote_code, config.models.policy

    def workers(kind: str) -> range:
        return range(config.cluster.of(kind).workers if cluster else 1)

    def scorer(name: str, kind: str, column: str, model: str) -> Group:
        return start(name, Scorer, [(model, column, policy, dtype, budget, threads, trust)] * len(workers(kind)))

    reference = (config.models.reference or policy, dtype, budget, config.rollout.temperature, threads, trust)
    generator = VllmGenerator if cluster else HFGenerator
    nobody = Group("none", [], 0.0)
    return Roles(
        rollout=start("rollout", generator, [(generator_spec(config),) for _ in workers("rollout")]),
        reward=scorer("reward", "reward", "reward", config.models.reward),
        costs={c.name: scorer(f"cost-{c.name}", "cost", f"cost/{c.name}", c.model) for c in config.constraints},
        reference=start("reference", Reference, [reference] * len(workers("reference"))),
        policy=nobody,
        critics={},
        experience=nobody,
    )


def _wait_started(roles: Roles, cluster: Cluster | None) -> None:
    if cluster:
        frozen = [roles.rollout, roles.reward, *roles.costs.values(), roles.reference]
        cluster.wait_started([*frozen, roles.policy, *roles.critics.values(), roles.experience])


def connect(groups: Sequence[Group]) -> None:
    """Let the ranks of each group meet and build their models; all groups at the same time."""
    meetings = [(group, group.wait(group.workers[0].call("rendezvous"), "rendezvous")) for group in groups]
    started = [(group, group.call("setup", *meeting)) for group, meeting in meetings]
    for group, references in started:
        group.wait(references, "loading its model")


def generator_spec(config: SafePpoConfig) -> GeneratorSpec:
    """The generator's side of the configuration."""
    rollout, policy = config.rollout, config.models.policy
    longest = config.data.max_prompt_tokens + rollout.max_new_tokens
    limit = context_length(policy, config.models.trust_remote_code)
    return GeneratorSpec(
        model=policy,
        dtype=config.engine.dtype,
        max_model_len=min(longest, limit) if limit else longest,
        max_new_tokens=rollout.max_new_tokens,
        max_sequences=rollout.max_sequences,
        temperature=rollout.temperature,
        seed=config.seed,
        in_flight=rollout.in_flight,
        eos_token_ids=read_eos_token_ids(policy, config.models.trust_remote_code),
        tensor_parallel_size=max(1, int(config.cluster.of("rollout").gpus)),
        kv_cache_gib=rollout.kv_cache_gib,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        trust_remote_code=config.models.trust_remote_code,
        threads=config.cluster.threads,
    )


def _calibrate(config: SafePpoConfig, roles: Roles) -> None:
    """Turn the cost of every constraint whose limit is a violation rate into a probability."""
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    for constraint in config.constraints:
        if constraint.violation_rate is not None:
            group = roles.costs[constraint.name]
            arguments = (constraint.calibration, longest, config.data.template)
            fitted = group.wait(group.workers[0].call("calibrate", *arguments), "calibrating")
            group.run("set_calibration", fitted)
