"""PPO on the reward less each cost with a fixed weight, the multiplier's initial value."""

from __future__ import annotations

from typing import ClassVar, Literal

from actors.driver.policy_stage import PolicyStage
from beaver_ray.config import option


class RewardShaping(PolicyStage):
    """Options of stage reward_shaping."""

    has_cost_critics: ClassVar[bool] = False

    stage: Literal["reward_shaping"] = option("PPO with fixed cost weights.")
