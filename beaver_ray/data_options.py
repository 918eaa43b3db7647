"""One entry of a list of data sets, where NAME:PROPORTION:PATH does not say enough.

Nothing heavy is imported here: the command line reads this module first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, Tag, ValidationError, model_validator

from beaver_ray.errors import UserError
from beaver_ray.options import Strict, near, option
from beaver_ray.yaml_files import TAGS, yaml_value

Scalar = str | int | float | bool | None
MAPPED = ("prompt", "messages", "system", "answer", "other_answer", "chosen", "rejected")
LABELS = ("better", "safer", "is_safe", "is_other_safe", "strength")
MOST_COPIES = 1000
SYNTAX = "NAME[:PROPORTION[:PATH]] with PROPORTION a number, a/b, or n/-1 for exactly n samples"


def split_spec(spec: str) -> tuple[str, str, str]:
    """(NAME, PROPORTION, PATH), of which the last two may be empty; the path may hold colons itself."""
    name, _, rest = spec.strip().partition(":")
    amount, _, path = rest.partition(":")
    return name, amount, path


def read_proportion(amount: str) -> tuple[float | Fraction, int | None]:
    """(Share of the rows, None), or for n/-1 (1, n). ValueError for what is neither, negative or far too much."""
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
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"bad proportion '{amount}': write {SYNTAX}") from None
    if not 0 <= (proportion if count is None else count) < math.inf:
        raise ValueError(f"proportion '{amount}' is negative or infinite: write {SYNTAX}")
    if proportion > MOST_COPIES:
        raise ValueError(f"proportion '{amount}' is above {MOST_COPIES}: lower it")
    return proportion, count


class DataEntry(Strict):
    """A data set by its name, or by the names of its fields; see docs/data.md."""

    name: str | None = option("Name of a known data set, which says what its fields mean; else map them here.", None)
    path: str | None = option("File, folder, or name of the Hugging Face hub; null for the home of name.", None)
    proportion: float | str = option("Share of its rows: a number, a/b, or n/-1 for exactly n.", 1.0)
    subset: str | None = option("Configuration of a data set of the hub.", None)
    split: str | None = option("Split; null for the training one.", None)
    where: dict[str, Scalar | list[Scalar]] = option(
        "Field of a row: value, or list of values; other rows are left out.", default_factory=dict
    )
    keep: list[str] | dict[str, str] | None = option(
        "Fields kept beside a prompt, or new name: field; null for all that are left.", None
    )
    prompt: str | None = option("Field of the prompt: text, turns, or messages with roles.", None)
    messages: str | None = option("Field of a dialogue with roles; a last turn of the assistant is the answer.", None)
    system: str | None = option("Field of the system prompt.", None)
    answer: str | None = option("Field of the answer.", None)
    other_answer: str | None = option("Field of a second answer.", None)
    chosen: str | None = option("Field of the preferred answer, or dialogue.", None)
    rejected: str | None = option("Field of the other answer, or dialogue.", None)
    better: str | None = option(
        "Field that is true where the first answer is more helpful; chosen: it always is.", None
    )
    safer: str | None = option("Field that is true where the first answer is less harmful; chosen: it always is.", None)
    strength: str | None = option("Field of a number: by how much the preferred answer is better.", None)
    is_safe: str | None = option("Field that says whether the first answer is safe.", None)
    is_other_safe: str | None = option("Field that says whether the second answer is safe.", None)

    @property
    def mapped(self) -> list[str]:
        """The options that name fields of a row, as far as they are given."""
        return [option for option in (*MAPPED, *LABELS) if getattr(self, option) is not None]

    @model_validator(mode="after")
    def _fits_together(self) -> DataEntry:
        if self.name is not None and self.mapped:
            raise ValueError(f"name {self.name} knows its fields; leave {self.mapped[0]} out, or leave name out")
        if self.name is None and not {"prompt", "messages", "chosen"} & set(self.mapped):
            raise ValueError("give name (a known data set), or the fields: prompt, messages, or chosen and rejected")
        if self.name is None and self.path is None:
            raise ValueError("path is missing: a file, a folder, or a name of the Hugging Face hub")
        if (self.chosen is None) != (self.rejected is None):
            raise ValueError("chosen and rejected go together: give both or neither")
        if self.chosen is not None and (given := {"answer", "other_answer", "messages"} & set(self.mapped)):
            raise ValueError(f"chosen and rejected are the answers; leave {min(given)} out")
        if self.prompt is not None and self.messages is not None:
            raise ValueError("messages hold the prompt; leave prompt out")
        if self.other_answer is not None and self.answer is None and self.messages is None:
            raise ValueError("other_answer needs answer")
        labels = [
            option for option in ("better", "safer", "strength", "is_other_safe") if getattr(self, option) is not None
        ]
        if labels and self.chosen is None and self.other_answer is None:
            raise ValueError(f"{labels[0]} compares two answers: give chosen and rejected, or answer and other_answer")
        if empty := [field for field, wanted in self.where.items() if wanted == []]:
            raise ValueError(f"where.{empty[0]} has no value, and would match no row")
        read_proportion(str(self.proportion))
        return self


def _kind(value: Any) -> str:
    return TAGS[1] if isinstance(value, Mapping | DataEntry) else TAGS[0]


def _readable(spec: str) -> str:
    try:
        if written_entry(spec) is None:
            name, amount, _ = split_spec(spec)
            if not name:
                raise ValueError(f"it has no name: write {SYNTAX}")
            read_proportion(amount)
    except UserError as error:
        raise ValueError(str(error)) from None
    return spec


def written_entry(spec: str) -> DataEntry | None:
    """The entry of a mapping that is written as text, as on a command line; None of NAME:PROPORTION:PATH. UserError."""
    if not spec.strip().startswith("{"):
        return None
    try:
        value = yaml_value(spec)
    except ValueError as error:
        raise UserError(f"dataset {spec!r} is no mapping: {error}; write {{path: FILE, ...}}") from None
    return data_entry(value)


DataSpec = Annotated[
    Annotated[str, AfterValidator(_readable), Tag(TAGS[0])] | Annotated[DataEntry, Tag(TAGS[1])], Discriminator(_kind)
]
"""An entry of a list of data sets: NAME[:PROPORTION[:PATH]], or a mapping."""


def data_entry(spec: Mapping[str, Any]) -> DataEntry:
    """The entry that a mapping of plain values is. Raises UserError for what is wrong in it."""
    try:
        return DataEntry.model_validate(spec)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise UserError(f"data set: unknown key {place}{near(place, DataEntry.model_fields)}") from None
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"data set: {f'{place}: ' if place else ''}{message}") from None


def data_label(spec: str | DataEntry | Mapping[str, Any]) -> str:
    """An entry on one line, for reports and errors; equal for equal entries."""
    if isinstance(spec, str):
        return spec
    entry = spec if isinstance(spec, DataEntry) else data_entry(spec)
    given = entry.model_dump(exclude_defaults=True)
    return "{" + ", ".join(f"{key}: {_plain(value)}" for key, value in given.items()) + "}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def data_paths(specs: Sequence[str | DataEntry]) -> list[str]:
    """The paths that the entries of a list name, without those that are at the home of their name."""
    paths = [spec.path if isinstance(spec, DataEntry) else split_spec(spec)[2] for spec in specs]
    return [path for path in paths if path]
