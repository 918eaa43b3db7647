"""What a stage declares, and all that others know of it: its options, the roles it is made of, its run, its report.

Command line, reader of configurations, plan, doctor, pipeline, report, cluster and recovery read nothing else. Light to
import: whatever a stage's methods need, they import themselves.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from beaver_ray.config import RunConfig
from beaver_ray.data_options import DataSpec
from beaver_ray.errors import UserError
from beaver_ray.options import near
from beaver_ray.score_sources import ScoreSource
from beaver_ray.template_options import TemplateOptions

if TYPE_CHECKING:
    import numpy as np

    from beaver_ray.report.charts import Card, Chart
    from beaver_ray.report.feasibility import Feasibility
    from beaver_ray.runs import RunFolder
    from beaver_ray.verdicts import Certificate, Reliability


@dataclass(frozen=True)
class ModelUse:
    """What a role needs a model for."""

    part: str
    """What the model is to the stage, as errors name it."""
    folder: str
    """A folder, or a name of the hub."""
    signals: tuple[str, ...] = ()
    """What its heads are for ("reward", "cost", names of constraints); none of a language model."""
    scores: bool = False
    """It must have its heads already: it is no start for training them."""
    classifier: bool = False
    """It is a moderation model (`beaver_ray.models.classifier`), or the start of one."""
    tokens_of: str | None = None
    """The folder whose tokens it reads, where it must have the same tokenizer as that; and the option that mends it."""
    mend: str = ""


@dataclass(frozen=True)
class Training:
    """What a role that is trained needs besides a forward pass."""

    folder: str
    """Name of the trained model's folder, under final/ and in checkpoints."""
    rows: int
    """Samples of the smallest batch of an optimizer step, which are dealt to the ranks."""
    rows_are: str
    """Where that number comes from."""
    lora_rank: int = 0
    """Rank of the adapter that is trained alone; 0 where all parameters are."""
    lora_targets: tuple[str, ...] = ()
    """Names of the linear layers that have one; empty for all."""
    passes: int = 1
    """Forward passes of a micro-batch whose activations are held at once."""
    copies: int = 0
    """Of all that is trained, in float32, beside weights, gradients and optimizer."""
    host_copies: int = 0
    """Of all that is trained, in float32 and in host memory, divided among the workers."""
    alone: bool = False
    """Each worker trains a model of its own, whole and on whole batches."""
    beside: tuple[str, ...] = ()
    """Folders of frozen models that every rank holds as well."""
    publishes: Callable[[float, float], float] | None = None
    """(bytes of what is trained, bytes of a GPU) -> bytes of published weights that stay on the device."""


@dataclass(frozen=True)
class RoleSpec:
    """One role of a stage: what it is called, where it is placed, how its workers are made, what they read and hold."""

    name: str
    kind: str
    """Its key under cluster.placement."""
    worker: str
    """Class of its workers, "module:Class", imported where they are started."""
    arguments: Callable[[int, int], tuple[Any, ...]]
    """(rank, number of workers) -> what the worker's constructor is given."""
    models: tuple[ModelUse, ...] = ()
    training: Training | None = None
    """None of a role without state, which is started anew where it dies."""
    logits: bool = False
    """It makes logits over the vocabulary, and not values or scores alone."""
    kv_cache_gib: float | None = None
    """Of a vLLM engine: its key-value cache on a CPU; on a GPU it takes what it is given."""
    source: ScoreSource | None = None
    """Where a scorer's scores come from."""
    gpu_part: int = 1
    """Its part of a GPU that all roles share, relative to the others'; 0 of a role that holds no model."""

    def worker_class(self) -> type:
        """The class of its workers."""
        found: type = pkgutil.resolve_name(self.worker)
        return found


@dataclass(frozen=True)
class Lengths:
    """The longest sequence of a stage."""

    longest: int
    options: str
    """The options that it comes from, with their values."""
    lower: str
    """What to do with them where it is too long: "lower it"."""
    at_once: int = 1
    """Sequences that must be read in one forward pass."""


@dataclass(frozen=True)
class Trajectories:
    """How to read the experience that a stage writes to trajectories/."""

    tokenizer: str
    """Folder of the tokenizer that its tokens are of, as long as no trained policy is saved."""
    unsafe_above: dict[str, float]
    """Names of its costs, each with the cost above which an answer is unsafe."""


class Stage(RunConfig):
    """Base of every stage's configuration; a class of `actors.stages` narrows ``stage`` to its name."""

    kinds: ClassVar[tuple[str, ...]] = ()
    """Keys of cluster.placement that its roles may have."""

    @model_validator(mode="after")
    def _known_roles(self) -> Stage:
        for kind in self.cluster.placement:
            if kind not in self.kinds:
                raise ValueError(f"cluster.placement: unknown role {kind!r}{near(kind, self.kinds)}")
        return self

    def roles(self) -> list[RoleSpec]:
        """The roles of this run, in the order in which they are shown. Raises UserError where models do not fit."""
        raise NotImplementedError

    def run(self, run: RunFolder) -> None:
        """Run the stage: everything between the run's folder and ``final.part`` in it, which is complete at the end."""
        raise NotImplementedError

    def lengths(self) -> Lengths:
        """The longest sequence that any of its models reads."""
        raise NotImplementedError

    @property
    def prompt_template(self) -> TemplateOptions:
        """How prompts are written for its models."""
        raise NotImplementedError

    @property
    def trusts_code(self) -> bool:
        """Whether Python code in a model's folder may run."""
        raise NotImplementedError

    def charts(self, metrics: dict[str, np.ndarray]) -> list[Chart]:
        """The charts of its report, from metrics.jsonl by key; none where cards, or a page of its own, say it all."""
        return []

    def cards(self, metrics: dict[str, np.ndarray], evaluation: dict[str, Any]) -> list[Card]:
        """The headline figures of its report; ``evaluation`` is evaluation.json, or empty."""
        raise NotImplementedError

    def signs(self, metrics: dict[str, np.ndarray]) -> list[str] | None:
        """What looks like reward hacking in its metrics, one sentence each; None of a stage that has no scorers."""
        return None

    def announcements(self) -> list[str]:
        """What a run does that one may not expect of it, one line each, for its plan."""
        return []

    def headlines(self) -> list[str]:
        """What came of the finished run, one line each, for whoever started it."""
        return []

    def trajectories(self) -> Trajectories | None:
        """How to read what it writes to trajectories/; None of a stage that writes nothing there."""
        return None

    @property
    def data_sets(self) -> tuple[list[DataSpec], list[DataSpec]]:
        """What it trains on, and what it holds out by name."""
        raise NotImplementedError

    @property
    def scoped_data(self) -> list[DataSpec]:
        """The data whose rows say what counts over them; none where all of it does."""
        return []

    def check_scopes(self, tokenized: bool) -> list[str]:
        """Over how much of `scoped_data` each scope is, one line each. Reads it; UserError where a scope is empty.

        tokenized: whether the models are there, so that what is too long, or there twice, can be left out.
        """
        return []

    @property
    def environment(self) -> str | None:
        """The class that says the next turn after an answer, python:FILE.py:CLASS; None where there is none."""
        return None

    def store_bytes(self) -> float:
        """Bytes that one step has in Ray's object store; 0 of a stage that passes nothing on there."""
        return 0.0

    def evaluate(self, policy: str | None) -> tuple[Path, list[str]]:
        """Evaluate its trained policy, or another one: the path of evaluation.json, and what it says, one line each.

        Raises UserError for a stage without held-out prompts.
        """
        raise UserError(f"stage {self.stage} trains no policy on prompts, so there is nothing to evaluate")

    def certify(
        self, confidence: float, policy: str | None, answers: int, prompts: Sequence[str], command: str
    ) -> tuple[Certificate, Path]:
        """Whether its constraints hold for its trained policy, or another one, and the path of certificate.json.

        Raises UserError for a stage without constraints.
        """
        raise UserError(f"stage {self.stage} trains no policy on prompts, so there is nothing to certify")

    def compare_with_labels(self, file: Path, policy: str | None) -> tuple[Reliability, Path]:
        """Whether its calibrated probabilities fit labelled answers, and the path of reliability.json.

        Raises UserError for a stage without constraints.
        """
        raise UserError(f"stage {self.stage} trains no policy on prompts, so it has no calibrated probabilities")

    def feasibility(self, prompts: int, answers: int, out: Path | None) -> Feasibility:
        """What the limits of its constraints cost, on ``answers`` of its reference to each of ``prompts`` prompts.

        Written to ``out``, or beside the run's folder. Raises UserError for a stage without constraints.
        """
        raise UserError(f"stage {self.stage} trains no policy under limits, so there is none to ask about")


class TemplatedStage(Stage):
    """Base of stages with options ``template`` and ``trust_remote_code`` of their own."""

    if TYPE_CHECKING:  # each has them where they belong among its options
        template: TemplateOptions
        trust_remote_code: bool

    @property
    def prompt_template(self) -> TemplateOptions:
        """How prompts are written for its models."""
        return self.template

    @property
    def trusts_code(self) -> bool:
        """Whether Python code in a model's folder may run."""
        return self.trust_remote_code
