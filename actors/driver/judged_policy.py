"""A policy that is asked and judged and not trained: the configuration of its generators and scorers."""

from __future__ import annotations

from typing import Any, ClassVar

from actors.driver.policy_stage import PolicyStage
from beaver_ray.options import option
from beaver_ray.stage import RoleSpec
from beaver_ray.yaml_files import validated

NOBODY = "http://localhost"
"""A source must be named for the reward; where nobody says it this one is, and is never started."""


class JudgedPolicy(PolicyStage):
    """What a run has whose generators and scorers are started without a trainer."""

    needs_constraints: ClassVar[bool] = False
    has_cost_critics: ClassVar[bool] = False

    rewarded: bool = option("Whether anybody says how good an answer is.", True)

    def judging_roles(self) -> list[RoleSpec]:
        """Generators, and scorers of what is scored."""
        return [role for role in super().judging_roles() if self.rewarded or role.name != "reward"]

    def roles(self) -> list[RoleSpec]:
        """The same: there is nobody else."""
        return self.judging_roles()

    def generators(self) -> list[RoleSpec]:
        """Those who answer."""
        return [role for role in self.judging_roles() if role.source is None]

    def scorers(self) -> list[RoleSpec]:
        """Those who judge."""
        return [role for role in self.judging_roles() if role.source is not None]

    def check_sources(self) -> None:
        """UserError for a source of scores that is none, or may not be used."""
        for role in self.scorers():
            assert role.source is not None
            role.source.check(role.name, self.trusts_code)


def judged_policy(
    policy: str, reward: Any, constraints: list[Any], where: str, trust_remote_code: bool = False, **more: Any
) -> JudgedPolicy:
    """A policy in ``policy``, a folder, under the reward (None for nobody's) and the costs of ``constraints``.

    more: further sections of the configuration. Raises UserError, with ``where`` it came from, for what is wrong in it.
    """
    source = NOBODY if reward is None else reward
    tree: dict[str, Any] = {
        "stage": "arena",
        "name": "arena",
        "steps": 1,
        "models": {"policy": policy, "reward": source, "trust_remote_code": trust_remote_code},
        "constraints": constraints,
        "rewarded": reward is not None,
        "ppo": {"advantage": "leave_one_out"},  # critics, which nobody needs here, would have to start from something
        **more,
        "rollout": {"samples_per_prompt": 2, **more.get("rollout", {})},
    }
    return validated(JudgedPolicy, tree, where)
