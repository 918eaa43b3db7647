"""A user whose turns were written down beforehand, whatever is answered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any


class Scripted:
    """Says the turns that ``file`` has for this dialogue: a JSON object, from a dialogue's seed to a list of turns.

    By the seed, because two dialogues that go on differently may begin alike.
    """

    def __init__(self, dialogue: Sequence[str], fields: Mapping[str, Any], seed: int, file: str) -> None:
        self.left = list(scripts(file).get(str(seed), []))

    def reply(self, answer: str) -> str | None:
        """The next turn that was written down; None after the last."""
        return self.left.pop(0) if self.left else None


@cache
def scripts(file: str) -> dict[str, list[str]]:
    """The content of a file of turns."""
    found: dict[str, list[str]] = json.loads(Path(file).read_text(encoding="utf-8"))
    return found
