"""What a judge says of pairs by each principle, and the labels that come of it (SALMON, arXiv 2310.05910).

A judge is asked about N pairs by P principles in both orders. Only what both orders agree on counts; scores of a
principle are divided by their spread, so that no principle is louder than another; the label of a pair under some
principles, any of them perhaps negated, is what the strongest of them says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from beaver_ray.evaluation import wilson
from beaver_ray.principle_options import NOT

MOST = 8
"""Principles of one label, at most."""
SIZE_SHARE = 0.2
"""Of the geometric distribution that their number is drawn from."""


@dataclass(frozen=True)
class Agreement:
    """What both orders of a judge's comparisons agree on, by one principle; arrays are [N]."""

    score_N: np.ndarray
    """Above 0 where the first answer follows the principle better; nan where that cannot be used."""
    one_order_N: np.ndarray
    """What the order says alone in which the first answer is shown first."""
    other_order_N: np.ndarray
    """The same of the other order."""

    @property
    def kept(self) -> int:
        """Pairs on which the orders agree."""
        return int(np.isfinite(self.score_N).sum())

    def figures(self) -> dict[str, Any]:
        """In numbers, shares with 95 % intervals (Wilson's)."""
        read = np.isfinite(self.one_order_N) & np.isfinite(self.other_order_N)
        tied = read & (self.one_order_N == 0) & (self.other_order_N == 0)
        one, other = self.one_order_N[read], self.other_order_N[read]
        # What stood first is the first answer in one order, and the second in the other.
        chose_first, decided = int((one > 0).sum() + (other < 0).sum()), int((one != 0).sum() + (other != 0).sum())
        return {
            "pairs": len(self.score_N),
            "unread": int((~read).sum()),
            "ties": int(tied.sum()),
            "kept": self.kept,
            "agreement": _share(self.kept, int((read & ~tied).sum())),
            "chose_what_stood_first": _share(chose_first, decided),
            "spread": spread(self.score_N),
        }


def _share(count: int, n: int) -> dict[str, Any]:
    low, high = wilson(count / n, n) if n else (0.0, 1.0)
    return {"mean": count / n if n else None, "low": low, "high": high, "n": n}


def agree(one_order_N: np.ndarray, other_order_N: np.ndarray) -> Agreement:
    """The mean of both orders where their signs are the same, and nothing where they are not, or one is a tie.

    one_order_N: log P(A) - log P(B), or +1 and -1, with the first answer shown as A. other_order_N: of the second shown
    as A. nan is a reply that could not be read.
    """
    one_N, other_N = np.asarray(one_order_N, dtype=np.float64), -np.asarray(other_order_N, dtype=np.float64)
    score_N = np.where((np.sign(one_N) == np.sign(other_N)) & (one_N != 0), (one_N + other_N) / 2, np.nan)
    return Agreement(score_N, one_N, other_N)


def spread(score_N: np.ndarray) -> float | None:
    """The standard deviation about 0 of the scores that there are; None where there are none.

    About 0, and not about their mean, so that it does not matter which answer of a pair stands first.
    """
    kept = score_N[np.isfinite(score_N)]
    return float(np.sqrt(np.mean(kept**2))) if len(kept) else None


def scaled(score_PN: np.ndarray) -> np.ndarray:
    """Scores [P, N], those of each principle divided by their spread."""
    spreads = [spread(score_N) or 1.0 for score_N in score_PN]
    return np.asarray(score_PN / np.array(spreads)[:, None])


@dataclass(frozen=True)
class Drawn:
    """A pair's label under some principles."""

    principles: tuple[int, ...]
    """Their numbers, in the order in which they are written."""
    negated: tuple[bool, ...]
    dominant: int
    """The number of the strongest of them."""
    score: float
    """What that says, in units of its spread; below 0 the second answer is better."""

    def called(self, names: Sequence[str]) -> list[str]:
        """Their names, "not " before those that are negated."""
        return [NOT * n + names[i] for i, n in zip(self.principles, self.negated, strict=True)]


def dominant(score_P: np.ndarray, principles: Sequence[int], negated: Sequence[bool]) -> Drawn:
    """The label that the principle of the largest score, in absolute value, gives; its sign is turned where negated.

    Of equal ones the first in the order of ``principles`` counts. ValueError where none of them has a score.
    """
    known = [(abs(float(score_P[i])), -place) for place, i in enumerate(principles) if np.isfinite(score_P[i])]
    if not known:
        raise ValueError("none of these principles has a score")
    place = -max(known)[1]
    score = float(score_P[principles[place]])
    return Drawn(tuple(principles), tuple(negated), principles[place], -score if negated[place] else score)


def draw_label(score_P: np.ndarray, rng: np.random.Generator, negate: float = 0.5, most: int = MOST) -> Drawn | None:
    """A label of one pair: a random subset of the principles that have a score for it, each negated at random.

    score_P: scaled scores by principle, nan where the orders disagree. The subset's size is geometric (SIZE_SHARE), at
    most ``most`` and as many as there are. None where no principle has a score.
    """
    known = np.flatnonzero(np.isfinite(score_P))
    if not len(known):
        return None
    size = min(int(rng.geometric(SIZE_SHARE)), most, len(known))
    some = [int(i) for i in rng.choice(known, size=size, replace=False)]
    return dominant(score_P, some, [bool(n) for n in rng.random(size) < negate])
