"""The training loop: generate, score, value, advantage, multiplier, update, publish.

Every role is a `Group`; what passes between them are references to Arrow batches. The loop is the same on a cluster
and in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from actors.roles import Roles
from actors.rollouts import Collected, Rollouts, Supply
from actors.schedule import RolloutSchedule
from beaver_ray.config import SafePpoConfig
from beaver_ray.method.multipliers import Multiplier, make_multiplier
from beaver_ray.runs import RunFolder


def train_policy(
    config: SafePpoConfig,
    roles: Roles,
    rollouts: Rollouts,
    run: RunFolder,
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
                stats, batch = assemble(roles, collected)
                figures, costs, experience = add_advantages(config, roles, batch)
            for name, multiplier in multipliers.items():
                multiplier.update(costs[name], limits[name])
            with clock("train"):
                figures |= update(config, roles, experience, multipliers, step)
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
    """Start reward, costs and reference log-probs of finished sequences."""
    scorers = [roles.reward, *roles.costs.values()]
    scores = [group.next().call("score", sequences) for group in scorers]
    return [*scores, roles.reference.next().call("logprobs", sequences)]


def assemble(roles: Roles, collected: Collected) -> tuple[dict[str, Any], Any]:
    """Figures of the step's answers, and a reference to all of them in one batch."""
    flat = [part for chunk in collected.chunks for part in (chunk.sequences, *chunk.columns)]
    wanted = [sorted(chunk.wanted) for chunk in collected.chunks]
    stats, batch = roles.experience.workers[0].call("assemble", wanted, *flat, returns=2)
    return roles.experience.wait(stats, "assembling experience"), batch


def add_advantages(
    config: SafePpoConfig, roles: Roles, batch: Any
) -> tuple[dict[str, float], dict[str, list[float]], Any]:
    """Values, the trainer's log-probs, then advantages and returns.

    Returns figures, the episodes' costs as the multipliers should see them, and a reference to the whole batch.
    """
    parts = [critic.call("values", batch) for critic in roles.critics.values()]
    if config.ppo.old_logprobs == "trainer":
        parts.append(roles.policy.call("logprobs", batch))
    sizes = [len(group) for group in parts]
    flat = [part for group in parts for part in group]
    computed, whole = roles.experience.workers[0].call("advantages", sizes, batch, *flat, returns=2)
    figures, costs = roles.experience.wait(computed, "computing advantages")
    return figures, costs, whole


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
    for signal, critic in roles.critics.items():
        started.append((critic, critic.call("save", f"{folder}/{signal}_critic")))
    for group, references in started:
        group.wait(references, "saving")


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - started

    def total(self) -> float:
        """Seconds since the step began, evaluation left out."""
        return time.perf_counter() - self.began - self.phases.get("evaluate", 0.0)

    def figures(self) -> dict[str, float]:
        """The phases as metrics."""
        return {**{f"time/{phase}": s for phase, s in self.phases.items()}, "time/step": self.total()}
