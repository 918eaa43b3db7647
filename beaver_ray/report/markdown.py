"""Tables in Markdown, whatever their cells hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The table; bars in cells are escaped, and line breaks become spaces."""
    lines = [_line(titles), f"|{'|'.join('---' for _ in titles)}|", *map(_line, rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    shown = [" ".join(cell.splitlines()).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(shown)} |"
