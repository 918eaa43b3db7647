"""Answers as an arena holds them, and files of them: one JSON object a line with ``prompt`` and ``response``.

``prompt`` is a text or a list of turns, several lines of one prompt are several answers, and ``ended: false`` says of
one that it was cut. What else a line says is not read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from beaver_ray.data.mixing import prompt_key
from beaver_ray.data.sources import RawSample
from beaver_ray.errors import UserError, first_line
from beaver_ray.manifest import read_rows, write_rows

Answered = dict[tuple[str, ...], list[tuple[str, bool]]]
"""By the turns of a prompt its answers, each with whether it came to its end."""


@dataclass(frozen=True)
class Said:
    """A policy's K answers to each of N prompts: their texts, and which of them came to their end, [N, K]."""

    texts: list[list[str]]
    ended_NK: NDArray[np.bool_]

    @property
    def answers(self) -> int:
        """K."""
        return int(self.ended_NK.shape[1])

    @classmethod
    def of_rounds(cls, answers: Sequence[tuple[str, bool]], prompts: int) -> Said:
        """From one answer to each prompt, then another to each, and so on."""
        rounds = len(answers) // prompts
        texts = [[answers[k * prompts + n][0] for k in range(rounds)] for n in range(prompts)]
        ended = np.array([whole for _, whole in answers], dtype=bool).reshape(rounds, prompts).T
        return cls(texts, ended)

    @classmethod
    def of_file(cls, answered: Answered, samples: Sequence[RawSample]) -> Said:
        """A file's answers to these prompts: as many to each as the prompt with the fewest has."""
        found = [answered[prompt_key(sample)] for sample in samples]
        fewest = min(len(answers) for answers in found)
        texts = [[text for text, _ in answers[:fewest]] for answers in found]
        return cls(texts, np.array([[whole for _, whole in answers[:fewest]] for answers in found], dtype=bool))

    def some(self, kept: NDArray[np.integer]) -> Said:
        """The answers to some prompts, by their numbers."""
        return Said([self.texts[n] for n in kept], self.ended_NK[kept])


def keep(path: Path, said: Said, gave_in_at_R: NDArray[np.int64] | None) -> None:
    """Write what a policy has said, and at which turn it gave in to insistence; the file is whole or absent."""
    gave_in = None if gave_in_at_R is None else gave_in_at_R.tolist()
    write_rows(path, [{"texts": said.texts, "ended": said.ended_NK.tolist(), "gave_in_at": gave_in}])


def read_kept(path: Path) -> tuple[Said, NDArray[np.int64] | None]:
    """What `keep` wrote."""
    (row,) = read_rows(path)
    gave_in = row["gave_in_at"]
    said = Said(row["texts"], np.array(row["ended"], dtype=bool))
    return said, None if gave_in is None else np.array(gave_in, dtype=np.int64)


def read_answers(path: Path) -> Answered:
    """A file of finished answers. UserError where it cannot be read, or a line is none of an answer."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # texts may hold other ends of lines
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the answers in {path}: {getattr(error, 'strerror', None) or error}") from None
    found: Answered = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            turns, response, ended = _row(path, number, line)
            found.setdefault(turns, []).append((response, ended))
    if not found:
        raise UserError(f"{path} holds no answers; write one JSON object a line with prompt and response")
    return found


def _row(path: Path, number: int, line: str) -> tuple[tuple[str, ...], str, bool]:
    where = f"{path} line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {first_line(error)}") from None
    prompt, response = (row.get("prompt"), row.get("response")) if isinstance(row, dict) else (None, None)
    turns = [prompt] if isinstance(prompt, str) else prompt if isinstance(prompt, list) else []
    whole = len(turns) % 2 == 1 and all(isinstance(turn, str) for turn in turns)
    if not whole or not isinstance(response, str):
        raise UserError(f"{where} needs prompt (a text, or an odd number of turns) and response (a text)")
    return tuple(turns), response, row.get("ended") is not False
