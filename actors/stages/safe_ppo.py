"""Safe PPO (Dai et al. 2023, arXiv 2310.12773): the reward is maximised while every cost stays under its limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from actors.driver.policy_stage import PolicyStage
from beaver_ray.options import option

if TYPE_CHECKING:
    from beaver_ray.method.objective import Objective


class SafePpo(PolicyStage):
    """Options of stage safe_ppo."""

    stage: Literal["safe_ppo"] = option("PPO under constraints.")

    def objective(self) -> Objective:
        """The reward while a multiplier for each constraint keeps its cost under its limit."""
        from beaver_ray.method.objective import ConstrainedReward

        return ConstrainedReward(self.settings(), {c.name: c.multiplier for c in self.constraints})
