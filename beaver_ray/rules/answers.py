"""Whether an answer is the right one: as text, or as a number. The right one is ``answer`` of the prompt's row.

What an answer says at last counts, behind its thoughts (</think>), and where it has <answer>...</answer> in the last of
these: the content of its last \\boxed{...}, what follows its last "####", "the answer is", "Answer:" or "答案是" (for a
text also a heading "Answer"; where there is none of these, "the result is", "the solution is" or "结果是"), else the
whole of it (text), or the last number in it (numbers). Of numbers the last of these phrases that one follows counts:
behind an answer many say that they hope "this solution is helpful".
"""

# ruff: noqa: RUF001 (characters that look alike are told apart on purpose)

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

from beaver_ray.rules.thoughts import without_thoughts
from beaver_ray.rules.written_numbers import LONGEST, last_number, one_width, only_number, said_number, with_its_minus
from beaver_ray.spelling import alike

_IS = r"(?:\*\*|__)?\s*(?:is(?![a-z])|:|=)(?:\s*:)?"
_CHINESE_IS = r"(?:\*\*|__)?\s*(?:是|为|:|=)(?:\s*:)?"
# "#### Step 2", "#### Solution" and "#### 2. Add them" are headings of the working.
_ANSWER = (
    r"(?<!#)####(?!#)(?![ \t]*(?:(?:step|solution|(?:final )?result)\b|\d+[.):][ \t]*[a-z*]))"
    rf"|(?<![a-z])(?:final answer|answer|(?:correct|right|best) (?:option|choice)){_IS}"
    rf"|(?:答案|正确选项){_CHINESE_IS}|(?:故|因此|所以|应该?)选择?(?:\s*:)?"
)
_RESULT = rf"(?<![a-z])(?:result|solution){_IS}|结果{_CHINESE_IS}"
# "Answer: Let's think step by step" marks no number.
_NOT_AN_ANSWER = r"(?!\W{0,20}(?:let(?:['’]?s|\s+us|\s+me)|step|first)\b)"
_MARK_OF_NUMBER = re.compile(f"(?:{_ANSWER}|{_RESULT}){_NOT_AN_ANSWER}", re.IGNORECASE)
# For texts alone: under such a heading a number may still be worked out, and the last one counts.
_HEADING = r"^(?:#{1,6}[ \t]?|\*\*|__){1,2}(?:(?:final )?answer|答案)(?:\*\*|__)?[ \t]*$"
_MARKS_OF_TEXT = [re.compile(marks, re.IGNORECASE | re.MULTILINE) for marks in (f"{_HEADING}|{_ANSWER}", _RESULT)]
_HOPE = re.compile(r"\b(?:hope|let me know)\b[^,;:.!?\n]*\Z", re.IGNORECASE)
_CLOSING = re.compile(r"\A\s*(?:\*\*|__)[ \t]*\n")  # of a bold "Answer:" that the answer stands below
_OPENING = re.compile(r"\A(?:\s*(?:\\\[|\$\$|```\w*|\\begin\{\w+\*?\})[ \t]*\n)+")  # of mathematics, or of a block
_BRACKETS = {"(": ")", "[": "]", "<": ">", "《": "》", "「": "」", "『": "』", "«": "»"}
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
# One formula is written in many ways: \dfrac{1}{2} and \frac12, \left( 3, 4 \right) and (3,4), x^{2} and x^2.
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}")
_LATEX_SPACING = re.compile(r"\\(?:left|right)(?![a-z])\.?|(?<!\\)\\[!,;: ]")
_FORMULA = re.compile(r"[\\^=+\d]")
_SPACE_IN_FORMULA = re.compile(r" (?![a-z\d])|(?<![a-z\d]) |(?<=[a-z]) (?=\d)|(?<=\d) (?=[a-z])")
_APPROXIMATELY = re.compile(r"≈|\\approx(?![a-z])")
_IN_TAGS = re.compile(r".*<answer>(.*?)(?:</answer>.*)?\Z", re.DOTALL | re.IGNORECASE)
_LEADING_POINTS = re.compile(r"\A\.+(?!\d)")
_OPERATED = re.compile(r"(?:\d|[)}\]]|(?<![^\W\d_])[^\W\d_])[!']+[ .。\"`$*“”‘’]*\Z")
_SAME_SIGN = {r"\\leq(?![a-z])": r"\\le", r"\\geq(?![a-z])": r"\\ge", r"\{,\}": ","}
# "b", "(b)", "option b", "b) paris", "b: paris", "b (paris)", "b - paris", "b is correct"; and not "b) and c)",
# "b: c, d", "a: dog b: cat"
_CHOICE = re.compile(
    r"(?:(?:the )?(?:correct |right |best )?(?:option|choice|letter|answer) (?:is )?"
    r"|(?:故|因此|所以|应该?)?选(?:择|项)? ?)?"
    r"[(\[]?([a-z])(?:[)\]]|(?=[.:、选]| - | \(| is (?:the )?(?:correct|right)\b|\Z))(?:[.:、]|选?项| -)?"
    r"(?:(?: |(?=[\u4e00-\u9fff])|(?<=[)\].:])(?=\d))"
    r"(?!(?:[\W_]|and\b|or\b|[a-z](?![a-z]))*\Z)(?!.*\b[a-z](?:[)\]]|: )).*)?",
    re.DOTALL,
)
_NUMBER_FIRST = re.compile(r"(?:[^=]*=)?(?!\s*\\?\{\d+\\?\}\s*\Z)[^\w.]*(?!0\d)\.?\d")
LONGEST_NUMBER = 100  # characters, with its unit
_COMMAND = re.compile(r"\\(?!circ|degree)[a-z]+")
_UNIT = re.compile(r"[^\W\d_]+|\\[a-z]+|[%°€£¥]")
_STYLE = re.compile(r"[$*`\"]")
# Why it is this choice, and no other
_REASON = re.compile(
    r"[,;.]? \b(?:because|since|whereas|rather than|instead of|not)\b|[,;] (?:as(?! well)|while)\b|[,;]?(?:因为|而不是)"
)
_ONE_IN_BRACES = re.compile(r"(?<=[\w^}])\{(\w|\\[a-z]+)\}")


def exact_answer(prompts: list[str], responses: list[str], *, answer: list[Any]) -> list[float]:
    """1 where the answer says what the row's ``answer`` does, or one of several, else 0.

    Capitals, width, white space, a last full stop, how LaTeX spaces and braces a formula, and what stands around the
    whole (quotes, $, **, \\text{}, brackets that the right one has not) do not matter. Where both are one number, as
    `numeric_answer` reads them, that counts: 1/2 and 0.5 are equal, 5 and 5 cm too, and 5 cm and 5 kg are not. Behind
    "the answer is" the line counts, or its first sentence. A row's ``answer`` may hold its working before \\boxed{...}
    or "####". A letter is one of several choices: B is said by "(B)", "B) Paris", "option B" and "B, because ..." too.
    """
    scores = []
    for response, right in zip(responses, answer, strict=True):
        wanted = [_without_working(str(one)) for one in several(right)]
        accepted = {plain(one, formula=True) for one in wanted} - {""}
        letters = {one.strip("()[]") for one in accepted if re.fullmatch(r"[(\[]?[a-z][)\]]?", one)}
        said, boxed = _said(response)
        texts = {said} if said == response else {said, _SENTENCE.split(said)[0]}
        forms = {plain(text, formula) for text in texts for formula in ({True} if boxed else {True, False})}
        forms |= {_unbracketed(form) for form in forms}
        right_so = not accepted.isdisjoint(forms) or (letters and not letters.isdisjoint(map(_choice, forms)))
        scores.append(float(bool(right_so) or any(_same_number(text, one) for text in texts for one in wanted)))
    return scores


def _choice(form: str) -> str | None:
    """The letter of the choice that a plain text says, where it says one."""
    found = _CHOICE.fullmatch(_unbracketed(_STYLE.sub("", _REASON.split(form)[0]).strip()))
    return found[1] if found else None


def _unbracketed(form: str) -> str:
    """The text without the brackets around the whole of it."""
    while len(form) > 2 and _BRACKETS.get(form[0]) == form[-1]:
        form = form[1:-1].strip()
    return form


def _same_number(said: str, right: str) -> bool:
    """Whether both are one number, and the same one, in one unit or one of them without any.

    A word before it, but for "x =", makes it a name (Apollo 11), and so do braces of a set, and 0 before its digits.
    """
    if max(len(said), len(right)) > LONGEST_NUMBER:
        return False
    texts = [_TEXT.sub(r" \1", alike(one_width(text)).casefold()) for text in (said, right)]
    bare = [_COMMAND.sub("", text) for text in texts]
    if not all(map(_NUMBER_FIRST.match, bare)):
        return False
    number = only_number(texts[1])
    if number is None or number != only_number(texts[0]):
        return False
    units = [set(_UNIT.findall(text.rpartition("=")[2])) for text in bare]
    return units[0] == units[1] or not all(units)


def numeric_answer(
    prompts: list[str], responses: list[str], *, answer: list[Any], tolerance: float = 0.0
) -> list[float]:
    """1 where the answer's number is that of the row's ``answer``, or one of several, else 0.

    1,000.50, -3/4, 1 1/2, 1½, 1e3, \\frac{1}{2}, 2 \\times 10^3 and 2^10 are read exactly; units and signs of money or
    percent do not matter (50% is 50, and so are 50kg and 50元), nor do words for large numbers (1.5 million is 1.5).
    A \\boxed{...} must hold one number, perhaps behind "=": for \\boxed{5, 6}, \\boxed{\\pm 5} and the like it is 0.
    After "the answer is" the first line or sentence with a number counts, and in it the number that stands there at
    once, or the last one where something is worked out. "- 5" is negative there and in a box, elsewhere the item of a
    list; so are "minus 5", "negative 5" and 负5 everywhere. A row's ``answer`` may hold its reasoning before "####",
    but must then be one number: for (1, 2), x/2 or 11:30 every answer gets 0. tolerance: how far off a number may be,
    as a share of the right one.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be a finite number of at least 0, not {tolerance}")
    allowed = Fraction(tolerance)
    scores = []
    for response, right in zip(responses, answer, strict=True):
        wanted = [number for number in map(_right_number, several(right)) if number is not None]
        said = _final_number(response)
        scores.append(float(said is not None and any(abs(said - n) <= allowed * abs(n) for n in wanted)))
    return scores


def _without_working(right: str) -> str:
    boxed = _last_boxed(right)
    return right.rpartition("####")[2] if boxed is None else boxed


def several(right: Any) -> Sequence[Any]:
    """The accepted answers of a row: none, one, or those of a list."""
    if right is None:
        return ()
    return right if isinstance(right, list | tuple) else (right,)


def final_answer(response: str) -> str:
    """What the answer says at last; see above."""
    return _said(response)[0]


def _said(response: str) -> tuple[str, bool]:
    """(What the answer says at last, whether in a box)."""
    text, _ = _last_part(response)
    boxed = _last_boxed(text)
    return (_behind_its_mark(text), False) if boxed is None else (boxed, True)


def _behind_its_mark(text: str) -> str:
    """What stands behind the last phrase that marks an answer, to the end of its line; the whole without any."""
    wide = one_width(text)
    for kind in _MARKS_OF_TEXT:
        marks = [
            mark for mark in kind.finditer(wide) if not _HOPE.search(wide, max(0, mark.start() - 200), mark.start())
        ]
        if marks:
            said = _OPENING.sub("", _CLOSING.sub("", wide[marks[-1].end() :])).strip()
            return said.splitlines()[0] if said else ""
    return text


def _last_part(response: str) -> tuple[str, bool]:
    """(The answer behind its thoughts, or what it has between the last tags for an answer; whether it has these)."""
    text = without_thoughts(response)[-LONGEST:]
    tagged = _IN_TAGS.match(text)
    return (tagged[1].strip(), True) if tagged else (text, False)


def _final_number(response: str) -> Fraction | None:
    """The number that the answer says at last; see above."""
    text, tagged = _last_part(response)
    boxed = _last_boxed(text)
    if boxed is not None:
        return _boxed_number(boxed)
    for part in reversed(_MARK_OF_NUMBER.split(one_width(text))[1:]):
        part = with_its_minus(part)
        number = _first(said_number(sentence) for line in part.splitlines() for sentence in _SENTENCE.split(line))
        if number is not None:
            return number
    return said_number(text) if tagged else last_number(text)


def _right_number(right: Any) -> Fraction | None:
    """The number that a row's answer is, after its reasoning where it has some; None where it is not one number."""
    text = str(right)
    boxed = _last_boxed(text)
    return only_number(_MARK_OF_NUMBER.split(one_width(text))[-1] if boxed is None else boxed)


def _boxed_number(boxed: str) -> Fraction | None:
    """The number that a box holds, behind its last "=" and before "≈" where it has these; None where it holds more."""
    for sentence in _SENTENCE.split(boxed):
        exact = _APPROXIMATELY.split(sentence)[0]
        for part in (exact.rpartition("=")[2], exact, sentence):
            if last_number(part) is not None:
                return only_number(part)
    return None


def _first(numbers: Iterable[Fraction | None]) -> Fraction | None:
    return next((number for number in numbers if number is not None), None)


def plain(text: str, formula: bool = False) -> str:
    """Lower case, one width, single spaces, formulas in one writing, without what stands around the whole.

    formula: a "!" or "'" behind a number, a bracket or a single letter is a factorial or a prime, and stays.
    """
    text = " ".join(_LATEX_SPACING.sub(" ", _TEXT.sub(r"\1", alike(one_width(text)).casefold())).split())
    if _FORMULA.search(text):
        for written, sign in _SAME_SIGN.items():
            text = re.sub(written, sign, text)
        text = re.sub(r"\\[dt]frac", r"\\frac", re.sub(r"\\([%$])", r"\1", text))
        text = _ONE_IN_BRACES.sub(r"\1", _SPACE_IN_FORMULA.sub("", text))
    before = None
    while before != text:
        before, text = text, text.lstrip(" !。\"'`$*“”‘’")
        text = _LEADING_POINTS.sub("", text)
        text = text.rstrip(' .。"`$*“”‘’' if formula and _OPERATED.search(text) else " .!。\"'`$*“”‘’")
        for opens, closes in (("\\(", "\\)"), ("\\[", "\\]")):
            text = text.removeprefix(opens).removesuffix(closes)
    return text


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
