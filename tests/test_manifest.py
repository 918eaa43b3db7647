"""Rows of any data as JSON lines, and what a manifest takes of an evaluation."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from actors.stages.label import Label
from beaver_ray.manifest import read_rows, stage_manifest, write_rows


def test_rows_of_a_table_become_json(tmp_path: Path) -> None:
    """As Parquet may have them: dates, bytes, numbers that are none."""
    odd = {"at": datetime.date(2024, 2, 29), "raw": b"x", "x": float("nan"), "more": [{"y": float("inf")}, True, 1]}
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "ä\u2028", "n": 1}, odd])
    assert read_rows(tmp_path / "rows.jsonl") == [
        {"prompt": "ä\u2028", "n": 1},
        {"at": "2024-02-29", "raw": "b'x'", "x": None, "more": [{"y": None}, True, 1]},
    ]


def test_scores_of_other_programs_are_no_means(tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "p", "response_0": "a", "response_1": "b"}])
    stage = Label(stage="label", name="l", workspace=str(tmp_path), pairs=str(tmp_path / "pairs.jsonl"), world="w")
    figure = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 4}
    task = {"version": 1, "n": 3, "scores": {"acc": {"value": 1.0, "stderr": None}}}
    found = {"prompts": 4, "samples": 4, "reward": figure, "bridges": {"lm-eval": {"tiny": task}}}
    stage.folder.mkdir()
    (stage.folder / "evaluation.json").write_text(json.dumps(found))
    assert stage_manifest(stage).evaluation == {"reward": 0.5}
