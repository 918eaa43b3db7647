"""Rows of any data, and figures, as JSON that any reader takes."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from beaver_ray.json_files import json_line, read_json, read_rows, write_json, write_rows


def test_rows_of_a_table_become_json(tmp_path: Path) -> None:
    """As Parquet may have them: dates, bytes, numbers that are none."""
    odd = {"at": datetime.date(2024, 2, 29), "raw": b"x", "x": float("nan"), "more": [{"y": float("inf")}, True, 1]}
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "ä\u2028", "n": 1}, odd])
    assert read_rows(tmp_path / "rows.jsonl") == [
        {"prompt": "ä\u2028", "n": 1},
        {"at": "2024-02-29", "raw": "b'x'", "x": None, "more": [{"y": None}, True, 1]},
    ]


def test_half_a_character_in_a_further_field(tmp_path: Path) -> None:
    """JSON can write one, and no file as it is."""
    rows = json.loads('[{"prompt": "p", "note": "cut \\ud83d", "cut \\ude00": "\\\\ud83d"}]')
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows and len(rows[0]["note"]) == 5
    assert json_line({"a": "\ud83d\n"}) == '{"a": "\\ud83d\\n"}\n'


def test_an_object_is_written_whole_with_null_for_what_is_no_number(tmp_path: Path) -> None:
    """By another reader: NaN and Infinity are no JSON."""
    file = tmp_path / "new" / "figures.json"
    assert read_json(file) is None
    write_json(file, {"a": float("nan"), "b": [float("-inf"), 0.1], "text": "é\ud83d"})

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    found = {"a": None, "b": [None, 0.1], "text": "é\ud83d"}
    assert json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse) == found == read_json(file)
    assert [path.name for path in file.parent.iterdir()] == ["figures.json"], "nothing is left beside it"
