"""Samples from files: readers by dataset name, as Safe RLHF has them, and an account of every row that is
dropped.

A reader turns one row of a file (a dict) into a `RawSample` or raises `BadRow(reason)`. Bad rows are counted,
never fatal; a source without a single good row is the user's error. Register a reader of your own with

    @reader("my-data")
    def my_data(row: dict[str, Any]) -> RawSample: ...
"""

from __future__ import annotations

import csv
import json
import lzma
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beaver_ray.data.splits import SUFFIXES, split_files
from beaver_ray.errors import UserError, first_line


@dataclass(frozen=True)
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
    """What else the row of a prompt says (category, answer, ...), for functions that score."""


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


SOURCES: dict[str, Source] = {}


def reader(
    name: str, hub: str | None = None, data_dir: str | None = None, split: str | None = None
) -> Callable[[Reader], Reader]:
    """Register the decorated function as the reader of dataset `name` (a later one replaces an earlier
    one)."""

    def register(function: Reader) -> Reader:
        SOURCES[name] = Source(name, function, hub, data_dir, split)
        return function

    return register


def find_source(name: str) -> Source:
    """The source registered under `name`, or a UserError that lists the names."""
    if name not in SOURCES:
        known = ", ".join(sorted(SOURCES))
        raise UserError(f"unknown dataset '{name}': use one of {known}, or register a reader for it")
    return SOURCES[name]


# ---------------------------------------------------------------- fields


def text_field(row: dict[str, Any], name: str) -> str:
    """A field that must be a string with something in it."""
    if name not in row or row[name] is None:
        raise BadRow(f"no field '{name}'")
    value = row[name]
    if not isinstance(value, str):
        raise BadRow(f"'{name}' is not a string")
    if not value.strip():
        raise BadRow(f"empty '{name}'")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can write such, and no tokenizer takes them
        raise BadRow(f"'{name}' has half a character") from None
    return value


def _flag(row: dict[str, Any], name: str) -> bool | None:
    """A label that may be missing: bool, 0 / 1, or those written in a CSV file."""
    value = row.get(name)
    if value is None or value == "":
        return None
    known = {"true": True, "1": True, "false": False, "0": False}
    label = known.get(str(value).lower())
    if label is None:
        raise BadRow(f"'{name}' is neither true / false nor 1 / 0")
    return label


def _prompt(value: Any, name: str) -> str | list[str]:
    """A prompt: a string, or an odd number of turns, all strings with something in them."""
    if not isinstance(value, list):
        return text_field({name: value}, name)
    if len(value) % 2 == 0:
        raise BadRow(f"'{name}' has an even number of turns")
    return [text_field({"turn": turn}, "turn") for turn in value]


# ---------------------------------------------------------------- readers


def pku_saferlhf(row: dict[str, Any]) -> RawSample:
    """prompt, response_0/1 and, where given, better_response_id, safer_response_id, is_response_0/1_safe."""
    prompt = _prompt(row.get("prompt"), "prompt")
    responses = text_field(row, "response_0"), text_field(row, "response_1")
    if responses[0] == responses[1]:
        raise BadRow("identical responses")
    better_is_1, safer_is_1 = _flag(row, "better_response_id"), _flag(row, "safer_response_id")
    safe = _flag(row, "is_response_0_safe"), _flag(row, "is_response_1_safe")
    if safer_is_1 is not None and safe[safer_is_1] is False and safe[not safer_is_1] is True:
        raise BadRow("safer answer is not safer")
    return RawSample(
        input=prompt,
        answer=responses[0],
        other_answer=responses[1],
        better=None if better_is_1 is None else not better_is_1,
        safer=None if safer_is_1 is None else not safer_is_1,
        is_safe=safe[0],
        is_other_safe=safe[1],
    )


for _size in ("", "-30K", "-10K"):
    for _prefix in ("", "PKU-Alignment/"):
        for _split in (None, "train", "test"):
            _name = f"{_prefix}PKU-SafeRLHF{_size}" + (f"/{_split}" if _split else "")
            reader(_name, f"PKU-Alignment/PKU-SafeRLHF{_size}", split=_split)(pku_saferlhf)


@reader("alpaca", "tatsu-lab/alpaca", split="train")
@reader("stanford-alpaca", "tatsu-lab/alpaca", split="train")
def alpaca(row: dict[str, Any]) -> RawSample:
    """instruction, input (may be empty), output."""
    prompt = text_field(row, "instruction")
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise BadRow("'input' is not a string")
    return RawSample(input=f"{prompt} {extra}" if extra else prompt, answer=text_field(row, "output"))


@reader("firefly", "YeungNLP/firefly-train-1.1M", split="train")
def firefly(row: dict[str, Any]) -> RawSample:
    """input, target."""
    return RawSample(input=text_field(row, "input"), answer=text_field(row, "target"))


def _hh_turns(text: str) -> list[str]:
    """Turns of "\\n\\nHuman: ...\\n\\nAssistant: ...", stripped; they must alternate and end with the
    assistant."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", text)
    speakers, turns = parts[0::2], [turn.strip() for turn in parts[1::2]]
    pairs = len(turns) // 2
    if before.strip() or pairs == 0 or len(turns) % 2 or speakers != ["Human", "Assistant"] * pairs:
        raise BadRow("turns do not alternate from human to assistant")
    if not all(turns):
        raise BadRow("empty turn")
    return turns


def _processed_turn(row: dict[str, Any], name: str) -> str:
    turn = row.get(name)
    if not isinstance(turn, dict):
        raise BadRow(f"'{name}' is not a turn")
    return text_field(turn, "text")


def hh_preference(row: dict[str, Any]) -> RawSample:
    """Dialogues chosen and rejected (Anthropic), or context[].text, chosen.text, rejected.text
    (processed-hh-rlhf)."""
    if "context" in row:
        context = row["context"]
        if not isinstance(context, list) or not all(isinstance(turn, dict) for turn in context):
            raise BadRow("'context' is not a list of turns")
        prompt = _prompt([turn.get("text") for turn in context], "context")
        chosen, rejected = _processed_turn(row, "chosen"), _processed_turn(row, "rejected")
    else:
        *turns, chosen = _hh_turns(text_field(row, "chosen"))
        *other_turns, rejected = _hh_turns(text_field(row, "rejected"))
        if turns != other_turns:
            raise BadRow("dialogues differ before the last answer")
        prompt = turns
    if chosen == rejected:
        raise BadRow("identical responses")
    return RawSample(input=prompt, answer=chosen, other_answer=rejected, better=True)


def hh_dialogue(row: dict[str, Any]) -> RawSample:
    """The chosen dialogue of an HH row, to imitate its last answer."""
    if "context" in row:
        sample = hh_preference({**row, "rejected": {"text": "-"}})
        return RawSample(input=sample.input, answer=sample.answer)
    *turns, answer = _hh_turns(text_field(row, "chosen"))
    return RawSample(input=turns, answer=answer)


reader("hh-rlhf", "Anthropic/hh-rlhf", split="train")(hh_preference)
for _kind in ("", "-harmless", "-helpful"):
    _folder = f"{_kind[1:]}-base" if _kind else None
    _hub = "PKU-Alignment/processed-hh-rlhf"
    reader(f"hh-rlhf{_kind}-dialogue", _hub, _folder, "train")(hh_dialogue)
    reader(f"hh-rlhf{_kind}-preference", _hub, _folder, "train")(hh_preference)
    for _split in ("train", "test"):
        reader(f"hh-rlhf{_kind}-preference/{_split}", _hub, _folder, _split)(hh_preference)


@reader("demonstrations")
def demonstrations(row: dict[str, Any]) -> RawSample:
    """prompt (a string or an odd list of turns), response."""
    return RawSample(input=_prompt(row.get("prompt"), "prompt"), answer=text_field(row, "response"))


@reader("prompts")
def prompts(row: dict[str, Any]) -> RawSample:
    """prompt or instruction (a string or an odd list of turns); further fields are kept beside it."""
    name = next((name for name in ("prompt", "instruction") if name in row), None)
    if name is None:
        raise BadRow("no field 'prompt' or 'instruction'")
    rest = {key: value for key, value in row.items() if key != name}
    return RawSample(input=_prompt(row.get(name), name), fields=rest)


@reader("labels")
def labels(row: dict[str, Any]) -> RawSample:
    """prompt (a string or an odd list of turns), response, unsafe (true / false or 1 / 0); further fields are kept."""
    unsafe = _flag(row, "unsafe")
    if unsafe is None:
        raise BadRow("no field 'unsafe'")
    rest = {key: value for key, value in row.items() if key not in ("prompt", "response", "unsafe")}
    prompt, response = _prompt(row.get("prompt"), "prompt"), text_field(row, "response")
    return RawSample(input=prompt, answer=response, is_safe=not unsafe, fields=rest)


# ---------------------------------------------------------------- files


def read_source(name: str, path: str | None = None) -> tuple[list[RawSample], DropReport]:
    """All good samples of dataset `name`, in the order of the files.

    Args:
        name: a registered name. Of a folder, as of the hub, it means one split (train, unless /test stands at its
            end) and perhaps one subset.
        path: a file, a folder of files (a clone of a dataset of the hub, for example), a folder written by
            `datasets.save_to_disk`, or a dataset name on the Hugging Face hub; None means the dataset's home on the
            hub. `FILE#COLUMN` takes that column as the prompt.

    Raises:
        UserError: nothing at `path`, no file that can be read, or no good row.
    """
    source = find_source(name)
    place = path or source.hub
    if place is None:
        raise UserError(f"dataset '{name}' needs a path: write {name}:PROPORTION:PATH")
    column: str | None = None
    if "#" in place and not os.path.exists(place):
        place, column = place.rsplit("#", 1)
    report = DropReport()
    samples: list[RawSample] = []
    for row in _rows(source, place, report):
        try:
            samples.append(source.read_row(_as_dict(row, column)))
        except BadRow as reason:
            report.drop(str(reason))
    report.kept = len(samples)
    if not samples:
        why = report.line() if report.dropped else "it has no rows"
        raise UserError(f"no usable sample of '{name}' in {place}: {why}; check that the file fits the dataset name")
    return samples, report


def _as_dict(row: Any, column: str | None) -> dict[str, Any]:
    if isinstance(row, str) and column is None:
        return {"prompt": row}
    if not isinstance(row, dict):
        raise BadRow("row is not an object")
    if column is None:
        return row
    if column not in row:
        raise BadRow(f"no column '{column}'")
    return {**row, "prompt": row[column]}


def _rows(source: Source, place: str, report: DropReport) -> Iterator[Any]:
    """Rows of a file, a folder or a hub dataset; lines that cannot be parsed are counted in `report`."""
    path = Path(os.path.expanduser(place))
    if not os.path.exists(path):
        if path.is_absolute() or place.startswith((".", "~")) or place.endswith(SUFFIXES):
            raise UserError(f"no file or folder {place} for dataset '{source.name}': check the path")
        yield from _hub_rows(source, place)
    elif path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        yield from _saved_rows(source, path)
    elif path.is_dir():
        for file in split_files(path, source.data_dir, source.split or "train", strict=source.hub is not None):
            try:
                yield from _file_rows(file, report)
            except NoRowsError:  # a file about the data, as there are many kinds
                report.remark(f"file without rows passed over ({file.relative_to(path)})")
    else:
        yield from _file_rows(path, report)


class NoRowsError(UserError):
    """A JSON file that holds no list of rows."""


def _file_rows(path: Path, report: DropReport) -> Iterator[Any]:
    kind = next((suffix.split(".")[1] for suffix in SUFFIXES if path.name.endswith(suffix)), None)
    try:
        if kind == "jsonl":
            _refuse_a_document(path)
            yield from _json_lines(path, report)
        elif kind == "json":
            yield from _json_rows(path, report)
        elif kind == "csv":
            csv.field_size_limit(sys.maxsize)
            with _open_text(path) as file:
                yield from csv.DictReader(file)
        elif kind == "parquet":
            yield from _parquet_rows(path)
        else:
            raise UserError(f"cannot read {path}: use a file ending in {', '.join(SUFFIXES)}")
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
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pa.ArrowException, OverflowError) as error:  # broken pages; dates that Python does not know
        raise ValueError(first_line(error)) from error


def _json_lines(path: Path, report: DropReport) -> Iterator[Any]:
    with _open_text(path) as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # a number of 5,000 digits, a thousand brackets
                report.drop("line is not JSON")
                continue
            yield row


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


def _json_rows(path: Path, report: DropReport) -> Iterator[Any]:
    """A list, an object with a list under "data" or lists by category, or one object a line."""
    try:
        with _open_text(path) as file:
            content = json.loads(file.read())
    except json.JSONDecodeError:
        yield from _json_lines(path, report)
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


def _hub_rows(source: Source, place: str) -> Iterator[Any]:
    import datasets

    try:
        yield from datasets.load_dataset(place, data_dir=source.data_dir, split=source.split or "train")
    except Exception as error:  # not found, offline, no such split, broken: each a kind of its own
        raise UserError(
            f"cannot load dataset '{place}' for '{source.name}' from the Hugging Face hub ({first_line(error)}): "
            f"give a local path as {source.name}:PROPORTION:PATH"
        ) from error


def _saved_rows(source: Source, path: Path) -> Iterator[Any]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # of broken files datasets raises nearly anything
        raise UserError(f"cannot load the dataset saved in {path}: {first_line(error)}; save it again") from error
    if isinstance(data, datasets.DatasetDict):
        split = source.split or "train"
        if split not in data and not (source.hub is None and len(data) == 1):
            raise UserError(f"{path} has no split '{split}': it has {', '.join(data)}")
        data = data[split] if split in data else next(iter(data.values()))
    yield from data
