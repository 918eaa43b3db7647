"""Weak-to-strong generalisation: a strong model learns from a weaker one's labels, beside one that learns the truth.

final/weak, final/ceiling and final/student_NAME are ordinary reward, cost or moderation models (a bag of words is read
by a function). final/labelled_by_weak.jsonl and tests_by_weak.jsonl have the students' half and the tests with the weak
model's labels, rounded. See docs/weak-to-strong.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from actors.driver.trainer_stage import TrainerStage
from beaver_ray.json_files import read_json
from beaver_ray.moderation_options import Reads
from beaver_ray.options import option
from beaver_ray.stage import Lengths, ModelUse, RoleSpec, Training
from beaver_ray.weak_to_strong_options import HEADS, STUDENT, StudentConfig, Task, WeakConfig

if TYPE_CHECKING:
    import numpy as np

    from beaver_ray.report.charts import Card, Chart
    from beaver_ray.runs import RunFolder


def _students() -> list[StudentConfig]:
    return [StudentConfig(name="xent"), StudentConfig(name="confidence", loss="confidence")]


class WeakToStrong(TrainerStage):
    """Options of stage weak_to_strong; ``save_every`` means nothing: whole models are kept."""

    trained: ClassVar[str] = "student"

    stage: Literal["weak_to_strong"] = option("Train a strong model on a weak one's labels, and measure what it gains.")
    model: str = option("Folder of the strong model to start from.")
    task: Task = option(
        "preference or cost (pairs), moderation or classification (single texts with one label).", "preference"
    )
    label: str = option("The label of single texts; unsafe is what data say of safety without categories.", "unsafe")
    input: Reads | None = option(
        "What is read of single texts; null: qa of moderation, question of classification.", None
    )
    weak: WeakConfig = option("The supervisor.", default_factory=WeakConfig)
    students: list[StudentConfig] = option(
        "Ways to learn from weak labels, each a model.", default_factory=_students, min_length=1
    )
    chain: list[str] = option(
        "Folders of models between weak and strong, each of which learns from the one before.", default_factory=list
    )
    generative: float = option(
        "First train the strong model on the unlabelled texts for so many epochs.", 0.0, ge=0, le=1e6
    )
    split: float = option(
        "Share of the prompts that the weak model learns from; the others are the strong ones'.", 0.5, gt=0, lt=1
    )
    soft_labels: bool = option("Weak labels are probabilities; false rounds them.", True)
    looks: float = option("Looks at the tests (and watched rows) in an epoch, for curves and for stop.", 1.0, ge=0)
    watch_fraction: float = option(
        "Share of the students' half whose weak labels are held out, where one stops.", 0.1, gt=0, lt=1
    )
    patience: int = option("A student with stop ends after so many looks without a better one; 0: never.", 0, ge=0)
    min_gap: float = option("Least ceiling - weak at which what is recovered may be read.", 0.05, gt=0, lt=1)
    by: list[str] = option("Fields of rows by whose values the tests are shown.", default_factory=list)
    regularization: float = option("Weight of the mean squared score, of pairs.", 0.001, ge=0)

    @model_validator(mode="after")
    def _fits_together(self) -> WeakToStrong:
        names = [student.name for student in self.students]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"students: {twice[0]!r} is there twice; give each another name")
        for student in self.students:
            if student.chain and not self.chain:
                raise ValueError(f"students.{student.name}: chain needs the folders of models under chain")
            if student.stop != "none" and not self.looks:
                raise ValueError(f"students.{student.name}: stop chooses among looks; set looks above 0")
        if self.chain and not any(student.chain for student in self.students):
            raise ValueError("chain: no student learns from it; give one with chain: true")
        if self.weak.model is None and self.reads == "dialogue":
            raise ValueError(
                "input: a bag of words reads the last turn; take question, answer or qa, or give weak.model"
            )
        if self.engine.zero_stage == 3:
            raise ValueError("each model is trained by one process; set engine.zero_stage to 2 at most")
        return self

    @model_validator(mode="after")
    def _all_is_read(self) -> WeakToStrong:
        pairs, single = self.task in HEADS, f"is of single texts; leave it out for task {self.task}"
        stops = "is of students that stop; give one with stop, or leave it out"
        unread = [
            ("input", not pairs, single),
            ("label", not pairs, single),
            ("regularization", pairs, f"is of pairs; leave it out for task {self.task}"),
            ("patience", self.watches, stops),
            ("watch_fraction", self.watches, stops),
        ]
        for name, is_read, why in unread:
            if not is_read and self.asks_for(name):
                raise ValueError(f"{name} {why}")
        return self

    @property
    def reads(self) -> Reads:
        """What is read of single texts."""
        return self.input or ("question" if self.task == "classification" else "qa")

    @property
    def watches(self) -> bool:
        """Whether weak labels are held out."""
        return any(student.stop != "none" for student in self.students)

    @property
    def student_names(self) -> list[str]:
        """The students' folders."""
        return [STUDENT + student.name for student in self.students]

    @property
    def model_names(self) -> list[str]:
        """The folders of final/: weak model, students, ceiling."""
        return ["weak", *self.student_names, "ceiling"]

    def roles(self) -> list[RoleSpec]:
        """Trainers that train alone, each one model after another."""
        batch = f"a batch of {self.batch_size} (batch_size)"
        targets = tuple(self.lora_targets)
        training = Training(self.trained, self.batch_size, batch, self.lora_rank, targets, alone=True)
        heads = HEADS.get(self.task, (self.label,))
        folders = {"model": self.model, "weak.model": self.weak.model} | dict(
            (f"chain.{number}", folder) for number, folder in enumerate(self.chain)
        )
        uses = tuple(
            ModelUse(part, folder, heads, classifier=self.task not in HEADS)
            for part, folder in folders.items()
            if folder
        )
        return [
            RoleSpec(
                "trainer",
                "trainer",
                "actors.roles.ensemble:EnsembleWorker",
                lambda rank, world: (rank, self.cluster.threads),
                uses,
                training,
                logits=self.generative > 0,
            )
        ]

    def lengths(self) -> Lengths:
        """Of a row."""
        return Lengths(self.max_tokens, f"max_tokens {self.max_tokens}", "lower it", 2 if self.task in HEADS else 1)

    def run(self, run: RunFolder) -> None:
        """Train weak model, ceiling, students and chain, and write what the students recover."""
        from actors.driver.weak_to_strong import supervise
        from beaver_ray.fit import check_there_and_fit
        from beaver_ray.report.weak_to_strong import WeakToStrongReport, remarks

        run.note(*check_there_and_fit(self))
        if self.generative:
            self._check_generative()
        halves, found = supervise(self, run)
        report = WeakToStrongReport(self, halves, found)
        figures = report.write(run.folder)
        run.rewind(0)
        for number, row in enumerate(report.metrics(figures), start=1):
            run.log(number, row)
        run.note(*remarks(figures))

    def _check_generative(self) -> None:
        from beaver_ray.errors import UserError
        from beaver_ray.models.classifier import is_encoder

        if self.task not in HEADS and is_encoder(self.model, self.trust_remote_code):
            raise UserError(
                f"generative: {self.model} sees both sides of a token and is no language model; set it to 0"
            )

    def charts(self, metrics: dict[str, np.ndarray]) -> list[Chart]:
        """The accuracy of each model."""
        from beaver_ray.report.charts import Chart, Panel, Series

        caption = "Of weak model, students and ceiling, in this order. Bars and curves: weak_to_strong.html."
        return [Chart("Accuracy", caption, [Panel("share", [Series("tests", metrics["accuracy"])])], xlabel="model")]

    def cards(self, metrics: dict[str, np.ndarray], evaluation: dict[str, Any]) -> list[Card]:
        """What weak_to_strong.json says."""
        from beaver_ray.report.weak_to_strong import FILE, cards

        figures = read_json(self.folder / FILE)
        return [] if figures is None else cards(figures)

    def headlines(self) -> list[str]:
        """What the students recover, and where that is shown."""
        from beaver_ray.report.weak_to_strong import FILE, remarks

        figures = read_json(self.folder / FILE)
        return [] if figures is None else [*remarks(figures), f"page: {self.folder / 'weak_to_strong.html'}"]
