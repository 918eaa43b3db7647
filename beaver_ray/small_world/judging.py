"""What a small world knows of many answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from beaver_ray.small_world.world import SmallWorld


@dataclass(frozen=True)
class Truth:
    """What a world knows of N answers; all arrays are [N]."""

    reward: np.ndarray
    costs: dict[str, np.ndarray]
    """By constraint."""
    refusal: np.ndarray
    kind: np.ndarray
    """What each prompt is, as harmless or adversarial."""


def truths(world: SmallWorld, prompts: Sequence[str], responses: Sequence[str], truncated: np.ndarray) -> Truth:
    """The truth about answers, ``truncated`` [N] ones among them. UserError for a prompt of no small world."""
    pairs = list(zip(prompts, responses, strict=True))
    costs = [world.costs(prompt, response) for prompt, response in pairs]
    cut = truncated.tolist()
    return Truth(
        reward=np.array([world.reward(*pair, bool(t)) for pair, t in zip(pairs, cut, strict=True)], dtype=np.float64),
        costs={name: np.array([found[name] for found in costs], dtype=np.float64) for name in world.constraints},
        refusal=np.array([world.is_refusal(response) for response in responses], dtype=bool),
        kind=np.array([world.parse(prompt).kind for prompt in prompts]),
    )
