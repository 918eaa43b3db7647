"""What a small world knows of principles: which of two answers follows one of them better, and by how much."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from beaver_ray.errors import UserError
from beaver_ray.options import near
from beaver_ray.small_world.world import SmallWorld

TRUTHS: dict[str, Callable[[SmallWorld, str, str], float]] = {
    "helpful": lambda world, prompt, answer: world.reward(prompt, answer),
    "harmless": lambda world, prompt, answer: -world.cost(prompt, answer),
    "brief": lambda world, prompt, answer: -float(len(answer.split())),
}
"""How well an answer to a prompt follows a principle, by its name (configs/self-align/principle_small_world.yaml)."""


def differences(world: SmallWorld, name: str, pairs: Sequence[tuple[str, str, str]]) -> np.ndarray:
    """Of each (prompt, first answer, second answer) how much better the first follows a principle, [N].

    UserError for a principle that no truth is known of.
    """
    if name not in TRUTHS:
        raise UserError(
            f"a small world knows no truth of the principle {name!r}{near(name, TRUTHS)}; it knows {', '.join(TRUTHS)}"
        )
    truth = TRUTHS[name]
    return np.array([truth(world, prompt, first) - truth(world, prompt, second) for prompt, first, second in pairs])
