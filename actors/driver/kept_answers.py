"""Answers that are sampled block by block and kept as soon as a block is whole: a resumed run asks what is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.driver.processes import Roles
from beaver_ray.json_files import read_rows, write_rows
from beaver_ray.runs import RunFolder

Row = dict[str, Any]


@dataclass(frozen=True)
class KeptAnswers:
    """The answers to prompts 0, 1, ..., in files of ``folder``, a block of prompts each."""

    run: RunFolder
    title: str
    """Of the line that shows progress."""
    folder: Path
    """Its name tells apart whatever decides the answers."""
    prompts: int
    answers: int
    """To each prompt."""
    block: int
    """Prompts whose answers are kept together."""
    before: int
    """Blocks of this run that came earlier: a block is a step of metrics.jsonl."""

    def rows(
        self,
        start: Callable[[], AbstractContextManager[Roles]],
        ask: Callable[[range, Roles], list[Row]],
        figures: Callable[[list[Row]], dict[str, float]],
    ) -> list[list[Row]]:
        """The answers to all prompts, block by block, in order; blocks that an earlier start has left are read.

        start: the roles that are asked, where a block is missing. ask: the answers to these prompts, with their
        ``tokens``, and whether they were ``truncated``. figures: what metrics.jsonl is to say of a block beside these.
        """
        parts = [range(n, min(n + self.block, self.prompts)) for n in range(0, self.prompts, self.block)]
        files = [self.folder / f"{part.start:08d}.jsonl" for part in parts]
        blocks = [read_rows(file) if file.is_file() else None for file in files]
        with self.run.progress(self.title, self.prompts) as progress:

            def done(number: int, rows: list[Row], seconds: float | None) -> None:
                self.run.log(self.before + 1 + number, {**_sizes(rows, seconds), **figures(rows)})
                progress.advance(len(rows) // self.answers)

            for number, rows in enumerate(blocks):
                if rows is not None:
                    done(number, rows, None)
            if missing := [number for number, rows in enumerate(blocks) if rows is None]:
                with start() as roles:
                    for number in missing:
                        began = time.perf_counter()
                        rows = ask(parts[number], roles)
                        write_rows(files[number], rows)
                        blocks[number] = rows
                        done(number, rows, time.perf_counter() - began)
        return [rows for rows in blocks if rows is not None]


def _sizes(rows: list[Row], seconds: float | None) -> dict[str, float]:
    """Of one block of answers, which took so long; None for answers that were there."""
    sizes = {
        "answers": len(rows),
        "tokens": sum(row["tokens"] for row in rows) / len(rows),
        "cut": sum(row["truncated"] for row in rows) / len(rows),
    }
    return sizes | ({"throughput/samples_per_second": len(rows) / seconds} if seconds else {})
