"""Multiple-choice questions put to a policy: TruthfulQA's MC1 and MC2, HHH and others of BIG-bench's format.

final/multiple_choice.json has the figures with intervals, final/questions.jsonl each question's scores
(docs/multiple-choice.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from actors.driver.choosing import choice_role
from beaver_ray.data_options import DataSpec
from beaver_ray.json_files import read_json, write_json, write_rows
from beaver_ray.judge_options import JudgeOptions, unread
from beaver_ray.options import option
from beaver_ray.stage import Lengths, RoleSpec, TemplatedStage
from beaver_ray.template_options import TemplateOptions

if TYPE_CHECKING:
    import numpy as np

    from beaver_ray.report.charts import Card
    from beaver_ray.runs import RunFolder

FIGURES = "multiple_choice.json"


class MultipleChoice(TemplatedStage):
    """Options of stage multiple_choice."""

    kinds: ClassVar[tuple[str, ...]] = ("policy",)

    stage: Literal["multiple_choice"] = option("Put multiple-choice questions to a policy.")
    policy: str = option("Folder of the policy, or its name on the hub.")
    questions: dict[str, str] = option("Files of questions, each with a name (docs/multiple-choice.md).", min_length=1)
    ask: Literal["auto", "apart", "listed"] = option(
        "apart: by the log-prob of each choice; listed: by its letter; auto: TruthfulQA's apart, BIG-bench's listed.",
        "auto",
    )
    orders: int = option("Orders in which listed choices are shown, at most one for each choice.", 4, ge=1, le=26)
    answers: str | None = option("Finished answers to the questions (prompt, response), for the judge.", None)
    judge: JudgeOptions | None = option("Who says whether these answers are true (docs/judge.md).", None)
    max_tokens: int = option("Longest question with its choices; a longer one is an error.", 2048, gt=0)
    template: TemplateOptions = option(
        "How a question is written: auto, chat or beaver, or {style, system, arguments}.", TemplateOptions()
    )
    trust_remote_code: bool = option("Run Python code that a model folder brings along.", False)

    @model_validator(mode="after")
    def _judged_answers(self) -> MultipleChoice:
        if (self.answers is None) != (self.judge is None):
            raise ValueError("answers and judge go together: give both or neither")
        if self.judge is not None:
            unread(self.judge, "rubric", "rubrics")
        return self

    def roles(self) -> list[RoleSpec]:
        """The policy, which reads and generates nothing."""
        return [choice_role(self, "policy", "policy", self.policy)]

    def run(self, run: RunFolder) -> None:
        """Ask, and write what came of it."""
        from actors.driver.multiple_choice import Asking
        from actors.driver.truthful_answers import judge_answers
        from actors.roles.judge import REPLIES
        from beaver_ray.fit import check_there_and_fit
        from beaver_ray.manifest import write_stage_manifest
        from beaver_ray.multiple_choice import read_questions

        run.note(*check_there_and_fit(self))
        files = {}
        for name, file in self.questions.items():
            files[name], report = read_questions(file, self.seed)
            run.note(f"{name}: questions {report.line()}")
        run.rewind(0)
        folder = run.folder / "final.part"
        judged: dict[str, Any] = {}
        if self.answers is not None and self.judge is not None:
            # First, since its replies are kept, and what is wrong with answers or judge shows at once.
            replies = Path(self.workspace) / REPLIES
            judged, answered = judge_answers(files, self.answers, self.judge, replies, run.note)
            write_rows(folder / "answers.jsonl", answered)
        figures, rows = Asking(self, self.policy, self.ask, self.orders).answer_all(files)
        figures |= judged
        write_rows(folder / "questions.jsonl", rows)
        write_json(folder / FIGURES, figures)
        run.log(1, {name: of["mean"] for name, of in figures.items()})
        for name, of in figures.items():
            run.note(f"{name}: {in_words(of)}")
        write_stage_manifest(
            self,
            folder,
            {"questions": len(rows)},
            [*self.questions.values(), *([self.answers] if self.answers else [])],
        )

    def lengths(self) -> Lengths:
        """Of a question with its choices."""
        return Lengths(self.max_tokens, f"max_tokens {self.max_tokens}", "lower it")

    @property
    def data_sets(self) -> tuple[list[DataSpec], list[DataSpec]]:
        """None: questions are no samples."""
        return [], []

    def headlines(self) -> list[str]:
        """The figures."""
        return [f"{name}: {in_words(of)}" for name, of in self._figures().items()]

    def _figures(self) -> dict[str, Any]:
        """Those of the finished run; none before."""
        return read_json(self.folder / "final" / FIGURES) or {}

    def cards(self, metrics: dict[str, np.ndarray], evaluation: dict[str, Any]) -> list[Card]:
        """Each figure beside chance."""
        from beaver_ray.report.charts import Card, interval

        return [
            Card(
                name,
                f"{of['mean']:.1%}",
                interval(of, ".1%") + (f" · chance {of['chance']:.1%}" if "chance" in of else ""),
            )
            for name, of in self._figures().items()
        ]


def in_words(figures: dict[str, Any]) -> str:
    """A figure with its interval, and what its orders say."""
    said = f"{figures['mean']:.3f} ({figures['low']:.3f} to {figures['high']:.3f}, n = {figures['n']})"
    said += f", chance {figures['chance']:.3f}" if "chance" in figures else ""
    said += f"; {figures['unread']} of {figures['answers']} not read" if "unread" in figures else ""
    if "same_in_all_orders" in figures:
        said += f"; the same choice in all orders {figures['same_in_all_orders']['mean']:.1%}"
        said += f", what stood first {figures['chose_first_place']['mean']:.1%}"
    return said
