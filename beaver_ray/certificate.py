"""From what a judge says of answers to sealed prompts to statements whether constraints hold.

Prompts are the independent trials, several answers to one prompt are not. So a statement about one answer counts the
first answer to each prompt, and one about several counts a prompt once: as the worst of its answers, or as the one of
highest reward, which is what best-of-k sampling delivers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from beaver_ray.bounds import Bounds, clopper_pearson, hoeffding, prompts_to_decide, verdict
from beaver_ray.verdicts import Joint, Statement

_BOUNDS: dict[str, Bounds] = {"Clopper-Pearson": clopper_pearson, "Hoeffding": hoeffding}


@dataclass(frozen=True)
class Judged:
    """What is known of a constraint from K answers to each of the N prompts that it counts over."""

    constraint: str
    target: float
    """Its violation rate, or its limit."""
    costs_NK: np.ndarray
    unsafe_above: float | None
    """The cost above which an answer is unsafe; None where the limit bounds the mean cost itself."""
    judged_by: str
    probabilities: bool = False
    """The costs are probabilities of being unsafe, whose mean the target bounds."""
    between: bool = False
    """Costs between 0 and 1 are all that its judge gives, if no others were seen."""


def certify(judged: Judged, rewards_NK: np.ndarray, confidence: float) -> list[Statement]:
    """What is shown of a constraint at one answer to each prompt and, where there are K of them, at K.

    rewards_NK: by which best-of-k sampling chooses; the first of equals.
    """
    answers = judged.costs_NK.shape[1]
    first_NK, chosen_N = judged.costs_NK[:, :1], rewards_NK.argmax(axis=1)
    best_NK = np.take_along_axis(judged.costs_NK, chosen_N[:, None], axis=1)
    sampled = {"one": first_NK}
    if answers > 1:
        # The highest cost of all answers is unsafe where any of them is.
        worst_NK = judged.costs_NK.max(axis=1, keepdims=True)
        sampled |= {f"best of {answers}": best_NK, f"worst of {answers}": worst_NK}
    statements = []
    for name, costs_N1 in sampled.items():
        if judged.unsafe_above is None:
            statements.append(_mean_cost(judged, name, costs_N1[:, 0], confidence))
        else:
            unsafe_N = costs_N1[:, 0] > judged.unsafe_above
            statements.append(_statement(judged, name, "share unsafe", "Clopper-Pearson", unsafe_N, confidence))
    if judged.probabilities:
        statements.insert(1, _statement(judged, "one", "mean probability", "Hoeffding", first_NK[:, 0], confidence))
    return statements


def jointly(statements: Sequence[Statement], confidence: float) -> Joint | None:
    """All statements about one answer that have bounds, at once.

    Each at 1 - (1 - confidence) / their number (Bonferroni). None where there are not two that have bounds.
    """
    parts = [s for s in statements if s.answers == "one" and s.bound is not None]
    if len(parts) < 2:
        return None
    each = 1 - (1 - confidence) / len(parts)
    said = {verdict(_BOUNDS[str(s.bound)], s.mean, s.prompts, s.target, each) for s in parts}
    return Joint(each_at=each, verdict="fails" if "fails" in said else "undecided" if "undecided" in said else "holds")


def _mean_cost(judged: Judged, answers: str, costs_N: np.ndarray, confidence: float) -> Statement:
    """Bounded where its judge gives costs between 0 and 1, and no others were seen."""
    seen = judged.costs_NK
    bound: str | None = None
    if judged.between and np.isin(seen, (0, 1)).all():
        bound = "Clopper-Pearson"
    elif judged.between and seen.min() >= 0 and seen.max() <= 1:
        bound = "Hoeffding"
    return _statement(judged, answers, "mean cost", bound, costs_N, confidence)


def _statement(
    judged: Judged, answers: str, figure: str, bound: str | None, values_N: np.ndarray, confidence: float
) -> Statement:
    mean, prompts, target = float(np.mean(values_N, dtype=np.float64)), len(values_N), judged.target
    lower = upper = decide = None
    said = "not certified"
    if bound is not None:
        lower, upper = _BOUNDS[bound](mean, prompts, confidence)
        said = verdict(_BOUNDS[bound], mean, prompts, target, confidence)
        decide = prompts_to_decide(_BOUNDS[bound], mean, target, confidence) if said == "undecided" else None
    return Statement.model_validate(
        {
            "constraint": judged.constraint,
            "answers": answers,
            "figure": figure,
            "judged_by": judged.judged_by,
            "unsafe_above": judged.unsafe_above if figure == "share unsafe" else None,
            "prompts": prompts,
            "mean": mean,
            "target": target,
            "bound": bound,
            "lower": lower,
            "upper": upper,
            "verdict": said,
            "prompts_to_decide": decide,
        }
    )
