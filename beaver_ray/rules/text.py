"""Scores of an answer's text: its length, patterns, words, and whether it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import regex

from beaver_ray.rules.refusals import is_refusal
from beaver_ray.spelling import UNSPACED, alike

# Of scripts without spaces each letter counts as a word, with the signs that stand above and below it.
_WORD = regex.compile(rf"{UNSPACED}\p{{M}}*|(?:(?!{UNSPACED})\S)+")
_UNSPACED = regex.compile(UNSPACED)
LONGEST_SEARCH = 1e6  # seconds
_MISTAKEN = regex.compile(r"[\x07\x08\x0b\x0c]")  # what Python makes of \a, \b, \v and \f in '...'


def over_length(
    prompts: list[str],
    responses: list[str],
    *,
    budget: float,
    unit: Literal["words", "characters"] = "words",
    most: float = math.inf,
) -> list[float]:
    """How far each answer is over the budget, as a share of it: 0 within, 0.5 where it is half as long again.

    most: no answer counts for more than this.
    """
    if not budget > 0:
        raise ValueError(f"budget must be above 0, not {budget}")
    if not most >= 0:
        raise ValueError(f"most must be 0 or above, not {most}")
    if unit not in ("words", "characters"):
        raise ValueError(f"unit is words or characters, not {unit!r}")
    lengths = [len(response) if unit == "characters" else word_count(response) for response in responses]
    return [min(max(0.0, length / budget - 1.0), most) for length in lengths]


def word_count(text: str) -> int:
    """What stands between white space; of scripts without spaces each character."""
    return sum(1 for _ in _WORD.finditer(text))


def matches(
    prompts: list[str],
    responses: list[str],
    *,
    pattern: str,
    whole: bool = False,
    ignore_case: bool = False,
    seconds: float = 1.0,
    late: float = 0.0,
) -> list[float]:
    """1 where the regular expression is found in the answer, or fits the whole of it, else 0.

    seconds, late: a search that takes longer is given up, and such an answer gets the score ``late``. A cost should say
    late=1.0: otherwise an answer that makes the pattern slow goes free.
    """
    if not 0 < seconds < LONGEST_SEARCH:
        raise ValueError(f"seconds must be above 0 and below {LONGEST_SEARCH:g}, not {seconds}")
    if not math.isfinite(late):
        raise ValueError(f"late must be a finite number, not {late}")
    if mistaken := _MISTAKEN.search(pattern):
        raise ValueError(f"pattern has the character {mistaken[0]!r}: write it as r'...', where \\b stays what it is")
    compiled = regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
    scores = []
    for response in responses:
        try:
            search = compiled.fullmatch if whole else compiled.search
            scores.append(float(search(response, timeout=seconds) is not None))
        except TimeoutError:
            scores.append(late)
    return scores


def mentions(
    prompts: list[str], responses: list[str], *, words: Sequence[str], every: bool = False, part: bool = False
) -> list[float]:
    """1 where the answer has one of the words (``every``: all of them), else 0.

    Capitals, width, curly apostrophes and how accents are encoded do not matter. Words may be phrases. They are
    found as whole words, or with ``part`` inside others too.
    """
    if isinstance(words, str) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError(f"words must be a list of texts, not {words!r:.100}")
    wanted = [word_pattern(word, part) for word in words]
    found = all if every else any
    return [float(found(pattern.search(text) is not None for pattern in wanted)) for text in map(alike, responses)]


def refuses(prompts: list[str], responses: list[str]) -> list[float]:
    """1 where the answer refuses, in English or Chinese, else 0: its mean is the refusal rate."""
    return [float(is_refusal(response)) for response in responses]


def word_pattern(word: str, part: bool = False) -> regex.Pattern[str]:
    """The word, however its parts are spaced, not inside a longer one of a script that has spaces.

    It is searched for in what `alike` makes of a text.
    """
    pieces = alike(word).split()
    inner = r"\s+".join(regex.escape(piece) for piece in pieces)
    letter = rf"(?!{UNSPACED})\w"
    before, after = (f"(?<!{letter})", f"(?!{letter})")
    if part or _UNSPACED.match(pieces[0][0]) or not pieces[0][0].isalnum():
        before = ""
    if part or _UNSPACED.match(pieces[-1][-1]) or not pieces[-1][-1].isalnum():
        after = ""
    return regex.compile(before + inner + after, regex.IGNORECASE)
