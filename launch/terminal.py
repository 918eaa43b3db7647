"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console

WIDTH = 160
"""Columns where the output is a file or a pipe: by itself it would have 80, into which few tables fit."""


def table_console() -> Console:
    """Standard output: as wide as the terminal, or WIDTH where it is none."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)
