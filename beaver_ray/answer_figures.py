"""What a step's answers are like, whatever they score: how varied they are, how many refuse, how many hedge."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beaver_ray import experience
from beaver_ray.rules.disclaimers import has_disclaimer
from beaver_ray.rules.refusals import is_refusal

READ = 256
"""Answers whose texts are read, spread over the step: a rate of one half is then known to 6 points."""
READ_TOKENS = 1024
"""Of each, from its start."""


def answer_figures(batch: pa.RecordBatch, decode: Callable[[list[list[int]]], Sequence[str]]) -> dict[str, float]:
    """Figures of the tokens that the policy wrote: distinct n-grams, and refusals and disclaimers among the texts.

    Each answer of a dialogue is one. decode: rows of tokens to texts without special tokens.
    """
    tokens, lengths = experience.own(batch, "response_tokens"), experience.answer_lengths(batch)
    figures = {f"rollout/distinct_{n}": distinct(tokens, lengths, n) for n in (1, 2)}
    ends = np.cumsum(lengths)
    some = np.unique(np.linspace(0, len(lengths) - 1, min(READ, len(lengths))).astype(np.int64))
    rows = [tokens[ends[row] - lengths[row] : ends[row]][:READ_TOKENS].tolist() for row in some]
    texts = decode(rows)
    figures["rollout/refusal_rate"] = float(np.mean([is_refusal(text) for text in texts]))
    figures["rollout/disclaimer_rate"] = float(np.mean([has_disclaimer(text) for text in texts]))
    return figures


def distinct(tokens_T: np.ndarray, lengths_B: np.ndarray, n: int) -> float:
    """Different n-grams as a share of all n-grams of all answers (Li et al. 2016, https://arxiv.org/abs/1510.03055).

    nan where no answer has n tokens.
    """
    size = len(tokens_T) - n + 1
    if size < 1:
        return float("nan")
    # An n-gram as one number; of n tokens of 2^21 values, as long as n is at most 3.
    grams = np.zeros(size, dtype=np.int64)
    answer_T = np.repeat(np.arange(len(lengths_B)), lengths_B)
    for place in range(n):
        grams = (grams << 21) + tokens_T[place : place + size].astype(np.int64)
    inside = answer_T[:size] == answer_T[n - 1 :]
    return pc.count_distinct(pa.array(grams[inside])).as_py() / inside.sum() if inside.any() else float("nan")
