"""PPO: the reward alone is maximised; costs, where constraints name any, are measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from actors.driver.policy_stage import PolicyStage
from beaver_ray.options import option

if TYPE_CHECKING:
    from beaver_ray.method.objective import Objective


class Ppo(PolicyStage):
    """Options of stage ppo."""

    needs_constraints: ClassVar[bool] = False
    has_cost_critics: ClassVar[bool] = False

    stage: Literal["ppo"] = option("PPO without constraints.")

    def objective(self) -> Objective:
        """The reward alone."""
        from beaver_ray.method.objective import RewardMaximization

        return RewardMaximization(self.settings())
