"""Labels of people for the tests: pairs, files in every form as annotators hand them back."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from beaver_ray.data.pairs import pair_id
from beaver_ray.json_files import read_rows, write_rows
from beaver_ray.labelling.export import QUESTIONS, Export, digest

Row = dict[str, Any]
GOOD: Row = {
    "better_response_id": 1,
    "is_response_0_safe": 1,
    "is_response_1_safe": 0,
    "safer_response_id": 0,
}
OTHER: Row = {name: 1 - bit for name, bit in GOOD.items()}


def pair(number: int, **more: Any) -> Row:
    texts = {"prompt": f"question {number}", "response_0": f"answer {number}, mild", "response_1": f"{number}: harsh"}
    return {"id": pair_id(texts), **texts, "model_0": "m", **more}


def fill(tmp_path: Path, annotator: str, labels: Callable[[Row], Row], name: str | None = None) -> Path:
    """A filled-in copy of tasks.jsonl; ``labels`` says which of a row."""
    rows = [row | {"annotator": annotator} | labels(row) for row in read_rows(tmp_path / "out" / "tasks.jsonl")]
    write_rows(tmp_path / (name or f"{annotator}.jsonl"), rows)
    return tmp_path / (name or f"{annotator}.jsonl")


def page_file(tmp_path: Path, export: Export, annotator: str, labels: Row) -> Path:
    """What the page saves where all pairs get these labels."""
    rows = [{"id": item["id"], **labels} for item in export.items]
    lines = [[row["id"], *(row[name] for name in QUESTIONS)] for row in rows]
    content = {"export": export.hash, "annotator": annotator, "labels": rows}
    path = tmp_path / f"{annotator}.json"
    path.write_text(json.dumps(content | {"digest": digest(export.hash, annotator, lines)}))
    return path


def label_studio(tmp_path: Path, by: Any, labels: Row) -> Path:
    """Label Studio's export of one annotator, as its documentation shows it."""
    tasks = json.loads((tmp_path / "out" / "label_studio.json").read_text())
    result = [
        {"from_name": name, "to_name": "response_0", "type": "choices", "value": {"choices": [str(bit)]}}
        for name, bit in labels.items()
    ]
    for number, task in enumerate(tasks):
        cancelled = {"id": 2, "completed_by": by, "was_cancelled": True, "result": result[:1]}
        own = {"id": 1, "completed_by": by, "was_cancelled": False, "result": result}
        task |= {"id": number, "annotations": [own, cancelled], "predictions": []}
    path = tmp_path / "label_studio_export.json"
    path.write_text(json.dumps(tasks))
    return path


def write_table(file: Path, rows: Sequence[Row], encoding: str = "utf-8") -> None:
    """A CSV file with the columns of the first row."""
    with file.open("w", encoding=encoding, newline="") as stream:
        table = csv.DictWriter(stream, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)
