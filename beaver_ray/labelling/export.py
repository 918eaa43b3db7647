"""Pairs for people: JSON lines, a table, tasks for Label Studio, and a page that works offline.

FOLDER/export.json        which pairs, and the known answers of gold questions: for whoever imports, not for annotators
       tasks.jsonl, tasks.csv                   a row a pair, with columns to fill in
       label_studio.json, label_studio.xml      tasks, and the labelling interface
       page.html, guideline.md
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from beaver_ray.data.pairs import LABELS, OTHER_LABELS, Row, pair_id, read_pairs, unlabelled_samples
from beaver_ray.data.sources import BadRow
from beaver_ray.errors import UserError, first_line
from beaver_ray.json_files import read_rows, write_rows
from beaver_ray.manifest import file_hash

EXPORT = "export.json"
QUESTIONS = {
    "better_response_id": "Which answer is better, harm aside?",
    "is_response_0_safe": "Is the first answer safe?",
    "is_response_1_safe": "Is the second answer safe?",
    "safer_response_id": "Which answer is safer, helpfulness aside?",
}
CHOICES = {name: ("first", "second") if name.endswith("_id") else ("unsafe", "safe") for name in QUESTIONS}
"""What the labels 0 and 1 are to people."""
TEXTS = ("prompt", "response_0", "response_1")


class Export(BaseModel):
    """What was given to people to label."""

    model_config = ConfigDict(extra="forbid")

    pairs: str
    """The file that the pairs are of."""
    pairs_sha256: str
    seed: int
    items: list[Row]
    """Pairs and gold questions in the order shown: id, prompt (and system), response_0, response_1."""
    gold: dict[str, dict[str, int]]
    """Labels 0 or 1 of the gold questions, by id."""
    hash: str

    @property
    def own_hash(self) -> str:
        """SHA-256 of the items and the known answers, in hex."""
        said = json.dumps([self.items, self.gold], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(said.encode()).hexdigest()

    @model_validator(mode="after")
    def _unchanged(self) -> Export:
        if self.hash != self.own_hash:
            raise ValueError("its pairs or gold answers were changed since they were exported; export again")
        try:
            unlabelled_samples(self.items)
        except BadRow as reason:
            raise ValueError(f"one of its items is no pair ({reason}); export again") from None
        if wrong := [item.get("id") for item in self.items if item.get("id") != pair_id(item)]:
            raise ValueError(f"pair {wrong[0]} has other texts than when it was made")
        if wrong := [id_ for id_, labels in self.gold.items() if labels.keys() != QUESTIONS.keys()]:
            raise ValueError(f"gold question {wrong[0]} has not all four labels; export again")
        return self

    @staticmethod
    def load(folder: Path) -> Export:
        """The export in a folder. UserError where there is none, or it was changed."""
        path = folder / EXPORT
        try:
            return Export.model_validate_json(path.read_bytes())
        except OSError:
            raise UserError(f"no export in {folder}: it has no {EXPORT}; give the folder of label export") from None
        except ValidationError as error:
            said = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
            raise UserError(f"{path}: {said}") from None


def label_bits(row: Row, where: str) -> dict[str, int]:
    """All four labels of a row as 0 or 1. UserError where one is missing or is neither."""
    found = {}
    for name in LABELS:
        value = row.get(name)
        if value not in (0, 1):  # true and false are such
            raise UserError(f"{where}: {name} is {value!r}; it must be 0 or 1, true or false")
        found[name] = int(value)
    if not consistent(found):
        raise UserError(f"{where}: the answer that is called safer is unsafe and the other one safe")
    return found


def consistent(labels: dict[str, int]) -> bool:
    """Whether the safer answer is not the only unsafe one, as far as that is said."""
    safer, safe = labels.get("safer_response_id"), [labels.get(f"is_response_{k}_safe") for k in (0, 1)]
    return safer is None or safe[safer] != 0 or safe[1 - safer] != 1


def shown_prompt(item: Row) -> str:
    """The prompt as one text, its turns one below the other."""
    turns = [item["prompt"]] if isinstance(item["prompt"], str) else item["prompt"]
    system = [f"(The machine was told: {item['system']})"] if item.get("system") else []
    if len(turns) == 1:
        return "\n\n".join([*system, turns[0]])
    return "\n\n".join([*system, *(f"{('Person', 'Machine')[k % 2]}: {turn}" for k, turn in enumerate(turns))])


def export_pairs(
    pairs: Path,
    folder: Path,
    gold: Path | None,
    count: int | None,
    seed: int,
    note: Callable[[str], None] = print,
) -> Export:
    """Write ``count`` pairs of a file, or all, with the gold questions mixed in, in every form.

    gold: labelled pairs whose labels are known; all of them are asked. The order, and which pairs, depend on the seed.
    note: told of rows that are left out.

    Raises UserError where the folder holds an export already, for files without pairs, and for a gold question that
    lacks a label, or stands there twice with different ones.
    """
    if (folder / EXPORT).exists():
        raise UserError(f"{folder} holds an export already, whose labels would be lost; give another folder")
    rng = random.Random(seed)
    rows, left_out = read_pairs(read_rows(pairs), str(pairs))
    known, no_gold = read_pairs(read_rows(gold), str(gold)) if gold else ([], Counter[str]())
    if no_gold[OTHER_LABELS]:
        raise UserError(f"{gold} has {no_gold[OTHER_LABELS]} {OTHER_LABELS}; leave one of each")
    for file, reasons in ((pairs, left_out), (gold, no_gold)):
        if reasons:
            note(f"{file}: left out {', '.join(f'{number} {reason}' for reason, number in reasons.items())}")
    answers = {row["id"]: label_bits(row, f"{gold} row {number}") for number, row in enumerate(known, start=1)}
    rows = [row for row in rows if row["id"] not in answers]
    if count is not None and count < len(rows):
        rows = rng.sample(rows, count)
    if not rows:
        raise UserError(f"{pairs} has no pair that is not a gold question too; give other gold questions")
    items = [{name: row[name] for name in ("id", "system", *TEXTS) if name in row} for row in (*rows, *known)]
    rng.shuffle(items)
    made = Export.model_construct(
        pairs=str(pairs), pairs_sha256=file_hash(pairs), seed=seed, items=items, gold=answers, hash=""
    )
    made = Export.model_validate(made.model_dump() | {"hash": made.own_hash})
    folder.mkdir(parents=True, exist_ok=True)
    _write_tables(made, folder)
    _write_label_studio(made, folder)
    (folder / "guideline.md").write_text(guideline(), encoding="utf-8")
    (folder / "page.html").write_text(page(made), encoding="utf-8")
    (folder / EXPORT).write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return made


def guideline() -> str:
    """What annotators are told, as Markdown."""
    return (Path(__file__).parent / "guideline.md").read_text(encoding="utf-8")


def blank_row(export: Export, item: Row) -> Row:
    """A row to fill in."""
    texts = {"prompt": shown_prompt(item), **{name: item[name] for name in TEXTS[1:]}}
    return {"export": export.hash, "id": item["id"], **texts, "annotator": "", **dict.fromkeys(QUESTIONS)}


def _write_tables(export: Export, folder: Path) -> None:
    rows = [blank_row(export, item) for item in export.items]
    write_rows(folder / "tasks.jsonl", rows)
    with (folder / "tasks.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def _write_label_studio(export: Export, folder: Path) -> None:
    """Tasks, each an object ``data`` of texts, and an interface with a single choice for each question."""
    blank = ("annotator", *QUESTIONS)
    rows = [blank_row(export, item) for item in export.items]
    tasks = [{"data": {name: value for name, value in row.items() if name not in blank}} for row in rows]
    (folder / "label_studio.json").write_text(json.dumps(tasks, indent=1, ensure_ascii=False), encoding="utf-8")
    lines = ["<View>", *(f'  <Text name="{name}" value="${name}"/>' for name in TEXTS)]
    for name, question in QUESTIONS.items():
        about = "response_1" if "_1_" in name else "response_0"
        lines += [f'  <Header value="{question}"/>', f'  <Choices name="{name}" toName="{about}" choice="single">']
        lines += [f'    <Choice value="{word}" alias="{bit}"/>' for bit, word in enumerate(CHOICES[name])]
        lines += ["  </Choices>"]
    (folder / "label_studio.xml").write_text("\n".join([*lines, "</View>"]) + "\n", encoding="utf-8")


def page(export: Export) -> str:
    """The page: one file that needs no network, shows the pairs, keeps what is chosen and saves a file of labels."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    items = [
        {"id": item["id"], "prompt": shown_prompt(item), **{n: item[n] for n in TEXTS[1:]}} for item in export.items
    ]
    lines = [line for line in guideline().splitlines() if line]
    questions = [{"name": name, "text": text, "choices": CHOICES[name]} for name, text in QUESTIONS.items()]
    data: dict[str, Any] = {"export": export.hash, "items": items, "questions": questions}
    return environment.get_template("page.html.j2").render(data=data, guideline=lines)


def digest(export: str, annotator: str, rows: Sequence[Sequence[Any]]) -> str:
    """What the page puts below its labels: SHA-256 of lines of export, annotator, and id and labels of each row."""
    lines = [export, annotator, *(",".join("" if cell is None else str(cell) for cell in row) for row in rows)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def broken(path: Path, error: Exception) -> UserError:
    """The error for a file of labels that cannot be read at all."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"there is no file {path}; check the path")
    mend = "save it as UTF-8 (CSV UTF-8 in Excel)" if isinstance(error, UnicodeDecodeError) else "save it again"
    return UserError(f"{path} is no file of labels ({first_line(error)}); {mend}")
