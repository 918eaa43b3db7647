"""Which processes a PPO run is made of, and how each is started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.machine.cluster import Cluster
from actors.machine.handles import Group, Handle, LocalHandle
from actors.roles.critic import Critic
from actors.roles.experience_builder import ExperienceBuilder
from actors.roles.generator import GeneratorSpec, VllmGenerator, read_eos_token_ids
from actors.roles.hf_generator import HFGenerator
from actors.roles.policy import PolicyTrainer
from actors.roles.remote_scorer import RemoteScorer
from actors.roles.scorer import Reference, Scorer
from beaver_ray.config import GPU_SHARE, SafePpoConfig
from beaver_ray.fit import check_fit
from beaver_ray.models.loading import check_model_folder, context_length
from beaver_ray.remote import check_allowed, is_remote
from beaver_ray.signals import ScorerPlan, critics, scorers

Start = Callable[[str, type, Sequence[tuple[Any, ...]]], Group]


@dataclass
class Roles:
    """The groups of a run; ``scorers`` by role name, ``critics`` by the folder that each is saved in.

    An evaluation has generators and scorers alone; ``reference`` has no workers there, and where the policy is its own.
    """

    rollout: Group
    scorers: dict[str, Group]
    reference: Group
    policy: Group
    critics: dict[str, Group]
    experience: Group
    calibrations: list[tuple[str, str, Any]] = field(default_factory=list)
    """What the scorers were told: (scorer, column, calibration)."""
    late: list[Handle] = field(default_factory=list)
    """Generators that have found no room or have not started yet."""
    notes: list[str] = field(default_factory=list)
    """What should be known of how they were started, one line each."""
    direct: bool = False
    """Weights stay on the policy's device, where generators read them (`actors.weights.direct`)."""


def judging_kinds(config: SafePpoConfig) -> dict[str, str]:
    """Every role of an evaluation by its name, with the kind that names it under cluster.placement."""
    return {"rollout": "rollout", **{plan.name: plan.kind for plan in scorers(config)}}


def role_kinds(config: SafePpoConfig) -> dict[str, str]:
    """Every role of the run by its name, with its kind."""
    reference = {} if config.models.adapter_off_is_reference else {"reference": "reference"}
    return {
        **judging_kinds(config),
        **reference,
        "policy": "policy",
        **{plan.name: plan.kind for plan in critics(config)},
        "experience": "experience",
    }


def check_models(config: SafePpoConfig) -> list[str]:
    """What should be known of the run's models, one line each.

    Raises UserError where one is not there or does not fit, or where a service may not be sent its texts.
    """
    check_model_folder(config.models.policy, "policy")
    costs = {f"cost model of {constraint.name}": constraint.model for constraint in config.constraints}
    for part, model in {"reward model": config.models.reward, **costs}.items():
        if is_remote(model):
            check_allowed(model)
        else:
            check_model_folder(model, part)
    return check_fit(config)


def start_local(name: str, role: type, arguments: Sequence[tuple[Any, ...]]) -> Group:
    """All workers of a role in this process."""
    return Group(name, [LocalHandle(name, role(*args)) for args in arguments], timeout_s=0.0)


def start_roles(config: SafePpoConfig, cluster: Cluster | None) -> Roles:
    """Start every role, on ``cluster`` or, where that is None, in this process."""
    start: Start = cluster.start if cluster else start_local

    # The constructors run side by side: all are started before any is waited for.
    roles = _start_judging(config, cluster)
    models, temperature = config.models, config.rollout.temperature
    if not models.adapter_off_is_reference:
        budget, threads = config.engine.micro_batch_tokens, config.cluster.threads
        frozen = (models.reference or models.policy, config.engine.dtype, budget, temperature, threads)
        workers = config.cluster.of("reference").workers if cluster else 1
        roles.reference = start("reference", Reference, [(*frozen, models.trust_remote_code)] * workers)
    world = config.cluster.of("policy").workers if cluster else 1
    in_ray = cluster is not None
    roles.policy = start("policy", PolicyTrainer, [(config, rank, world, in_ray) for rank in range(world)])
    for plan in critics(config):
        world = config.cluster.of(plan.kind).workers if cluster else 1
        arguments = [(config, plan.signals, plan.model, rank, world) for rank in range(world)]
        roles.critics[plan.folder] = start(plan.name, Critic, arguments)
    roles.experience = start("experience", ExperienceBuilder, [(config,)])
    _wait_started(roles, cluster, grows=True)
    connect([roles.policy, *roles.critics.values()])
    _calibrate(config, roles)
    return roles


def start_judging_roles(config: SafePpoConfig, cluster: Cluster | None) -> Roles:
    """Only what an evaluation needs: generators and scorers."""
    roles = _start_judging(config, cluster)
    _wait_started(roles, cluster)
    _calibrate(config, roles)
    return roles


def _start_judging(config: SafePpoConfig, cluster: Cluster | None) -> Roles:
    start: Start = cluster.start if cluster else start_local
    budget, threads = config.engine.micro_batch_tokens, config.cluster.threads
    dtype, trust, policy = config.engine.dtype, config.models.trust_remote_code, config.models.policy

    template, prompts = config.data.template, (config.data.prompts, config.evaluation.prompts)

    def workers(kind: str) -> range:
        return range(config.cluster.of(kind).workers if cluster else 1)

    def scorer(plan: ScorerPlan) -> Group:
        copies = len(workers(plan.kind))
        if is_remote(plan.model):
            remote = (plan.model, plan.columns, policy, config.cluster.step_timeout, trust, template, prompts)
            return start(plan.name, RemoteScorer, [remote] * copies)
        arguments = (plan.model, plan.columns, policy, dtype, budget, threads, trust, template, prompts)
        return start(plan.name, Scorer, [arguments] * copies)

    generator = VllmGenerator if cluster else HFGenerator
    nobody = Group("none", [], 0.0)
    return Roles(
        rollout=start("rollout", generator, [(generator_spec(config),) for _ in workers("rollout")]),
        scorers={plan.name: scorer(plan) for plan in scorers(config)},
        reference=nobody,
        policy=nobody,
        critics={},
        experience=nobody,
    )


def _wait_started(roles: Roles, cluster: Cluster | None, grows: bool = False) -> None:
    if cluster:
        frozen = [roles.rollout, *roles.scorers.values(), roles.reference]
        groups = [*frozen, roles.policy, *roles.critics.values(), roles.experience]
        roles.late = cluster.wait_started(groups, grows)


def connect(groups: Sequence[Group]) -> None:
    """Let the ranks of each group meet and build their models; all groups at the same time."""
    meetings = [(group, group.wait(group.workers[0].call("rendezvous"), "rendezvous")) for group in groups]
    started = [(group, group.call("setup", *meeting)) for group, meeting in meetings]
    for group, references in started:
        group.wait(references, "loading its model")


def generator_spec(config: SafePpoConfig) -> GeneratorSpec:
    """The generators' settings from the configuration."""
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
        eos_token_ids=read_eos_token_ids(policy, config.models.trust_remote_code, config.data.template),
        tensor_parallel_size=max(1, int(config.cluster.of("rollout").gpus)),
        kv_cache_gib=rollout.kv_cache_gib,
        gpu_memory_utilization=GPU_SHARE * min(1.0, config.cluster.of("rollout").gpus or 1.0),
        shares_gpu=0 < config.cluster.of("rollout").gpus < 1,
        trust_remote_code=config.models.trust_remote_code,
        threads=config.cluster.threads,
        load_timeout_s=config.cluster.step_timeout,
    )


def _calibrate(config: SafePpoConfig, roles: Roles) -> None:
    """Turn the cost of every constraint whose limit is a violation rate into a probability."""
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    for constraint in config.constraints:
        if constraint.violation_rate is not None:
            column = f"cost/{constraint.name}"
            name = next(plan.name for plan in scorers(config) if column in plan.columns)
            group = roles.scorers[name]
            first = group.workers[0]
            fitted = group.wait(first.call("calibrate", column, constraint.calibration, longest), "calibrating")
            pairs = group.wait(first.call("labelled_pairs", column), "calibrating")
            roles.notes.append(f"calibration of {constraint.name}: {pairs}")
            group.run("set_calibration", column, fitted)
            roles.calibrations.append((name, column, fitted))
