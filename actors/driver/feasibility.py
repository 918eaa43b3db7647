"""What limits cost before anything is trained: answers of the reference, scored as in a run, and the dual on them.

As a command of its own it starts generators and scorers alone; a run with ``multiplier.initial: auto`` asks its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.driver.evaluate import answers_to, judging, with_policy
from actors.driver.policy_stage import START_ANSWERS, START_PROMPTS, PolicyStage
from actors.driver.processes import Roles
from actors.driver.recovery import Recovery
from actors.driver.rollouts import Rollouts
from actors.roles.experience_builder import ExperienceBuilder
from beaver_ray import experience
from beaver_ray.data.scopes import in_words
from beaver_ray.data.tokenized import PromptDataset
from beaver_ray.errors import UserError
from beaver_ray.method.feasibility import Outcome, Reference, start, study
from beaver_ray.method.objective import Answers, ConstrainedReward
from beaver_ray.models.loading import load_tokenizer

if TYPE_CHECKING:
    from beaver_ray.report.feasibility import Feasibility

FIRST_SAMPLE_ID = 1 << 39  # shared with no answer of training or of an evaluation
LEAST_LOG = 0.1  # rule log_sgd cannot leave 0, and hardly moves below


@dataclass(frozen=True)
class Sampled:
    """Answers of a reference with their scores, and what should be known of them, one line each.

    ``names`` are of the constraints in ``reference``: those that any sampled prompt counts for.
    """

    reference: Reference
    names: list[str]
    remarks: list[str]


def feasibility(config: PolicyStage, prompts: int, answers: int, out: Path | None = None) -> Feasibility:
    """Sample the reference on up to ``prompts`` training prompts, solve the dual, and write what came of it.

    feasibility.json and feasibility.html go to ``out``, or beside the run's folder. Raises UserError where there is no
    limit, no KL that would keep a policy near the reference, or a form that is not of each answer by itself.
    """
    from beaver_ray.report.feasibility import Feasibility, write_feasibility

    if not config.constraints:
        raise UserError(f"{config.name}: there are no constraints whose limits could cost anything")
    if not config.ppo.kl_coefficient:
        raise UserError("ppo.kl_coefficient is 0, with which nothing keeps a policy near the reference; set it above 0")
    try:
        config.check_dual()
    except ValueError as error:
        raise UserError(str(error)) from None
    folder = config.models.reference or config.models.policy
    config = with_policy(config, folder)
    tokenizer = load_tokenizer(folder, config.models.trust_remote_code)
    known, _, _ = config.training_prompts(tokenizer)
    out = out or config.folder.with_name(f"{config.folder.name}-feasibility")
    out.mkdir(parents=True, exist_ok=True)  # before anybody is asked: nothing could be kept without it
    with judging(config, config.judging_roles()) as roles:
        rollouts = Rollouts(roles.rollout, config.rollout.max_sequences, config.cluster.step_timeout)
        sampled = sample(config, known, roles, rollouts, prompts, answers)
    if not sampled.names:
        raise UserError(f"no constraint counts for any sampled prompt ({'; '.join(sampled.remarks)}); raise --samples")
    remarks = [*roles.notes, *sampled.remarks]
    if config.ppo.advantage == "group_standardized":
        remarks.append(
            "ppo.advantage: group_standardized weighs standard deviations, so that a run's multipliers are others"
        )
    most = {c.name: c.multiplier.max for c in config.constraints}
    found = Feasibility(config.name, folder, study(sampled.reference, sampled.names), most, remarks, out)
    write_feasibility(found)
    return found


def sample(
    config: PolicyStage, prompts: PromptDataset, roles: Roles, rollouts: Rollouts, count: int, answers: int
) -> Sampled:
    """Answers of what the generators hold to ``count`` prompts, or as many as there are, with scores as in a run.

    The prompts are drawn by the configuration's seed, no training step's random numbers among it. Answers without a
    finite score are left out, as in a run.
    """
    draw = np.random.default_rng(np.random.SeedSequence((config.seed, FIRST_SAMPLE_ID)))
    prompt_ids = np.repeat(np.sort(draw.permutation(len(prompts))[:count]), answers)
    batch = experience.make_batch(
        {
            "sample_id": FIRST_SAMPLE_ID + np.arange(len(prompt_ids)),
            "prompt_id": prompt_ids,
            "prompt_tokens": [prompts.prompts[int(i)] for i in prompt_ids],
        }
    )
    costs = [f"cost/{c.name}" for c in config.constraints]
    columns = ["sample_id", "prompt_id", "finish_reason", "reward", *costs]
    answered = answers_to(batch, columns, roles, rollouts)
    builder = ExperienceBuilder(config)
    marked = experience.join(answered, builder.scopes(prompts.inside, answered))
    usable, unusable = builder.usable(marked)
    remarks = [f"{line}; left out" for line in unusable.values()]
    return _as_reference(config, prompts, usable, remarks)


def _as_reference(config: PolicyStage, prompts: PromptDataset, batch: Any, remarks: list[str]) -> Sampled:
    """The batch's answers, sorted by prompt, under the scores that a run compares."""
    prompt_ids, counts = np.unique(experience.scalars(batch, "prompt_id"), return_counts=True)
    everywhere = np.ones(len(prompt_ids), dtype=bool)
    inside = {c.name: prompts.inside.get(c.name) for c in config.constraints}
    inside_of = {name: everywhere if mask is None else mask[prompt_ids] for name, mask in inside.items()}
    names = [name for name, counting in inside_of.items() if counting.any()]
    for c in config.constraints:
        if c.confidence is not None:
            remarks.append(f"constraints.{c.name}.confidence is left out: a run aims below the limit, which costs more")
        if c.name not in names:
            remarks.append(f"{c.name} is left out: no sampled prompt has {in_words(c.where)}")
    constraints = [c for c in config.constraints if c.name in names]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    # Scores know no tokens: one stands for each answer.
    nothing = np.zeros(batch.num_rows)
    answers = Answers(
        offsets=np.arange(batch.num_rows + 1),
        prompts_B=experience.scalars(batch, "prompt_id"),
        rewards_B=experience.scalars(batch, "reward").astype(np.float64),
        costs={name: experience.scalars(batch, f"cost/{name}").astype(np.float64) for name in names},
        truncated_B=experience.truncated(batch),
        kl_terms_T=nothing,
        log_ratios_T=nothing,
        values={},
        inside={name: np.repeat(inside_of[name], counts) for name in names if inside[name] is not None},
    )
    objective = ConstrainedReward(config.settings(), {c.name: c.multiplier for c in constraints})
    scores = objective.scores(answers)
    units = objective.units(objective.history(answers, scores))
    scales = {signal: units[signal].scale if units else 1.0 for signal in scores}
    if units:
        divided = ", ".join(f"{signal} by {scale:.3g}" for signal, scale in scales.items())
        remarks.append(f"ppo.normalize_rewards: a run divides {divided}; that it cuts rewards is left out")
    elif (most := config.ppo.clip_score) is not None:
        # A limit is on costs as they are: a run's multiplier compares these, and only its advantages are clipped.
        said = dict.fromkeys(scores, "count as they are, as under a run's limit; its advantages clip them")
        said["reward"] = "count as that"
        for signal, scores_B in scores.items():
            if cut := int((np.abs(scores_B) > most).sum()):
                remarks.append(f"{signal}: {cut} scores are beyond ppo.clip_score {most:g} and {said[signal]}")
        scores["reward"] = np.clip(scores["reward"], -most, most)
    reference = Reference(
        offsets=offsets,
        rewards_B=scores["reward"],
        costs_MB=np.array([scores[name] for name in names]).reshape(len(names), len(answers.rewards_B)),
        inside_MN=np.array([inside_of[name] for name in names]).reshape(len(names), len(prompt_ids)),
        limits_M=np.array([c.bound for c in constraints]),
        kl_coefficient=config.ppo.kl_coefficient,
        reward_scale=scales["reward"],
        cost_scales_M=np.array([scales[name] for name in names]),
    )
    return Sampled(reference, names, remarks)


def start_multipliers(config: PolicyStage, recovery: Recovery, roles: Roles, rollouts: Rollouts) -> None:
    """Before step 1, set the multipliers whose ``initial`` is auto by answers of the policy as it starts.

    At any later step the checkpoint has them.
    """
    state, note = recovery.state, recovery.run.note
    if not config.auto_multipliers or state.step:
        return
    sampled = recovery.survive(
        lambda again: sample(config, state.dataset, roles, rollouts, START_PROMPTS, START_ANSWERS), needs_trained=False
    )
    for line in sampled.remarks:
        note(f"multiplier.initial auto: {line}")
    most = {c.name: c.multiplier.max or np.inf for c in config.constraints}
    values = dict.fromkeys(most, 0.0)
    if sampled.names:
        rest, values_M = start(sampled.reference, np.array([most[name] for name in sampled.names]))
        values |= dict(zip(sampled.names, values_M.tolist(), strict=True))
        note(f"multiplier.initial auto: {_in_words(sampled, rest)}")
    for c in (c for c in config.constraints if c.name in config.auto_multipliers):
        least = LEAST_LOG if c.multiplier.rule == "log_sgd" else 0.0
        value = min(max(values[c.name], least), most[c.name])
        state.start(c.name, value)
        note(f"multiplier.initial auto: {c.name} starts at {value:.4g}")


def _in_words(sampled: Sampled, rest: Outcome) -> str:
    """What the dual says of the limits, on one line."""
    reference = sampled.reference
    answers, prompts = len(reference.rewards_B), len(reference.counts_N)
    limits = zip(sampled.names, rest.costs_M, reference.limits_M, strict=True)
    costs = ", ".join(f"{name} {cost:.4g} (limit {limit:.4g})" for name, cost, limit in limits)
    on = f"{answers:,} answers of the policy to {prompts} prompts"
    if not rest.kept:
        kl = f"ppo.kl_coefficient {reference.kl_coefficient:g}"
        return f"on {on} no policy near it keeps all limits with {kl}, the nearest has {costs}"
    counting = f"{rest.effective_answers:.1f} answers to each count"
    return f"on {on} the policy at the limits has reward {rest.reward:.4g}, {costs}; {counting}"
