"""Rejection sampling at serving: an answer that is flagged is drawn anew, a few times, and then it is a refusal.

The pair of question and answer is judged, and not the question alone: a harmful question may get a harmless answer
(BeaverTails, arXiv 2307.04657).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

REFUSAL = "Sorry, I can't help with that."
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What came of one question."""

    answer: T | None
    """The first answer that was not flagged; None where all were."""
    tries: int


@dataclass
class RejectionFigures:
    """Counts over the questions so far."""

    questions: int = 0
    flagged_first: int = 0
    """Questions whose first answer was flagged: the rate without rejection."""
    refused: int = 0
    """Questions all of whose answers were flagged."""
    tries: int = 0

    def count(self, outcome: Outcome[T]) -> None:
        """One more question."""
        self.questions += 1
        self.flagged_first += outcome.tries > 1 or outcome.answer is None
        self.refused += outcome.answer is None
        self.tries += outcome.tries

    def line(self) -> str:
        """`flagged 12 of 40 (30.0 %) at first, 0 in the end, 3 refused; 1.40 tries a question`."""
        if not self.questions:
            return "no question was asked"
        share = 100 * self.flagged_first / self.questions
        return (
            f"flagged {self.flagged_first} of {self.questions} ({share:.1f} %) at first, 0 in the end, "
            f"{self.refused} refused; {self.tries / self.questions:.2f} tries a question"
        )


def sample_unflagged(draw: Callable[[], T], flagged: Callable[[T], bool], most: int) -> Outcome[T]:
    """Draw until an answer is not flagged, at most ``most`` times."""
    if most < 1:
        raise ValueError(f"at least one try, not {most}")
    for number in range(1, most + 1):
        answer = draw()
        if not flagged(answer):
            return Outcome(answer, number)
    return Outcome(None, most)
