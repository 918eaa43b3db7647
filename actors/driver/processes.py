"""Which processes a PPO run is made of, and how each is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from actors.driver.policy_stage import PolicyStage
from actors.machine.cluster import Cluster
from actors.machine.handles import Group, Handle, LocalHandle
from actors.machine.ranks import TrainingRank
from actors.roles.environment import EnvironmentSpec
from actors.roles.generator import GeneratorSpec, read_eos_token_ids
from actors.roles.scorer import ScorerBase
from beaver_ray.config import GPU_SHARE, ClusterConfig, RunConfig, SamplingConfig, TextSamplingConfig
from beaver_ray.environments import check_environment, environment_code
from beaver_ray.fit import check_fit
from beaver_ray.models.loading import check_model_folder, context_length
from beaver_ray.policy_options import PolicyConfig
from beaver_ray.score_sources import score_source
from beaver_ray.signals import HELD_OUT_JUDGE, scorers
from beaver_ray.stage import RoleSpec, Stage
from beaver_ray.template_options import TemplateOptions


@dataclass
class Roles:
    """The groups of a run; ``scorers`` by role name, ``critics`` by the folder that each is saved in. ``judges`` score
    held-out answers alone, by role name too.

    An evaluation has generators and scorers alone, a comparison with labels only scorers; ``reference`` has no workers
    there, and where the policy is its own.
    """

    rollout: Group
    scorers: dict[str, Group]
    reference: Group
    policy: Group
    critics: dict[str, Group]
    experience: Group
    judges: dict[str, Group]
    calibrations: list[tuple[str, str, Any]] = field(default_factory=list)
    """What the scorers were told: (scorer, column, calibration)."""
    late: list[Handle] = field(default_factory=list)
    """Generators that have found no room or have not started yet."""
    notes: list[str] = field(default_factory=list)
    """What should be known of how they were started, one line each."""
    direct: bool = False
    """Weights stay on the policy's device, where generators read them (`actors.weights.direct`)."""

    def score(self, sequences: Any) -> list[Any]:
        """Start every scorer on finished sequences: references to reward and costs."""
        return [group.next().call(ScorerBase.score, sequences) for group in self.scorers.values()]


def check_models(config: PolicyStage) -> list[str]:
    """What should be known of the run's models, one line each.

    Raises UserError where one is not there or does not fit, and where a service may not be sent texts, or a function
    or an environment's class not be run.
    """
    check_model_folder(config.models.policy, "policy")
    sources = {"reward model": config.models.reward}
    sources |= {f"cost model of {constraint.name}": constraint.model for constraint in config.constraints}
    judges = {"evaluation.judge": config.evaluation.judge}
    judges |= {f"judge of constraint {constraint.name}": constraint.judge for constraint in config.constraints}
    sources |= {part: judge for part, judge in judges.items() if judge is not None}
    for part, model in sources.items():
        score_source(model).check(part, config.trusts_code)
    if config.environment is not None:
        check_environment(config.environment)
    return check_fit(config)


def open_cluster(stage: Stage, roles: Sequence[RoleSpec]) -> Cluster | None:
    """The cluster that these roles of a stage are started on; None in debug mode, where all are in this process."""
    return None if stage.debug else Cluster(stage.cluster, {role.name: role.kind for role in roles})


def start_role(role: RoleSpec, config: ClusterConfig, cluster: Cluster | None) -> Group:
    """All workers of a role, on ``cluster`` or, where that is None, one in this process."""
    world = config.of(role.kind).workers if cluster else 1
    arguments = [role.arguments(rank, world) for rank in range(world)]
    if cluster:
        return cluster.start(role.name, role.worker_class(), arguments)
    make = role.worker_class()
    return Group(role.name, [LocalHandle(role.name, make(*each)) for each in arguments], timeout_s=0.0)


def start_roles(stage: PolicyStage, cluster: Cluster | None) -> Roles:
    """Start every role, on ``cluster`` or, where that is None, in this process."""
    # The constructors run side by side: all are started before any is waited for.
    roles = _start(stage, stage.roles(), cluster)
    _wait_started(roles, cluster, grows=True)
    connect([roles.policy, *roles.critics.values()])
    _calibrate(stage, roles)
    return roles


def start_judging_roles(stage: Stage, wanted: Sequence[RoleSpec], cluster: Cluster | None) -> Roles:
    """Generators and scorers alone, or those of them that are ``wanted``.

    Costs of a stage with constraints are calibrated.
    """
    roles = _start(stage, wanted, cluster)
    _wait_started(roles, cluster)
    if isinstance(stage, PolicyStage):
        _calibrate(stage, roles)
    return roles


def _start(stage: Stage, specs: Sequence[RoleSpec], cluster: Cluster | None) -> Roles:
    groups = {spec.name: start_role(spec, stage.cluster, cluster) for spec in specs}
    trained = {spec.training.folder: groups.pop(spec.name) for spec in specs if spec.training is not None}
    nobody = Group("none", [], 0.0)
    return Roles(
        rollout=groups.pop("rollout", nobody),
        reference=groups.pop("reference", nobody),
        experience=groups.pop("experience", nobody),
        policy=trained.pop("policy", nobody),
        critics=trained,
        judges={name: groups.pop(name) for name in list(groups) if name.startswith(HELD_OUT_JUDGE)},
        scorers=groups,
    )


def _wait_started(roles: Roles, cluster: Cluster | None, grows: bool = False) -> None:
    if cluster:
        frozen = [roles.rollout, *roles.scorers.values(), *roles.judges.values(), roles.reference]
        groups = [*frozen, roles.policy, *roles.critics.values(), roles.experience]
        roles.late = cluster.wait_started(groups, grows)


def connect(groups: Sequence[Group]) -> None:
    """Let the ranks of each group meet and build their models; all groups at the same time."""
    meetings = [(group, group.wait(group.workers[0].call(TrainingRank.rendezvous), "rendezvous")) for group in groups]
    started = [(group, group.call(TrainingRank.setup, *meeting)) for group, meeting in meetings]
    for group, references in started:
        group.wait(references, "loading its model")


def generator_spec(config: PolicyConfig) -> GeneratorSpec:
    """The generators' settings from the configuration of a PPO run."""
    data, models = config.data, config.models
    spec = sampling_spec(
        config, models.policy, config.rollout, data.max_prompt_tokens, data.template, models.trust_remote_code
    )
    return replace(spec, in_flight=config.rollout.in_flight, environment=environment_spec(config))


def sampling_spec(
    config: RunConfig,
    policy: str,
    sampling: SamplingConfig,
    max_prompt_tokens: int,
    template: TemplateOptions,
    trust_remote_code: bool,
) -> GeneratorSpec:
    """The settings of generators of a stage that samples from ``policy``."""
    longest = max_prompt_tokens + sampling.max_new_tokens
    limit = context_length(policy, trust_remote_code)
    gpus = config.cluster.of("rollout").gpus
    return GeneratorSpec(
        model=policy,
        dtype=config.engine.dtype,
        max_model_len=min(longest, limit) if limit else longest,
        max_new_tokens=sampling.max_new_tokens,
        max_sequences=sampling.max_sequences,
        temperature=sampling.temperature,
        top_p=sampling.top_p if isinstance(sampling, TextSamplingConfig) else 1.0,
        seed=config.seed,
        eos_token_ids=read_eos_token_ids(policy, trust_remote_code, template),
        tensor_parallel_size=max(1, int(gpus)),
        kv_cache_gib=sampling.kv_cache_gib,
        gpu_memory_utilization=GPU_SHARE * min(1.0, gpus or 1.0),
        shares_gpu=0 < gpus < 1,
        trust_remote_code=trust_remote_code,
        threads=config.cluster.threads,
        load_timeout_s=config.cluster.step_timeout,
    )


def environment_spec(config: PolicyConfig) -> EnvironmentSpec | None:
    """What generators need to know of the run's environment. UserError where its file cannot be read."""
    if config.rollout.environment is None:
        return None
    prompts = (config.data.prompts, config.evaluation.prompts)
    return EnvironmentSpec(environment_code(config.rollout.environment).pack(), config.data.template, prompts)


def _calibrate(config: PolicyConfig, roles: Roles) -> None:
    """Turn the cost of every constraint whose limit is a violation rate into a probability."""
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    for constraint in config.constraints:
        if constraint.violation_rate is not None:
            column = f"cost/{constraint.name}"
            name = next(plan.name for plan in scorers(config) if column in plan.columns)
            group = roles.scorers[name]
            first = group.workers[0]
            started = first.call(ScorerBase.calibrate, column, constraint.calibration, longest)
            fitted = group.wait(started, "calibrating")
            pairs = group.wait(first.call(ScorerBase.labelled_pairs, column), "calibrating")
            roles.notes.append(f"calibration of {constraint.name}: {pairs}")
            group.run(ScorerBase.set_calibration, column, fitted)
            roles.calibrations.append((name, column, fitted))
