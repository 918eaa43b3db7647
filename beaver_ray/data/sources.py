"""Samples from rows: readers by dataset name, or by the names of its fields, and an account of every row that is
dropped.

A reader turns one row of a file (a dict) into a `RawSample` or raises `BadRow(reason)`. Bad rows are counted,
never fatal; a source without a single good row is the user's error. Register a reader of your own with

    @reader("my-data")
    def my_data(row: dict[str, Any]) -> RawSample: ...
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from beaver_ray.data.files import Line, Place, find_place, rows
from beaver_ray.data.splits import SUFFIXES
from beaver_ray.errors import UserError
from beaver_ray.options import near


@dataclass(frozen=True, slots=True)
class RawSample:
    """One prompt, perhaps with one or two answers and their labels (Safe RLHF's raw sample)."""

    input: str | list[str]  # one user turn, or turns user, assistant, ..., user (an odd number)
    answer: str | None = None
    other_answer: str | None = None
    better: bool | None = None  # `answer` is more helpful than `other_answer`
    safer: bool | None = None  # `answer` is less harmful than `other_answer`
    is_safe: bool | None = None
    is_other_safe: bool | None = None
    system: str | None = None  # the row's own system text, which goes before the configured one
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)
    """What else the row says (category, answer, ...), for scopes and for functions that score."""
    labels: Mapping[str, bool] = field(default_factory=lambda: _NO_LABELS, compare=False, hash=False)
    """What `answer` (or, without one, the prompt) is an example of, by name; what is not named is not known, unless
    `REST` says it of all others."""
    other_labels: Mapping[str, bool] = field(default_factory=lambda: _NO_LABELS, compare=False, hash=False)

    @property
    def system_row(self) -> dict[str, str]:
        """The system text as a row has it: under ``system``, or nothing where there is none."""
        return {"system": self.system} if self.system else {}


_NO_LABELS: Mapping[str, bool] = {}  # one for all of a million samples
REST = "*"
"""The name in a sample's labels that stands for all that are not named."""

STRENGTHS = {"better": "strength_mean", "safer": "safety_strength_mean"}
"""The further fields of a sample that hold the strength of a label (`beaver_ray.method.noise`)."""


class BadRow(ValueError):
    """Raised by a reader for a row it cannot use; the message is the reason it is counted under."""


@dataclass
class DropReport:
    """How many rows were kept, and how many were dropped for which reason."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    """What is odd about what was kept, in words that follow a number."""

    def remark(self, what: str) -> None:
        """Count one more thing of which this is true."""
        self.remarks[what] += 1

    def drop(self, reason: str, count: int = 1) -> None:
        """Count `count` rows as dropped for `reason`."""
        self.dropped[reason] += count

    def add(self, other: DropReport) -> None:
        """Count what became of other rows as well."""
        self.kept += other.kept
        self.dropped += other.dropped
        self.remarks += other.remarks

    def line(self) -> str:
        """`kept 90 of 100; dropped 10: 7 empty answer, 3 identical responses`."""
        total = self.dropped.total()
        text = f"kept {self.kept} of {self.kept + total}"
        if total:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
            text += f"; dropped {total}: {reasons}"
        return text + "".join(f"; {count} {what}" for what, count in self.remarks.items())


Reader = Callable[[dict[str, Any]], RawSample]


@dataclass(frozen=True)
class Source:
    """A dataset name: its reader, and where the data lie when the user gives no path."""

    name: str
    read_row: Reader
    hub: str | None = None  # name on the Hugging Face hub
    data_dir: str | None = None  # folder inside the hub's dataset
    split: str | None = None
    subset: str | None = None  # configuration of the hub's dataset

    def place(self, path: str | None) -> Place:
        """Where the data are: at ``path`` (`find_place`), else at home on the hub. Raises UserError."""
        where = path or self.hub
        if where is None:
            raise UserError(f"dataset '{self.name}' needs a path: write {self.name}:PROPORTION:PATH")
        strict = self.hub is not None or self.split is not None
        return find_place(self.name, where, self.split, strict, self.subset, self.data_dir)


SOURCES: dict[str, Source] = {}


def reader(
    name: str,
    hub: str | None = None,
    data_dir: str | None = None,
    split: str | None = None,
    subset: str | None = None,
) -> Callable[[Reader], Reader]:
    """Register the decorated function as the reader of dataset `name` (a later one replaces an earlier
    one)."""
    _load_known()

    def register(function: Reader) -> Reader:
        SOURCES[name] = Source(name, function, hub, data_dir, split, subset)
        return function

    return register


def _load_known() -> None:
    """The readers of known data sets register themselves, and need this module to do so."""
    from beaver_ray.data import field_formats, safe_rlhf_formats  # noqa: F401


def find_source(name: str) -> Source:
    """The source registered under `name`, or a UserError that lists the names."""
    _load_known()
    if name not in SOURCES:
        if os.path.exists(name) or name.endswith(SUFFIXES):
            raise UserError(
                f"{name} is a path, and not the name of a dataset; write NAME:1:{name} with the NAME of its format "
                f"(docs/data.md), or map the fields of a file: {{path: {name}, prompt: FIELD, ...}}"
            )
        raise UserError(
            f"unknown dataset '{name}'{near(name, SOURCES)}; or map the fields of a file: "
            "{path: FILE, prompt: FIELD, ...}"
        )
    return SOURCES[name]


# ---------------------------------------------------------------- fields


def system_field(row: dict[str, Any], name: str = "system") -> str | None:
    """The system text of a row, where it has one; a blank one is none. Raises BadRow."""
    value = row.get(name)
    return text_field(row, name) if (value.strip() if isinstance(value, str) else value) else None


def text_field(row: dict[str, Any], name: str) -> str:
    """A field that must be a string with something in it."""
    if name not in row or row[name] is None:
        raise BadRow(f"no field '{name}'")
    value = row[name]
    if not isinstance(value, str):
        raise BadRow(f"'{name}' is not a string")
    if not value.strip():
        raise BadRow(f"empty '{name}'")
    if not is_whole(value):
        raise BadRow(f"'{name}' has half a character")
    return value


def number_field(row: Mapping[str, Any], name: str) -> float | None:
    """The number in a field, also one that a table holds as text; None where there is none. Raises BadRow."""
    value = row.get(name)
    if value is None or value == "" or value != value:  # a table's nan is a blank
        return None
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise BadRow(f"'{name}' is not a number")
    return found


def is_whole(text: str) -> bool:
    """Whether a text has no half of a character, which JSON can write, and no tokenizer or file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
"""How labels are written in tables; 1.0 is what programs write where a column of 0 and 1 has blanks too."""


def flag(row: dict[str, Any], name: str) -> bool | None:
    """A label that may be missing: bool, 0 / 1, or one of `FLAGS`. Raises BadRow."""
    value = row.get(name)
    if value is None or value == "":
        return None
    label = FLAGS.get(str(value).lower())
    if label is None:
        raise BadRow(f"'{name}' is neither true / false nor 1 / 0")
    return label


def flagged(*flags: Any) -> list[str]:
    """The names that are true in any of these mappings of names to flags."""
    return sorted({name for some in flags if isinstance(some, dict) for name, on in some.items() if on in (True, 1)})


def label_flags(value: Any, name: str) -> dict[str, bool]:
    """The labels in a field: a mapping of names to flags, null for unknown; or a list of the names that are true."""
    if value is None:
        return {}
    if isinstance(value, list):
        if not all(isinstance(label, str) for label in value):
            raise BadRow(f"'{name}' is not a list of names")
        return {REST: False} | dict.fromkeys(value, True)
    if not isinstance(value, dict):
        raise BadRow(f"'{name}' is neither a list of names nor a mapping of names to true / false")
    flags = {str(label): flag(value, label) for label in value}
    return {label: on for label, on in flags.items() if on is not None}


def rest(row: dict[str, Any], *used: str) -> dict[str, Any]:
    """What a row says besides the fields that are ``used``."""
    return {key: value for key, value in row.items() if key not in used}


def prompt_field(value: Any, name: str) -> str | list[str]:
    """A prompt: a string, or an odd number of turns, all strings with something in them."""
    if not isinstance(value, list):
        return text_field({name: value}, name)
    if len(value) % 2 == 0:
        raise BadRow(f"'{name}' has an even number of turns")
    if not all(isinstance(turn, str) for turn in value):
        raise BadRow(f"'{name}' is a list of other things than texts")
    return [text_field({"turn": turn}, "turn") for turn in value]


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class RowReader:
    """From a row as it stands in a file to a sample."""

    source: Source
    column: str | None = None
    """The column of a table that is the prompt."""
    where: Mapping[str, Any] = field(default_factory=dict)
    """Field to a value or several; other rows are left out."""

    def __call__(self, row: Any) -> RawSample:
        """The sample of one row. Raises BadRow."""
        values = self._values(row)
        sample = self.source.read_row(values)
        if self.where and not fits(self.where, {**values, **sample.fields}):
            raise BadRow("left out by where")
        return sample

    def _values(self, row: Any) -> dict[str, Any]:
        if isinstance(row, Line):
            try:
                row = json.loads(row)
            except (ValueError, RecursionError):  # a number of 5,000 digits, a thousand brackets
                raise BadRow("line is not JSON") from None
        if isinstance(row, str) and self.column is None:
            return {"prompt": row}
        if not isinstance(row, dict):
            raise BadRow("row is not an object")
        if None in row:  # of a CSV file
            raise BadRow("more cells than the header has; texts with commas need quotes")
        if self.column is None:
            return row
        if self.column not in row:
            raise BadRow(f"no column '{self.column}'")
        return {**row, "prompt": row[self.column]}


def open_source(
    source: Source, path: str | None = None, where: Mapping[str, Any] | None = None
) -> tuple[Place, RowReader]:
    """Where the rows of a source are, and how they are read. ``FILE#COLUMN`` takes that column as the prompt."""
    column: str | None = None
    if path is not None and "#" in path and not os.path.exists(path):
        path, column = path.rsplit("#", 1)
    return source.place(path), RowReader(source, column, where or {})


def read_source(
    name: str | Source, path: str | None = None, where: Mapping[str, Any] | None = None
) -> tuple[list[RawSample], DropReport]:
    """All good samples of dataset `name`, in the order of the files.

    Args:
        name: a registered name. Of a folder, as of the hub, it means one split (train, unless /test stands at its
            end) and perhaps one subset.
        path: a file, a folder of files (a clone of a dataset of the hub, for example), a folder written by
            `datasets.save_to_disk`, or a dataset name on the Hugging Face hub; None means the dataset's home on the
            hub. `FILE#COLUMN` takes that column as the prompt.
        where: field to a value or several; other rows are dropped.

    Raises:
        UserError: nothing at `path`, no file that can be read, or no good row.
    """
    source = find_source(name) if isinstance(name, str) else name
    place, read_row = open_source(source, path, where)
    report = DropReport()
    samples: list[RawSample] = []
    for row in rows(place, report.remark):
        try:
            samples.append(read_row(row))
        except BadRow as reason:
            report.drop(str(reason))
    report.kept = len(samples)
    check_kept(report, place)
    return samples, report


def check_kept(report: DropReport, place: Place) -> None:
    """UserError where no row of a source is good."""
    if not report.kept:
        why = report.line() if report.dropped else "it has no rows"
        raise UserError(
            f"no usable sample of '{place.name}' in {place.where}: {why}; check that the file fits the dataset name"
            f"{_fields_there(place)}"
        )


def _fields_there(place: Place) -> str:
    """What else to do with the first row, where it has fields that are not mapped already."""
    if place.name not in SOURCES:
        return ""
    row = next(iter(rows(place, lambda what: None)), None)
    with suppress(ValueError, RecursionError):
        row = json.loads(row) if isinstance(row, Line) else row
    if not isinstance(row, dict) or not row:
        return ""
    names = ", ".join(str(name) for name in row)
    return f" (its first row has {names[:200]}), or map its fields: {{path: FILE, prompt: FIELD, ...}}"


# ---------------------------------------------------------------- values of fields


def field_value(row: Mapping[str, Any], name: str) -> Any:
    """The value of a field, None where there is none; ``a.b`` is b of what stands in a."""
    if name in row:
        return row[name]
    first, dot, inner = name.partition(".")
    below = row.get(first)
    return field_value(below, inner) if dot and isinstance(below, Mapping) else None


def fits(where: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether every field has one of the values that it should, compared as text; of a list any item will do."""
    for name, wanted in where.items():
        if not _is_there(values, name):
            return False
        value = field_value(values, name)
        said = {as_text(item) for item in (value if isinstance(value, list | tuple) else [value])} - {None}
        if said.isdisjoint(map(as_text, several(wanted))):
            return False
    return True


def _is_there(values: Mapping[str, Any], name: str) -> bool:
    first, dot, inner = name.partition(".")
    below = values.get(first)
    return name in values or (bool(dot) and isinstance(below, Mapping) and _is_there(below, inner))


def several(wanted: Any) -> list[Any] | tuple[Any, ...]:
    """A value, or a list of them, as a list."""
    return wanted if isinstance(wanted, list | tuple) else (wanted,)


def as_text(value: Any) -> str | None:
    """The text that a value is compared as; None for a list or an object."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    # As CSV files have them, in which a column of integers with gaps is one of floats.
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower()
    if isinstance(value, str) and re.fullmatch(r"-?\d+\.0+", value):
        return value.partition(".")[0]
    return str(value) if isinstance(value, str | int | float) else None
