"""Rows of files, folders and data sets of the Hugging Face hub, one after another.

A line of a file of lines is handed on as it is (`Line`): whoever reads it parses it, in as many processes as there are.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from beaver_ray.data.splits import SUFFIXES, split_files
from beaver_ray.errors import UserError, first_line

Remark = Callable[[str], None]


class Line(str):
    """A line that is to hold one row in JSON."""

    __slots__ = ()


class NoRowsError(UserError):
    """A JSON file that holds no list of rows."""


@dataclass(frozen=True)
class Place:
    """Where the rows of a data set are: files, a folder that `datasets.save_to_disk` wrote, or the hub."""

    name: str
    """The data set's, for errors."""
    where: str
    split: str
    strict: bool
    """It is this split and no other; else the only one that there is will do."""
    subset: str | None
    """A configuration of the hub."""
    data_dir: str | None
    """A folder inside the data set."""
    files: tuple[Path, ...] = ()
    folder: Path | None = None
    """What the files are in, or a saved data set."""

    @property
    def all_files(self) -> list[Path]:
        """The files that hold the rows, those of a saved data set too; none of the hub."""
        if self.files or self.folder is None:
            return list(self.files)
        return sorted(file for file in self.folder.rglob("*") if file.is_file())


def find_place(
    name: str, where: str, split: str | None, strict: bool, subset: str | None, data_dir: str | None
) -> Place:
    """Where data set ``name`` is.

    where: a file, a folder of files (a clone of a data set of the hub, for example), a folder written by
        `datasets.save_to_disk`, or a name on the hub.

    Raises UserError for a path at which nothing is, and for a folder without such a split.
    """
    path, split = Path(os.path.expanduser(where)), split or "train"
    place = Place(name, where, split, strict, subset, data_dir)
    if not os.path.exists(path):
        if path.is_absolute() or where.startswith((".", "~")) or where.endswith(SUFFIXES):
            raise UserError(f"no file or folder {where} for dataset '{name}': check the path")
        return place
    if not path.is_dir():
        return replace(place, files=(path,))
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return replace(place, folder=path)
    files = split_files(path, data_dir, split, strict, subset)
    return replace(place, files=tuple(files), folder=path)


def rows(place: Place, remark: Remark) -> Iterator[Any]:
    """Every row, as a `Line` or a plain value. ``remark`` is told of files without rows. Raises UserError."""
    if not place.files:
        yield from hub_rows(place) if place.folder is None else saved_rows(place)
        return
    for file in place.files:
        try:
            yield from file_rows(file)
        except NoRowsError:  # in a folder a file about the data, as there are many kinds
            if place.folder is None:
                raise
            remark(f"file without rows passed over ({os.path.relpath(file, place.folder)})")


def file_rows(path: Path) -> Iterator[Any]:
    """The rows of one file. Raises UserError for what cannot be read."""
    kind = next((suffix.split(".")[1] for suffix in SUFFIXES if path.name.endswith(suffix)), None)
    try:
        if kind == "jsonl":
            _refuse_a_document(path)
            yield from _lines(path)
        elif kind == "json":
            yield from _json_rows(path)
        elif kind in ("csv", "tsv"):
            yield from _table_rows(path, "\t" if kind == "tsv" else ",")
        elif kind == "parquet":
            yield from _parquet_rows(path)
        else:
            if not path.exists():
                raise FileNotFoundError
            raise UserError(f"cannot read {path}: use a file ending in {', '.join(SUFFIXES)}")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; check the path") from None
    except (OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError) as error:
        reason = first_line(error)
        raise UserError(f"cannot read {path}: {reason}; check that the file is whole and UTF-8") from error


def _open_text(path: Path) -> Any:
    """A text file, unpacked where it is packed."""
    import fsspec
    import pyarrow as pa

    if path.suffix == ".zst":  # which fsspec leaves packed where one more package is missing
        unpacked: Any = pa.input_stream(str(path), compression="zstd")
        return io.TextIOWrapper(unpacked, encoding="utf-8-sig", newline="")
    local = fsspec.filesystem("file")  # fsspec.open would take a path with :: for a chain of file systems
    return local.open(str(path.absolute()), "rt", compression="infer", encoding="utf-8-sig", newline="")


def _table_rows(path: Path, delimiter: str) -> Iterator[Any]:
    """The rows of a table of texts; a quote that nothing closes is refused, which would hold all rows behind it."""
    csv.field_size_limit(sys.maxsize)
    with _open_text(path) as file:
        table = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            yield from table
        except csv.Error as error:
            raise UserError(
                f"cannot read {path}: {error}, in the row behind line {table.line_num}; a text that begins with a "
                "quote must end with one, and have those inside of it doubled"
            ) from None


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                yield from batch.to_pylist()
    except (pa.ArrowException, OverflowError) as error:  # broken pages; dates that Python does not know
        raise ValueError(first_line(error)) from error


def _lines(path: Path) -> Iterator[Line]:
    with _open_text(path) as file:
        for line in file:
            if line.strip():
                yield Line(line)


def _refuse_a_document(path: Path) -> None:
    """UserError where a file of lines holds one JSON list or object instead, over one line or many."""
    with _open_text(path) as file:
        first = next((line for line in file if line.strip()), "")
        if first.lstrip()[:1] not in ("[", "{"):
            return
        if isinstance(_parsed(first), dict):
            return
        content = _parsed(first + file.read())
    if content is None:
        return
    kind = "list" if isinstance(content, list) else "object"
    raise UserError(
        f"{path} holds one JSON {kind}, but a file ending in .jsonl has one object on each line: rename it to end in "
        ".json, or write it so"
    )


def _parsed(text: str) -> Any:
    """What a list or an object in JSON holds; None where the text is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_rows(path: Path) -> Iterator[Any]:
    """The rows of one document, or one object a line."""
    try:
        with _open_text(path) as file:
            content = json.loads(file.read())
    except json.JSONDecodeError:
        yield from _lines(path)
        return
    found = _rows_of(content)
    if found is None:
        raise NoRowsError(
            f"{path} holds no list of rows: write a JSON list (of a single row too), or one object a line and .jsonl "
            "at the end of its name"
        )
    yield from found


ROW_FIELDS = ("prompt", "instruction")
"""What has one of these is a row by itself, however its values look."""


def _rows_of(content: Any) -> list[Any] | None:
    """The rows of a JSON document, None where it holds none.

    They are a list, an object's list under "data", its only list that holds objects, or all lists of an object that has
    nothing but lists of one kind by category. An object that can only be a row is one.
    """
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("data"), list):
        return list(content["data"])
    if any(name in content for name in ROW_FIELDS) or any(map(_is_dialogue, content.values())):
        return [content]
    parts = list(_parts(content))
    lists = [part for part in parts if isinstance(part, list) and part]
    of_objects = [part for part in lists if any(isinstance(item, dict) for item in part)]
    if all(isinstance(part, list) for part in parts) and len(of_objects) in (0, len(lists)):
        return [item for part in lists for item in part]
    return of_objects[0] if len(of_objects) == 1 else None


def _is_dialogue(value: Any) -> bool:
    """Whether a field's value is a list of messages with roles."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and ("role" in first or "from" in first)


def _parts(content: dict[str, Any]) -> Iterator[Any]:
    """What stands in an object of categories, at whatever depth."""
    for part in content.values():
        yield from _parts(part) if isinstance(part, dict) else (part,)


def hub_dataset(place: Place) -> Any:
    """The data set of the hub at ``place``. Raises UserError for one that cannot be had."""
    import datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as READERS

    # For the name of one of its readers it would take all files below the working directory for data.
    if place.where in READERS:
        raise UserError(
            f"'{place.where}' is a format and no dataset: give a local path as {place.name}:PROPORTION:PATH"
        )
    try:
        return datasets.load_dataset(place.where, place.subset, data_dir=place.data_dir, split=place.split)
    except Exception as error:  # not found, offline, no such split, broken: each a kind of its own
        raise UserError(
            f"cannot load dataset '{place.where}' for '{place.name}' from the Hugging Face hub ({first_line(error)}): "
            f"give a local path as {place.name}:PROPORTION:PATH"
        ) from error


def hub_rows(place: Place) -> Iterator[Any]:
    """The rows of a data set of the hub."""
    yield from hub_dataset(place)


def saved_rows(place: Place) -> Iterator[Any]:
    """The rows of a folder that `datasets.save_to_disk` wrote."""
    import datasets

    def broken(error: Exception) -> UserError:
        return UserError(f"cannot load the dataset saved in {place.folder}: {first_line(error)}; save it again")

    try:
        data = datasets.load_from_disk(str(place.folder))
    except Exception as error:  # of broken files datasets raises nearly anything
        raise broken(error) from error
    if isinstance(data, datasets.DatasetDict):
        if place.split not in data and (place.strict or len(data) != 1):
            raise UserError(f"{place.folder} has no split '{place.split}': it has {', '.join(data)}")
        data = data[place.split] if place.split in data else next(iter(data.values()))
    try:
        yield from data
    except Exception as error:  # what is broken inside is seen only when it is read
        raise broken(error) from error
