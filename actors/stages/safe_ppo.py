"""Safe PPO (Dai et al. 2023, arXiv 2310.12773): the reward is maximised while every cost stays under its limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from actors.driver.policy_stage import PolicyStage
from beaver_ray.constraint_options import FEWEST
from beaver_ray.options import option

if TYPE_CHECKING:
    from beaver_ray.method.objective import Objective


class SafePpo(PolicyStage):
    """Options of stage safe_ppo."""

    stage: Literal["safe_ppo"] = option("PPO under constraints.")

    @model_validator(mode="after")
    def _errors_can_be_told(self) -> SafePpo:
        for c in self.constraints:
            of_a_prompt = 1 if c.form == "worst_of_k" else self.rollout.samples_per_prompt
            window = c.multiplier.window
            held = window or (FEWEST if c.multiplier.rule == "pid" else 0)
            one_prompt_only = held <= of_a_prompt and (window or self.rollout.prompts_per_step < 2)
            if c.confidence is not None and one_prompt_only:
                prompts = "" if window else "raise rollout.prompts_per_step to 2 at least, or "
                raise ValueError(
                    f"constraint {c.name}: confidence needs answers to several prompts; {prompts}give a "
                    f"multiplier.window above {of_a_prompt}"
                )
        return self

    @property
    def remarks(self) -> list[str]:
        """As of the others, and multipliers that never move."""
        never = [
            f"constraints.{c.name}.multiplier.delay_steps is {c.multiplier.delay_steps}, and the run ends after "
            f"{self.steps}: its multiplier never moves"
            for c in self.constraints
            if self.steps is not None and c.multiplier.delay_steps >= self.steps
        ]
        return [*super().remarks, *never]

    def objective(self) -> Objective:
        """The reward while a multiplier for each constraint keeps its cost under its limit."""
        from beaver_ray.method.objective import ConstrainedReward

        return ConstrainedReward(self.settings(), {c.name: c.multiplier for c in self.constraints})
