"""The role of a language model that chooses between answers, in stages that ask one."""

from __future__ import annotations

from beaver_ray.stage import ModelUse, RoleSpec, Stage


def choice_role(stage: Stage, name: str, kind: str, folder: str) -> RoleSpec:
    """A `ChoiceScorer` of the model in ``folder``, placed as ``kind``."""

    def arguments(rank: int, world: int) -> tuple[object, ...]:
        engine = stage.engine
        return (folder, engine.dtype, engine.micro_batch_tokens, stage.cluster.threads, stage.trusts_code)

    uses = (ModelUse(name, folder),)
    return RoleSpec(name, kind, "actors.roles.choices:ChoiceScorer", arguments, uses, logits=True)
