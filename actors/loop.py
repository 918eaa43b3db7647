"""The training loop: generate, score, value, advantage, multiplier, update, publish.

Every role is a `Group`; what passes between them are references to Arrow batches. The loop is the same on a cluster
and in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from actors.roles import Roles
from actors.rollouts import Collected, Rollouts, Supply
from actors.schedule import RolloutSchedule
from actors.tracing import Clock, StepTrace
from beaver_ray.config import SafePpoConfig
from beaver_ray.method.multipliers import Multiplier, make_multiplier
from beaver_ray.runs import RunFolder


def train_policy(
    config: SafePpoConfig,
    roles: Roles,
    rollouts: Rollouts,
    run: RunFolder,
    trace: StepTrace,
    evaluate: Callable[[int], dict[str, float]],
) -> None:
    """All steps of a PPO run; ``evaluate`` gives figures on held-out prompts."""
    constraints = config.constraints if config.stage == "safe_ppo" else []
    limits = {c.name: c.bound for c in config.constraints}
    multipliers = {c.name: make_multiplier(c.multiplier) for c in constraints}
    began = time.perf_counter()
    steps = config.total_steps(0)
    with run.progress(config.stage, steps) as progress:
        for step in range(1, steps + 1):
            clock = Clock()
            with clock("generate"):
                collected = rollouts.take(step)
            with clock("score"):
                stats, costs, experience = build_experience(config, roles, collected)
            for name, multiplier in multipliers.items():
                multiplier.update(costs[name], limits[name])
            with clock("train"):
                figures = update(config, roles, experience, multipliers, step)
            with clock("sync"):
                synced = publish(roles, rollouts, version=step)
            if config.trajectory_every and step % config.trajectory_every == 0:
                path = str(run.trajectories / f"step_{step:06d}.parquet")
                roles.experience.run("write", experience, path)
            if config.evaluation.every and step % config.evaluation.every == 0:
                with clock("evaluate"):
                    figures |= evaluate(step)
            if config.save_every and step % config.save_every == 0:
                save(roles, str(run.checkpoints / f"step_{step}"))
            values = {name: multiplier.value for name, multiplier in multipliers.items()}
            figures["rollout/workers"] = float(len(rollouts.workers))
            figures["rollout/repeated_samples"] = float(rollouts.schedule.repeated)
            metrics = step_metrics(step, stats, limits, values, collected, clock) | figures | synced
            metrics["time/elapsed"] = time.perf_counter() - began
            run.log(step, metrics)
            trace.record(step, clock)
            shown = {f"{name} cost": stats[f"cost/{name}/mean"] for name in limits}
            shown |= {f"{name} multiplier": value for name, value in values.items()}
            progress.advance(1, reward=stats["reward/mean"], **shown)


def make_rollouts(
    config: SafePpoConfig,
    roles: Roles,
    next_prompts: Callable[[int], pa.RecordBatch],
    supply: Supply | None,
    note: Callable[[str], None],
) -> Rollouts:
    """This run's generators, which go on whenever the loop waits for another role."""
    rollout, timeout = config.rollout, config.cluster.step_timeout
    schedule = RolloutSchedule(config.total_steps(0), rollout.staleness, rollout.oversample)
    rollouts = Rollouts(
        roles.rollout,
        rollout.max_sequences,
        timeout,
        schedule,
        next_prompts,
        lambda chunk: score(roles, chunk),
        supply,
        note,
    )
    for group in (roles.policy, roles.experience, *roles.critics.values()):
        group.meanwhile = rollouts.while_waiting
    return rollouts


def score(roles: Roles, sequences: Any) -> list[Any]:
    """Start reward, costs and, where the reference is a role, its log-probs of finished sequences."""
    scores = [group.next().call("score", sequences) for group in roles.scorers.values()]
    if roles.reference.workers:
        scores.append(roles.reference.next().call("logprobs", sequences))
    return scores


def build_experience(
    config: SafePpoConfig, roles: Roles, collected: Collected
) -> tuple[dict[str, Any], dict[str, list[float]], Any]:
    """Scores, values, log-probs and advantages of the step's samples in one batch.

    Values and log-probs need the sequences alone and do not wait for the scorers. Returns figures, the episodes' costs
    as the multipliers should see them, and a reference to the batch.
    """
    builder = roles.experience.workers[0]
    wanted = [sorted(chunk.wanted) for chunk in collected.chunks]
    sequences = builder.call("gather", wanted, *(chunk.sequences for chunk in collected.chunks))
    parts = [critic.call("values", sequences) for critic in roles.critics.values()]
    if config.ppo.old_logprobs == "trainer" or config.models.adapter_off_is_reference:
        parts.append(roles.policy.call("logprobs", sequences))
    scores = [column for chunk in collected.chunks for column in chunk.columns]
    stats, batch = builder.call("assemble", wanted, sequences, *scores, returns=2)
    sizes = [len(group) for group in parts]
    flat = [part for group in parts for part in group]
    computed, experience = builder.call("advantages", sizes, batch, *flat, returns=2)
    figures, costs = roles.experience.wait(computed, "building experience")
    return roles.experience.wait(stats, "building experience") | figures, costs, experience


def update(
    config: SafePpoConfig, roles: Roles, experience: Any, multipliers: dict[str, Multiplier], step: int
) -> dict[str, float]:
    """Policy and critics step at the same time; in the critics' warm-up the policy stands still."""
    values = {name: multiplier.value for name, multiplier in multipliers.items()}
    started = [(critic, critic.call("update", experience, step)) for critic in roles.critics.values()]
    if step > config.ppo.critic_warmup_steps:
        started.append((roles.policy, roles.policy.call("update", experience, values, step)))
    figures: dict[str, float] = {}
    for group, references in started:
        figures |= group.wait(references, "training")[0]
    return figures


def publish(roles: Roles, rollouts: Rollouts, version: int) -> dict[str, float]:
    """New weights from the policy, which every generator loads before its next prompts."""
    weights = roles.policy.wait(roles.policy.call("publish", version), "publishing weights")[0]
    rollouts.publish(weights)
    return {"sync/bytes": float(weights.manifest.total_bytes)}


def step_metrics(
    step: int,
    stats: dict[str, Any],
    limits: dict[str, float],
    multipliers: dict[str, float],
    collected: Collected,
    clock: Clock,
) -> dict[str, float]:
    """What the loop itself knows of a step; roles add their own figures."""
    return {
        **{key: value for key, value in stats.items() if "/" in key},
        **{f"cost/{name}/limit": limit for name, limit in limits.items()},
        **{f"multiplier/{name}": value for name, value in multipliers.items()},
        **clock.figures(),
        "rollout/tokens_per_second": collected.generated_tokens / collected.seconds,
        "rollout/staleness_max": step - 1 - stats["rollout/weight_version_min"],
        "throughput/samples_per_second": stats["samples"] / clock.total(),
        "throughput/tokens_per_second": stats["tokens"] / clock.total(),
    }


def save(roles: Roles, folder: str) -> None:
    """The policy and every critic as Hugging Face folders."""
    started = [(roles.policy, roles.policy.call("save", f"{folder}/policy"))]
    started += [(critic, critic.call("save", f"{folder}/{name}")) for name, critic in roles.critics.items()]
    for group, references in started:
        group.wait(references, "saving")
