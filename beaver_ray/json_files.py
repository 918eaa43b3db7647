"""Files of JSON: one object, or rows as lines. What is written is whole or absent, and JSON that any reader takes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from beaver_ray.errors import UserError, first_line


def json_line(row: Mapping[str, Any]) -> str:
    """A row as a line of JSON, its end included, as `as_json` writes it."""
    return as_json(row) + "\n"


def as_json(content: Any, indent: int | None = None) -> str:
    """The JSON of a value: what JSON has no form for (dates, bytes) is text, and a number that is not finite null.

    Half a character, which no file can hold, is escaped.
    """
    try:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=indent)
    except (TypeError, ValueError):
        text = json.dumps(plain(content), ensure_ascii=False, indent=indent)
    return text.encode("utf-8", "backslashreplace").decode()


def plain(value: Any) -> Any:
    """What JSON can hold of a value: None for a number that is not finite, text for what it has no form for."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def check_writable(*files: Path | None) -> None:
    """UserError, before hours of work, for a file that could not be written after them; makes its folder."""
    for file in filter(None, files):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {file}: {first_line(error)}") from None
        if file.is_dir() or not os.access(file.parent, os.W_OK):
            raise UserError(f"cannot write {file}: {'it is a folder' if file.is_dir() else 'its folder is read-only'}")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines; the file is whole or absent."""
    write_lines(path, map(json_line, rows))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines, their ends included; the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    part.rename(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that `write_rows` wrote. Raises UserError for anything else."""
    from beaver_ray.data.files import file_rows

    try:
        rows = [json.loads(row) if isinstance(row, str) else row for row in file_rows(path)]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} has a line that is not JSON ({first_line(error)}); write the file again") from None
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} has a row that is no object; write the file again")
    return rows


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one object, indented; the file is whole or absent."""
    write_lines(path, [as_json(content, indent=2) + "\n"])


def read_json(file: Path) -> dict[str, Any] | None:
    """What a run has written into a file of one JSON object; None before it is there."""
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
