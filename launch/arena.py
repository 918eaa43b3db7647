"""`beaver-ray arena`: the configuration of stage arena that a command line means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beaver_ray.errors import UserError
from beaver_ray.judge_options import read_judge
from beaver_ray.stage import Stage
from launch.config_files import parse_config
from launch.score_options import named, source


def arena_config(
    policies: Sequence[str],
    prompts: Sequence[str],
    judges: tuple[str | None, Sequence[str], str | None],
    answers: int,
    out: Path,
    changes: Sequence[str],
    pairwise: Sequence[str] = (),
) -> Stage:
    """The stage. policies: NAME=FOLDER or NAME=FILE.jsonl each; judges: reward, costs (NAME=SOURCE, or NAME), world;
    pairwise: judges of pairs, NAME=JUDGE each.

    Raises UserError, one line, for what is wrong in any of it.
    """
    reward, costs, world = judges
    places = [named(text, "policy", "FOLDER or FILE.jsonl, what to call it and where it lies") for text in policies]
    names = [name for name, _ in places]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two policies are called {twice[0]}; give them different names")
    tree: dict[str, Any] = {
        "stage": "arena",
        "workspace": str(out.parent),
        "name": out.name,
        "policies": dict(places),
        "prompts": list(prompts),
        "answers": answers,
        "costs": [_cost(text) for text in costs],
    }
    tree |= {} if reward is None else {"reward": source(reward)}
    if pairwise:
        called = [named(text, "--judge", "JUDGE, what to call it and where it is") for text in pairwise]
        tree["judges"] = {name: read_judge(judge).model_dump(exclude_unset=True) for name, judge in called}
    tree |= {} if world is None else {"world": world}
    return parse_config(tree, list(changes), "arena")


def _cost(text: str) -> dict[str, Any]:
    if "=" not in text:  # the world's true cost
        return {"name": text}
    name, model = named(text, "--cost", "SOURCE, what to call it and who scores it")
    return {"name": name, "model": source(model)}
