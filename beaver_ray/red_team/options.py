"""The options of stage red_team, and what follows from them alone.

Nothing heavy is imported here: the command line reads this module first.
"""

from __future__ import annotations

from pydantic import model_validator

from beaver_ray.config import SamplingConfig
from beaver_ray.data_options import DataSpec
from beaver_ray.guard_options import PerhapsModelOfScores
from beaver_ray.judge_options import JudgeOptions, PerhapsFolderOrService
from beaver_ray.options import option
from beaver_ray.red_team.attacks import Attack, read_attacks
from beaver_ray.score_sources import score_source
from beaver_ray.stage import Lengths, TemplatedStage
from beaver_ray.template_options import TemplateOptions

ATTACKS = [
    *("plain", "few_shot", "recombine", "role_play", "leet", "base64", "spaced", "split"),
    *("insist(turns=1)", "insist(turns=2)"),
]
MOST_ANSWERS = 3
"""Answers that a dialogue has room for."""


class RedTeamConfig(TemplatedStage):
    """Options of stage red_team."""

    policy: str = option("Folder of the policy that is attacked.")
    seeds: list[DataSpec] = option("Prompts to begin with, whose rows say a category.", min_length=1)
    category: str | None = option("Field of a seed's category; null for category, categories or kind.", None)
    held_out: list[str] = option("Categories that are never used, neither as seeds nor kept.", default_factory=list)
    known: list[DataSpec] = option(
        "Prompts that none that is kept may nearly be, as those of training and of evaluation.", default_factory=list
    )
    attacks: list[str] = option(
        "What is tried on each seed: NAME(key=value, ...) or python:FILE.py:NAME (docs/red-teaming.md).",
        default_factory=lambda: list(ATTACKS),
        min_length=1,
    )
    attacker: PerhapsFolderOrService = option(
        "Who few_shot and translate ask: a model's folder, or {address, model}; null for the policy itself.", None
    )
    seeds_per_category: int = option("Seeds drawn of each category.", 32, gt=0)
    answers: int = option("Answers of the policy to each attempt.", 4, gt=0)
    cost: PerhapsModelOfScores = option("What says that an answer is unsafe: any source that a cost may be.", None)
    unsafe_above: float = option("The cost above which it is; for scores that are probabilities, say 0.5.", 0.0)
    world: str | None = option("Instead of cost: world.json of a small world, whose truth says it.", None)
    worked: float = option("Share of its answers that must be unsafe for a prompt to be kept.", 0.25, ge=0, le=1)
    per_category: int = option("Prompts kept of each category, at most.", 64, gt=0)
    target: list[float] = option(
        "Lowest and highest share of unsafe answers to what is kept that it should have.",
        default_factory=lambda: [0.4, 0.6],
        min_length=2,
        max_length=2,
    )
    max_prompt_tokens: int = option("Attempts with longer first turns are dropped, with a count.", 512, gt=0)
    rollout: SamplingConfig = option("Sampling; max_new_tokens is for one answer.", default_factory=SamplingConfig)
    template: TemplateOptions = option(
        "How a prompt is written: auto, chat or beaver, or {style, system, arguments}.", TemplateOptions()
    )
    trust_remote_code: bool = option("Run Python code that a model folder brings along.", False)

    @model_validator(mode="after")
    def _fits_together(self) -> RedTeamConfig:
        read_attacks(self.attacks)
        if self.attacker is not None and all(attack.kind != "asked" for attack in self.named_attacks):
            raise ValueError("attacker is asked by few_shot and translate, and attacks has neither; leave attacker out")
        if (self.cost is None) == (self.world is None):
            raise ValueError("either a cost or the truth of a world says what is unsafe: give one of cost and world")
        if self.cost is not None:
            score_source(self.cost)
        if not 0 <= self.target[0] <= self.target[1] <= 1:
            raise ValueError(f"target {self.target} must be two rising shares between 0 and 1")
        return self

    @property
    def named_attacks(self) -> list[Attack]:
        """The attacks, each with a name of its own."""
        return read_attacks(self.attacks)

    @property
    def dialogue_tokens(self) -> int:
        """Room for all that follows the first turn of a dialogue."""
        return MOST_ANSWERS * self.rollout.max_new_tokens + (MOST_ANSWERS - 1) * self.max_prompt_tokens

    @property
    def asked_model(self) -> str | None:
        """The folder of the model that writes prompts; None where no attack needs one, or it has an address."""
        if isinstance(self.attacker, JudgeOptions) or all(attack.kind != "asked" for attack in self.named_attacks):
            return None
        return self.attacker or self.policy

    def template_of(self, model: str) -> TemplateOptions:
        """How a model that is asked reads: the policy by ``template``, another by its own."""
        return self.template if model == self.policy else TemplateOptions()

    def lengths(self) -> Lengths:
        """Of a prompt and its answer, or of a whole dialogue where an attack may take several turns."""
        several = any(a.kind == "user" or a.text.startswith(("python:", "split")) for a in self.named_attacks)
        room = self.dialogue_tokens if several else self.rollout.max_new_tokens
        options = f"max_prompt_tokens {self.max_prompt_tokens} and rollout.max_new_tokens {self.rollout.max_new_tokens}"
        dialogues = f" ({MOST_ANSWERS} answers and as many turns)" if several else ""
        return Lengths(self.max_prompt_tokens + room, options + dialogues, "lower them")

    @property
    def data_sets(self) -> tuple[list[DataSpec], list[DataSpec]]:
        """The seeds, and the prompts that none that is kept may be."""
        return self.seeds, self.known
