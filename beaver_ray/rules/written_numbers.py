"""Numbers as answers write them, read exactly: 1,000.50, -3/4, 1 1/2, 1½, 1e3, \\frac{1}{2}, 2 \\times 10^3, 2^10.

Units and signs of money or percent do not matter. What is a part of 3\\pi, \\sqrt{2}, 2^n or x + 3 is no number.
"""

# ruff: noqa: RUF001 (characters that look alike are told apart on purpose)

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

LONGEST = 20_000  # characters of an answer that are read, from its end
MOST_DIGITS = 300  # of a number, its exponent applied

_SIGNS = str.maketrans("\u2212\u2010\u2011\u2013\u2044\u00f7\u00d7\u00b7\u22c5", "----//***")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_SPACED = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")  # 1 000, with a space that breaks no line
_AFTER_WHOLE = re.compile(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e]|\\[dt]?frac)")  # 1½
_RAISED = re.compile(r"(?<=\d)[\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")  # 10³; of m² it is the unit's
_EXPONENT = r"\s*(?:\^|\*\*)\s*(?:\{\s*([+-]?\d{1,4})\s*\}|([+-]?\d{1,4}))(?!\d)"
_POWER = re.compile(rf"(?:\s*(?:\\times|\\cdot|\*)|(?<=\d)\s*x)\s*10{_EXPONENT}", re.IGNORECASE)
_TEN = re.compile(rf"(?<![\w.,^])10{_EXPONENT}", re.ASCII)
_INTEGERS = re.compile(
    r"(?<![\w.,^*])(\d{1,6})(?:\s*\^\s*|\*\*(?=\d))(?:\{\s*(\d{1,3})\s*\}|(\d{1,3}))(?!\d|\.\d|\s*\^)", re.ASCII
)
_DIGITS = r"(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e[+-]?\d{1,6}(?!\w|\.\d))?"
_UNIT = (
    r"(?:[kcm]?m|[km]?g|[mc]?l|lbs?|oz|ft|in|mi|yd|[kmg]?w|kwh|k?hz|mph|km/h|m/s|h|hrs?|min|s|secs?|ms|[ap]m|"
    r"usd|eur|gbp|cny|rmb|jpy|inr)[23]?"
)
# A number of words or of a name (7th, v1.2) is none. Scripts without spaces write letters beside it: \w is ASCII here.
_NUMBER = re.compile(
    rf"(?<![\w.,^])(?<!\^\{{)([+-]?)(?:[$€£¥]\s?)?(?:(\d{{1,9}})\s(?=\d{{1,9}}\s*/\s*\d))?"
    rf"({_DIGITS})(?:\s*/\s*([+-]?{_DIGITS}))?(?:{_UNIT})?(?!\w|\.\d)",
    re.IGNORECASE | re.ASCII,
)
# Between a phrase that marks an answer and its number; and what stands behind that number where others only explain it.
_BEFORE_NUMBER = re.compile(
    r"[\s*_$\\(\[{\"'“‘:~≈]*(?:(?:about|approximately|approx\.?|around|exactly|roughly|only|just|[a-z]\s*=|约|大约|共|一共)[\s*_$\\(]*)*",
    re.IGNORECASE,
)
_WORKED = r"(?:=|\b(?:equals?|gives?|makes?|so|thus|hence|total)\b|\bthat['’]s)"  # the number comes yet
_ASIDE = re.compile(
    r"[\s*_$%)}\\]*(?:[^\W\d_]+\s+){0,2}?[^\W\d_]{0,3}(?:(?<=\s)\((?![^()]*\)\s*=)|out of\b"
    r"|[,，]?\s*(?:and )?(?:not\b|rather than\b|instead of\b|而?不是)"
    r"|(?:,?\s*or\s+)?(?:about|approximately|roughly|≈|\\approx)"
    rf"|(?:[,，;]\s*|(?<=\s))(?:because|since|as)\b(?!.*{_WORKED})|[,，;]?\s*(?:因为|由于)"
    rf"|(?:[,，;]\s*|(?<=\s))(?:for|in|per|every|each|with|which is)\b(?!.*(?:{_WORKED}|\bis\b))"
    rf"|\s?[:—–]\s+(?=[\w$])(?!.*(?:{_WORKED}|\bis\b)))",
    re.IGNORECASE,
)
# What a text that is one number has not: beside it (here #) signs by which it is a part of something else.
_NOT_ONE = re.compile(
    r"\d|[<>≤≥≠±∓_!;∞]|/\s*#|#\s*/\s*(?:[a-z](?![a-z])|[\\(])|#\s*[:,]|,\s*#|#\s*\\?[abciknpqrxyz](?!\.?m\b|[a-z])"
    r"|\\(?:leq?|geq?|lt|gt|neq?|in|cup|cap|infty|pm|mp|overline|overbrace|binom|choose|begin|l?dots)(?![a-z])",
    re.IGNORECASE,
)
_RAISED_UNIT = re.compile(
    r"(?:\\(?:text|mathrm|mbox|rm)\s*\{[^{}]*\}|\b(?:[kcm]?m|ft|in|yd|mi|units?|inch(?:es)?|feet|met(?:er|re)s?|s))"
    r"\s*(?:\^\s*)?\{?\s*[23]\s*\}?"
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
_AFTER_EQUALS = re.compile(r"=\s*-\s+(?=[\d.$(\\])")  # x = - 5
# A minus apart from its number: -(5), -{5}, -\text{5}, -**5**; and in words, between two numbers a difference.
_NEGATIVE = re.compile(
    rf"(?<![\w)}}\]])-(?:\(|\{{|\*\*|__|\\(?:text|textbf|mathrm|mathbf|mbox)\s?\{{)\s?"
    rf"({_DIGITS}(?:\s?/\s?{_DIGITS})?)\s?(?:[)}}]|\*\*|__)",
    re.IGNORECASE,
)
_MINUS = re.compile(
    r"(?:(?<![a-z])negative|(?<![\d)}%°]\s)(?<!\b[a-z]\s)(?<![a-z])minus)\s?\}?\s?(?=[\d.$£€¥(\\])"
    r"|[负負]\s?(?=[\d$¥])|零下\s?(?=\d)",
    re.IGNORECASE,
)
_APART = re.compile(r"\A([ \t*_$(\[{\\]*)-[ \t]+(?=[\d.$£€¥(\\])")  # what begins so is no bullet where a number is said
_CURRENCY = re.compile(r"(?<![a-z])(?:rm|rs\.?)\s?(?=\d)", re.IGNORECASE)
_BOLD = re.compile(r"__(?=[\d.$£€¥+-])|(?<=\d)__")
_LONG_SPACE = re.compile(r"\s{3,}")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+")


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly; None where it has none, or one too large to be worked with."""
    found = _numbers(_readable(text))
    return _value(found[-1]) if found else None


def said_number(sentence: str) -> Fraction | None:
    """The last number of the sentence, or the first where it begins with that and explains it: "5 out of 10"."""
    text = _readable(sentence)
    found = _numbers(text)
    if not found:
        return None
    explained = _BEFORE_NUMBER.fullmatch(text, 0, found[0].start()) and _ASIDE.match(text, found[0].end())
    return _value(found[0] if explained else found[-1])


def with_its_minus(text: str) -> str:
    """The text, in which a minus apart from the number that it begins with stands at that number."""
    return _APART.sub(r"\1-", text.replace("\u2212", "-"))


def only_number(text: str) -> Fraction | None:
    """The number that the text is, with a unit, a sign of money or "x =" beside it; None where it is anything else."""
    text = _readable(with_its_minus(text.lstrip()))
    found = _numbers(text)
    if len(found) != 1:
        return None
    beside = text[: found[0].start()] + "#" + text[found[0].end() :]
    return None if _NOT_ONE.search(_RAISED_UNIT.sub("", beside)) else _value(found[0])


def _readable(text: str) -> str:
    """The text with powers, fractions and roots in the writing that `_NUMBER` knows; where no number is, signs."""
    text = _LONG_SPACE.sub("  ", one_width(text[-LONGEST:])).translate(_SIGNS).replace("{,}", ",")
    text = _BOLD.sub(" ", text)
    text = _NO_NUMBER.sub("π", _ROOT.sub("π", _DEGREES.sub("° ", text)))
    text = text.replace("\\,", "").replace("\\!", "").replace("\\$", "$")
    text = _TEN.sub(lambda m: f"1e{m[1] or m[2]}", _POWER.sub(lambda m: f"e{m[1] or m[2]}", text))
    text = _OTHER_EXPONENT.sub("^n", _INTEGERS.sub(_raised, text))
    text = _MINUS.sub("-", _CURRENCY.sub("", _FRACTION.sub(r"\1\2/\3\4", text)))
    return _NEGATIVE.sub(r"-\1", _AFTER_EQUALS.sub("=-", text))


def _numbers(text: str) -> list[re.Match[str]]:
    """The numbers of a readable text, but for parts of what is none."""
    return [number for number in _NUMBER.finditer(text) if _stands_alone(number, text)]


def _stands_alone(number: re.Match[str], text: str) -> bool:
    """Whether it is no part of a sum, a power or a product with what is no number."""
    before = text[max(0, number.start() - 6) : number.start()]
    digits = number.end(4) if number[4] else number.end(3)  # before the unit, which may be m^2
    return not _BESIDE_BEFORE.search(before) and not _BESIDE_AFTER.match(text, digits)


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


def one_width(text: str) -> str:
    """Characters of one width, a fraction apart from the whole number before it, 1 000 in one piece."""
    text = _RAISED.sub(r"^\g<0>", _AFTER_WHOLE.sub(" ", _SPACED.sub("", text)))
    return unicodedata.normalize("NFKC", text).replace("^\u2212", "^-")
