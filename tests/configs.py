"""A small Safe PPO configuration, and what is said of one that is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from actors.driver.policy_stage import PolicyStage
from beaver_ray.errors import UserError
from launch.config_files import parse_config

SAFE_PPO: dict[str, Any] = {
    "name": "one",
    "stage": "safe_ppo",
    "steps": 3,
    "models": {"policy": "${workspace}/sft/final/policy", "reward": "r"},
    "constraints": [{"name": "harm", "model": "c", "limit": 0.0}],
    "data": {"prompts": ["p"]},
    "rollout": {"prompts_per_step": 8},
}


def safe_ppo(*overrides: str) -> PolicyStage:
    config = parse_config(SAFE_PPO, list(overrides), "f.yaml")
    assert isinstance(config, PolicyStage)
    return config


def error(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        safe_ppo(*overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message
