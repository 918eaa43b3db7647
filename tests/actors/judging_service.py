"""A judge for tests: OpenAI's chat completions over real HTTP, answered by a given function instead of a model."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from tests.actors.scoring_service import Service, running

Says = Callable[[str], str | dict[str, Any]]
"""The reply to a text, or all that goes back instead of a completion."""


class JudgeService(Service):
    """Replies with ``says(text)``; a text counts a token for each of its words, and so does a reply."""

    def __init__(self, says: Says) -> None:
        super().__init__(lambda prompts, responses: [])
        self.says = says
        self.cached: int | None = None
        """Tokens of each prompt that it says it had computed before; None says nothing of that."""
        self.finish = "stop"
        """Why it ends its replies."""
        self.in_flight = self.most_in_flight = 0
        self.counting = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://{self.host}/v1"

    def answer(self, body: dict[str, Any]) -> Any:
        """A chat completion."""
        with self.counting:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        (message,) = body["messages"]
        text = self.says(message["content"])
        with self.counting:
            self.in_flight -= 1
        if isinstance(text, dict):
            return text
        sizes = {"prompt_tokens": len(message["content"].split()), "completion_tokens": len(text.split())}
        details = None if self.cached is None else {"cached_tokens": self.cached}
        usage = {**sizes, "prompt_tokens_details": details}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": self.finish}
        return {"choices": [choice], "usage": usage}


def judging(says: Says) -> AbstractContextManager[JudgeService]:
    """A judge that is there while the block runs."""
    return running(JudgeService(says))


def shown(text: str) -> dict[str, str]:
    """The parts of the material in what a judge is given: conversation, "answer A", "answer B" or answer."""
    mark = re.search(r"^(\[[0-9a-f]{12}\]) end$", text, re.MULTILINE)
    assert mark
    parts = text.split(f"\n{mark[1]} ")[1:-1]
    return {name: rest for name, _, rest in (part.partition("\n") for part in parts)}
