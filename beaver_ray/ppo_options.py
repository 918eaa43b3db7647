"""The options of the policy-gradient method.

Nothing heavy is imported here: the command line reads this module first.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from beaver_ray.options import Strict, option, without

AdvantageRule = Literal["gae", "leave_one_out", "group_standardized"]
"""How a signal's advantages are made: see `beaver_ray.method.advantages`."""


class PpoConfig(Strict):
    """The policy-gradient method."""

    advantage: AdvantageRule = option(
        "gae needs critics; leave_one_out and group_standardized compare answers to the same prompt.", "gae"
    )
    epochs: int = option("Passes over one step's experience.", 1, gt=0)
    minibatches: int = option("Optimizer steps in one pass.", 1, gt=0)
    gae_lambda: float = option("Lambda of generalised advantage estimation.", 0.95, ge=0, le=1)
    kl_coefficient: float = option("Weight of the KL to the reference, per token.", 0.02, ge=0)
    clip_ratio: float = option("Clipping of the policy ratio.", 0.2, gt=0)
    clip_value: float | None = option("Clipping of the value update; null for none.", 5.0, gt=0)
    clip_score: float | None = option("Each token's reward and cost, KL included, is clamped to this.", 50.0, gt=0)
    normalize_rewards: float | None = option(
        "Rewards by mean and deviation of all so far, cut at so many deviations (costs are only divided); null: not.",
        None,
        gt=0,
    )
    normalize_advantages: bool = option("Whiten the combined advantage over the step's tokens.", False)
    loss_reduction: Literal["sequence", "token"] = option(
        "sequence: mean of each answer's mean; token: mean over all tokens.", "sequence"
    )
    old_logprobs: Literal["trainer", "generator"] = option(
        "Old log-probs: recomputed by the trainer, or the generator's own.", "trainer"
    )
    importance_cap: float | None = option(
        "Truncated importance weights trainer/generator, capped here; null: 2 with staleness, else none.", None, gt=0
    )
    ptx_coefficient: float = option("Weight of the PTX loss; 0 for none.", 0.0, ge=0)
    replay: float = option(
        "Best earlier answers to a step's prompts that are imitated beside its own, as a share of them; 0 for none.",
        0.0,
        ge=0,
        le=1,
    )
    average_last: float = option(
        "The policy handed out is the mean of the weights over this last share of the steps; 0 for the last step's.",
        0.0,
        ge=0,
        le=1,
    )
    truncation_penalty: float = option("Taken off the reward of an answer that was cut at its longest.", 0.0, ge=0)
    critic_warmup_steps: int = option("First steps that train the critics alone; multipliers stand still.", 0, ge=0)

    @property
    def has_critics(self) -> bool:
        """Whether advantages are made with critics, and so whether there are any."""
        return self.advantage == "gae"

    @property
    def remarks(self) -> list[str]:
        """What may be asked for and is seldom wise (appendix B.1 of https://arxiv.org/abs/2307.04964)."""
        if not (self.normalize_rewards and self.normalize_advantages and self.has_critics and self.clip_value):
            return []
        stacked = "ppo.normalize_rewards, normalize_advantages and clip_value each put the same thing to scale"
        return [f"{stacked}; two of them at most are known to go well together: leave one out (false, null)"]

    @model_validator(mode="before")
    @classmethod
    def _without_discount(cls, given: Any) -> Any:
        return without(given, "gamma", 1.0, "answers are never discounted, as with gamma 1; leave it out")

    @model_validator(mode="after")
    def _fits_the_advantage(self) -> PpoConfig:
        if not self.has_critics and self.critic_warmup_steps:
            raise ValueError(f"advantage {self.advantage} has no critics to warm up; leave critic_warmup_steps out")
        if self.replay and self.advantage == "group_standardized":
            raise ValueError("ppo.replay compares scores, whose unit group_standardized takes away; use leave_one_out")
        if self.normalize_rewards and self.advantage == "group_standardized":
            raise ValueError(
                "advantage group_standardized takes a reward's unit away itself; leave normalize_rewards out"
            )
        return self
