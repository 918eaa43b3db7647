"""Which model scores each signal of a PPO run, and which critic values it.

A signal is ``reward`` or the name of a constraint. Score models whose folder has several heads are read once for all
the signals that name it, and one critic can carry all signals. Reads config.json files alone, no weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from beaver_ray.errors import UserError
from beaver_ray.guard_options import ModelOfScores
from beaver_ray.models.folders import read_config
from beaver_ray.policy_options import PolicyConfig
from beaver_ray.score_sources import GroupedSource, GuardSource, PrincipleSource, ScoreSource, score_source

HELD_OUT_JUDGE = "held-out-judge"
"""What the names of roles begin with that score held-out answers and no others."""
_OTHER = "start from another model, or from a language model for fresh heads"


@dataclass(frozen=True)
class ScorerPlan:
    """One scorer: its role's name, the key of its placement, the source of its scores, and the number of its score for
    each column that it gives.
    """

    name: str
    kind: str
    source: ScoreSource
    columns: dict[str, int]


@dataclass(frozen=True)
class CriticPlan:
    """One critic: its role's name, the key of its placement, the folder it starts from, its signals, its own folder."""

    name: str
    kind: str
    model: str
    signals: tuple[str, ...]
    folder: str


def head_names(path: str) -> list[str]:
    """Names of a score model's heads, from its config.json; empty where that names none (one head, or none).

    A model of the ``*ForSequenceClassification`` layout with several labels has a head for each.
    """
    if not os.path.isfile(os.path.join(path, "config.json")):
        return []
    config = read_config(Path(path))
    heads = config.get("score_heads") or []
    if not isinstance(heads, list) or not all(isinstance(name, str) for name in heads):
        raise UserError(f"{path}: score_heads in config.json must be a list of names")
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    if heads or not str(first).endswith("ForSequenceClassification"):
        return heads
    labels = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})  # which transformers leaves out
    return [str(label) for label in labels.values()] if isinstance(labels, dict) and len(labels) > 1 else []


def head_of(signal: str, heads: Sequence[str]) -> int | None:
    """A signal's head: the one of its name, for a constraint else the one called cost; None where there is neither."""
    for name in (signal,) if signal == "reward" else (signal, "cost"):
        if name in heads:
            return list(heads).index(name)
    return None


def head_kind(path: str) -> str:
    """What a folder says its only head is: "reward", "cost", or nothing."""
    heads = head_names(path)
    kind = read_config(Path(path)).get("score_type") if os.path.isfile(os.path.join(path, "config.json")) else None
    if kind in ("reward", "cost") or not heads:
        return str(kind) if kind in ("reward", "cost") else ""
    return "reward" if heads[0] == "reward" else "cost"


def check_start(signals: Sequence[str], model: str) -> None:
    """UserError where a folder has heads, and none of them is one of these ``signals``: all would begin at random.

    The only head of a folder is for the only signal, if it is of the same kind: reward or cost.
    """
    heads = head_names(model)
    if len(heads) > 1 and all(head_of(signal, heads) is None for signal in signals):
        raise UserError(f"{model} has no head for {' or '.join(signals)}, only {', '.join(heads)}; {_OTHER}")
    kind = head_kind(model)
    if len(heads) <= 1 and kind and all(kind != _kind(signal) for signal in signals):
        raise UserError(f"{model} is a {kind} model, not one of {' and '.join(signals)}; {_OTHER}")


def scorers(config: PolicyConfig) -> list[ScorerPlan]:
    """The scorers of a run, the reward's first; see `scorer_plans`."""
    return scorer_plans(config.models.reward, {constraint.name: constraint.model for constraint in config.constraints})


def held_out_judges(config: PolicyConfig) -> list[ScorerPlan]:
    """The scorers of held-out answers alone: of a reward, and of each constraint that has one.

    Judges of one model share a scorer, as in `scorer_plans`; a function is asked for one signal at a time.

    Raises UserError where a folder has no head of that kind.
    """
    judges = {"reward": config.evaluation.judge} | {c.name: c.judge for c in config.constraints}
    plans = [
        scorer_plan(signal, f"{HELD_OUT_JUDGE}-{signal}", _kind(signal), judge)
        for signal, judge in judges.items()
        if judge is not None
    ]
    functions = [plan for plan in plans if plan.source.names_signals]
    models = _shared([plan for plan in plans if not plan.source.names_signals])
    return [replace(plan, kind="judge") for plan in models + functions]


def scorer_plans(reward: ModelOfScores, costs: Mapping[str, ModelOfScores]) -> list[ScorerPlan]:
    """The scorers of a reward and of named costs, the reward's first.

    Signals whose source is one folder with several heads, one guard, one moderation model, one model that follows
    principles, or one function, share a scorer.

    Raises UserError where none of several heads is the signal's.
    """
    plans = [scorer_plan("reward", "reward", "reward", reward)]
    return _shared(plans + [scorer_plan(name, f"cost-{name}", "cost", model) for name, model in costs.items()])


def _shared(plans: Sequence[ScorerPlan]) -> list[ScorerPlan]:
    """These plans of one signal each, those of a source that can give several under the name of the first."""
    found: list[ScorerPlan] = []
    for plan in plans:
        (column,) = plan.columns
        same = next((p for p in found if p.source.shared == plan.source.shared), None)
        if same is not None and plan.source.names_signals:
            same.columns[column] = len(same.columns)
        elif isinstance(plan.source, GroupedSource) and same is not None:
            assert isinstance(same.source, GroupedSource)
            same.columns[column] = same.source.join(plan.source)
        elif same is not None and (isinstance(plan.source, GuardSource) or len(head_names(plan.source.text)) > 1):
            same.columns.update(plan.columns)
        else:
            found.append(plan)
    return found


def critics(config: PolicyConfig) -> list[CriticPlan]:
    """The critics of a run: one for each signal that its objective wants valued, or one for all of them."""
    models, signals = config.models, config.objective().critics
    reward_critic = models.reward_critic or _folder(models.reward)
    if models.shared_critic and signals:
        return [CriticPlan("critic", "reward_critic", reward_critic, signals, "critic")]
    starts = {"reward": reward_critic} | {c.name: c.critic or _folder(c.model) for c in config.constraints}
    return [CriticPlan(f"critic-{s}", f"{_kind(s)}_critic", starts[s], (s,), f"{s}_critic") for s in signals]


def scorer_plan(signal: str, name: str, kind: str, model: ModelOfScores) -> ScorerPlan:
    """The scorer ``name`` of one signal, of kind reward or cost. UserError where the model is of another kind."""
    source, column = score_source(model), signal if signal == "reward" else f"cost/{signal}"
    if isinstance(source, GuardSource):
        return ScorerPlan(name, kind, source, {column: source.head(kind)})
    if isinstance(source, PrincipleSource):
        _checked_head("reward", "reward", source.folder)
    if isinstance(source, GroupedSource):
        source.serve(kind)
        return ScorerPlan(name, kind, source, {column: 0})
    head = _checked_head(signal, kind, source.text) if source.is_score_model else 0
    return ScorerPlan(name, kind, source, {column: head})


def _checked_head(signal: str, kind: str, folder: str) -> int:
    """The head of a score model that is the signal's."""
    heads = head_names(folder)
    head = head_of(signal, heads) if len(heads) > 1 else 0
    if head is None:
        wanted = "reward" if signal == "reward" else f"{signal} or cost"
        raise UserError(
            f"{folder} has no head called {wanted}, only {', '.join(heads)}; give the folder of another model"
        )
    if os.path.isfile(os.path.join(folder, "config.json")) and read_config(Path(folder)).get("score_type") == "critic":
        raise UserError(f"{folder} is a critic, whose values are no scores; give the folder of a {kind} model")
    if len(heads) <= 1 and head_kind(folder) not in ("", kind):
        raise UserError(f"{folder} is a {head_kind(folder)} model; give the folder of a {kind} model for {signal}")
    return head


def _folder(model: ModelOfScores) -> str:
    return model if isinstance(model, str) else model.folder


def _kind(signal: str) -> str:
    return "reward" if signal == "reward" else "cost"
