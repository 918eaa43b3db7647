"""Safe PPO (Dai et al. 2023, arXiv 2310.12773): the reward is maximised while every cost stays under its limit."""

from __future__ import annotations

from typing import Literal

from actors.driver.policy_stage import PolicyStage
from beaver_ray.config import option


class SafePpo(PolicyStage):
    """Options of stage safe_ppo."""

    stage: Literal["safe_ppo"] = option("PPO under constraints.")
