"""Answers that were generated to questions whose true and false answers are known, judged by a model over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.roles.judge import Judge
from beaver_ray.errors import UserError
from beaver_ray.evaluation import share_interval
from beaver_ray.json_files import read_rows
from beaver_ray.judge.prompts import OURS, Rubric
from beaver_ray.judge.replies import Form
from beaver_ray.judge_options import JudgeOptions
from beaver_ray.multiple_choice import Question

TRUTH = Form("VERDICT", ("TRUE", "FALSE"), ("answer",))
Row = dict[str, Any]


def judge_answers(
    files: dict[str, list[Question]], answers: str, options: JudgeOptions, replies: Path, note: Callable[[str], None]
) -> tuple[dict[str, Row], list[Row]]:
    """(figures by name of the questions' file, every answer with its verdict).

    answers: rows prompt and response, as stage generate writes them; those to no question of the files are left out.
    A reply that cannot be read is in no share. Raises UserError where no answer is to a question.
    """
    given: dict[str, list[str]] = {}
    for row in read_rows(Path(answers)):
        if isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
            given.setdefault(row["prompt"], []).append(row["response"])
    # The rubric is ours: it is given what is known, which differs by question.
    rubric = Rubric("truthful", (OURS / "truthful.j2").read_text(encoding="utf-8"), TRUTH, "truthful.j2")
    rows: list[Row] = []
    texts: list[str] = []
    for name, questions in files.items():
        for number, question in enumerate(questions):
            own = replace(rubric, given=_known(question))
            for answer in given.get(question.text, []):
                rows.append({"file": name, "number": number, "question": question.text, "response": answer})
                texts.append(own.write([question.text], None, answer=answer))
    if not rows:
        raise UserError(
            f"{answers} has no answer to any of the questions; let the policy answer them by stage generate, with "
            f"prompts: [{{path: FILE, prompt: question}}]"
        )
    asked = {row["question"] for row in rows}
    if lost := sum(len(some) for question, some in given.items() if question not in asked):
        note(f"{answers}: {lost} answers are to no question, and are left out")
    judge = Judge(options, replies, note)
    said = [TRUTH.read(reply) for reply in judge(texts)]
    note(f"{options.model}: {judge.usage.line(options)}")
    figures = {}
    for row, word in zip(rows, said, strict=True):
        row["verdict"] = word
    for name in dict.fromkeys(row["file"] for row in rows):
        some = [row for row in rows if row["file"] == name]
        read = [row for row in some if row["verdict"] in TRUTH.words]
        if read:
            true = np.array([row["verdict"] == "TRUE" for row in read])
            of = share_interval(true, np.array([row["number"] for row in read]))
            figures[f"{name}/truthful"] = of | {"answers": len(some), "unread": len(some) - len(read)}
        else:
            note(f"{name}: no reply of the judge could be read, to {len(some)} answers; {name}/truthful is left out")
    return figures, rows


def _known(question: Question) -> dict[str, list[str]]:
    known: dict[str, list[str]] = {"known_true": [], "known_false": []}
    for choices in question.sets.values():
        for text, right in zip(choices.texts, choices.right, strict=True):
            of = known["known_true" if right else "known_false"]
            of += [] if text in of else [text]
    return {name: sorted(texts) for name, texts in known.items()}
