"""Two policies on the same prompts: who wins, how often neither does, and how often the judge said nothing of use.

A judge's word on answer k of both policies to a prompt is a verdict, one of VERDICTS; a judge may be a score
(`compare`) or somebody who reads both answers. Verdicts of one prompt are not independent: every interval is clustered
by prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from beaver_ray.evaluation import alike_bounds, mean_interval, share_interval

VERDICTS = ("first", "second", "tie", "unparsed", "refused")
"""The first answer is better, the second one is, neither is; the judge's reply says none of these, or declines."""
FAILURES = ("unparsed", "refused")
VERDICT = np.dtype("U8")
"""Type of arrays of verdicts: NumPy cuts a longer word to what an array was made for."""


def compare(first: NDArray[np.floating], second: NDArray[np.floating], higher_wins: bool = True) -> NDArray[np.str_]:
    """The verdicts of a score on two policies' answers, in the scores' shape; a tie is where they are equal."""
    difference = (first - second) if higher_wins else (second - first)
    return np.where(difference > 0, "first", np.where(difference < 0, "second", "tie")).astype(VERDICT)


def by_words(first: NDArray[np.str_], second: NDArray[np.str_]) -> NDArray[np.str_]:
    """The verdicts of a judge who gave each answer a number, in words; one of FAILURES instead of it stays."""
    failed = [np.isin(words, FAILURES) for words in (first, second)]
    one, other = (
        np.where(bad, "0", words).astype(np.float64) for bad, words in zip(failed, (first, second), strict=True)
    )
    return np.select(failed, (first, second), compare(one, other)).astype(VERDICT)


def points(verdicts_M: NDArray[np.str_]) -> NDArray[np.float64]:
    """What the first policy earns by each verdict: 1 for a win, one half for a tie, 0 for a loss, nan where it failed.

    Raises ValueError for a word that is no verdict.
    """
    earned_M = np.full(len(verdicts_M), np.nan)
    for verdict, value in {"first": 1.0, "tie": 0.5, "second": 0.0}.items():
        earned_M[verdicts_M == verdict] = value
    if strange := set(verdicts_M[np.isnan(earned_M)].tolist()) - set(FAILURES):
        raise ValueError(f"{min(strange)!r} is no verdict; there are {', '.join(VERDICTS)}")
    return earned_M


def win_tie_loss(verdicts_M: NDArray[np.str_], prompts_M: NDArray[np.integer]) -> dict[str, Any]:
    """How the first policy fares against the second.

    win, tie, loss: their shares of the comparisons that a verdict came of, each {"mean", "low", "high", "n"}.
    win_rate: wins and half of the ties. Its interval is no narrower than that of as many prompts that all went alike
    (`alike_bounds`), which the spread of mere ties, or of ties and one win, does not tell.
    comparisons: all that were asked for. unparsed, refused: how many of them the judge failed at, which are in no
    share. Without any verdict all figures are None.
    """
    earned_M = points(verdicts_M)
    counted = ~np.isnan(earned_M)
    found: dict[str, Any] = {"comparisons": len(verdicts_M)}
    found |= {failure: int((verdicts_M == failure).sum()) for failure in FAILURES}
    if not counted.any():
        return found | dict.fromkeys(("win", "tie", "loss", "win_rate"))
    prompts, earned = prompts_M[counted], earned_M[counted]
    shares = {"win": earned == 1.0, "tie": earned == 0.5, "loss": earned == 0.0}
    found |= {name: share_interval(flags, prompts) for name, flags in shares.items()}
    rate = mean_interval(earned, prompts, within=(0.0, 1.0))
    low, high = alike_bounds(rate["mean"], len(np.unique(prompts)))
    return found | {"win_rate": rate | {"low": min(rate["low"], low), "high": max(rate["high"], high)}}
