"""What ppo, reward_shaping and safe_ppo share: their roles, their run, their report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from beaver_ray.config import DTYPE_BYTES, SamplingConfig
from beaver_ray.data_options import DataSpec
from beaver_ray.errors import UserError
from beaver_ray.policy_options import PolicyConfig
from beaver_ray.score_sources import ScorerSetting
from beaver_ray.stage import Lengths, ModelUse, RoleSpec, Stage, Training, Trajectories
from beaver_ray.template_options import TemplateOptions

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from actors.roles.generator import GeneratorSpec
    from beaver_ray.data.sources import DropReport, RawSample
    from beaver_ray.data.tokenized import PromptDataset
    from beaver_ray.method.objective import Settings
    from beaver_ray.report.charts import Card, Chart
    from beaver_ray.report.feasibility import Feasibility
    from beaver_ray.runs import RunFolder
    from beaver_ray.signals import CriticPlan, ScorerPlan
    from beaver_ray.verdicts import Certificate, Reliability

# Parts of a GPU that all roles share. A generator's is the share of memory that its engine is given.
GENERATOR_PART, POLICY_PART, CRITIC_PART = 6, 4, 2
START_PROMPTS, START_ANSWERS = 128, 8
"""What a run samples at its start for ``multiplier.initial: auto``, or as many prompts as there are."""


def scorer_role(plan: ScorerPlan, setting: ScorerSetting) -> RoleSpec:
    """The role of one scorer."""
    source = plan.source
    signals = source.heads(list(plan.columns))
    folder, classifier = source.folder, source.is_classifier
    has_heads = source.is_score_model or classifier
    return RoleSpec(
        plan.name,
        plan.kind,
        source.worker,
        lambda rank, world: source.arguments(plan.columns, setting),
        () if folder is None else (ModelUse(plan.name, folder, signals, has_heads, classifier),),
        source=source,
        gpu_part=0 if folder is None else 1,
    )


def generator_role(
    stage: Stage, sampling: SamplingConfig, spec: Callable[[], GeneratorSpec], models: tuple[ModelUse, ...]
) -> RoleSpec:
    """The role of a stage's generators; ``spec`` says their settings, where they are started."""
    return RoleSpec(
        "rollout",
        "rollout",
        "actors.roles.hf_generator:HFGenerator" if stage.debug else "actors.roles.generator:VllmGenerator",
        lambda rank, world: (spec(),),
        models,
        kv_cache_gib=None if stage.debug else sampling.kv_cache_gib,
        gpu_part=GENERATOR_PART,
    )


class PolicyStage(PolicyConfig, Stage):
    """A policy trained on prompts with PPO, its answers scored by models or services."""

    kinds: ClassVar[tuple[str, ...]] = (
        "rollout",
        "reward",
        "cost",
        "judge",
        "reference",
        "policy",
        "reward_critic",
        "cost_critic",
        "experience",
    )

    @model_validator(mode="after")
    def _one_experience_builder(self) -> PolicyStage:
        if self.cluster.of("experience").workers > 1:
            raise ValueError("cluster.placement.experience.workers: one process joins the parts of a step; leave it 1")
        return self

    def settings(self) -> Settings:
        """What every objective is given."""
        from beaver_ray.method.forms import make_form
        from beaver_ray.method.objective import Settings

        answers = self.rollout.samples_per_prompt
        return Settings(
            kl_coefficient=self.ppo.kl_coefficient,
            clip_score=self.ppo.clip_score,
            gae_lambda=self.ppo.gae_lambda,
            truncation_penalty=self.ppo.truncation_penalty,
            normalize=self.ppo.normalize_advantages,
            normalize_rewards=self.ppo.normalize_rewards,
            advantage=self.ppo.advantage,
            importance_cap=self.importance_cap,
            forms={c.name: make_form(c.form, answers) for c in self.constraints if c.form != "mean"},
        )

    def judging_roles(self) -> list[RoleSpec]:
        """Generators and scorers: all that answers with their scores need."""
        from beaver_ray.signals import scorers

        return [self._generator(), *(self._scorer(plan) for plan in scorers(self))]

    def evaluating_roles(self) -> list[RoleSpec]:
        """Those, and the judges of held-out answers."""
        from beaver_ray.signals import held_out_judges

        return [*self.judging_roles(), *(self._scorer(plan) for plan in held_out_judges(self))]

    def roles(self) -> list[RoleSpec]:
        """Generators, scorers, reference, policy, critics where there are any, and the experience builder."""
        from beaver_ray.signals import critics

        return [
            *self.evaluating_roles(),
            *([] if self.models.adapter_off_is_reference else [self._reference()]),
            self._policy(),
            *(self._critic(plan) for plan in critics(self)),
            RoleSpec(
                "experience",
                "experience",
                "actors.roles.experience_builder:ExperienceBuilder",
                lambda rank, world: (self,),
                gpu_part=0,
            ),
        ]

    def run(self, run: RunFolder) -> None:
        """Train the policy, save it with any critics, and evaluate it where there are held-out prompts."""
        from actors.driver.train_on_prompts import train_on_prompts

        train_on_prompts(self, run)

    def evaluate(self, policy: str | None) -> tuple[Path, list[str]]:
        """Evaluate the run's final policy, or another one, on the held-out prompts."""
        if not self.evaluation.prompts:
            raise UserError(f"{self.name}: evaluation.prompts is empty; name held-out prompts there")
        self._check_there(policy)
        from actors.driver.evaluate import evaluate
        from beaver_ray.report.policy import evaluation_lines

        path = evaluate(self, policy)
        return path, evaluation_lines(self, path.parent)

    @property
    def data_sets(self) -> tuple[list[DataSpec], list[DataSpec]]:
        """Prompts and PTX texts, and the prompts of its evaluations."""
        return [*self.data.prompts, *self.data.ptx], self.evaluation.prompts

    @property
    def scoped_data(self) -> list[DataSpec]:
        """The training prompts, where a constraint counts over some of them alone."""
        return self.data.prompts if self.scopes else []

    def check_scopes(self, tokenized: bool) -> list[str]:
        """Over how many prompts each constraint with a ``where`` counts."""
        from beaver_ray.data.mixing import load_mix
        from beaver_ray.data.scopes import lines, masks
        from beaver_ray.models.loading import load_tokenizer

        if tokenized:
            tokenizer = load_tokenizer(self.models.policy, self.models.trust_remote_code)
            return lines(self.scopes, self.training_prompts(tokenizer)[0].inside)
        samples, _ = load_mix(self.data.prompts)
        inside = masks(self.scopes, samples)
        self._check_masks(inside, samples, len(samples))
        return lines(self.scopes, inside)

    def training_prompts(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[PromptDataset, list[RawSample], dict[str, DropReport]]:
        """The training prompts, the rows that they are of, and what was dropped of each data set.

        Raises UserError where the ``where`` of a constraint matches none, or where too few count for its form.
        """
        from beaver_ray.data.mixing import load_mix
        from beaver_ray.data.tokenized import PromptDataset

        samples, reports = load_mix(self.data.prompts)
        limit = self.data.max_prompt_tokens
        prompts = PromptDataset.build(samples, tokenizer, limit, self.data.template, self.scopes)
        self._check_masks(prompts.inside, samples, len(prompts))
        return prompts, samples, reports

    def _check_masks(self, inside: Mapping[str, np.ndarray], samples: Sequence[RawSample], prompts: int) -> None:
        from beaver_ray.data.scopes import check_masks

        check_masks(self.scopes, inside, samples)
        rollout = self.rollout
        for c in (c for c in self.constraints if c.tail < 1):
            there = int(inside[c.name].sum()) if c.name in inside else prompts
            steps = math.ceil(prompts / rollout.prompts_per_step)  # of an epoch, the last of which may be smaller
            counting = there * rollout.samples_per_prompt / steps
            if counting * c.tail < 1 - 1e-9:
                matches = f"constraints.{c.name}.where matches {there} of" if c.name in inside else "there are"
                raise UserError(
                    f"constraint {c.name}: form {c.form} is of the worst {c.tail:.2g} of the answers that count, less "
                    f"than one of some {counting:.3g} in a step ({matches} {prompts} prompts); raise "
                    f"rollout.prompts_per_step or samples_per_prompt, or lower the level"
                )

    def certify(
        self, confidence: float, policy: str | None, answers: int, prompts: Sequence[str], command: str
    ) -> tuple[Certificate, Path]:
        """Whether the constraints hold for the final policy, or another one, beside which the certificate is put."""
        if not self.constraints:
            raise UserError(f"{self.name} has no constraints; there is nothing to certify")
        if formed := [c for c in self.constraints if c.form != "mean"]:
            name, form = formed[0].name, formed[0].form
            mend = f"give constraints.{name}.form=mean to certify those"
            raise UserError(f"constraint {name} has form {form}, and a certificate is about rates and means; {mend}")
        if not prompts and not self.evaluation.prompts:
            raise UserError(f"{self.name}: evaluation.prompts is empty; name prompts there, or give --prompts")
        self._check_there(policy)
        from actors.driver.certify import certify

        certificate = certify(self, confidence, policy, answers, prompts, command)
        return certificate, certificate.write(Path(policy) if policy else self.folder)

    def compare_with_labels(self, file: Path, policy: str | None) -> tuple[Reliability, Path]:
        """Whether calibrated probabilities fit labelled answers."""
        self._check_there(policy)
        from actors.driver.labels import compare_with_labels

        reliability = compare_with_labels(self, file, policy)
        return reliability, reliability.write(Path(policy) if policy else self.folder)

    def _check_there(self, policy: str | None) -> None:
        chosen = Path(policy) if policy is not None else self.folder / "final" / "policy"
        if not (chosen / "config.json").is_file():
            inside = chosen / "final" / "policy"
            mend = "train it first, or give --policy FOLDER"
            if (inside / "config.json").is_file():
                mend = f"it is a run's folder, give --policy {inside}"
            raise UserError(f"no model in {chosen} (no config.json there); {mend}")

    @property
    def auto_multipliers(self) -> list[str]:
        """Constraints whose multiplier starts where the dual on sampled answers has it."""
        asked = [c.name for c in self.constraints if c.multiplier.initial == "auto"]
        return [name for name in asked if name in self.objective().bounded]

    def announcements(self) -> list[str]:
        """The answers that ``multiplier.initial: auto`` takes, and what is seldom wise."""
        if not self.auto_multipliers:
            return self.remarks
        names = ", ".join(self.auto_multipliers)
        answers = f"{START_ANSWERS} answers to each of up to {START_PROMPTS} prompts"
        return [f"multiplier.initial auto ({names}): {answers} are sampled and scored before step 1", *self.remarks]

    def feasibility(self, prompts: int, answers: int, out: Path | None) -> Feasibility:
        """What the limits cost near the reference, by the dual on sampled answers."""
        from actors.driver.feasibility import feasibility

        return feasibility(self, prompts, answers, out)

    def lengths(self) -> Lengths:
        """Of a prompt and its answer."""
        prompt, answer = self.data.max_prompt_tokens, self.rollout.max_new_tokens
        options = f"data.max_prompt_tokens {prompt} and rollout.max_new_tokens {answer}"
        return Lengths(prompt + answer, options, "lower them")

    @property
    def prompt_template(self) -> TemplateOptions:
        """How prompts are written for the policy."""
        return self.data.template

    @property
    def trusts_code(self) -> bool:
        """Whether Python code in a model's folder may run."""
        return self.models.trust_remote_code

    @property
    def environment(self) -> str | None:
        """What says the next turn after an answer."""
        return self.rollout.environment

    def store_bytes(self) -> float:
        """Experience, as parts, joined and with combined advantages, and the weights that may be read at one time."""
        from beaver_ray.models.folders import adapter_numbers, read_model

        objective = self.objective()
        # Tokens, versions, three log-probs, advantages; advantages of each signal; values and returns of each critic.
        columns = 6 + len(objective.signals) + 2 * len(objective.critics)
        tokens = self.data.max_prompt_tokens + columns * self.rollout.max_new_tokens
        models = self.models
        facts = read_model(models.policy)
        numbers = facts.parameters or 0
        if models.lora_rank:
            numbers = models.lora_rank * adapter_numbers(models.policy, facts, models.lora_targets)
        weights = numbers * DTYPE_BYTES[self.engine.dtype] * (self.rollout.staleness + 2)
        return 3 * 4 * self._samples * tokens + weights

    def charts(self, metrics: dict[str, np.ndarray]) -> list[Chart]:
        """Reward, costs against limits, multipliers, KL, timings."""
        from beaver_ray.report.policy import ppo_charts

        return ppo_charts(metrics, self)

    def cards(self, metrics: dict[str, np.ndarray], evaluation: dict[str, Any]) -> list[Card]:
        """How good, how safe, how fast."""
        from beaver_ray.report.policy import ppo_cards

        return ppo_cards(metrics, evaluation, self)

    def headlines(self) -> list[str]:
        """How good, how safe and how fast the run was, and what looks like reward hacking."""
        from beaver_ray.report.policy import ppo_headlines

        return ppo_headlines(self)

    def signs(self, metrics: dict[str, np.ndarray]) -> list[str]:
        """What looks like reward hacking."""
        from beaver_ray.hacking import signs

        return [sign.sentence for sign in signs(metrics, truth=self.evaluation.world is not None)]

    def trajectories(self) -> Trajectories:
        """With a violation rate as its limit a cost is the probability of being unsafe, otherwise a raw score."""
        above = {c.name: 0.0 if c.violation_rate is None else 0.5 for c in self.constraints}
        return Trajectories(self.models.policy, above)

    # Roles

    @property
    def _samples(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.samples_per_prompt

    def _generator(self) -> RoleSpec:
        def spec() -> GeneratorSpec:
            from actors.driver.processes import generator_spec

            return generator_spec(self)

        return generator_role(self, self.rollout, spec, (ModelUse("policy", self.models.policy),))

    def _scorer(self, plan: ScorerPlan) -> RoleSpec:
        setting = ScorerSetting(
            policy=self.models.policy,
            dtype=self.engine.dtype,
            token_budget=self.engine.micro_batch_tokens,
            threads=self.cluster.threads,
            trust_remote_code=self.models.trust_remote_code,
            template=self.data.template,
            prompts=(self.data.prompts, self.evaluation.prompts),
            timeout_s=self.cluster.step_timeout,
        )
        return scorer_role(plan, setting)

    def _reference(self) -> RoleSpec:
        models, engine = self.models, self.engine
        folder = models.reference or models.policy
        arguments = (
            folder,
            engine.dtype,
            engine.micro_batch_tokens,
            self.rollout.temperature,
            self.cluster.threads,
            models.trust_remote_code,
        )
        use = ModelUse("reference", folder, tokens_of=models.policy, mend="models.reference")
        worker = "actors.roles.scorer:Reference"
        return RoleSpec("reference", "reference", worker, lambda rank, world: arguments, (use,), logits=True)

    def _policy(self) -> RoleSpec:
        training = Training(
            "policy",
            **self._minibatch(),
            lora_rank=self.models.lora_rank,
            lora_targets=tuple(self.models.lora_targets),
            publishes=self.direct_room if self.direct_weights else None,
            host_copies=int(self.ppo.average_last > 0),
        )
        return RoleSpec(
            "policy",
            "policy",
            "actors.roles.policy:PolicyTrainer",
            lambda rank, world: (self, rank, world, not self.debug),
            (ModelUse("policy", self.models.policy),),
            training,
            logits=True,
            gpu_part=POLICY_PART,
        )

    def _critic(self, plan: CriticPlan) -> RoleSpec:
        start = "its start (models.reward_critic, critic)"
        use = ModelUse(plan.name, plan.model, plan.signals, tokens_of=self.models.policy, mend=start)
        return RoleSpec(
            plan.name,
            plan.kind,
            "actors.roles.critic:Critic",
            lambda rank, world: (self, plan.signals, plan.model, rank, world),
            (use,),
            Training(
                plan.folder,
                **self._minibatch(),
                lora_rank=self.models.critic_lora_rank,
                lora_targets=tuple(self.models.lora_targets),
            ),
            gpu_part=CRITIC_PART,
        )

    def _minibatch(self) -> dict[str, Any]:
        rows = self._samples // self.ppo.minibatches
        step = f"a step has {self._samples} in {self.ppo.minibatches}"
        return {"rows": rows, "rows_are": f"a minibatch of {rows} samples ({step})"}
