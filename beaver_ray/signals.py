"""Which model scores each signal of a PPO run, and which critic values it.

A signal is ``reward`` or the name of a constraint. Score models whose folder has several heads are read once for all
the signals that name it, and one critic can carry all signals. Reads config.json files alone, no weights.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from beaver_ray.config import SafePpoConfig
from beaver_ray.errors import UserError
from beaver_ray.models.folders import read_config


@dataclass(frozen=True)
class ScorerPlan:
    """One score model: its role's name, the key of its placement, its folder, and a head for each column it gives."""

    name: str
    kind: str
    model: str
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
    """Names of a score model's heads, from its config.json; empty where that names none (one head, or none)."""
    if not os.path.isfile(os.path.join(path, "config.json")):
        return []
    heads = read_config(Path(path)).get("score_heads") or []
    if not isinstance(heads, list) or not all(isinstance(name, str) for name in heads):
        raise UserError(f"{path}: score_heads in config.json must be a list of names")
    return heads


def head_of(signal: str, heads: Sequence[str]) -> int | None:
    """A signal's head: the one of its name, for a constraint else the one called cost; None where there is neither."""
    for name in (signal,) if signal == "reward" else (signal, "cost"):
        if name in heads:
            return list(heads).index(name)
    return None


def scorers(config: SafePpoConfig) -> list[ScorerPlan]:
    """The scorers of a run, the reward's first; signals whose model is one folder with several heads share a scorer.

    Raises UserError where none of several heads is the signal's.
    """
    plans = [_scorer("reward", "reward", "reward", config.models.reward)]
    for constraint in config.constraints:
        plan = _scorer(constraint.name, f"cost-{constraint.name}", "cost", constraint.model)
        shared = next((p for p in plans if p.model == plan.model and len(head_names(p.model)) > 1), None)
        if shared is None:
            plans.append(plan)
        else:
            shared.columns.update(plan.columns)
    return plans


def critics(config: SafePpoConfig) -> list[CriticPlan]:
    """The critics of a run: one for each signal, or one for all of them."""
    models = config.models
    constraints = config.constraints if config.stage == "safe_ppo" else []
    reward_critic = models.reward_critic or models.reward
    if models.shared_critic:
        signals = ("reward", *(c.name for c in constraints))
        return [CriticPlan("critic", "reward_critic", reward_critic, signals, "critic")]
    return [
        CriticPlan("critic-reward", "reward_critic", reward_critic, ("reward",), "reward_critic"),
        *(
            CriticPlan(f"critic-{c.name}", "cost_critic", c.critic or c.model, (c.name,), f"{c.name}_critic")
            for c in constraints
        ),
    ]


def _scorer(signal: str, name: str, kind: str, model: str) -> ScorerPlan:
    heads = head_names(model)
    head = head_of(signal, heads) if len(heads) > 1 else 0
    if head is None:
        wanted = "reward" if signal == "reward" else f"{signal} or cost"
        raise UserError(
            f"{model} has no head called {wanted}, only {', '.join(heads)}; give the folder of another model"
        )
    return ScorerPlan(name, kind, model, {signal if signal == "reward" else f"cost/{signal}": head})
