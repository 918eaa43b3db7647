"""A policy that a stage of red teaming asks: the configuration of its generators and of those who score."""

from __future__ import annotations

from collections.abc import Sequence

from actors.driver.judged_policy import JudgedPolicy, judged_policy
from beaver_ray.data_options import DataSpec
from beaver_ray.red_team.options import RedTeamConfig


def asking_policy(
    config: RedTeamConfig,
    model: str,
    prompts: Sequence[DataSpec],
    longest: int,
    room: int,
    environment: str | None = None,
    scored: bool = True,
) -> JudgedPolicy:
    """The configuration of a model that is asked: generators and, where its answers are ``scored``, scorers.

    longest: tokens of a prompt. room: of all that follows it. environment: what says the next turn, if anything.
    """
    return judged_policy(
        model,
        None,
        [{"name": "harm", "model": config.cost, "limit": 0.0}] if scored and config.cost is not None else [],
        f"red_team {config.name}",
        config.trust_remote_code,
        seed=config.seed,
        debug=config.debug,
        cluster=config.cluster,
        engine=config.engine,
        data={"prompts": list(prompts), "template": config.template_of(model), "max_prompt_tokens": longest},
        rollout=config.rollout.model_dump() | {"max_new_tokens": room, "environment": environment},
    )
