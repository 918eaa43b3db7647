"""Mixing datasets: the `NAME[:PROPORTION[:PATH]]` syntax of Safe RLHF or mappings, and a hold-out split by prompt."""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beaver_ray.data.mapping import entry_source
from beaver_ray.data.sources import DropReport, RawSample, Source, find_source, open_source, read_source
from beaver_ray.data_options import (
    MOST_COPIES,
    SYNTAX,
    DataEntry,
    data_entry,
    data_label,
    read_proportion,
    split_spec,
    written_entry,
)
from beaver_ray.errors import UserError

Spec = str | DataEntry | Mapping[str, Any]
"""An entry of a list of data sets: as text, as an option, or as such an option's plain values."""


@dataclass(frozen=True)
class MixSpec:
    """One dataset of a mix: `count` samples where that is set, else `proportion` of what there is."""

    name: str
    proportion: float | Fraction = 1.0
    count: int | None = None
    path: str | None = None
    entry: DataEntry | None = None
    """The mapping that it was given as."""

    @property
    def source(self) -> Source:
        """How its rows are read. Raises UserError for an unknown name."""
        return find_source(self.name) if self.entry is None else entry_source(self.entry)

    @property
    def where(self) -> Mapping[str, Any]:
        """Field to a value or several; other rows are left out."""
        return {} if self.entry is None else self.entry.where

    @property
    def rows(self) -> str:
        """What rows it means, on one line; the same for two that differ in their proportions alone."""
        path = os.path.abspath(os.path.expanduser(self.path)) if self.path else None
        entry = None if self.entry is None else data_label(self.entry.model_copy(update={"proportion": 1.0}))
        return f"{self.name}:{path}:{entry}"

    def size(self, available: int) -> int:
        """How many samples are taken of `available`; round() is Python's, halves to the even number."""
        return round(self.proportion * available) if self.count is None else self.count


def check_not_read(written: Iterable[Path | None], specs: Iterable[Spec]) -> None:
    """UserError where a file that is to be written is one of the data sets', or is to be written twice."""
    files = [file.resolve() for file in written if file is not None]
    if twice := next((file for file in files if files.count(file) > 1), None):
        raise UserError(f"{twice} would be written twice; give two files")
    for mix in map(parse_spec, specs):
        read = {file.resolve() for file in open_source(mix.source, mix.path)[0].all_files}
        if lost := next((file for file in files if file in read), None):
            raise UserError(f"{lost} is one of the files that are read, and would be overwritten; give another")


def parse_spec(spec: Spec) -> MixSpec:
    """Read one `NAME[:PROPORTION[:PATH]]` (the path may hold colons itself, an empty part means its default), or one
    mapping."""
    if isinstance(spec, str):
        spec = written_entry(spec) or spec
    if not isinstance(spec, str):
        entry = spec if isinstance(spec, DataEntry) else data_entry(spec)
        entry_source(entry)
        found = _proportion(str(entry.proportion), data_label(entry))
        return replace(found, name=entry.name or str(entry.path), path=entry.path, entry=entry)
    name, amount, path = split_spec(spec)
    if not name:
        raise UserError(f"dataset '{spec}' has no name: write {SYNTAX}")
    find_source(name)
    return replace(_proportion(amount, spec), name=name, path=path.strip() or None)


def _proportion(amount: str, text: str) -> MixSpec:
    try:
        return MixSpec("", *read_proportion(amount))
    except ValueError as error:
        raise UserError(f"dataset '{text}': {error}") from None


def parse_mix(specs: Sequence[Spec]) -> dict[str, MixSpec]:
    """What is to be read, by its label; a proportion of 0 skips a data set without opening it.

    Raises UserError: bad syntax, or the same rows twice.
    """
    parsed = {data_label(spec): parse_spec(spec) for spec in specs}
    seen: set[str] = set()
    if len(parsed) < len(specs):
        raise UserError("a dataset is given twice: keep one and raise its proportion")
    for spec in parsed.values():
        if spec.rows in seen:
            raise UserError(f"dataset '{spec.name}' is given twice: keep one and raise its proportion")
        seen.add(spec.rows)
    return {label: spec for label, spec in parsed.items() if 0 not in (spec.proportion, spec.count)}


def take(label: str, spec: MixSpec, available: int, seed: int = 42) -> NDArray[np.int64]:
    """Which of the ``available`` samples of a data set are in the mix: whole copies as long as they fit, then a
    random remainder without replacement, in file order.

    The draw depends on the seed, the name and the number of samples, not on the other datasets of a mix.

    Raises UserError for many more samples than there are.
    """
    size = spec.size(available)
    if size > MOST_COPIES * available:
        raise UserError(f"dataset '{label}' has {available} samples, far fewer than it should give: ask for less")
    copies, remainder = divmod(size, available) if available else (0, 0)
    seeds = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(spec.name.encode()),))
    chosen = np.random.default_rng(seeds).permutation(available)[:remainder]
    return np.concatenate([np.tile(np.arange(available), copies), np.sort(chosen)]).astype(np.int64)


def load_mix(specs: Sequence[Spec]) -> tuple[list[RawSample], dict[str, DropReport]]:
    """Read the datasets and mix them, one after another (batches are shuffled later).

    Returns:
        The samples, and for each spec that was read the report of what was dropped. A proportion of 0 skips
        the dataset without opening it.

    Raises:
        UserError: bad syntax, the same dataset (name, path and where) twice, a source without good rows, or an
        empty mix.
    """
    mixed: list[RawSample] = []
    reports: dict[str, DropReport] = {}
    for label, spec in parse_mix(specs).items():
        samples, reports[label] = read_source(spec.source, spec.path, spec.where)
        mixed += [samples[index] for index in take(label, spec, len(samples))]
    check_mix(specs, len(mixed))
    return mixed, reports


def check_mix(specs: Sequence[Spec], size: int) -> None:
    """UserError for a mix without samples."""
    if not size:
        raise UserError(f"the datasets {list(map(data_label, specs))} give no samples: raise a proportion")


def hold_out(keys_N: NDArray[np.uint64], ratio: float, seed: int = 42) -> NDArray[np.bool_]:
    """Which samples [N] are held out, cut by prompt: all samples of one prompt fall on the same side.

    keys_N: the `prompt_keys` of the samples. `ratio` of the distinct prompts, at least one, are held out.

    Raises:
        UserError: ratio outside (0, 1), or fewer than two distinct prompts.
    """
    if not 0 < ratio < 1:
        raise UserError(f"split ratio {ratio} must lie between 0 and 1")
    _, first, numbers_N = np.unique(keys_N, return_index=True, return_inverse=True)
    distinct = len(first)
    if distinct < 2:
        raise UserError(
            f"cannot hold out from {distinct} distinct prompts: give at least two, or held-out data under eval"
        )
    count = min(max(1, math.floor(ratio * distinct + 0.5)), distinct - 1)
    order = np.random.default_rng(np.random.SeedSequence(seed)).permutation(distinct)
    chosen = np.zeros(distinct, dtype=np.bool_)
    chosen[np.argsort(first)[order[:count]]] = True  # the order is over prompts as they first appear
    return np.asarray(chosen[numbers_N.reshape(-1)], dtype=np.bool_)


def held_out_too(trained: NDArray[np.uint64], held_out: NDArray[np.uint64]) -> str | None:
    """A line about held-out prompts that are trained on as well (`prompt_keys` of both); None where there are none."""
    kept = np.unique(held_out)
    both = int(np.isin(kept, trained).sum())
    if not both:
        return None
    return f"{both} of {len(kept)} held-out prompts are training prompts too; figures on them flatter the model"


def prompt_keys(samples: Iterable[RawSample]) -> NDArray[np.uint64]:
    """64 bits of each sample's prompt: equal where its turns are, white space around them aside."""
    return np.fromiter(map(prompt_hash, samples), dtype=np.uint64)


def prompt_hash(sample: RawSample) -> int:
    """64 bits of the turns of a prompt, without white space around them."""
    digest = hashlib.blake2b(digest_size=8)
    for turn in bare_turns(sample):
        digest.update(turn.encode() + b"\0")
    return int.from_bytes(digest.digest(), "little")


def bare_turns(sample: RawSample) -> tuple[str, ...]:
    """The turns of a prompt, without white space around them."""
    return tuple(turn.strip() for turn in prompt_key(sample))


def prompt_key(sample: RawSample) -> tuple[str, ...]:
    """Equal for samples with the same prompt."""
    return (sample.input,) if isinstance(sample.input, str) else tuple(sample.input)
