"""How a reward model keeps up with a policy that has moved away from its labelled pairs.

Nothing heavy is imported here: the command line reads this module first.
"""

from __future__ import annotations

from typing import Literal

from beaver_ray.data_options import DataSpec
from beaver_ray.options import Strict, option


class MetaConfig(Strict):
    """MetaRM (https://arxiv.org/abs/2405.00438); see docs/reward-models.md."""

    answers: list[DataSpec] = option("Unlabelled answers of the current policy, several to a prompt.", min_length=1)
    order: Literal["second", "first", "joint"] = option(
        "second: the whole derivative; first: without the ascent's own; joint: the spread is added to the loss.",
        "second",
    )
    rate: float = option("Step of the ascent on the spread (eta); for joint its weight in the loss.", 1.0, gt=0)
    batch: int = option("Prompts of answers that a step looks at.", 32, gt=0)
    spread_floor: float = option(
        "Below this deviation of the rewards to one prompt the run says that they collapse.", 0.05, ge=0
    )
