"""Pairs with the strength of their label: the rows that are written of them, and who is trained on which.

A row is in the columns of PKU-SafeRLHF, with strength_mean and strength_std of the label which answer is better, and
safety_strength_mean and safety_strength_std of the label which is safer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from beaver_ray.data.mixing import bare_turns, prompt_key
from beaver_ray.data.sources import STRENGTHS, RawSample
from beaver_ray.errors import UserError

Label = Literal["better", "safer"]


def folds(samples: Sequence[RawSample], count: int, seed: int) -> NDArray[np.int64]:
    """The fold [N] of each sample, 0 to ``count`` - 1; pairs of one prompt are in one fold.

    Prompts are dealt in random order, the next one to the fold that is smallest so far. Raises UserError for fewer
    prompts than folds.
    """
    of_prompt: dict[tuple[str, ...], list[int]] = {}
    for number, sample in enumerate(samples):
        of_prompt.setdefault(bare_turns(sample), []).append(number)
    if len(of_prompt) < count:
        raise UserError(f"{count} folds of {len(of_prompt)} prompts: give more data, or lower folds")
    groups = list(of_prompt.values())
    sizes, fold_N = [0] * count, np.zeros(len(samples), dtype=np.int64)
    for place in np.random.default_rng(np.random.SeedSequence(seed)).permutation(len(groups)):
        smallest = sizes.index(min(sizes))
        fold_N[groups[place]] = smallest
        sizes[smallest] += len(groups[place])
    return fold_N


def plain_row(sample: RawSample, preferred: bool) -> dict[str, Any]:
    """A pair for training on one label alone: the preferred answer first."""
    answers = [sample.answer, sample.other_answer]
    first, second = answers if preferred else answers[::-1]
    texts = {"prompt": sample.input, **sample.system_row, "response_0": first, "response_1": second}
    return texts | {"better_response_id": 0}


def strength_row(sample: RawSample, label: Label, mean: float, deviation: float) -> dict[str, Any]:
    """A pair with all that is known of it, and the strength of one of its labels."""
    labels = {
        "better_response_id": None if sample.better is None else int(not sample.better),
        "safer_response_id": None if sample.safer is None else int(not sample.safer),
        "is_response_0_safe": sample.is_safe,
        "is_response_1_safe": sample.is_other_safe,
    }
    said = {"prompt": sample.input, "response_0": sample.answer, "response_1": sample.other_answer}
    known = {name: value for name, value in labels.items() if value is not None}
    name = STRENGTHS[label]
    return {**sample.fields, **said, **sample.system_row, **known, name: mean, name.replace("_mean", "_std"): deviation}


def published_row(sample: RawSample, preferred: bool, mean: float, deviation: float) -> dict[str, Any]:
    """The same in the fields of fnlp/hh-rlhf-strength-cleaned: two dialogues as lists of lines."""
    lines = [f"{'Assistant' if n % 2 else 'Human'}: {turn}" for n, turn in enumerate(prompt_key(sample))]
    answers = [sample.answer, sample.other_answer]
    chosen, rejected = answers if preferred else answers[::-1]
    return {
        "chosen": [*lines, f"Assistant: {chosen}"],
        "rejected": [*lines, f"Assistant: {rejected}"],
        "mean preference difference": mean,
        "std preference difference": deviation,
    }
