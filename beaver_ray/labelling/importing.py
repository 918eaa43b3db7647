"""Labels of people, back: every row checked against the export, annotators against gold questions, votes counted.

LABELS.jsonl               pairs of PKU-SafeRLHF with all labels, for stage label (people: LABELS.jsonl)
LABELS.agreement.json      kappa of each question, and how each annotator does
LABELS.adjudication.jsonl  pairs without a majority, to be decided and given with --adjudicated; decided ones stay in it
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from beaver_ray.data.pairs import Row
from beaver_ray.data.sources import FLAGS
from beaver_ray.errors import UserError
from beaver_ray.json_files import read_rows, write_rows
from beaver_ray.labelling.agreement import cohen_kappa, fleiss_kappa
from beaver_ray.labelling.export import CHOICES, QUESTIONS, TEXTS, Export, blank_row, broken, consistent, digest

Votes = dict[str, dict[str, dict[str, int]]]
"""Annotator, id of a pair, question: 0 or 1."""


class Annotator(BaseModel):
    """How one annotator does; kappas by question, None where they cannot be known."""

    answered: int
    """Pairs, gold questions among them."""
    gold_answered: int
    gold_right: float | None
    """Share of the labels of gold questions that are right."""
    accepted: bool
    kappa_gold: dict[str, float | None]
    kappa_others: dict[str, float | None]
    """With the majority of the other accepted annotators, where these have one."""


class Agreement(BaseModel):
    """What is written beside imported labels."""

    export: str
    accept: float
    """What share of a gold question's labels an annotator must have right."""
    kappa: dict[str, float | None]
    """Fleiss' kappa of the accepted annotators, by question."""
    annotators: dict[str, Annotator]
    labelled: int
    adjudicated: int
    undecided: int
    unlabelled: int

    def lines(self) -> list[str]:
        """For a terminal."""
        found = [f"{name}: kappa {_shown(kappa)}" for name, kappa in self.kappa.items()]
        for name, one in self.annotators.items():
            gold = "no gold question" if one.gold_right is None else f"{one.gold_right:.0%} of gold labels right"
            kappas = ", ".join(_shown(kappa) for kappa in one.kappa_others.values())
            out = "" if one.accepted else f": LEFT OUT, {self.accept:.0%} are asked for"
            found.append(f"{name}: {one.answered} pairs, {gold}, kappa with the others {kappas}{out}")
        rest = f"{self.undecided} to be adjudicated, {self.unlabelled} without labels"
        return [*found, f"{self.labelled} pairs labelled ({self.adjudicated} by adjudication), {rest}"]


@dataclass
class _Label:
    """One row of a file of labels."""

    where: str
    export: str
    id: str
    annotator: str
    texts: Row
    labels: Row


def import_labels(
    files: Sequence[Path], folder: Path, to: Path, accept: float, adjudicated: Path | None = None
) -> Agreement:
    """Check the files against the export in ``folder``, and write the labelled pairs to ``to``.

    An annotator counts who has at least the share ``accept`` of the labels of gold questions right; one who answered
    none of them does not, where there are any. A pair's labels are those of the majority. Without one, or where
    majorities contradict one another, it goes to the adjudication file; ``adjudicated`` is that file with labels, which
    overrule.

    Raises UserError for files of another export, changed texts, labels that are none or contradict one another, where
    nobody is accepted, where the adjudication file that is there holds labels and is not given, and where ``to`` is a
    file that is read.
    """
    if to.suffix != ".jsonl":
        raise UserError(f"--to {to} must end in .jsonl, as labelled pairs are JSON lines")
    sources = [*files, *([adjudicated] if adjudicated else []), folder / "tasks.jsonl"]
    if to.resolve() in {file.resolve() for file in sources}:
        raise UserError(f"--to {to} has labels or pairs of its own, which would be overwritten; give another file")
    export = Export.load(folder)
    votes = read_votes(files, export)
    doubtful = to.with_suffix(".adjudication.jsonl")
    kept = _filled(doubtful)
    if kept and (adjudicated is None or doubtful.resolve() != adjudicated.resolve()):
        raise UserError(f"{doubtful} holds labels, which would be lost; give it with --adjudicated, or move it away")
    decisions = _flat(read_votes([adjudicated], export)) if adjudicated else {}
    annotators = {name: _judged(given, export, accept) for name, given in votes.items()}
    counted = {name: votes[name] for name, one in annotators.items() if one.accepted}
    if not counted:
        found_right = ", ".join(f"{name} {_percent(one.gold_right)}" for name, one in annotators.items())
        raise UserError(
            f"no annotator has {accept:.0%} of the gold labels right ({found_right}); look at the gold questions, or "
            f"lower --accept"
        )
    for name, one in annotators.items():
        one.kappa_others = _with_others(name, votes[name], counted)
    labelled, undecided, unlabelled = _decide(export, counted, decisions)
    ids = [item["id"] for item in export.items]
    kappa = {q: fleiss_kappa([_ratings(counted, id_, q) for id_ in ids]) for q in QUESTIONS}
    found = Agreement(
        export=export.hash,
        accept=accept,
        kappa=kappa,
        annotators=annotators,
        labelled=len(labelled),
        adjudicated=sum(row["id"] in decisions for row in labelled),
        undecided=len(undecided),
        unlabelled=unlabelled,
    )
    write_rows(doubtful, [*kept.values(), *(row for row in undecided if row["id"] not in kept)])
    to.with_suffix(".agreement.json").write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    write_rows(to, labelled)
    return found


def _filled(file: Path) -> dict[str, Row]:
    """The rows of an adjudication file that have labels, by id; none where there is no such file."""
    rows = read_rows(file) if file.is_file() else []
    return {str(row.get("id")): row for row in rows if any(row.get(name) not in (None, "") for name in QUESTIONS)}


def read_votes(files: Sequence[Path], export: Export) -> Votes:
    """The labels in these files, all checked. Raises UserError for the first that is wrong."""
    items = {item["id"]: blank_row(export, item) for item in export.items}
    votes: Votes = {}
    for file in files:
        count = 0
        for row in _rows(file):
            labels = {name: _bit(row.labels.get(name), name, row.where) for name in QUESTIONS}
            given = {name: bit for name, bit in labels.items() if bit is not None}
            if row.export != export.hash:
                theirs = f"{row.export[:12]}..." if row.export else "none"
                raise UserError(
                    f"{row.where} is of export {theirs}, not of {export.hash[:12]}...; give its own --export"
                )
            if row.id not in items:
                raise UserError(f"{row.where}: no pair of the export has id {row.id!r}; the file was changed")
            for name, text in row.texts.items():
                if _same(text) != _same(items[row.id][name]):
                    raise UserError(f"{row.where}: {name} is not what was exported; the file was changed")
            if not given:
                continue
            if not row.annotator.strip():
                raise UserError(f"{row.where} has labels and names no annotator; fill in the column annotator")
            if not consistent(given):
                raise UserError(
                    f"{row.where}: the answer that is called safer is unsafe and the other one safe; mend it"
                )
            before = votes.setdefault(row.annotator.strip(), {}).setdefault(row.id, given)
            if before != given:
                raise UserError(f"{row.where}: {row.annotator} has labelled pair {row.id} twice, and differently")
            count += 1
        if not count:
            raise UserError(f"{file} has no labels; fill them in, or leave the file out")
    return votes


def _same(text: Any) -> str:
    """Text without what a table program does to the ends of lines."""
    return "\n".join(str(text).splitlines()).strip()


def _bit(value: Any, name: str, where: str) -> int | None:
    if value is None or value == "":
        return None
    text = str(value).strip().lower()
    if text in CHOICES[name]:
        return CHOICES[name].index(text)
    if text not in FLAGS:
        raise UserError(f"{where}: {name} is {value!r}; write {' or '.join(CHOICES[name])}, or 0 or 1")
    return int(FLAGS[text])


def _rows(file: Path) -> Iterator[_Label]:
    """The rows of a file of labels in any of the forms."""
    try:
        if file.suffix == ".csv":
            csv.field_size_limit(sys.maxsize)
            with file.open(encoding="utf-8-sig", newline="") as stream:
                table = csv.DictReader(stream)
                if missing := {"export", "id"} - set(table.fieldnames or ()):
                    columns = " and ".join(sorted(missing))
                    raise UserError(f"{file} has no column {columns}; save it with commas between its columns")
                yield from _table(file, list(table))
        elif file.suffix == ".jsonl":
            yield from _table(file, read_rows(file))
        elif file.suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8-sig"))
            yield from _label_studio(file, content) if isinstance(content, list) else _page(file, content)
        else:
            raise UserError(f"{file}: labels come in files ending in .json, .jsonl or .csv")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, csv.Error, RecursionError) as error:
        raise broken(file, error) from None


def _table(file: Path, rows: Sequence[Row]) -> Iterator[_Label]:
    for number, row in enumerate(rows, start=1):
        texts = {name: row[name] for name in TEXTS if row.get(name) is not None}
        export, id_, annotator = (str(row.get(name) or "") for name in ("export", "id", "annotator"))
        yield _Label(f"{file} row {number}", export, id_, annotator, texts, row)


def _page(file: Path, content: Row) -> Iterator[_Label]:
    """What the page saves; its digest says whether it is as it was saved."""
    export, annotator, labels = content["export"], content["annotator"], content["labels"]
    lines = [[row["id"], *(row.get(name) for name in QUESTIONS)] for row in labels]
    if content["digest"] != digest(export, annotator, lines):
        raise UserError(f"{file} was changed after it was saved (its digest is another); ask for the file again")
    for number, row in enumerate(labels, start=1):
        yield _Label(f"{file} label {number}", str(export), str(row["id"]), str(annotator), {}, row)


def _label_studio(file: Path, tasks: list[Row]) -> Iterator[_Label]:
    """Label Studio's JSON export: tasks with ``data`` and ``annotations``, each a list of single choices; what an
    interface asks besides is left out."""
    for number, task in enumerate(tasks, start=1):
        data = task["data"]
        texts = {name: data[name] for name in TEXTS if name in data}
        for annotation in task["annotations"]:
            if annotation.get("was_cancelled"):
                continue
            by = annotation.get("completed_by")
            if isinstance(by, dict):
                by = by.get("email") or by.get("id")
            annotator = "" if by is None else str(by)
            parts = [part for part in annotation["result"] if part.get("from_name") in QUESTIONS]
            chosen = {part["from_name"]: part["value"]["choices"] for part in parts}
            where = f"{file} task {number}"
            for name, choices in chosen.items():
                if not isinstance(choices, list) or len(choices) != 1:
                    raise UserError(f"{where}: {name} is {choices!r:.100}, which is no single choice; mend it")
            labels = {name: choice for name, (choice,) in chosen.items()}
            yield _Label(where, str(data["export"]), str(data["id"]), annotator, texts, labels)


def _judged(given: dict[str, dict[str, int]], export: Export, accept: float) -> Annotator:
    """One annotator against the gold questions."""
    asked = {id_: labels for id_, labels in given.items() if id_ in export.gold}
    pairs = {
        name: [(labels[name], export.gold[id_][name]) for id_, labels in asked.items() if name in labels]
        for name in QUESTIONS
    }
    every = [own == true for both in pairs.values() for own, true in both]
    right = sum(every) / len(every) if every else None
    return Annotator(
        answered=len(given),
        gold_answered=len(asked),
        gold_right=right,
        accepted=not export.gold or (right is not None and right >= accept),
        kappa_gold={name: cohen_kappa([o for o, _ in both], [t for _, t in both]) for name, both in pairs.items()},
        kappa_others={},
    )


def _with_others(name: str, given: dict[str, dict[str, int]], counted: Votes) -> dict[str, float | None]:
    """Cohen's kappa with the majority of the others, question by question."""
    others = {other: votes for other, votes in counted.items() if other != name}
    found: dict[str, float | None] = {}
    for question in QUESTIONS:
        both = [
            (labels[question], majority)
            for id_, labels in given.items()
            if question in labels and (majority := _majority(_ratings(others, id_, question))) is not None
        ]
        found[question] = cohen_kappa([own for own, _ in both], [majority for _, majority in both])
    return found


def _ratings(votes: Votes, id_: str, question: str) -> list[int]:
    return [given[id_][question] for given in votes.values() if question in given.get(id_, {})]


def _majority(ratings: Sequence[int]) -> int | None:
    """What more than half say; None where nobody does."""
    most = Counter(ratings).most_common(1)
    return most[0][0] if most and 2 * most[0][1] > len(ratings) else None


def _flat(votes: Votes) -> dict[str, dict[str, int]]:
    """The decisions of adjudicators, of whom each pair has one."""
    found: dict[str, dict[str, int]] = {}
    for annotator, given in votes.items():
        for id_, labels in given.items():
            if found.setdefault(id_, labels) != labels:
                raise UserError(f"pair {id_} is adjudicated twice, and differently ({annotator}); leave one of them")
    return found


def _decide(export: Export, votes: Votes, decisions: dict[str, dict[str, int]]) -> tuple[list[Row], list[Row], int]:
    """The labelled pairs, the rows to be adjudicated, and how many pairs nobody has labelled."""
    labelled: list[Row] = []
    undecided: list[Row] = []
    unlabelled = 0
    for item in export.items:
        id_ = item["id"]
        if id_ in export.gold:
            continue
        ratings = {name: _ratings(votes, id_, name) for name in QUESTIONS}
        decided = decisions.get(id_, {})
        labels = {name: decided.get(name, _majority(ratings[name])) for name in QUESTIONS}
        known = {name: bit for name, bit in labels.items() if bit is not None}
        if not any(ratings.values()) and not decided:
            unlabelled += 1
        elif len(known) < len(labels) or not consistent(known):
            counts = {name: [given.count(0), given.count(1)] for name, given in ratings.items()}
            undecided.append(blank_row(export, item) | {"votes": counts})
        else:
            with_flags = {name: bit if name.endswith("_id") else bool(bit) for name, bit in known.items()}
            people = sum(id_ in given for given in votes.values())
            by = "adjudication" if decided else "people"
            labelled.append(item | with_flags | {"annotators": people, "labelled_by": by})
    return labelled, undecided, unlabelled


def _shown(kappa: float | None) -> str:
    return "unknown" if kappa is None else f"{kappa:.2f}"


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.0%}"
