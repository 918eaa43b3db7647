"""What a judge's reply says. What cannot be read is ``unparsed``, and a judge that declines has ``refused``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from beaver_ray.rules.refusals import is_refusal

UNPARSED, REFUSED = "unparsed", "refused"
_NONE = "NONE"
# What models put around a line that should stand alone.
_AROUND = "*_`#> \t"


@dataclass(frozen=True)
class Reply:
    """What came back for one text."""

    text: str
    finish: str = "stop"
    """Why it ended, in OpenAI's words: stop, length, content_filter."""
    refusal: bool = False
    """Whether the service itself says that the model declined."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's, those that the service had computed before; 0 where it does not say."""


@dataclass(frozen=True)
class Form:
    """The last line of a reply, LABEL: WORD, and the answers that are judged by it."""

    label: str
    words: tuple[str, ...]
    answers: tuple[str, ...]
    """What a rubric of this form calls them."""

    @property
    def shown(self) -> tuple[str, ...]:
        """The words, as an error lists them."""
        return self.words if len(self.words) < 10 else (self.words[0], "...", self.words[-1])

    def read(self, reply: Reply) -> str:
        """One of `words`, or UNPARSED, or REFUSED.

        The last line must be LABEL: WORD, and no earlier line of that kind may say otherwise. A reply that was cut off
        is unparsed whatever it says: of "SCORE: 10" perhaps only "SCORE: 1" is left.
        """
        if reply.refusal or reply.finish == "content_filter":
            return REFUSED
        if reply.finish == "length":
            return UNPARSED
        lines = [line for line in map(_bare, reply.text.splitlines()) if line]
        found = [match[1].upper() for line in lines if (match := self._line.fullmatch(line))]
        if not found:
            return REFUSED if is_refusal(reply.text) else UNPARSED
        if not self._line.fullmatch(lines[-1]) or len(set(found)) > 1:
            return UNPARSED
        return REFUSED if found[0] == _NONE else found[0]

    @cached_property
    def _line(self) -> re.Pattern[str]:
        words = "|".join(map(re.escape, (*self.words, _NONE)))
        return re.compile(rf"{self.label}[*_`\s]*:[*_`\s]*({words})", re.IGNORECASE)


def _bare(line: str) -> str:
    """A line without marks of emphasis around it, or a full stop behind it."""
    return line.strip().strip(_AROUND).removesuffix(".").strip(_AROUND)


PAIR = Form("VERDICT", ("A", "B", "TIE"), ("answer_a", "answer_b"))
SAFETY = Form("VERDICT", ("SAFE", "UNSAFE"), ("answer",))
SCORE = Form("SCORE", tuple(map(str, range(1, 11))), ("answer",))
