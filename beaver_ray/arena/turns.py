"""Prompts that go on: what their users say after the first answer, whatever that was, as MT-bench's second turns.

A row lists all that its user says in the field ``turns``, the prompt first. Each turn that is asked is a question of
its own in an arena, behind the policy's own answers to those before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beaver_ray.data.mixing import prompt_key
from beaver_ray.data.sources import BadRow, RawSample, text_field

FIELD = "turns"


def next_turns(sample: RawSample, most: int) -> list[str]:
    """What the user says after the first answer, ``most`` turns of it at most; none where the row lists no turns.

    A turn that is no text, or an empty one, ends the dialogue.
    """
    turns = sample.fields.get(FIELD)
    if not isinstance(turns, list) or list(prompt_key(sample)) != turns[:1]:
        return []
    return list(itertools.takewhile(_is_text, turns[1 : 1 + most]))


def _is_text(turn: Any) -> bool:
    try:
        text_field({FIELD: turn}, FIELD)
    except BadRow:
        return False
    return True


def by_turn(turn_N: NDArray[np.integer]) -> dict[str, NDArray[np.bool_]]:
    """Which questions are of each turn; nothing where all are of the first."""
    turns = np.unique(turn_N).tolist()
    return {f"turn {turn}": turn_N == turn for turn in turns} if len(turns) > 1 else {}


def places(next_turns_P: Sequence[Sequence[str]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each question [N] the number of its prompt, and its turn from 1: all turns of a prompt, then of the next."""
    found = [(number, turn + 1) for number, later in enumerate(next_turns_P) for turn in range(1 + len(later))]
    prompt_N, turn_N = np.array(found, dtype=np.int64).reshape(-1, 2).T
    return prompt_N, turn_N
