"""Whether an answer is the right one: as text, or as a number. The right one is ``answer`` of the prompt's row.

What an answer says at last counts: the content of its last \\boxed{...}, what follows its last "####", "the answer is"
or "答案是" (for a text also a heading "Answer"), and else the whole of it (text), or the last number in it (numbers).
Of numbers the last of these phrases that one follows counts: behind an answer many say that they hope "this solution is
helpful".
"""

# ruff: noqa: RUF001 (characters that look alike are told apart on purpose)

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

LONGEST = 20_000  # characters of an answer that are read, from its end
MOST_DIGITS = 300  # of a number, its exponent applied

_MARK = re.compile(
    r"####|(?:final answer|answer|result|solution)(?:\*\*|__)?\s*(?:is(?![a-z])|:|=)(?:\s*:)?"
    r"|(?:答案|结果)(?:\*\*|__)?\s*(?:是|为|:|=)(?:\s*:)?",
    re.IGNORECASE,
)
# For texts alone: under such a heading a number may still be worked out, and the last one counts.
_HEADING = r"^(?:#{1,6}[ \t]?|\*\*|__){1,2}(?:(?:final )?answer|答案)(?:\*\*|__)?[ \t]*$"
_MARK_OR_HEADING = re.compile(f"{_HEADING}|{_MARK.pattern}", re.IGNORECASE | re.MULTILINE)
_CLOSING = re.compile(r"\A\s*(?:\*\*|__)[ \t]*\n")  # of a bold "Answer:" that the answer stands below
_BRACKETS = "()[]<>《》「」『』«»"
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
_SIGNS = str.maketrans("\u2212\u2010\u2011\u2013\u2044\u00d7\u00b7\u22c5", "----/***")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_SPACED = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")  # 1 000, with a space that breaks no line
_AFTER_WHOLE = re.compile(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e]|\\[dt]?frac)")  # 1½
_RAISED = re.compile(r"(?<=\d)[\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")  # 10³; of m² it is the unit's
_EXPONENT = r"\s*(?:\^|\*\*)\s*(?:\{\s*([+-]?\d{1,4})\s*\}|([+-]?\d{1,4}))(?!\d)"
_POWER = re.compile(rf"(?:\s*(?:\\times|\\cdot|\*)|(?<=\d)\s*x)\s*10{_EXPONENT}", re.IGNORECASE)
_TEN = re.compile(rf"(?<![\w.,^])10{_EXPONENT}", re.ASCII)
_INTEGERS = re.compile(r"(?<![\w.,^])(\d{1,6})\s*\^\s*(?:\{\s*(\d{1,3})\s*\}|(\d{1,3}))(?!\d|\.\d|\s*\^)", re.ASCII)
_DIGITS = r"(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e[+-]?\d{1,6}(?!\w|\.\d))?"
_UNIT = r"(?:[kcm]?m|[km]?g|[mc]?l|lbs?|oz|ft|in|mi|yd|[kmg]?w|kwh|k?hz|mph|km/h|m/s|h|hrs?|min|s|secs?|ms|[ap]m)[23]?"
# A number of words or of a name (7th, v1.2) is none. Scripts without spaces write letters beside it: \w is ASCII here.
_NUMBER = re.compile(
    rf"(?<![\w.,^])(?<!\^\{{)([+-]?)(?:[$€£¥]\s?)?(?:(\d{{1,9}})\s(?=\d{{1,9}}\s*/\s*\d))?"
    rf"({_DIGITS})(?:\s*/\s*([+-]?{_DIGITS}))?(?:{_UNIT})?(?!\w|\.\d)",
    re.IGNORECASE | re.ASCII,
)
# Roots, π and what else is not read, and the numbers beside it; and the parts of a sum.
_IN_BRACES = r"\{(?:[^{}]|\{[^{}]*\})*\}"
_ROOT = re.compile(rf"\\sqrt\s*(?:\[[^\[\]]*\])?\s*(?:{_IN_BRACES}|\\[dt]?frac\s*\d\s*\d|\w)|√\s*(?:\([^()]*\)|[\d.]*)")
_FUNCTION = r"(?:ln|log|sin|cos|tan|exp)(?![a-zA-Z])(?:\s*_\s*(?:\{[^{}]*\}|\w))?"
_NO_NUMBER = re.compile(
    rf"\\pi(?![a-zA-Z])|\\{_FUNCTION}\s*(?:{_IN_BRACES}|\([^()]*\)|[\d.]*)|(?<![a-zA-Z])(?:sqrt|{_FUNCTION})\s*\([^()]*\)"
)
_BESIDE_BEFORE = re.compile(r"(?:π\s*[*/+-]?|[\w°)}\]]\s*\+|[a-zA-Zπ)}\]]-)\s*\Z")
_BESIDE_AFTER = re.compile(
    r"\s*(?:(?:[*/+-]|\\times|\\cdot)?\s*π|\^\s*\{?\s*[+-]?\s*(?:\d|[a-zA-Z](?![a-zA-Z]))|\+\s*[\\\w(]|-\s*[\\\d])"
)
_DEGREES = re.compile(r"\s?\^\s?\{?\s?(?:\\circ|\\degree|\\prime|°|o(?![a-z])|th|st|nd|rd)\s?\}?")
_OTHER_EXPONENT = re.compile(r"\^\s*\{[^{}]*\}")  # what is in it is no number by itself
_LONG_SPACE = re.compile(r"\s{3,}")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+")


def exact_answer(prompts: list[str], responses: list[str], *, answer: list[Any]) -> list[float]:
    """1 where the answer says what the row's ``answer`` does, or one of several, else 0.

    Capitals, width, white space, a last full stop and what stands around the whole (quotes, $, **, \\text{}, brackets
    that the right one has not) do not matter. Behind "the answer is" the line counts, or its first sentence.
    """
    scores = []
    for response, right in zip(responses, answer, strict=True):
        accepted = {plain(str(one)) for one in several(right)} - {""}
        said = final_answer(response)
        marked = said != response
        forms = {plain(said), plain(_SENTENCE.split(said)[0] if marked else said)}
        scores.append(float(not accepted.isdisjoint(forms | {form.strip(_BRACKETS) for form in forms})))
    return scores


def numeric_answer(
    prompts: list[str], responses: list[str], *, answer: list[Any], tolerance: float = 0.0
) -> list[float]:
    """1 where the answer's number is that of the row's ``answer``, or one of several, else 0.

    1,000.50, -3/4, 1 1/2, 1½, 1e3, \\frac{1}{2}, 2 \\times 10^3 and 2^10 are read exactly; units and signs of money or
    percent do not matter (50% is 50, and so are 50kg and 50元), nor do words for large numbers (1.5 million is 1.5).
    After "the answer is" the first line or sentence with a number counts, and in it the last number. tolerance: how far
    off a number may be, as a share of the right one.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be a finite number of at least 0, not {tolerance}")
    allowed = Fraction(tolerance)
    scores = []
    for response, right in zip(responses, answer, strict=True):
        wanted = [number for number in (last_number(str(one)) for one in several(right)) if number is not None]
        said = _final_number(response)
        scores.append(float(said is not None and any(abs(said - n) <= allowed * abs(n) for n in wanted)))
    return scores


def several(right: Any) -> Sequence[Any]:
    """The accepted answers of a row: none, one, or those of a list."""
    if right is None:
        return ()
    return right if isinstance(right, list | tuple) else (right,)


def final_answer(response: str) -> str:
    """What the answer says at last; see above."""
    text = response[-LONGEST:]
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    wide = _one_width(text)
    marks = list(_MARK_OR_HEADING.finditer(wide))
    if not marks:
        return text
    said = _CLOSING.sub("", wide[marks[-1].end() :]).strip()
    return said.splitlines()[0] if said else ""


def _final_number(response: str) -> Fraction | None:
    """The number that the answer says at last; see above."""
    text = response[-LONGEST:]
    boxed = _last_boxed(text)
    if boxed is not None:
        parts = [_SENTENCE.split(boxed)]
    else:
        behind = _MARK.split(_one_width(text))[1:]
        parts = [[s for line in part.splitlines() for s in _SENTENCE.split(line)] for part in behind]
    for sentences in reversed(parts):
        for number in map(last_number, sentences):
            if number is not None:
                return number
    return last_number(text) if boxed is None else None


def plain(text: str) -> str:
    """Lower case, one width, single spaces, without what stands around the whole."""
    text = " ".join(_TEXT.sub(r"\1", _one_width(text)).casefold().split())
    before = None
    while before != text:
        before, text = text, text.strip(" .!。\"'`$*“”‘’").removeprefix("\\(").removesuffix("\\)")
    return text


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly; None where it has none, or one too large to be worked with.

    What is a part of 3\\pi, \\sqrt{2}, 2^n or x + 3 is none.
    """
    text = _LONG_SPACE.sub("  ", _one_width(text[-LONGEST:])).translate(_SIGNS).replace("{,}", ",")
    text = _NO_NUMBER.sub("π", _ROOT.sub("π", _DEGREES.sub("° ", text)))
    text = text.replace("\\,", "").replace("\\!", "")
    text = _TEN.sub(lambda m: f"1e{m[1] or m[2]}", _POWER.sub(lambda m: f"e{m[1] or m[2]}", text))
    text = _OTHER_EXPONENT.sub("^n", _INTEGERS.sub(_raised, text))
    text = _FRACTION.sub(r"\1\2/\3\4", text)
    for number in reversed(list(_NUMBER.finditer(text))):
        before = text[max(0, number.start() - 6) : number.start()]
        digits = number.end(4) if number[4] else number.end(3)  # before the unit, which may be m^2
        if not _BESIDE_BEFORE.search(before) and not _BESIDE_AFTER.match(text, digits):
            return _value(number)
    return None


def _raised(power: re.Match[str]) -> str:
    """2^10 in digits; where they may be too many, a number that is too large."""
    base, exponent = power[1], int(power[2] or power[3])
    return str(int(base) ** exponent) if len(base) * exponent <= MOST_DIGITS else f"1e{MOST_DIGITS}"


def _value(found: re.Match[str]) -> Fraction | None:
    sign, whole, upper, lower = found.groups()
    value, divisor = _decimal(upper), _decimal(lower) if lower else Fraction(1)
    if value is None or not divisor:
        return None
    value = value / divisor
    if whole and 0 < value < 1:  # 1 1/2
        value += int(whole)
    return -value if sign == "-" else value


def _decimal(text: str) -> Fraction | None:
    """One number without its fraction; None for 1,2 (no groups of three) and for one of too many digits."""
    digits, _, exponent = text.lower().partition("e")
    sign = -1 if digits.startswith("-") else 1
    digits = digits.lstrip("+-").rstrip(",")
    if len(digits) + abs(int(exponent or 0)) > MOST_DIGITS or not _GROUPED.fullmatch(digits):
        return None
    return sign * Fraction(digits.replace(",", "")) * Fraction(10) ** int(exponent or 0)


def _one_width(text: str) -> str:
    """Characters of one width, a fraction apart from the whole number before it, 1 000 in one piece."""
    text = _RAISED.sub(r"^\g<0>", _AFTER_WHOLE.sub(" ", _SPACED.sub("", text)))
    return unicodedata.normalize("NFKC", text).replace("^\u2212", "^-")


def _last_boxed(text: str) -> str | None:
    r"""The content of the last whole \boxed{...}, whatever brackets it holds; None where there is none."""
    opened: list[tuple[int, bool]] = []
    found = None
    for bracket in re.finditer(r"[{}]", text):
        place = bracket.start()
        if bracket[0] == "{":
            opened.append((place + 1, text.endswith("\\boxed", 0, place)))
        elif opened:
            start, boxed = opened.pop()
            found = text[start:place] if boxed else found
    return found
