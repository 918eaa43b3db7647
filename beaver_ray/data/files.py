"""Rows of files, folders and data sets of the Hugging Face hub, one after another.

A line of a file of lines is handed on as it is (`Line`): whoever reads it parses it, in as many processes as there are.
"""

from __future__ import annotations

import csv
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
            csv.field_size_limit(sys.maxsize)
            with _open_text(path) as file:
                yield from csv.DictReader(file, delimiter="\t" if kind == "tsv" else ",")
        elif kind == "parquet":
            yield from _parquet_rows(path)
        else:
            raise UserError(f"cannot read {path}: use a file ending in {', '.join(SUFFIXES)}")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; check the path") from None
    except (OSError, EOFError, ValueError, RecursionError, csv.Error, zlib.error, lzma.LZMAError) as error:
        reason = first_line(error)
        raise UserError(f"cannot read {path}: {reason}; check that the file is whole and UTF-8") from error


def _open_text(path: Path) -> Any:
    """A text file, unpacked where it is packed."""
    import fsspec

    return fsspec.open(str(path.absolute()), "rt", compression="infer", encoding="utf-8-sig", newline="").open()


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
    """A list, an object with a list under "data" or lists by category, or one object a line."""
    try:
        with _open_text(path) as file:
            content = json.loads(file.read())
    except json.JSONDecodeError:
        yield from _lines(path)
        return
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    yield from _listed_rows(content, path)


def _listed_rows(content: Any, path: Path) -> Iterator[Any]:
    """The items of a list, or of all lists in an object of categories."""
    if isinstance(content, dict):
        for part in content.values():
            yield from _listed_rows(part, path)
    elif isinstance(content, list):
        yield from content
    else:
        raise NoRowsError(f"{path} holds no list of rows: write a JSON list, or one object a line")


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

    try:
        data = datasets.load_from_disk(str(place.folder))
    except Exception as error:  # of broken files datasets raises nearly anything
        where = place.folder
        raise UserError(f"cannot load the dataset saved in {where}: {first_line(error)}; save it again") from error
    if isinstance(data, datasets.DatasetDict):
        if place.split not in data and (place.strict or len(data) != 1):
            raise UserError(f"{place.folder} has no split '{place.split}': it has {', '.join(data)}")
        data = data[place.split] if place.split in data else next(iter(data.values()))
    yield from data
