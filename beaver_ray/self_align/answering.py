"""Answers by rules of the model's own choice: the context, and what of a reply is kept.

The context is the same for all questions (so that its keys and values are computed once); behind it come the tag of the
user, the question, and the tag of the assistant's thoughts, which the model goes on with.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from beaver_ray.errors import UserError, first_line
from beaver_ray.self_align.options import AnswerFilters, Tags
from beaver_ray.self_align.principles import Principle
from beaver_ray.self_align.seeds import Exemplar
from beaver_ray.spelling import words

CONTEXT = Path(__file__).parent / "context.j2"
_GIVEN = {"principles", "assistant", "exemplars", "tags"}
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False
)
_RULES = re.compile(r"\brules?\s*#?(\d+(?:(?:\s*,\s*(?:and\s+|or\s+)?|\s*(?:and|or|&)\s*)\d+)*)", re.IGNORECASE)
_CLAUSES = re.compile(r"[.,;:!?()\n]+|\s[-\u2013\u2014]\s")
_SENTENCES = re.compile(r"(?<=[.!?])\s+|\n+")
CLAUSE_WORDS, SENTENCE_WORDS = 4, 6
"""Shorter clauses may come twice, and shorter sentences be an exemplar's, by chance."""


@dataclass(frozen=True)
class Answered:
    """A reply that is kept."""

    answer: str
    thoughts: str
    rules: tuple[int, ...]
    """Numbers of the principles that the thoughts name, each once, in their order."""
    notes: tuple[str, ...] = ()
    """What was done to it, or is odd about it."""


def write_context(
    principles: Sequence[Principle], exemplars: Sequence[Exemplar], tags: Tags, assistant: str, file: str | None = None
) -> str:
    """What stands before every question. UserError where the template cannot be read, or does not show the principles.

    A template is given principles (number, name, text), exemplars, tags and assistant; exemplars follow by themselves
    one that does not show them.
    """
    path = Path(file) if file else CONTEXT
    try:
        text = path.read_text(encoding="utf-8")
        used = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(text))
        if unknown := used - _GIVEN:
            raise UserError(f"context {path} uses {min(unknown)}, which it is not given; it is given {sorted(_GIVEN)}")
        if "principles" not in used:
            raise UserError(f"context {path} must show {{{{ principles }}}}, or no answer is by rules")
        shown = [one.model_dump() | {"number": number} for number, one in enumerate(principles, 1)]
        head = _ENVIRONMENT.from_string(text).render(
            principles=shown, assistant=assistant, exemplars=exemplars, tags=tags
        )
    except UserError:
        raise
    except Exception as error:  # whatever a template of the user's does
        raise UserError(f"context {path} cannot be read as a Jinja template: {first_line(error)}") from None
    told = [] if "exemplars" in used else [dialogue(one, tags) for one in exemplars]
    return "\n\n".join([head.rstrip(), *told]) + "\n\n"


def dialogue(one: Exemplar, tags: Tags) -> str:
    """An exemplar as the context shows it."""
    return "\n".join([*_asked(one.user, tags), one.thoughts.strip(), tags.answer, one.answer.strip()])


def question(text: str, tags: Tags) -> str:
    """What comes behind the context: the question, up to where the thoughts begin."""
    return "\n".join([*_asked(text, tags), ""])


def rules_of(thoughts: str, known: int) -> tuple[tuple[int, ...], int]:
    """The numbers of rules that thoughts name, from 1 to ``known``, each once; and how many others they name."""
    said = [int(number[:6]) for some in _RULES.findall(thoughts) for number in re.findall(r"\d+", some)]
    there = tuple(dict.fromkeys(number for number in said if 1 <= number <= known))
    return there, len({number for number in said if not 1 <= number <= known})


class Sieve:
    """The filters of stage self_align, in the order of `AnswerFilters`."""

    def __init__(self, filters: AnswerFilters, tags: Tags, exemplars: Sequence[Exemplar], rules: int) -> None:
        self.filters, self.tags, self.rules = filters, tags, rules
        said = [part for one in exemplars for part in _SENTENCES.split(one.answer)]
        self.copied = {" ".join(words(part)) for part in said if len(words(part)) >= SENTENCE_WORDS}

    def read(self, reply: str, cut: bool) -> Answered | str:
        """What a reply comes to, or why it is left out. cut: whether it was ended by its length."""
        filters, notes = self.filters, []
        text = reply.strip()
        if self.tags.user in text:  # what comes behind it is a dialogue of the model's own
            text, cut = text[: text.index(self.tags.user)].strip(), False
            notes.append("went on as the user")
        if filters.opening and not text.startswith(filters.opening):
            return "thoughts begin otherwise"
        thoughts, tag, answer = text.partition(self.tags.answer)
        if not tag:
            if filters.needs_answer:
                return "no answer"
            thoughts, answer = "", text
        again = [answer.index(tag) for tag in (self.tags.thoughts, self.tags.answer) if tag in answer]
        if again:
            answer, cut = answer[: min(again)], False
            notes.append("thought and answered once more")
        if cut and not filters.allow_cut:
            return "cut at its longest"
        answer = answer.strip()
        for pattern in filters.strip:
            if (found := re.match(pattern, answer)) and found.end():
                answer = answer[found.end() :].strip()
                answer = answer[:1].upper() + answer[1:]
                notes.append("preamble taken off")
        if reason := self._fault(answer):
            return reason
        rules, unknown = rules_of(thoughts, self.rules)
        notes += ["thoughts name no rule"] if not rules else []
        notes += ["thoughts name a rule that there is not"] if unknown else []
        return Answered(answer, thoughts.strip(), rules, tuple(notes))

    def _fault(self, answer: str) -> str | None:
        filters = self.filters
        if not answer:
            return "an empty answer"
        if len(answer) < filters.min_chars:
            return f"fewer than {filters.min_chars} characters"
        if filters.repeats and repeats_a_clause(answer):
            return "a clause twice"
        if any(answer.replace("\u2019", "'").startswith(start.replace("\u2019", "'")) for start in filters.starts):
            return "begins as a bare apology"
        if any(phrase.lower() in answer.lower() for phrase in filters.blacklist):
            return "a phrase of the blacklist"
        if filters.copies and any(" ".join(words(part)) in self.copied for part in _SENTENCES.split(answer)):
            return "a sentence of an exemplar"
        return None


def repeats_a_clause(answer: str) -> bool:
    """Whether it says a clause of four words or more twice; case does not count."""
    clauses = [" ".join(words(part)) for part in _CLAUSES.split(answer)]
    long = [clause for clause in clauses if clause.count(" ") >= CLAUSE_WORDS - 1]
    return len(set(long)) < len(long)


def histograms(rules: Mapping[str, Sequence[Sequence[int]]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """By pool: the share of its answers whose thoughts name each rule. rules: of each answer of a pool."""
    return {
        pool: {
            name: sum(number in some for some in answers) / len(answers) if answers else 0.0
            for number, name in enumerate(names, 1)
        }
        for pool, answers in rules.items()
    }


def apart(rules: Mapping[str, Sequence[Sequence[int]]]) -> float | None:
    """How different the use of rules is in two pools: total variation distance, 0 (the same) to 1, of their shares of
    all mentions. None where there are not two pools with mentions.
    """
    counts = [Counter(number for some in answers for number in some) for answers in rules.values()]
    counts = [some for some in counts if some]
    if len(counts) != 2:
        return None
    first, second = counts
    return sum(abs(first[n] / first.total() - second[n] / second.total()) for n in {*first, *second}) / 2


def identity_rows(count: int, assistant: str, maker: str) -> list[dict[str, str]]:
    """Questions about who the assistant is, with answers that name it: every question with every answer, in turn."""
    answers = [
        f"I am {assistant}, an assistant made by {maker}.",
        f"My name is {assistant}. {maker[:1].upper()}{maker[1:]} made me to be helpful, honest and harmless.",
        f"I am called {assistant}, a language model trained by {maker}.",
    ]
    pairs = [(asked, answer) for answer in answers for asked in _IDENTITY]
    rows = [{"prompt": asked, "response": answer} for asked, answer in pairs]
    return [rows[place % len(rows)] for place in range(count)]


_IDENTITY = [
    *("Who are you?", "What is your name?", "Who made you?", "What should I call you?", "Which model am I talking to?"),
    *(
        "Are you a human being?",
        "Tell me who you are.",
        "Who trained you?",
        "Introduce yourself.",
        "Do you have a name?",
    ),
    *("Are you ChatGPT?", "What are you?", "Which company is behind you?", "Is there a person typing this?"),
]


def behind_system_texts(
    rows: Sequence[Mapping[str, Any]], texts: Sequence[str], share: float, seed: int
) -> list[dict[str, Any]]:
    """Pairs, a share of those without a system text of their own behind one of ``texts``.

    Which ones, and behind which, is drawn by the seed and the pair alone.
    """
    found = []
    for row in rows:
        rng = random.Random(f"system text/{seed}/{row['prompt']}/{row['response']}")
        drawn = {"system": rng.choice(texts)} if rng.random() < share else {}
        found.append({**drawn, **row})
    return found


def _asked(text: str, tags: Tags) -> list[str]:
    return [tags.user, text.strip(), tags.thoughts]
