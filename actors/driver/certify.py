"""Does it hold? What a policy answers to prompts that training never saw, and what that shows of its constraints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from actors.driver.evaluate import HeldOut, judging, with_policy
from actors.driver.policy_stage import PolicyStage
from actors.driver.rollouts import Rollouts
from beaver_ray.bounds import clopper_pearson, prompts_to_decide
from beaver_ray.certificate import Judged, jointly
from beaver_ray.certificate import certify as statements
from beaver_ray.constraint_options import ConstraintConfig
from beaver_ray.data.mixing import load_mix
from beaver_ray.data.scopes import in_words
from beaver_ray.data.sealed import seal
from beaver_ray.data_options import data_label
from beaver_ray.errors import UserError
from beaver_ray.evaluation import Samples
from beaver_ray.models.folders import fingerprint
from beaver_ray.score_sources import score_source
from beaver_ray.verdicts import Certificate


def certify(
    config: PolicyStage, confidence: float, policy: str | None, answers: int, prompts: Sequence[str], command: str
) -> Certificate:
    """Whether the constraints of ``config`` hold at ``confidence`` for its final policy, or for another one.

    Asked are ``prompts`` (without any, evaluation.prompts) that stand in no training data, each ``answers`` times.

    Raises UserError, before anything is started, where no prompt is left, where so few are left that they could show
    nothing whatever is answered to them, and where nothing can be bounded; and for answers without a finite score.
    """
    specs = [*prompts] or config.evaluation.prompts
    tree = config.model_dump(mode="json")
    judged = with_policy(config, policy)
    judged = judged.model_copy(update={"evaluation": judged.evaluation.model_copy(update={"prompts": specs})})
    sealed = seal(load_mix(specs)[0], tree, judged.models.policy)
    if not sealed.samples:
        raise UserError(
            f"no prompt of {', '.join(map(data_label, specs))} is left to certify on ({_why(sealed.left_out)}); "
            "give others (--prompts)"
        )
    held_out = HeldOut(judged, sealed.samples)
    left_out = dict(Counter(sealed.left_out) + Counter(held_out.prompts.report.dropped))
    check_enough(held_out, left_out, confidence)
    with judging(judged, judged.judging_roles()) as roles:
        rollouts = Rollouts(roles.rollout, judged.rollout.max_sequences, judged.cluster.step_timeout)
        batch = held_out.answers(roles, rollouts, 0, answers)
    _, lost = held_out.unusable(batch)
    if lost:
        raise UserError(f"nothing is certified on a part of the answers: {lost}; mend the model that scores them")
    samples, _ = held_out.judged(batch)
    assert samples.reward is not None
    rewards_NK = samples.reward.reshape(answers, -1).T
    found = [
        statement
        for constraint in judged.constraints
        for part in [_judged(held_out, constraint, samples, answers)]
        for statement in statements(part, rewards_NK[held_out.counting(constraint.name)], confidence)
    ]
    return Certificate(
        command=command,
        confidence=confidence,
        policy=judged.models.policy,
        policy_hash=fingerprint(judged.models.policy),
        seed=judged.seed,
        temperature=judged.rollout.temperature,
        max_new_tokens=judged.rollout.max_new_tokens,
        answers=answers,
        prompts=list(map(data_label, specs)),
        sealed=len(held_out.prompts),
        left_out=left_out,
        unchecked=sealed.unchecked,
        statements=found,
        joint=jointly(found, confidence),
    )


def check_enough(held_out: HeldOut, left_out: Mapping[str, int], confidence: float) -> None:
    """UserError where a limit is tighter than what the prompts can show, even if all answers to them were safe.

    left_out: how many prompts are not asked, by why.
    """
    bounded = [c for c in held_out.config.constraints if c.violation_rate is not None or _between(held_out, c)]
    if not bounded:
        raise UserError(
            "nothing can be certified: a constraint needs a violation_rate, or a limit on costs from 0 to 1 of a "
            "function or service, or on a small world's refusals; the mean of a score without bounds has no certificate"
        )
    for constraint in held_out.config.constraints:
        there, needed = int(held_out.counting(constraint.name).sum()), 1
        if constraint in bounded:
            fewest = prompts_to_decide(clopper_pearson, 0.0, constraint.bound, confidence)
            if fewest is None or constraint.bound <= 0:
                raise UserError(
                    f"constraint {constraint.name}: no set of prompts can show that {constraint.bound:g} is kept, even "
                    f"without one violation; raise it"
                )
            needed = fewest
        scope = f" with {in_words(constraint.where)}" if constraint.where else ""
        if not there:
            mend = f", or mend constraints.{constraint.name}.where" if constraint.where else ""
            raise UserError(
                f"constraint {constraint.name}: it counts for none of the sealed prompts{scope} ({_why(left_out)}); "
                f"name others (--prompts){mend}"
            )
        if there < needed:
            raise UserError(
                f"constraint {constraint.name}: {there} sealed prompts{scope} cannot show at confidence {confidence!r} "
                f"that {constraint.bound:g} is kept, even without one violation; that takes {needed} "
                f"({_why(left_out)}); name more of them (--prompts), or raise the limit"
            )


def _between(held_out: HeldOut, constraint: ConstraintConfig) -> bool:
    """Whether its judge may give costs between 0 and 1 alone, so that their mean has bounds: no score model does.

    Costs whose mean is to be below 0 are others.
    """
    if constraint.bound < 0:
        return False
    if constraint.name in held_out.learned:
        return score_source(constraint.model).folder is None
    return constraint.name == "refusal"  # the one cost of a world that is 0 or 1


def _judged(held_out: HeldOut, constraint: ConstraintConfig, samples: Samples, answers: int) -> Judged:
    costs_NK = np.asarray(samples.costs[constraint.name], dtype=np.float64).reshape(answers, -1).T
    learned, rate = constraint.name in held_out.learned, constraint.violation_rate is not None
    return Judged(
        constraint=constraint.name,
        target=constraint.bound,
        costs_NK=costs_NK[held_out.counting(constraint.name)],
        unsafe_above=(0.5 if learned else 0.0) if rate else None,
        judged_by=score_source(constraint.model).text if learned else "the small world's true cost",
        probabilities=rate and learned,
        between=_between(held_out, constraint),
    )


def _why(left_out: Mapping[str, int]) -> str:
    """Which prompts are not asked."""
    parts = [f"{count} {name}" for name, count in left_out.items()]
    return f"left out: {', '.join(parts)}" if parts else "none stands in training data"
