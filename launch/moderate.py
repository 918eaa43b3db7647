"""`beaver-ray moderate`: flag the rows of data sets by a moderation model or by keywords, and say how many of what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.markup import escape
from rich.table import Table
from scipy.special import expit

from beaver_ray.data.mixing import Spec, check_not_read, load_mix
from beaver_ray.data.moderation import Dialogue, LabelledAnswer, answers_of, check_answered
from beaver_ray.data.splits import SUFFIXES
from beaver_ray.errors import UserError, first_line
from beaver_ray.evaluation import share_interval
from beaver_ray.json_files import check_writable, write_json, write_rows
from beaver_ray.method.multilabel import figures, flag_margin, shares_by
from beaver_ray.moderation_options import Reads
from beaver_ray.options import meant, near
from beaver_ray.rules.keywords import KEYWORDS, OBFUSCATIONS, KeywordRail
from beaver_ray.yaml_files import read_yaml
from launch.terminal import table_console

UNKNOWN_SHOWN = 5
"""Labels of rows that the judge does not know, by name; of more the number is said."""


class Judge(Protocol):
    """A `Moderator`, or a `KeywordRail`."""

    labels: list[str]

    @property
    def thresholds_K(self) -> np.ndarray:
        """Of the log-odds of each label."""
        ...

    @property
    def reads(self) -> Reads:
        """The part of a dialogue that it judges."""
        ...

    def judge(self, dialogues: Sequence[Dialogue]) -> np.ndarray:
        """Log-odds [N, K] of answers."""
        ...


@dataclass(frozen=True)
class Judged:
    """Answers, and what a judge says of them."""

    answers: list[LabelledAnswer]
    prompts_N: np.ndarray
    """What is equal of answers to one prompt."""
    labels: list[str]
    odds_NK: np.ndarray
    above_NK: np.ndarray
    """Which labels are above their thresholds."""
    margin_N: np.ndarray
    """`flag_margin`."""

    @property
    def flagged_N(self) -> np.ndarray:
        """Whether any label is above its threshold."""
        flagged_N: np.ndarray = self.margin_N > 0
        return flagged_N


def moderate(
    specs: Sequence[Spec],
    judge: Judge,
    out: Path | None,
    keep: str,
    by: Sequence[str],
    json_file: Path | None,
    evade: bool,
) -> None:
    """Judge every answer of the data sets, write rows, and print and write the figures.

    keep: which rows are written, "all", "flagged" or "unflagged". UserError for a field of ``by`` that no row has, for
    rows without what the judge reads, and for files that cannot be written.
    """
    check_writable(out, json_file)
    if out is not None and out.name.endswith(SUFFIXES) and out.suffix != ".jsonl":
        raise UserError(f"--out {out}: rows are written as lines of JSON; give a file ending in .jsonl")
    check_not_read([out, json_file], specs)
    samples, reports = load_mix(list(specs))
    for spec, read in reports.items():
        if read.dropped:
            print(f"{spec}: {read.line()}")
    answers, prompts_N = answers_of(samples)
    check_answered(answers, judge.reads, "the data")
    if unknown := _unknown_labels(answers, judge.labels):
        print(unknown)
    for name in by:
        if not any(name in answer.fields for answer in answers):
            known = sorted({field for answer in answers for field in answer.fields})
            raise UserError(f"--by {name}: no row has that field{near(name, known)}")
    odds_NK = judge.judge([answer.dialogue for answer in answers])
    thresholds_K = judge.thresholds_K
    margin_N = flag_margin(odds_NK, thresholds_K)
    judged = Judged(answers, prompts_N, judge.labels, odds_NK, odds_NK > thresholds_K, margin_N)
    if out is not None:
        written = _write(out, judged, keep)
        print(f"{written} of {len(answers)} rows written: {out}")
    found = report(judged, by)
    if evade:
        found["evasion"] = evasion(judged, judge)
    for table in _tables(found, judge.labels):
        table_console().print(table)
    if json_file is not None:
        write_json(json_file, found)
        print(f"figures: {json_file}")


def _unknown_labels(answers: Sequence[LabelledAnswer], labels: Sequence[str]) -> str:
    """A line on labels that rows name and the judge does not know: by them nothing is judged. Empty without any."""
    counts = Counter(name for answer in answers for name in answer.unasked(labels))
    named = [f"{name!r} ({count}{meant(name, labels)})" for name, count in counts.most_common(UNKNOWN_SHOWN)]
    named += [f"{len(counts) - UNKNOWN_SHOWN} more"] if len(counts) > UNKNOWN_SHOWN else []
    return f"labels in the rows that the judge does not know: {', '.join(named)}" if named else ""


def report(judged: Judged, by: Sequence[str]) -> dict[str, Any]:
    """The share of flagged answers, of each label and by fields, with intervals; and how right they are where labels
    are known."""
    answers, labels, prompts_N, above_NK = judged.answers, judged.labels, judged.prompts_N, judged.above_NK
    found: dict[str, Any] = {
        "share": share_interval(judged.flagged_N, prompts_N),
        "labels": {name: share_interval(above_NK[:, k], prompts_N) for k, name in enumerate(labels)},
        "by": {name: shares_by([a.fields.get(name) for a in answers], judged.flagged_N, prompts_N) for name in by},
    }
    truth_NK = np.array([answer.truth(labels) for answer in answers], dtype=np.int8)
    if (truth_NK >= 0).any():
        found["against_labels"] = figures(judged.odds_NK, truth_NK, above_NK, judged.margin_N, labels)
    return found


def evasion(judged: Judged, judge: Judge) -> dict[str, Any]:
    """Of the flagged answers the share that is flagged no more once question and answer are obfuscated."""
    flagged_N = judged.flagged_N
    caught = [answer for answer, flagged in zip(judged.answers, flagged_N.tolist(), strict=True) if flagged]
    if not caught:
        return {}
    found = {}
    for name, change in OBFUSCATIONS.items():
        asked: list[Dialogue] = [
            ([change(turn) for turn in a.turns], None if a.answer is None else change(a.answer), a.system)
            for a in caught
        ]
        passes_N = flag_margin(judge.judge(asked), judge.thresholds_K) <= 0
        found[name] = share_interval(passes_N, judged.prompts_N[flagged_N])
    return found


def find_judge(model: str | None, keywords: str | None) -> Judge:
    """The moderation model in a folder, or a keyword rail: our own lists, or a YAML file of label: [words].

    Raises UserError for neither or both, and for a file that is none.
    """
    if (model is None) == (keywords is None):
        raise UserError("give --model FOLDER (a moderation model) or --keywords FILE|beavertails, one of them")
    if model is not None:
        from beaver_ray.models.moderator import Moderator

        return Moderator(model)
    assert keywords is not None
    if keywords == "beavertails":
        return KeywordRail(KEYWORDS)
    lists = read_yaml(Path(keywords), frozenset())
    bad = [
        name
        for name, words in lists.items()
        if not isinstance(words, list) or not words or not all(str(word).strip() for word in words)
    ]
    if bad or not lists:
        raise UserError(f"{keywords}: {bad[0] if bad else 'the file'} must be a label with a list of words")
    for name, words in lists.items():
        for word in words:
            if not isinstance(word, str):  # what it was written as is not known any more: 0123 is 83 here
                raise UserError(f"{keywords}: {name} has {word!r}, which YAML reads as no text; put it into quotes")
    return KeywordRail({str(name): words for name, words in lists.items()})


def _write(out: Path, judged: Judged, keep: str) -> int:
    """A line for each row that is kept, with all that it said; returns how many. The file is whole or absent."""
    answers, labels, above_NK, flagged_N = judged.answers, judged.labels, judged.above_NK, judged.flagged_N
    probability_NK = expit(judged.odds_NK)
    kept_N: np.ndarray = np.ones(len(answers), dtype=bool) if keep == "all" else flagged_N == (keep == "flagged")
    rows = (
        {
            **answer.fields,
            **answer.system_row,
            "prompt": answer.turns[0] if len(answer.turns) == 1 else list(answer.turns),
            **({} if answer.answer is None else {"response": answer.answer}),
            **({} if answer.safe is None else {"is_safe": answer.safe}),
            **({"labels": dict(answer.labels)} if answer.labels else {}),
            "flagged": bool(flagged_N[row]),
            "flagged_labels": [name for k, name in enumerate(labels) if above_NK[row, k]],
            "probabilities": {n: round(float(probability_NK[row, k]), 6) for k, n in enumerate(labels)},
        }
        for row, answer in enumerate(answers)
        if kept_N[row]
    )
    try:
        write_rows(out, rows)
    except OSError as error:
        out.with_name(f"{out.name}.part").unlink(missing_ok=True)
        raise UserError(f"cannot write {out}: {first_line(error)}") from None
    return int(kept_N.sum())


def _tables(found: dict[str, Any], labels: Sequence[str]) -> list[Table]:
    known = found.get("against_labels")
    table = Table(title="Flagged, with 95 % intervals", title_justify="left")
    for title in ("label", "flagged", "interval", "answers", *(("precision", "recall", "F1") if known else ())):
        table.add_column(title, justify="left" if title == "label" else "right", overflow="fold")
    rows = [("any", found["share"], known and known["flagged"])]
    rows += [(name, found["labels"][name], known and known["labels"][name]) for name in labels]
    for name, share, right in rows:
        figures_of = [right[key] for key in ("precision", "recall", "f1")] if right else []
        # Nobody knows the precision of a label that no row is known to have, or that none is flagged with.
        shown = [f"{figure:.3f}" if np.isfinite(figure) else "unknown" for figure in figures_of]
        table.add_row(escape(name), *_cells(share), *shown)
    tables = [table]
    others = {f"by {name}": values for name, values in found["by"].items()}
    others |= {"Flagged answers that pass once obfuscated": found["evasion"]} if found.get("evasion") else {}
    for title, values in others.items():
        table = Table(title=escape(title), title_justify="left")
        for column in ("value", "share", "interval", "answers"):
            table.add_column(column, justify="left" if column == "value" else "right", overflow="fold")
        for value, share in values.items():
            table.add_row(escape(value), *_cells(share))
        tables.append(table)
    return tables


def _cells(share: dict[str, Any]) -> tuple[str, str, str]:
    return f"{share['mean']:.3f}", f"{share['low']:.3f} to {share['high']:.3f}", str(share["n"])
