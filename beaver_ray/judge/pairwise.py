"""Comparisons of two answers, each asked in both orders, and judgements of single ones.

A judge that likes whatever stands first is found out by it: it contradicts itself, and its comparisons become ties
that are counted as `position_disagreement`. A reply that cannot be read, or a refusal, is neither a tie nor a loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from beaver_ray.judge.prompts import Reading, Rubric
from beaver_ray.judge.replies import REFUSED, UNPARSED, Reply

Ask = Callable[[Sequence[str]], list[Reply]]
"""A reply for each text, in their order."""
Value = Literal["first", "second", "tie", "unparsed", "refused"]
VALUES: tuple[Value, ...] = ("first", "second", "tie", "unparsed", "refused")
_UNREAD: tuple[Value, ...] = ("refused", "unparsed")

# What A, B and TIE mean where the first answer is shown as A, and where it is shown as B.
_SHOWN_FIRST: dict[str, Value] = {"A": "first", "B": "second", "TIE": "tie", UNPARSED: "unparsed", REFUSED: "refused"}
_SHOWN_SECOND: dict[str, Value] = {**_SHOWN_FIRST, "A": "second", "B": "first"}


@dataclass(frozen=True)
class Comparison:
    """Two answers to one dialogue."""

    turns: tuple[str, ...]
    """User, assistant, ..., user."""
    first: Reading
    second: Reading
    system: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a comparison."""

    value: Value
    orders: tuple[Value, ...]
    """What it said with the first answer shown first, and with it shown second; none where both are the same text."""

    @property
    def position_disagreement(self) -> bool:
        """Whether both orders could be read and say different things."""
        return self.value == "tie" and self.orders != () and set(self.orders) != {"tie"}


IDENTICAL = Verdict("tie", ())


def settle(shown_first: Value, shown_second: Value) -> Verdict:
    """The verdict of both orders: where they agree what they say, else a tie, and nothing where one is unreadable."""
    orders = (shown_first, shown_second)
    for value in _UNREAD:
        if value in orders:
            return Verdict(value, orders)
    return Verdict(shown_first if shown_first == shown_second else "tie", orders)


def compare(comparisons: Sequence[Comparison], rubric: Rubric, ask: Ask) -> list[Verdict]:
    """A verdict for each; the same text twice is a tie for which nobody is asked."""
    different = [c for c in comparisons if c.first != c.second]
    texts = [rubric.write(c.turns, c.system, answer_a=c.first, answer_b=c.second) for c in different]
    texts += [rubric.write(c.turns, c.system, answer_a=c.second, answer_b=c.first) for c in different]
    said = [rubric.form.read(reply) for reply in ask(texts)]
    halves = zip(said[: len(different)], said[len(different) :], strict=True)
    verdicts = iter([settle(_SHOWN_FIRST[one], _SHOWN_SECOND[other]) for one, other in halves])
    return [next(verdicts) if c.first != c.second else IDENTICAL for c in comparisons]


@dataclass(frozen=True)
class Answer:
    """One answer to a dialogue."""

    turns: tuple[str, ...]
    text: str
    system: str | None = None


def judge_each(answers: Sequence[Answer], rubric: Rubric, ask: Ask) -> list[str]:
    """A word of the rubric's form for each answer ("7"; "SAFE"), or UNPARSED, or REFUSED."""
    texts = [rubric.write(answer.turns, answer.system, answer=answer.text) for answer in answers]
    return [rubric.form.read(reply) for reply in ask(texts)]


@dataclass(frozen=True)
class PairCounts:
    """What became of comparisons; the five values of a verdict sum to ``comparisons``."""

    comparisons: int
    first: int
    second: int
    tie: int
    """With those of identical answers and of orders that disagree."""
    unparsed: int
    refused: int
    identical: int
    position_disagreement: int
    chose_a: int
    """Decisions, of both orders, for the answer that was shown first."""
    chose_b: int

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> PairCounts:
        """Count them. Decisions for a place are of the comparisons that could be read in both orders."""
        values = Counter(verdict.value for verdict in verdicts)
        read = [v.orders for v in verdicts if v.orders and v.value not in _UNREAD]
        chose_a = sum((one == "first") + (other == "second") for one, other in read)
        chose_b = sum((one == "second") + (other == "first") for one, other in read)
        return cls(
            comparisons=len(verdicts),
            **{value: values[value] for value in VALUES},
            identical=sum(verdict.orders == () for verdict in verdicts),
            position_disagreement=sum(verdict.position_disagreement for verdict in verdicts),
            chose_a=chose_a,
            chose_b=chose_b,
        )

    @property
    def win_rate(self) -> float | None:
        """Of the first answers, a tie as half a win, of the comparisons that could be read; None where none could."""
        read = self.first + self.second + self.tie
        return (self.first + self.tie / 2) / read if read else None

    @property
    def position_bias(self) -> float | None:
        """Share of decisions for what was shown first. Each pair is shown in both orders: a fair judge has 0.5."""
        decisions = self.chose_a + self.chose_b
        return self.chose_a / decisions if decisions else None
