"""Best-of-n under a cost gate: of n answers the one with the best reward that keeps all limits, otherwise a refusal.

Nothing is trained. What it leaves are answers, which stage sft can learn (final/answers.jsonl) and which can be judged
beside policies (final/held_out.jsonl, of evaluation.prompts).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from actors.stages.ppo import Ppo
from beaver_ray.constraint_options import ConstraintConfig
from beaver_ray.data_options import DataSpec
from beaver_ray.options import Strict, option
from beaver_ray.policy_options import EvaluationConfig, PolicyModels, PromptData, RolloutConfig
from beaver_ray.stage import Lengths, RoleSpec, Stage, Trajectories
from beaver_ray.template_options import TemplateOptions

if TYPE_CHECKING:
    import numpy as np

    from beaver_ray.report.charts import Card, Chart
    from beaver_ray.runs import RunFolder

OF_TRAINING = {
    "models": {"reference", "reward_critic", "lora_rank", "lora_targets", "critic_lora_rank", "shared_critic"},
    "data": {"ptx"},
    "rollout": {"staleness", "in_flight", "oversample", "environment"},
    "evaluation": {"judge"},
    "constraints": {"critic", "judge", "confidence", "form", "multiplier"},
}
"""Options of stages that train, which have nothing to say here."""


class BestOfN(Stage):
    """Options of stage best_of_n; what they have in common with a stage that trains a policy is called as there."""

    kinds: ClassVar[tuple[str, ...]] = ("rollout", "reward", "cost")

    stage: Literal["best_of_n"] = option("Answer prompts with the best of several answers that keep all limits.")
    models: PolicyModels = option("Policy and reward.")
    constraints: list[ConstraintConfig] = option(
        "The gate: an answer's cost is at most limit, or its probability of being unsafe at most violation_rate.",
        default_factory=list,
    )
    data: PromptData = option("Prompts to answer.")
    rollout: RolloutConfig = option("Generation; samples_per_prompt is the n.", default_factory=RolloutConfig)
    evaluation: EvaluationConfig = option("Evaluation.", default_factory=EvaluationConfig)
    refusal: str = option(
        "What is answered where no answer keeps all limits.", "I'm sorry, but I can't help with that.", min_length=1
    )

    @model_validator(mode="after")
    def _trains_nothing(self) -> BestOfN:
        parts: list[tuple[str, str, Strict]] = [
            *(("constraints", f"constraint {c.name}: ", c) for c in self.constraints),
            *((name, f"{name}.", getattr(self, name)) for name in ("models", "data", "rollout", "evaluation")),
        ]
        for name, where, part in parts:
            if given := sorted(OF_TRAINING[name] & part.model_dump(exclude_defaults=True).keys()):
                raise ValueError(f"{where}{given[0]} is of stages that train a policy, which this one does not")
        self.sampling()
        return self

    def sampling(self) -> Ppo:
        """The stage whose generators and scorers these are, and whose held-out evaluation."""
        same = ["workspace", "name", "seed", "debug", "cluster", "engine", "save_every", "resume"]
        same += ["constraints", "data", "rollout", "evaluation"]
        critic = {"reward_critic": self.models.policy}  # of which none is started
        return Ppo.model_validate(
            {"stage": "ppo", "steps": 1, "models": self.models.model_copy(update=critic)}
            | {name: getattr(self, name) for name in same}
        )

    def roles(self) -> list[RoleSpec]:
        """Generators and scorers."""
        return self.sampling().judging_roles()

    def run(self, run: RunFolder) -> None:
        """Answer the prompts, and the held-out ones, where they are evaluated."""
        from actors.driver.best_of_n import best_of_n

        best_of_n(self.sampling(), self.refusal, run)

    def lengths(self) -> Lengths:
        """Of a prompt and its answer."""
        return self.sampling().lengths()

    @property
    def prompt_template(self) -> TemplateOptions:
        """How prompts are written for the policy."""
        return self.sampling().prompt_template

    @property
    def trusts_code(self) -> bool:
        """Whether Python code in a model's folder may run."""
        return self.sampling().trusts_code

    @property
    def data_sets(self) -> tuple[list[DataSpec], list[DataSpec]]:
        """The prompts, and the held-out ones."""
        return self.sampling().data_sets

    @property
    def scoped_data(self) -> list[DataSpec]:
        """The prompts, where a limit counts over some of them alone."""
        return self.sampling().scoped_data

    def check_scopes(self, tokenized: bool) -> list[str]:
        """Over how many prompts each constraint with a ``where`` counts."""
        return self.sampling().check_scopes(tokenized)

    def store_bytes(self) -> float:
        """The answers to one block of prompts with their scores, as parts and joined."""
        tokens = self.data.max_prompt_tokens + 3 * self.rollout.max_new_tokens
        return 2 * 4 * self.rollout.prompts_per_step * self.rollout.samples_per_prompt * tokens

    def charts(self, metrics: dict[str, np.ndarray]) -> list[Chart]:
        """Reward, refusals and costs over n, and the throughput."""
        import numpy as np

        from beaver_ray.report.charts import Chart, Panel, Series, drawable

        ends = ["refused", "reward", *(f"cost/{c.name}" for c in self.constraints)]
        parts = [key.split("/") for key in metrics if key.startswith("best_of/")]
        points = sorted(int(k) for _, k, *end in parts if end == ["refused"])
        curves = {end: np.array([self._mean(metrics, f"best_of/{k}/{end}") for k in points]) for end in ends}
        speed = metrics.get("throughput/samples_per_second", np.array([np.nan]))
        caption = "What best-of-n gives, refusals included; of fewer answers it is the mean over all draws of them."
        return drawable(
            [
                Chart(
                    "Over n",
                    caption,
                    [Panel(end, [Series(end, y)]) for end, y in curves.items()],
                    x=np.array(points, dtype=np.float64),
                    xlabel="n",
                ),
                Chart("Throughput", "Answers sampled and scored.", [Panel("samples/s", [Series("samples/s", speed)])]),
            ]
        )

    def cards(self, metrics: dict[str, np.ndarray], evaluation: dict[str, Any]) -> list[Card]:
        """What was given to the prompts, and what an evaluation says of the held-out ones."""
        from beaver_ray.report.charts import Card
        from beaver_ray.report.policy import ppo_cards

        n = self.rollout.samples_per_prompt
        about = f"{int(metrics['prompts'].sum()):,} prompts, best of {n}"
        cards = [
            Card("Refused", f"{self._mean(metrics, f'best_of/{n}/refused'):.1%}", about),
            Card("Reward", f"{self._mean(metrics, f'best_of/{n}/reward'):.3g}", "refusals included"),
        ]
        for c in self.constraints:
            mean = self._mean(metrics, f"best_of/{n}/cost/{c.name}")
            cards.append(Card(f"Mean cost: {c.name}", f"{mean:.3g}", f"each answer's at most {c.bound:g}"))
        return cards + ppo_cards(metrics, evaluation, self.sampling())

    def headlines(self) -> list[str]:
        """What was given to the prompts, and how good and safe it is on the held-out ones."""
        from beaver_ray.hacking import columns
        from beaver_ray.report.policy import ppo_headlines
        from beaver_ray.runs import read_metrics

        metrics = columns(read_metrics(self.folder))
        n = self.rollout.samples_per_prompt
        costs = "".join(f", {c.name} {self._mean(metrics, f'best_of/{n}/cost/{c.name}'):.4g}" for c in self.constraints)
        refused, reward = (self._mean(metrics, f"best_of/{n}/{end}") for end in ("refused", "reward"))
        prompts = int(metrics["prompts"].sum())
        first = f"best of {n} on {prompts:,} prompts: {refused:.1%} refused, reward {reward:.4g}{costs}"
        return [first, *ppo_headlines(self.sampling())]

    def trajectories(self) -> Trajectories:
        """What is given in the first and the last block."""
        return self.sampling().trajectories()

    @staticmethod
    def _mean(metrics: dict[str, np.ndarray], key: str) -> float:
        """The mean of a figure over all prompts that it counts over, from those of the blocks."""
        import numpy as np

        known = np.isfinite(metrics[key])
        weights = metrics.get(f"counted/{key.partition('/cost/')[2]}", metrics["prompts"])
        return float(np.average(metrics[key][known], weights=weights[known])) if known.any() else np.nan
