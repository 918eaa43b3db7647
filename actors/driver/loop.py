"""The training loop: generate, score, value, advantage, multiplier, update, publish.

Every role is a `Group`; what passes between them are references to Arrow batches. The loop is the same on a cluster
and in one process.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

from actors.driver.processes import Roles
from actors.driver.recovery import Recovery
from actors.driver.rollouts import Collected, Rollouts
from actors.driver.sources import Supply
from actors.driver.tracing import Clock, StepTrace
from actors.driver.training_state import TrainingState
from actors.roles.critic import Critic
from actors.roles.experience_builder import ExperienceBuilder
from actors.roles.policy import PolicyTrainer
from actors.roles.scorer import Reference
from actors.weights.publishing import publish
from beaver_ray.errors import UserError
from beaver_ray.hacking import Watch
from beaver_ray.method.calibration import Calibration
from beaver_ray.method.confidence import safety_margin
from beaver_ray.method.divergence import PERSISTS, bounded_cost
from beaver_ray.method.forms import make_form
from beaver_ray.method.history import Moments, Unit
from beaver_ray.method.multipliers import Multiplier
from beaver_ray.method.objective import BoundedCosts
from beaver_ray.policy_options import PolicyConfig
from beaver_ray.runs import read_metrics


def train_policy(
    config: PolicyConfig,
    roles: Roles,
    rollouts: Rollouts,
    recovery: Recovery,
    trace: StepTrace,
    evaluate: Callable[[int], dict[str, float]],
) -> None:
    """All steps of a PPO run from where its state stands; ``evaluate`` gives figures on held-out prompts."""
    state, run = recovery.state, recovery.run
    steps = config.total_steps(0)
    if state.step > steps:
        raise UserError(
            f"the run has come to step {state.step}, by its newest checkpoint, and is to have {steps}: raise steps, or "
            f"delete {run.folder / 'checkpoints'} and begin anew"
        )
    signs = Watch(config.evaluation.world is not None, read_metrics(run.folder))
    with run.progress(config.stage, steps) as progress:
        while state.step < steps:
            clock = Clock()
            metrics = train_step(config, roles, rollouts, recovery, clock, evaluate)
            run.log(state.step, metrics)
            for sign in signs.observe(state.step, metrics):
                run.note(f"step {state.step}: sign of reward hacking: {sign}")
            watch(config, recovery, metrics)
            # The guard has seen the step that is saved, so that a resumed run ends where this one would.
            if config.save_every and state.step % config.save_every == 0 and state.step < steps:
                recovery.save()
            trace.record(state.step, clock)
            shown = {f"{c.name} cost": bounded_cost(metrics, c.name) for c in config.constraints}
            shown |= {f"{name} multiplier": multiplier.value for name, multiplier in state.multipliers.items()}
            progress.reach(state.step, reward=metrics["reward/mean"], **shown)


def train_step(
    config: PolicyConfig,
    roles: Roles,
    rollouts: Rollouts,
    recovery: Recovery,
    clock: Clock,
    evaluate: Callable[[int], dict[str, float]],
) -> dict[str, float]:
    """The next step, from its samples to new weights at the generators; returns its metrics."""
    run, state, step = recovery.run, recovery.state, recovery.state.step + 1
    with clock("generate"):
        collected = rollouts.gather(step)
    with clock("score"):
        stats, state.multipliers, experience = recovery.survive(
            lambda again: combine_experience(config, roles, state, collected, again)
        )
        state.history = stats["history"]
    # Not before: where answers were lost with their node, the step may be trained on others than were chosen first.
    state.prompts.forget(sample for chunk in collected.chunks for sample in chunk.wanted)
    for line in stats["unusable"].values():
        run.note(f"step {step}: {line}; the step is trained without")
    for name in stats["without_margin"]:
        if name not in state.without_margin:  # said once: with few prompts in scope there are many such steps
            run.note(
                f"step {step}: all answers that {name} compares with its limit are to one prompt, and no error can be "
                f"told of these; confidence takes nothing off in such steps"
            )
            state.without_margin.add(name)
    state.guard.miss(stats["unusable"])
    if stats["samples"] < config.ppo.minibatches:
        fewer = f"{stats['samples']} sample(s), fewer than ppo.minibatches ({config.ppo.minibatches})"
        run.note(f"step {step} has {fewer}: each makes one optimizer step")
    with clock("train"):
        figures = update(config, roles, state, experience, step)
    with clock("publish"):
        synced = send_weights(roles, rollouts, version=step)
    if config.trajectory_every and step % config.trajectory_every == 0:
        path = str(run.trajectories / f"step_{step:06d}.parquet")
        recovery.survive(lambda again: roles.experience.run(ExperienceBuilder.write, experience, path))
    if config.evaluation.every and step % config.evaluation.every == 0:
        with clock("evaluate"):
            figures |= recovery.survive(lambda again: evaluate(step))
    figures["rollout/workers"] = float(len(rollouts.workers))
    figures["rollout/repeated_samples"] = float(rollouts.schedule.repeated)
    metrics = step_metrics(config, state, step, stats, collected, clock) | figures | synced
    state.step, state.elapsed = step, state.elapsed + clock.total() + clock.phases.get("evaluate", 0.0)
    return metrics | {"time/elapsed": state.elapsed}


def watch(config: PolicyConfig, recovery: Recovery, metrics: dict[str, float]) -> None:
    """Say what looks like divergence; raise it as UserError after a checkpoint where guard.action is stop, and where
    numbers that are not finite do not end.
    """
    step, guard = recovery.state.step, recovery.state.guard
    complaints = [f"step {step}: {complaint}" for complaint in guard.observe(metrics)]
    for complaint in complaints:
        recovery.run.note(complaint)
    if complaints and config.guard.action == "stop":
        recovery.save()
        raise UserError(
            f"{complaints[0]}; stopped with a checkpoint (guard.action=stop). Change what is wrong and go on with "
            f"resume=true, or let it run with guard.action=warn"
        )
    if trouble := guard.lasting():
        recovery.save()
        raise UserError(
            f"step {step}: {trouble} for {PERSISTS} steps in a row, as was said above; stopped with a checkpoint. "
            f"Mend the model that is named there, or lower its learning rate, and go on with resume=true"
        )


def make_rollouts(
    config: PolicyConfig, roles: Roles, state: TrainingState, supply: Supply | None, note: Callable[[str], None]
) -> Rollouts:
    """This run's generators, which go on whenever the loop waits for another role."""
    rollouts = Rollouts(
        roles.rollout,
        config.rollout.max_sequences,
        config.cluster.step_timeout,
        state.schedule,
        state.prompts,
        lambda chunk: score(roles, chunk),
        supply,
        note,
        roles.late,
    )
    for group in (roles.policy, roles.experience, *roles.critics.values()):
        group.meanwhile = rollouts.while_waiting
    return rollouts


def score(roles: Roles, sequences: Any) -> list[Any]:
    """Start reward, costs and, where the reference is a role, its log-probs of finished sequences."""
    scores = roles.score(sequences)
    if roles.reference.workers:
        scores.append(roles.reference.next().call(Reference.logprobs, sequences))
    return scores


def build_experience(
    config: PolicyConfig, roles: Roles, state: TrainingState, collected: Collected, again: bool = False
) -> tuple[dict[str, Any], dict[str, BoundedCosts], Any]:
    """Scores, values, log-probs and advantages of the step's samples in one batch; ``again`` asks for scores anew.

    Values and log-probs need the sequences alone and do not wait for the scorers. Returns figures, the episodes' costs
    as the multipliers should see them, and a reference to the batch.
    """
    if again:
        for chunk in collected.chunks:
            chunk.columns = score(roles, chunk.sequences)
    builder = roles.experience.workers[0]
    wanted = [sorted(chunk.wanted) for chunk in collected.chunks]
    sequences = builder.call(ExperienceBuilder.gather, wanted, *(chunk.sequences for chunk in collected.chunks))
    parts = [critic.call(Critic.values, sequences) for critic in roles.critics.values()]
    if config.ppo.old_logprobs == "trainer" or config.models.adapter_off_is_reference:
        parts.append(roles.policy.call(PolicyTrainer.logprobs, sequences))
    if inside := state.dataset.inside:  # which prompts each constraint with a scope counts over
        parts.append([builder.call(ExperienceBuilder.scopes, inside, sequences)])
    scores = [column for chunk in collected.chunks for column in chunk.columns]
    batch = builder.call(ExperienceBuilder.assemble, wanted, sequences, *scores)
    sizes = [len(group) for group in parts]
    flat = [part for group in parts for part in group]
    computed, experience = builder.call(ExperienceBuilder.advantages, sizes, state.history, batch, *flat, returns=2)
    needs = [[sequences], [*scores, *flat]]
    stats, costs = roles.experience.wait(computed, "building experience", needs)
    return stats, costs, experience


def combine_experience(
    config: PolicyConfig, roles: Roles, state: TrainingState, collected: Collected, again: bool = False
) -> tuple[dict[str, Any], dict[str, Multiplier], Any]:
    """The batch of `build_experience` with the policy's advantages, under multipliers that have seen the step's costs.

    Returns figures, these multipliers and a reference to the batch. Those of ``state`` stay as they are, so that a step
    that is asked for ``again`` moves them once.
    """
    stats, costs, batch = build_experience(config, roles, state, collected, again)
    stats["without_margin"] = []
    multipliers, warming_up = copy.deepcopy(state.multipliers), state.step < config.ppo.critic_warmup_steps
    calibrations = {column: Calibration.from_dict(fitted) for _, column, fitted in roles.calibrations}
    for constraint in config.constraints if multipliers else []:
        name, bound, multiplier = constraint.name, constraint.bound, multipliers[constraint.name]
        given, prompts = costs[name].costs_E.tolist(), costs[name].prompts_E.tolist()
        if not given:
            continue  # no prompt of the step is in the constraint's scope
        if constraint.confidence is not None:
            compared = multiplier.compared(given, prompts)
            calibration, shares = calibrations.get(f"cost/{name}"), costs[name].shares and multiplier.shares
            form = make_form(constraint.form, config.rollout.samples_per_prompt)
            margin = safety_margin(*compared, constraint.confidence, calibration, form, shares)
            if math.isfinite(margin):
                stats[f"cost/{name}/margin"], bound = margin, bound - margin
            else:
                stats["without_margin"].append(name)
        seen = {"reward_std": stats["reward/std"], "prompts": prompts, "shares": costs[name].shares}
        multiplier.update(given, bound, hold=warming_up, **seen)
    weights, _ = weighing(config, multipliers, stats["history"])
    combined, experience = roles.experience.workers[0].call(ExperienceBuilder.combine, batch, weights, returns=2)
    roles.experience.wait(combined, "combining advantages", [[batch]])
    return stats, multipliers, experience


def weighing(
    config: PolicyConfig, multipliers: Mapping[str, Multiplier], history: Mapping[str, Moments]
) -> tuple[dict[str, float], dict[str, Unit]]:
    """What each cost weighs against the reward in a step, and the units that signals are in, by its history."""
    objective = config.objective()
    units = objective.units(history)
    return objective.in_units({name: multiplier.value for name, multiplier in multipliers.items()}, units), units


def update(config: PolicyConfig, roles: Roles, state: TrainingState, experience: Any, step: int) -> dict[str, float]:
    """Policy and critics step at the same time; in the critics' warm-up the policy stands still."""
    started = [(critic, critic.call(Critic.update, experience, step)) for critic in roles.critics.values()]
    if step > config.ppo.critic_warmup_steps:
        weights, units = weighing(config, state.multipliers, state.history)
        started.append((roles.policy, roles.policy.call(PolicyTrainer.update, experience, step, weights, units)))
    elif config.ppo.replay:
        started.append((roles.policy, roles.policy.call(PolicyTrainer.remember, experience)))
    figures: dict[str, float] = {}
    for group, references in started:
        figures |= group.wait(references, "training")[0]
    return figures


def send_weights(roles: Roles, rollouts: Rollouts, version: int) -> dict[str, float]:
    """Publish the policy's new weights, which every generator loads before its next prompts."""
    weights = publish(roles.policy, version, roles.direct)
    rollouts.offer(weights)
    return {"sync/bytes": float(weights.layout.total_bytes)}


def average_policy(config: PolicyConfig, roles: Roles, rollouts: Rollouts, recovery: Recovery) -> None:
    """Replace the policy's weights by their mean over the last steps (ppo.average_last), here and at the generators."""
    share = config.ppo.average_last
    if not share:
        return
    steps = roles.policy.run(PolicyTrainer.take_mean)[0]
    if len(steps) > 1:
        send_weights(roles, rollouts, version=recovery.state.step + 1)
    recovery.run.note(handed_out(share, recovery.state.step, steps))


def handed_out(share: float, last: int, steps: list[int]) -> str:
    """Which policy a run of ``last`` steps ends with, where the weights after ``steps`` are in the mean."""
    policy = "that of the last one"
    if len(steps) > 1:
        policy = f"the mean of its weights after steps {steps[0]} to {steps[-1]}"
    wanted, why = round(share * last), ""
    if wanted < 2:
        why = f"ppo.average_last {share:g} of {last} steps is less than two: "
    elif len(steps) < wanted:
        # What was trained before a resumed run's `steps` were lowered was not known to be among the last.
        others = "others were the critics' warm-up, or trained when the run was to be longer"
        why = f"ppo.average_last {share:g} of {last} steps is {wanted}, {len(steps)} of them in the mean ({others}): "
    return f"{why}the policy is {policy}"


def step_metrics(
    config: PolicyConfig,
    state: TrainingState,
    step: int,
    stats: dict[str, Any],
    collected: Collected,
    clock: Clock,
) -> dict[str, float]:
    """What the loop itself knows of a step; roles add their own figures.

    ``time/sync`` is no phase of the loop: generators take new weights in during others, mostly ``time/generate``.
    """
    return {
        **{key: value for key, value in stats.items() if "/" in key},
        **{f"cost/{c.name}/limit": c.bound for c in config.constraints},
        **{f"multiplier/{name}": multiplier.value for name, multiplier in state.multipliers.items()},
        **clock.figures(),
        "time/sync": collected.load_s,
        "rollout/tokens_per_second": collected.generated_tokens / collected.seconds,
        "rollout/staleness_max": step - 1 - stats["rollout/weight_version_min"],
        "throughput/samples_per_second": stats["samples"] / clock.total(),
        "throughput/tokens_per_second": stats["tokens"] / clock.total(),
    }
