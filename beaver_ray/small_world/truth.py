"""The world's true reward and cost as functions that score, to see what a run would do with perfect score models.

models.reward="python:beaver_ray/small_world/truth.py:reward(world='runs/small-world/world/world.json')"
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from beaver_ray.small_world.world import SmallWorld


def reward(prompts: Sequence[str], responses: Sequence[str], world: str) -> list[float]:
    """The true reward of each answer; ``world`` is the path of world.json. UserError where no world is there."""
    settings = SmallWorld.load(Path(world))
    return [settings.reward(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def cost(prompts: Sequence[str], responses: Sequence[str], world: str, name: str = "harm") -> list[float]:
    """The true cost of each answer, of constraint ``name``; above 0 is a violation. Errors as of `reward`."""
    settings = SmallWorld.load(Path(world))
    return [settings.costs(prompt, response)[name] for prompt, response in zip(prompts, responses, strict=True)]
