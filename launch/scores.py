"""`beaver-ray scores`: a reward or cost model, or anything else that scores, against labelled answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.driver.score_models import Answers, ScoreModel, read_answers, score_all
from beaver_ray.errors import UserError
from beaver_ray.feature_figures import overlap
from beaver_ray.guard_options import read_guard
from beaver_ray.report.scores import Judged, ScoreReport
from beaver_ray.score_figures import agreement, figures
from beaver_ray.yaml_files import yaml_value
from launch.config_files import load_run
from launch.score_options import short_names
from launch.terminal import table_console

TRAINED = ("reward_model", "cost_model", "score_model")


def scores(
    model: str, specs: Sequence[str], against: str | None, kind: str | None, by: Sequence[str], out: Path | None
) -> None:
    """Score the answers of ``specs``, say how good the scores are, and write it down."""
    if kind not in (None, "reward", "cost"):
        raise UserError(f"--as must be reward or cost, not {kind!r}")
    folder = out or (Path(model) / "scores" if Path(model).is_dir() else Path("scores"))
    if any(place.is_file() for place in (folder, *folder.parents)):
        raise UserError(f"cannot write to {folder}: a file is in the way; give another folder with --out")
    answers = read_answers(specs, by)
    judges = [_judge(text, kind, specs) for text in (model, *([against] if against else []))]
    if missing := [name for name in judges[-1].kinds.values() if name not in judges[0].kinds.values()]:
        raise UserError(f"{judges[0].name} gives no {missing[0]}, which {against} gives; compare models of one kind")
    answers, scored = score_all(judges, answers, by)
    found = _report(short_names([judge.name for judge in judges]), judges, answers, scored, specs)
    console = table_console()
    for table in found.tables():
        console.print(table)
    for line in found.remarks():
        print(line)
    for path in found.write(folder):
        print(f"written: {path}")


def _report(
    names: Sequence[str],
    judges: Sequence[ScoreModel],
    answers: Answers,
    scored: Sequence[dict[str, Any]],
    specs: Sequence[str],
) -> ScoreReport:
    """What the labels say of the scores of one or two models."""
    labelled = answers.labelled
    judged = []
    for short, judge, of in zip(names, judges, scored, strict=True):
        found = {name: figures(judge.kinds[name], of[name], labelled) for name in of}
        features = judge.features(answers)
        for name, pairs in features.items():
            found[name]["features"] = overlap(pairs)
        judged.append(Judged(short, judge.name, of, found, features))
    both = {}
    for first, kind in judges[0].kinds.items() if len(judges) > 1 else []:
        for second in [name for name, other in judges[1].kinds.items() if other == kind]:
            name = first if first == second else f"{first} and {second}"
            both[name] = agreement(kind, scored[0][first], scored[1][second], labelled)
    rows = [(_asked(answers, int(row)), text) for row, text in zip(answers.row_N.tolist(), answers.texts, strict=True)]
    return ScoreReport(judged, both, labelled, rows, list(specs), answers.report)


def _asked(answers: Answers, row: int) -> str:
    """The prompt of a row: its last turn."""
    turns = answers.rows[row].input
    return turns if isinstance(turns, str) else turns[-1]


def _judge(text: str, kind: str | None, specs: Sequence[str]) -> ScoreModel:
    """The source of scores that a word of the command line means: a run's folder, or whatever models.reward may be."""
    if text.startswith("{"):
        try:
            return ScoreModel(read_guard(yaml_value(text)), kind, specs)
        except ValueError as error:
            raise UserError(f"{text!r} is no guard: {error}") from None
    folder = Path(text)
    if (folder / "config.yaml").is_file():
        run = load_run(folder)
        trained = next((folder / "final" / name for name in TRAINED if (folder / "final" / name).is_dir()), None)
        if trained is None:
            raise UserError(
                f"{folder} is a run of stage {run.stage} without a trained score model under final/; give a run of "
                f"{', '.join(TRAINED)} that is finished, or a model's folder"
            )
        return ScoreModel(str(trained), kind, specs, run.trusts_code)
    try:
        return ScoreModel(text, kind, specs)
    except ValueError as error:  # an address or function that is none
        raise UserError(str(error)) from None
