"""Mixing datasets: the `NAME[:PROPORTION[:PATH]]` syntax of Safe RLHF, and a hold-out split by prompt."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from beaver_ray.data.sources import DropReport, RawSample, find_source, read_source
from beaver_ray.errors import UserError

MOST_COPIES = 1000
SYNTAX = "NAME[:PROPORTION[:PATH]] with PROPORTION a number, a/b, or n/-1 for exactly n samples"


@dataclass(frozen=True)
class MixSpec:
    """One dataset of a mix: `count` samples where that is set, else `proportion` of what there is."""

    name: str
    proportion: float | Fraction = 1.0
    count: int | None = None
    path: str | None = None

    def size(self, available: int) -> int:
        """How many samples are taken of `available`; round() is Python's, halves to the even number."""
        return round(self.proportion * available) if self.count is None else self.count


def parse_spec(text: str) -> MixSpec:
    """Read one `NAME[:PROPORTION[:PATH]]`; the path may hold colons itself, an empty part means its
    default."""
    name, _, rest = text.strip().partition(":")
    amount, _, path = rest.partition(":")
    if not name:
        raise UserError(f"dataset '{text}' has no name: write {SYNTAX}")
    find_source(name)
    proportion: float | Fraction = 1.0
    count: int | None = None
    try:
        numerator, slash, denominator = (amount.strip() or "1").partition("/")
        if slash and int(denominator) == -1:
            count = int(numerator)
        elif slash:
            proportion = Fraction(int(numerator), int(denominator))
        else:
            proportion = float(numerator)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"bad proportion '{amount}' in dataset '{text}': write {SYNTAX}") from error
    if not 0 <= (proportion if count is None else count) < math.inf:
        raise UserError(f"proportion '{amount}' in dataset '{text}' is negative or infinite: write {SYNTAX}")
    if proportion > MOST_COPIES:
        raise UserError(f"proportion '{amount}' in dataset '{text}' is above {MOST_COPIES}: lower it")
    return MixSpec(name, proportion, count, path.strip() or None)


def resample(samples: Sequence[RawSample], size: int, name: str, seed: int = 42) -> list[RawSample]:
    """`size` samples: whole copies as long as they fit, then a random remainder without replacement, in file
    order.

    The draw depends on the seed, the name and the number of samples, not on the other datasets of a mix.
    """
    if size and not samples:
        raise ValueError(f"cannot take {size} of no samples")
    copies, remainder = divmod(size, len(samples)) if samples else (0, 0)
    seeds = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(name.encode()),))
    chosen = np.random.default_rng(seeds).permutation(len(samples))[:remainder]
    return [*list(samples) * copies, *(samples[index] for index in sorted(chosen))]


def load_mix(specs: Sequence[str], seed: int = 42) -> tuple[list[RawSample], dict[str, DropReport]]:
    """Read the datasets and mix them, one after another (batches are shuffled later).

    Returns:
        The samples, and for each spec that was read the report of what was dropped. A proportion of 0 skips
        the dataset without opening it.

    Raises:
        UserError: bad syntax, the same dataset (name and path) twice, a source without good rows, or an empty
        mix.
    """
    parsed = [parse_spec(text) for text in specs]
    seen: set[tuple[str, str | None]] = set()
    for spec in parsed:
        key = (spec.name, os.path.abspath(os.path.expanduser(spec.path)) if spec.path else None)
        if key in seen:
            raise UserError(f"dataset '{spec.name}' is given twice: keep one and raise its proportion")
        seen.add(key)
    mixed: list[RawSample] = []
    reports: dict[str, DropReport] = {}
    for text, spec in zip(specs, parsed, strict=True):
        if 0 in (spec.proportion, spec.count):
            continue
        samples, reports[text] = read_source(spec.name, spec.path)
        if spec.size(len(samples)) > MOST_COPIES * len(samples):
            raise UserError(f"dataset '{text}' has {len(samples)} samples, far fewer than it should give: ask for less")
        mixed += resample(samples, spec.size(len(samples)), spec.name, seed)
    if not mixed:
        raise UserError(f"the datasets {list(specs)} give no samples: raise a proportion")
    return mixed, reports


def split(samples: Sequence[RawSample], ratio: float, seed: int = 42) -> tuple[list[RawSample], list[RawSample]]:
    """(rest, held out), in order, cut by prompt: all samples of one prompt fall on the same side.

    `ratio` of the distinct prompts, at least one, are held out.

    Raises:
        UserError: ratio outside (0, 1), or fewer than two distinct prompts.
    """
    if not 0 < ratio < 1:
        raise UserError(f"split ratio {ratio} must lie between 0 and 1")
    keys = [prompt_key(sample) for sample in samples]
    distinct = list(dict.fromkeys(keys))
    if len(distinct) < 2:
        raise UserError(
            f"cannot hold out from {len(distinct)} distinct prompts: give at least two, or held-out data under eval"
        )
    count = min(max(1, math.floor(ratio * len(distinct) + 0.5)), len(distinct) - 1)
    order = np.random.default_rng(np.random.SeedSequence(seed)).permutation(len(distinct))
    held_out = {distinct[index] for index in order[:count]}
    rest = [sample for sample, key in zip(samples, keys, strict=True) if key not in held_out]
    return rest, [sample for sample, key in zip(samples, keys, strict=True) if key in held_out]


def held_out_too(samples: Sequence[RawSample], held_out: Sequence[RawSample]) -> str | None:
    """A line about held-out prompts that are trained on as well; None where there are none.

    White space around a turn makes no other prompt.
    """
    trained, kept = prompt_texts(samples), prompt_texts(held_out)
    both = len(trained & kept)
    if not both:
        return None
    return f"{both} of {len(kept)} held-out prompts are training prompts too; figures on them flatter the model"


def prompt_texts(samples: Sequence[RawSample]) -> set[tuple[str, ...]]:
    """The turns of every distinct prompt, without white space around them."""
    return {tuple(turn.strip() for turn in prompt_key(sample)) for sample in samples}


def prompt_key(sample: RawSample) -> tuple[str, ...]:
    """Equal for samples with the same prompt."""
    return (sample.input,) if isinstance(sample.input, str) else tuple(sample.input)
