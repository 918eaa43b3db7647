"""The options of PPO runs, which train a policy on what scorers say of its answers: ppo, reward_shaping, safe_ppo."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from beaver_ray.config import OptimizerConfig, RunConfig, SamplingConfig
from beaver_ray.constraint_options import ConstraintConfig
from beaver_ray.data_options import DataSpec
from beaver_ray.environments import environment_code
from beaver_ray.guard_options import ModelOfScores, PerhapsModelOfScores
from beaver_ray.options import Strict, option, rounded_up
from beaver_ray.ppo_options import PpoConfig
from beaver_ray.score_sources import score_source
from beaver_ray.template_options import TemplateOptions

if TYPE_CHECKING:
    from beaver_ray.method.objective import Objective

DIRECT_SHARE = 0.25  # what weights that generators read on the policy's GPU may take of it
DIRECT_WEIGHTS = "BEAVER_RAY_DIRECT_WEIGHTS"  # environment variable; with 0 weights never go from GPU to GPU


class PolicyModels(Strict):
    """The models of a PPO run; costs stand under constraints."""

    policy: str = option("Folder of the policy to train.")
    reward: ModelOfScores = option(
        "Folder of the reward model, one with principles (docs/principles.md), a guard, a service's address, or "
        "python:FILE.py:FUNCTION."
    )
    reference: str | None = option("Folder of the frozen reference; null for the policy's start.", None)
    reward_critic: str | None = option("Folder the reward critic starts from; null for the reward model.", None)
    lora_rank: int = option("Train a LoRA adapter of this rank; 0 trains all parameters.", 0, ge=0)
    lora_alpha: float = option("An adapter's weight is lora_alpha / its rank.", 32.0, gt=0)
    lora_targets: list[str] = option(
        "Linear layers with an adapter (q_proj, ...); empty for all.", default_factory=list
    )
    critic_lora_rank: int = option("Train critics as adapters of this rank, and their heads; 0 trains all.", 0, ge=0)
    shared_critic: bool = option("One critic, from reward_critic, with a head for each signal.", False)
    trust_remote_code: bool = option("Run Python code that a model folder brings along.", False)

    @model_validator(mode="after")
    def _source_of_rewards(self) -> PolicyModels:
        score_source(self.reward)
        return self

    @property
    def adapter_off_is_reference(self) -> bool:
        """The policy without its LoRA adapter is the reference, which then is no role of its own."""
        return self.lora_rank > 0 and self.reference is None


class PromptData(Strict):
    """Where prompts and PTX texts come from: NAME[:PROPORTION[:PATH]], or a mapping (docs/data.md)."""

    prompts: list[DataSpec] = option("Training prompts.", min_length=1)
    ptx: list[DataSpec] = option(
        "Demonstrations mixed into the policy's loss; see ppo.ptx_coefficient.", default_factory=list
    )
    template: TemplateOptions = option(
        "How a prompt is written: auto, chat or beaver, or {style, system, arguments}.", TemplateOptions()
    )
    max_prompt_tokens: int = option("Longer prompts are dropped, with a count.", 512, gt=0)


class RolloutConfig(SamplingConfig):
    """Generation of what is trained on."""

    prompts_per_step: int = option("Prompts in one training step.", 128, gt=0)
    samples_per_prompt: int = option("Answers for each prompt.", 1, gt=0)
    staleness: int = option("Versions that generation may run ahead of training; 0 is synchronous.", 0, ge=0)
    in_flight: Literal["recompute", "keep", "finish"] = option(
        "Sequences under way when weights arrive: recompute their KV cache, keep it, or finish them first.", "recompute"
    )
    oversample: float = option("Answers started for each one trained on; the slowest are aborted.", 1.0, ge=1)
    environment: str | None = option("Says the next turn after an answer: python:FILE.py:CLASS; null for none.", None)

    @field_validator("environment")
    @classmethod
    def _an_environment(cls, value: str | None) -> str | None:
        if value is not None:
            environment_code(value)
        return value


class EvaluationConfig(Strict):
    """Held-out prompts, and the truth where it is known."""

    prompts: list[DataSpec] = option("Held-out prompts (NAME[:PROPORTION[:PATH]], or a mapping).", default_factory=list)
    world: str | None = option("world.json of a small world: evaluate by its true reward and cost.", None)
    every: int = option("Also evaluate every so many steps during training; 0 for the end only.", 0, ge=0)
    judge: PerhapsModelOfScores = option(
        "Scores held-out answers beside the reward and is not trained on: any source that models.reward may be.", None
    )


class GuardConfig(Strict):
    """Divergence: what is not finite or cannot be right, KL or a cost above its limit, a fallen reward."""

    action: Literal["warn", "stop"] = option(
        "warn: say it and go on (at most 3 steps where numbers are not finite); stop: end the run with a checkpoint.",
        "warn",
    )
    kl: float | None = option("Highest mean KL of an answer to the reference; null for none.", None, gt=0)


class PolicyConfig(RunConfig):
    """What ppo, reward_shaping and safe_ppo share."""

    needs_constraints: ClassVar[bool] = True
    """Whether there is nothing to do without a constraint."""
    has_cost_critics: ClassVar[bool] = True
    """Whether each constraint has a critic of its own, or a head of the shared one."""

    steps: int | None = option("Training steps; or give epochs.", None, gt=0)
    epochs: float | None = option("Passes over the prompts; or give steps.", None, gt=0, le=1e6)
    models: PolicyModels = option("Models.")
    constraints: list[ConstraintConfig] = option("Named costs; plain ppo measures them only.", default_factory=list)
    data: PromptData = option("Data.")
    rollout: RolloutConfig = option("Generation.", default_factory=RolloutConfig)
    ppo: PpoConfig = option("The method.", default_factory=PpoConfig)
    policy: OptimizerConfig = option("The policy's optimizer.", default_factory=OptimizerConfig)
    critic: OptimizerConfig = option("The critics' optimizers.", default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = option("Evaluation.", default_factory=EvaluationConfig)
    guard: GuardConfig = option("What counts as divergence.", default_factory=GuardConfig)
    trajectory_every: int = option(
        "Write a step's experience to trajectories/ every so many steps; 0 for never.", 10, ge=0
    )

    def objective(self) -> Objective:
        """What is optimised."""
        raise NotImplementedError

    @property
    def scopes(self) -> dict[str, dict[str, Any]]:
        """``where`` of each constraint that does not count over all prompts, by its name."""
        return {c.name: dict(c.where) for c in self.constraints if c.where}

    @property
    def importance_cap(self) -> float | None:
        """The cap of the importance weights trainer/generator; None where there are none."""
        return self.ppo.importance_cap or (2.0 if self.rollout.staleness else None)

    @property
    def direct_weights(self) -> bool:
        """Whether weights may go from GPU to GPU and not through the object store.

        They may where policy and generators have GPUs, each generator one at most, and the environment does not say
        DIRECT_WEIGHTS=0. They do where there is room (`direct_room`) and a trial succeeds (`actors.weights.direct`).

        With tensor parallelism a generator's weights go on to other processes, which cannot take them from a device.
        """
        policy, rollout = self.cluster.of("policy"), self.cluster.of("rollout")
        possible = not self.debug and policy.gpus > 0 and 0 < rollout.gpus <= 1
        return possible and os.environ.get(DIRECT_WEIGHTS, "1") != "0"

    def direct_room(self, nbytes: float, gpu_bytes: float) -> float:
        """Bytes that direct weights of ``nbytes`` take of the policy's part of a GPU: several versions.

        Those are the newest, the one that is still read, and with staleness up to two that calls waiting at a slow
        generator may still name.

        Raises ValueError where that is more than DIRECT_SHARE of its part.
        """
        needed = nbytes * (2 + min(self.rollout.staleness, 2))
        part = gpu_bytes * min(1.0, self.cluster.of("policy").gpus)
        if needed > DIRECT_SHARE * part:
            there = f"{DIRECT_SHARE:.0%} of the {part / 2**30:.1f} GiB of GPU that the policy has"
            raise ValueError(f"{needed / 2**30:.1f} GiB of weights to be read there are more than {there}")
        return needed

    @property
    def remarks(self) -> list[str]:
        """What may be asked for and is seldom wise."""
        judges = [("evaluation.judge", self.evaluation.judge, self.models.reward)]
        judges += [(f"the judge of constraint {c.name}", c.judge, c.model) for c in self.constraints]
        own = "is what the policy is trained on itself, and agrees with it whatever comes; give another"
        return [*self.ppo.remarks, *(f"{name} {own}" for name, judge, model in judges if judge and judge == model)]

    def total_steps(self, prompts: int) -> int:
        """Training steps of this run, where there are ``prompts`` distinct prompts."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return rounded_up(self.epochs * math.ceil(prompts / self.rollout.prompts_per_step))

    @model_validator(mode="after")
    def _consistent(self) -> PolicyConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs, not both or neither")
        names = [c.name for c in self.constraints]
        if len(set(names)) < len(names):
            raise ValueError(f"constraints must have different names, not {names}")
        if self.needs_constraints and not names:
            raise ValueError(f"stage {self.stage} needs at least one entry under constraints (or use stage: ppo)")
        if (self.ppo.ptx_coefficient > 0) != bool(self.data.ptx):
            raise ValueError("data.ptx and ppo.ptx_coefficient go together: set both or neither")
        if self.rollout.staleness and self.ppo.old_logprobs == "generator":
            raise ValueError("rollout.staleness above 0 needs ppo.old_logprobs: trainer, which corrects for it")
        if self.ppo.importance_cap is not None and self.ppo.old_logprobs == "generator":
            raise ValueError("ppo.importance_cap weighs the trainer's log-probs; it needs ppo.old_logprobs: trainer")
        if any(c.multiplier.initial == "auto" for c in self.constraints):
            if not self.ppo.kl_coefficient:
                raise ValueError("multiplier.initial: auto needs ppo.kl_coefficient above 0, or no policy is near it")
            if self.ppo.advantage == "group_standardized":
                raise ValueError("multiplier.initial: auto is in units of scores; ppo.advantage takes these away")
            self.check_dual()
        if self.steps is not None:
            self.check_warmup(self.steps)
        if not self.evaluation.prompts:
            asked = {"evaluation.every": self.evaluation.every, "evaluation.judge": self.evaluation.judge}
            asked |= {f"the judge of constraint {c.name}": c.judge for c in self.constraints}
            if needy := [name for name, value in asked.items() if value]:
                raise ValueError(f"{needy[0]} needs prompts to evaluate on: set evaluation.prompts, or leave it out")
        if self.models.shared_critic and any(c.critic for c in self.constraints):
            raise ValueError("models.shared_critic starts from models.reward_critic; leave constraints.*.critic out")
        if self.ppo.has_critics:
            self._check_starts_of_critics()
        elif self.rollout.samples_per_prompt < 2:
            few = f"ppo.advantage {self.ppo.advantage} compares the answers to a prompt"
            raise ValueError(f"{few}; raise rollout.samples_per_prompt to 2 at least")
        samples = self.rollout.prompts_per_step * self.rollout.samples_per_prompt
        if samples % self.ppo.minibatches:
            raise ValueError(f"{samples} samples in a step cannot be cut into {self.ppo.minibatches} minibatches")
        for c in self.constraints:
            self._check_form(c, samples)
        return self

    def _check_form(self, constraint: ConstraintConfig, samples: int) -> None:
        what = f"constraint {constraint.name}: form {constraint.form}"
        if constraint.form == "worst_of_k" and self.rollout.samples_per_prompt < 2:
            raise ValueError(
                f"{what} is of several answers to a prompt; raise rollout.samples_per_prompt to 2 at least"
            )
        if constraint.form == "worst_of_k" and self.ppo.advantage == "group_standardized":
            raise ValueError(f"{what} is of all answers together, and group_standardized of each; use leave_one_out")
        if constraint.of_several and self.ppo.replay:
            # What an earlier answer counted among the worst of its own step it does not count among those of today.
            raise ValueError(
                f"{what} is of all answers together, and ppo.replay of one earlier one; leave ppo.replay out"
            )
        if samples * constraint.tail < 1 - 1e-9:
            raise ValueError(
                f"{what} is of the worst {constraint.tail:.2g} of the answers, less than one of the {samples} in a "
                f"step; raise rollout.prompts_per_step, or lower the level"
            )

    def check_warmup(self, steps: int) -> None:
        """ValueError where a run of so many steps ends before the policy is trained."""
        if self.ppo.critic_warmup_steps >= steps:
            raise ValueError(
                f"the policy is never trained in {steps} steps of which ppo.critic_warmup_steps are "
                f"{self.ppo.critic_warmup_steps}; lower these, or raise steps (epochs)"
            )

    def check_dual(self) -> None:
        """ValueError where a limit is on a figure of several answers: the dual is of what each costs by itself."""
        for c in self.constraints:
            if c.of_several:
                raise ValueError(
                    f"constraint {c.name}: what limits cost is worked out of form mean and hinge alone, not {c.form}"
                )

    def _check_starts_of_critics(self) -> None:
        models, without = self.models, "or do without critics (ppo.advantage: leave_one_out)"
        reward = score_source(models.reward)
        if not reward.starts_critics and models.reward_critic is None:
            raise ValueError(f"no critic can start from {reward.text}; give reward_critic a folder, {without}")
        for c in self.constraints if self.has_cost_critics and not models.shared_critic else []:
            cost = score_source(c.model)
            if not cost.starts_critics and c.critic is None:
                lacking = f"constraint {c.name}: no critic can start from {cost.text}"
                raise ValueError(f"{lacking}; give critic a folder, {without}")
