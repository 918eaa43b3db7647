"""PPO on the reward less each cost with a fixed weight, the multiplier's initial value."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from actors.driver.policy_stage import PolicyStage
from beaver_ray.options import option

if TYPE_CHECKING:
    from beaver_ray.method.objective import Objective


class RewardShaping(PolicyStage):
    """Options of stage reward_shaping."""

    has_cost_critics: ClassVar[bool] = False

    stage: Literal["reward_shaping"] = option("PPO with fixed cost weights.")

    @model_validator(mode="after")
    def _costs_of_single_answers(self) -> RewardShaping:
        for c in self.constraints:
            if c.form == "worst_of_k":
                raise ValueError(
                    f"constraint {c.name}: form worst_of_k is of all answers to a prompt, and the reward is each "
                    f"answer's own; use mean, hinge or cvar:LEVEL, or stage safe_ppo"
                )
        return self

    @model_validator(mode="after")
    def _fixed_weights(self) -> RewardShaping:
        for c in self.constraints:
            if c.multiplier.initial == "auto":
                raise ValueError(f"constraint {c.name}: its weight is fixed; set multiplier.initial to a number")
            if c.confidence is not None:
                raise ValueError(
                    f"constraint {c.name}: confidence puts a limit lower, and reward_shaping has fixed weights and "
                    f"keeps none; leave it out, or use stage safe_ppo"
                )
        return self

    @property
    def remarks(self) -> list[str]:
        """As of the others, and costs that weigh nothing."""
        free = [c.name for c in self.constraints if c.multiplier.initial == 0.0]
        weighs = "weighs 0 in the reward, and nothing holds it down: set its multiplier.initial"
        return [*super().remarks, *(f"constraint {name} {weighs}" for name in free)]

    def objective(self) -> Objective:
        """The reward less each cost times its multiplier's initial value."""
        from beaver_ray.method.objective import RewardShaping

        weights = {c.name: c.multiplier.initial for c in self.constraints}
        return RewardShaping(self.settings(), {name: 1.0 if w is None else float(w) for name, w in weights.items()})
