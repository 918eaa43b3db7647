"""Answers as an arena holds them, and files of them: one JSON object a line with ``prompt`` and ``response``.

``prompt`` is a text or a list of turns, ``system`` perhaps the system text that it was answered under, several lines of
one prompt are several answers, and ``ended: false`` says of one that it was cut. What else a line says is not read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from beaver_ray.arena.turns import next_turns
from beaver_ray.data.mixing import prompt_key
from beaver_ray.data.sources import RawSample, is_whole
from beaver_ray.errors import UserError, first_line
from beaver_ray.json_files import read_rows, write_rows

Asked = tuple[str | None, tuple[str, ...]]
"""A system text, None where a line has none, and the turns of a prompt."""
Answered = dict[Asked, list[tuple[str, bool]]]
"""By what was asked its answers, each with whether it came to its end."""
Dialogue = list[tuple[str, bool]]
"""The answers of one dialogue, each with whether it came to its end."""


@dataclass(frozen=True)
class Said:
    """A policy's K answers to each of N questions: their texts, and which of them came to their end, [N, K].

    A prompt is a question, and each further turn of its user is another one behind it (`beaver_ray.arena.turns`).
    """

    texts: list[list[str]]
    ended_NK: NDArray[np.bool_]
    since: list[list[tuple[str, ...]]]
    """What was said between the prompt and each answer: the policy's own earlier answers and its user's turns."""

    @property
    def answers(self) -> int:
        """K."""
        return int(self.ended_NK.shape[1])

    @classmethod
    def of_dialogues(cls, dialogues_PK: Sequence[Sequence[Dialogue]], next_turns_P: Sequence[Sequence[str]]) -> Said:
        """From K dialogues about each of P prompts, and what users say after the first answer."""
        texts, ended, since = [], [], []
        for dialogues, later in zip(dialogues_PK, next_turns_P, strict=True):
            for turn in range(1 + len(later)):
                texts.append([dialogue[turn][0] for dialogue in dialogues])
                ended.append([dialogue[turn][1] for dialogue in dialogues])
                since.append([_since(dialogue[:turn], later) for dialogue in dialogues])
        return cls(texts, np.array(ended, dtype=bool), since)

    @classmethod
    def of_file(
        cls, answered: Answered, samples: Sequence[RawSample], follow_ups: int, note: Callable[[str], None]
    ) -> Said:
        """A file's answers to these prompts: as many to each as the prompt with the fewest has."""
        found = [dialogues_about(answered, sample, follow_ups) for sample in samples]
        fewest, most = min(map(len, found)), max(map(len, found))
        if fewest < most:
            note(f"cut to {fewest} of up to {most} answers each, since a prompt has no more")
        return cls.of_dialogues([some[:fewest] for some in found], [next_turns(s, follow_ups) for s in samples])

    def some(self, kept: NDArray[np.integer]) -> Said:
        """The answers to some questions, by their numbers."""
        return Said([self.texts[n] for n in kept], self.ended_NK[kept], [self.since[n] for n in kept])


def dialogues_about(answered: Answered, sample: RawSample, follow_ups: int) -> list[Dialogue]:
    """The dialogues of a file about a prompt that have an answer to each turn of its user, each answer used once.

    Lines under the prompt's own system text count; where there are none, those that say nothing of a system text.
    """
    later, used, found = next_turns(sample, follow_ups), Counter[tuple[str, ...]](), []
    system = sample.system if (sample.system, prompt_key(sample)) in answered else None
    for first in answered.get((system, prompt_key(sample)), []):
        dialogue, turns = [first], prompt_key(sample)
        for turn in later:
            turns = (*turns, dialogue[-1][0], turn)
            replies = answered.get((system, turns), [])[used[turns] :]
            if not replies:
                break
            used[turns] += 1
            dialogue.append(replies[0])
        else:
            found.append(dialogue)
    return found


def _since(dialogue: Dialogue, later: Sequence[str]) -> tuple[str, ...]:
    """The dialogue's answers, each with the turn that follows it."""
    return tuple(text for (answer, _), turn in zip(dialogue, later, strict=False) for text in (answer, turn))


def keep(path: Path, said: Said, gave_in_at_R: NDArray[np.int64] | None) -> None:
    """Write what a policy has said, and at which turn it gave in to insistence; the file is whole or absent."""
    gave_in = None if gave_in_at_R is None else gave_in_at_R.tolist()
    row = {"texts": said.texts, "ended": said.ended_NK.tolist(), "since": said.since, "gave_in_at": gave_in}
    write_rows(path, [row])


def read_kept(path: Path) -> tuple[Said, NDArray[np.int64] | None]:
    """What `keep` wrote."""
    (row,) = read_rows(path)
    gave_in = row["gave_in_at"]
    since = [[tuple(turns) for turns in some] for some in row["since"]]
    said = Said(row["texts"], np.array(row["ended"], dtype=bool), since)
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
            asked, response, ended = _row(path, number, line)
            found.setdefault(asked, []).append((response, ended))
    if not found:
        raise UserError(f"{path} holds no answers; write one JSON object a line with prompt and response")
    return found


def _row(path: Path, number: int, line: str) -> tuple[Asked, str, bool]:
    where = f"{path} line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {first_line(error)}") from None
    row = row if isinstance(row, dict) else {}
    prompt, response, system = row.get("prompt"), row.get("response"), row.get("system")
    turns = [prompt] if isinstance(prompt, str) else prompt if isinstance(prompt, list) else []
    whole = len(turns) % 2 == 1 and all(isinstance(turn, str) for turn in turns)
    if not whole or not isinstance(response, str) or not isinstance(system, str | None):
        raise UserError(
            f"{where} needs prompt (a text, or an odd number of turns), response (a text) and perhaps system (a text)"
        )
    if not all(map(is_whole, (system or "", *turns, response))):
        raise UserError(f"{where} has half a character, which nobody can read or write; mend its text")
    return (system, tuple(turns)), response, row.get("ended") is not False and row.get("truncated") is not True
