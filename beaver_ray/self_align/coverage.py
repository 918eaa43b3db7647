"""What a pool of instructions covers: kinds and topics, and which verbs and nouns its instructions begin with.

Verb and noun by a rule of thumb for English, as no parser is at hand: past polite words the first word is the verb (of
a question its question word), and the noun is the last word of the first group of words behind an article or the like,
or else behind the verb. It is right of most imperatives, and no grammar.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import regex

SHOWN = 20
"""How many verbs are listed, the commonest first."""
_WORD = regex.compile(r"[\p{L}\p{M}'-]+|[.,;:!?()\n]")
_POLITE = frozenset(
    {
        "please",
        "kindly",
        "can",
        "could",
        "would",
        "will",
        "you",
        "i",
        "want",
        "need",
        "to",
        "help",
        "me",
        "let's",
        "let",
    }
    | {"us", "now", "then", "first"}
)
_BEFORE_NOUN = frozenset(
    {"a", "an", "the", "this", "these", "those", "my", "your", "his", "her", "its", "our", "their", "some", "any"}
    | {"each", "every", "two", "three", "four", "five", "several"}
)
_AFTER_NOUN = frozenset(
    {"of", "in", "on", "at", "for", "to", "from", "with", "without", "about", "by", "between", "among", "into", "as"}
    | {"that", "which", "who", "whose", "where", "when", "how", "why", "what", "if", "and", "or", "so", "because"}
    | {"while", "during", "after", "before", "is", "are", "was", "were", "can", "could", "should", "would", "does"}
    | {"do", "did", "has", "have", "had", "using", "than"}
)


def verb_and_noun(instruction: str) -> tuple[str, str] | None:
    """Of one instruction, in lower case; the noun is "" where none is found. None without a word."""
    found = [word.lower() for word in _WORD.findall(instruction)]
    start = next((place for place, word in enumerate(found) if word not in _POLITE and word[0].isalpha()), None)
    if start is None:
        return None
    rest = found[start + 1 :]
    rest = rest[: next((place for place, word in enumerate(rest) if word in ".!?\n"), len(rest))]
    opened = next((place for place, word in enumerate(rest) if word in _BEFORE_NOUN), -1)
    group = []
    for word in rest[opened + 1 :]:
        if word in _AFTER_NOUN or word in _BEFORE_NOUN or not word[0].isalpha():
            break
        group.append(word)
    return found[start], group[-1] if group else ""


def coverage(rows: Sequence[Mapping[str, Any]], topics: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Of a pool's rows and topics: instructions and topics of each kind, the commonest verbs, each with its nouns.

    distinct_verb_noun: different pairs of both as a share of all instructions.
    """
    pairs = [pair for row in rows if (pair := verb_and_noun(row["instruction"]))]
    verbs = Counter(verb for verb, _ in pairs)
    nouns = {verb: Counter(n for v, n in pairs if v == verb and n) for verb, _ in verbs.most_common(SHOWN)}
    kinds = Counter(row["category"] for row in rows if "category" in row)
    return {
        "types": {kind: {"topics": len(some), "instructions": kinds[kind]} for kind, some in topics.items()},
        "verbs": {verb: {"instructions": verbs[verb], "nouns": dict(nouns[verb].most_common(4))} for verb in nouns},
        "distinct_verbs": len(verbs),
        "distinct_verb_noun": len(set(pairs)) / len(pairs) if pairs else None,
    }
