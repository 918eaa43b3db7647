"""Data sets of millions of rows: read as a stream, tokenised on all cores, kept on disk by their content.

What a small file holds is tokenised on the spot. Of a large one the tokens are kept in `cache_folder`, a folder for
each content: KEY/tokens.arrow (read by memory mapping) and KEY/report.json (what was dropped). KEY is a hash of all
that the tokens depend on: the bytes of the files (or the revision of the hub's data set), the reader with its mapping
and filter, tokenizer, template, longest sequence, and this package's own code. An entry is whole or absent: it is
written under another name and renamed. Of several processes that want the same one, one makes it, the others wait.

Never more than a few blocks of rows are in memory, beyond the tokens of what is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import itertools
import json
import os
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np
import pyarrow as pa
import tokenizers
import transformers
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from beaver_ray.data.files import Place, hub_dataset, rows
from beaver_ray.data.mapping import MappedReader
from beaver_ray.data.mixing import MixSpec, Spec, check_mix, hold_out, parse_mix, prompt_hash, take
from beaver_ray.data.sources import STRENGTHS, BadRow, DropReport, RawSample, RowReader, check_kept, open_source
from beaver_ray.data.templates import Template
from beaver_ray.data.tokenized import ODD, Columns, EncodedRow, Encoder, Ragged, RowKind
from beaver_ray.errors import UserError

BLOCK = 2000  # rows that one process tokenises at a time
LARGE = 32 * 2**20  # bytes of files whose tokens are kept; packed ones count for more
PACKED = 5  # times as much text as bytes
LARGE_ROWS = 20_000  # of a data set of the hub
SECONDS_BETWEEN_CALLS = 2.0

Watch = Callable[[str, int, float], None]
"""Told of a data set's label, how many rows are read, and in how many seconds."""
D = TypeVar("D")


def cache_folder() -> Path:
    """Where tokens are kept: beaver-ray/ in the cache of `datasets` (HF_DATASETS_CACHE, HF_HOME); may be deleted."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "beaver-ray"


# ---------------------------------------------------------------- mixes of tokens


@dataclass(frozen=True)
class Part:
    """One data set of a mix."""

    table: pa.Table
    """A row for each good sample: see `_schema`."""
    chosen: NDArray[np.int64]
    """Rows that are in the mix; a row may be there several times."""


@dataclass(frozen=True)
class TokenMix(Generic[D]):
    """A mix of data sets in tokens, which may be split by prompt."""

    kind: RowKind[D]
    parts: list[Part]
    reports: dict[str, DropReport]
    """What was dropped as rows were read, by the label of each data set."""

    @property
    def keys(self) -> NDArray[np.uint64]:
        """`prompt_keys` of the samples [N] of the mix."""
        found = [part.table.column("key").to_numpy()[part.chosen] for part in self.parts]
        return np.concatenate([np.empty(0, np.uint64), *found])

    def split(self, ratio: float, seed: int) -> tuple[Self, Self]:
        """(The rest, what is held out), cut by prompt (`hold_out`)."""
        held_N = hold_out(self.keys, ratio, seed)
        cuts = np.cumsum([0, *(len(part.chosen) for part in self.parts)])
        sides: tuple[list[Part], list[Part]] = ([], [])
        for part, start, end in zip(self.parts, cuts[:-1], cuts[1:], strict=True):
            held = held_N[start:end]
            for side, mask in zip(sides, (~held, held), strict=True):
                side.append(replace(part, chosen=part.chosen[mask]))
        return replace(self, parts=sides[0]), replace(self, parts=sides[1])

    def dataset(self) -> D:
        """The data set of the samples that are fit for it. Raises UserError where none is."""
        found = [_columns(part, self.kind) for part in self.parts]
        dropped: Counter[str] = Counter()
        for columns in found:
            dropped += columns.dropped
        sides = [[columns.sequences[side] for columns in found] for side in range(self.kind.width)]
        return self.kind.of_columns(
            Columns(
                tuple(_joined(side) for side in sides),
                np.concatenate([columns.prompt_length for columns in found]),
                np.concatenate([columns.labels for columns in found]),
                np.sum([columns.odd for columns in found], axis=0),
                dropped,
                np.concatenate([columns.strengths for columns in found]),
            )
        )


def read_tokens(
    kind: RowKind[D],
    specs: Sequence[Spec],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    template: Template = "auto",
) -> TokenMix[D]:
    """Read and mix data sets as `load_mix` does, in tokens.

    Raises UserError: bad syntax, the same rows twice, a source without good rows, or an empty mix.
    """
    parts: list[Part] = []
    reports: dict[str, DropReport] = {}
    for label, spec in parse_mix(specs).items():
        job, place = _job(kind, spec, tokenizer, max_length, template)
        table, reports[label] = _kept(job, place, label) if _is_large(place) else _on_the_spot(job, place)
        parts.append(Part(table, take(label, spec, table.num_rows)))
    check_mix(specs, sum(len(part.chosen) for part in parts))
    return TokenMix(kind, parts, reports)


def keep_tokens(
    kind: RowKind[Any],
    specs: Sequence[Spec],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    template: Template,
    watch: Watch,
) -> None:
    """Have the tokens of the large ones of these data sets on disk, for processes that read them later."""
    for label, spec in parse_mix(specs).items():
        job, place = _job(kind, spec, tokenizer, max_length, template)
        if _is_large(place):
            _kept(job, place, label, watch)


def _joined(parts: list[Ragged]) -> Ragged:
    if len(parts) == 1:
        return parts[0]
    return Ragged.of(np.concatenate([p.flat for p in parts]), np.concatenate([p.lengths for p in parts]))


def _columns(part: Part, kind: RowKind[Any]) -> Columns:
    """The chosen rows of a table that are fit, in their order."""
    table, chosen = part.table, part.chosen
    reasons = table.column("dropped").combine_chunks().dictionary_encode()
    codes_N = reasons.indices.fill_null(-1).to_numpy(zero_copy_only=False)[chosen]
    counts = np.bincount(codes_N[codes_N >= 0], minlength=len(reasons.dictionary))
    dropped = Counter({str(reason): int(n) for reason, n in zip(reasons.dictionary, counts, strict=True) if n})
    fit = chosen[codes_N < 0]
    labels = [table.column(f"label_{n}").to_numpy()[fit] for n in range(kind.label_count)]
    return Columns(
        tuple(_rows_of(table, f"tokens_{side}", fit) for side in range(kind.width)),
        table.column("prompt_length").to_numpy()[fit],
        np.stack(labels, axis=1),
        np.array([table.column(name).to_numpy()[fit].sum() for name in ODD], dtype=np.int64),
        dropped,
        np.stack([table.column(name).to_numpy()[fit] for name in STRENGTHS.values()], axis=1),
    )


def _rows_of(table: pa.Table, column: str, chosen: NDArray[np.int64]) -> Ragged:
    """Some rows of a column of lists, copied block by block into one array."""
    blocks = table.column(column).chunks
    lengths_N = np.concatenate([np.empty(0, np.int64), *(np.diff(b.offsets.to_numpy()) for b in blocks)])
    starts = np.cumsum([0, *(len(block) for block in blocks)])
    flat = np.empty(int(lengths_N[chosen].sum()), dtype=np.int32)
    filled = 0
    # Whole copies of a data set stand one behind another; within each one rows rise.
    for run in np.split(chosen, np.flatnonzero(np.diff(chosen) <= 0) + 1):
        cuts = np.searchsorted(run, starts)
        for block, start, low, high in zip(blocks, starts, cuts[:-1], cuts[1:], strict=False):
            if low == high:
                continue
            mask = np.zeros(len(block), dtype=np.bool_)
            mask[run[low:high] - start] = True
            offsets = block.offsets.to_numpy()
            tokens = block.values.to_numpy()[offsets[0] : offsets[-1]][np.repeat(mask, np.diff(offsets))]
            flat[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
    return Ragged.of(flat, lengths_N[chosen])


# ---------------------------------------------------------------- tokenising


@dataclass(frozen=True)
class _Job:
    """From rows to tokens; travels to other processes."""

    kind: RowKind[Any]
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    template: Template
    read_row: RowReader

    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.template, self.max_length)

    def encode(self, encoder: Encoder, block: list[Any]) -> tuple[pa.RecordBatch, DropReport]:
        """A row for each good sample of a block, and what became of the block."""
        report = DropReport()
        found: list[tuple[int, str | None, EncodedRow]] = []
        nothing = EncodedRow(tuple([] for _ in range(self.kind.width)), 0)
        for row in block:
            try:
                sample: RawSample = self.read_row(row)
            except BadRow as reason:
                report.drop(str(reason))
                continue
            try:
                found.append((prompt_hash(sample), None, self.kind.encode(encoder, sample)))
            except BadRow as reason:
                found.append((prompt_hash(sample), str(reason), nothing))
        report.kept = len(found)
        report.remarks.update(remark for _, _, row in found for remark in row.remarks)
        columns: dict[str, Any] = {
            "key": [key for key, _, _ in found],
            "dropped": [reason for _, reason, _ in found],
            "prompt_length": [row.prompt_length for _, _, row in found],
        }
        for n, name in enumerate(ODD):
            columns[name] = [row.odd[n] for _, _, row in found]
        for n, name in enumerate(STRENGTHS.values()):
            columns[name] = [row.strengths[n] for _, _, row in found]
        for n in range(self.kind.label_count):
            columns[f"label_{n}"] = [int(row.labels[n]) if n < len(row.labels) else 0 for _, _, row in found]
        for side in range(self.kind.width):
            columns[f"tokens_{side}"] = [row.sequences[side] for _, _, row in found]
        schema = _schema(self.kind)
        arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
        return pa.RecordBatch.from_arrays(arrays, schema=schema), report


def _schema(kind: RowKind[Any]) -> pa.Schema:
    return pa.schema(
        {
            "key": pa.uint64(),
            "dropped": pa.string(),
            "prompt_length": pa.int32(),
            **dict.fromkeys(ODD, pa.int8()),
            **dict.fromkeys(STRENGTHS.values(), pa.float32()),
            **{f"label_{n}": pa.int8() for n in range(kind.label_count)},
            **{f"tokens_{side}": pa.list_(pa.int32()) for side in range(kind.width)},
        }
    )


def _job(
    kind: RowKind[Any], spec: MixSpec, tokenizer: PreTrainedTokenizerBase, max_length: int, template: Template
) -> tuple[_Job, Place]:
    place, read_row = open_source(spec.source, spec.path, spec.where)
    return _Job(kind, tokenizer, max_length, template, read_row), place


def _is_large(place: Place) -> bool:
    """Whether the tokens are worth keeping."""
    if files := place.all_files:
        packed = (".gz", ".bz2", ".xz", ".zst", ".parquet")
        return sum(f.stat().st_size * (PACKED if f.name.endswith(packed) else 1) for f in files) >= LARGE
    return bool(hub_dataset(place).num_rows >= LARGE_ROWS)


def _on_the_spot(job: _Job, place: Place) -> tuple[pa.Table, DropReport]:
    """The tokens of a small data set."""
    report, batches = DropReport(), []
    for batch, told, _ in _encoded_here(job, place, report):
        report.add(told)
        batches.append(batch)
    check_kept(report, place)
    return pa.Table.from_batches(batches, schema=_schema(job.kind)), report


def _blocks(place: Place, report: DropReport) -> Iterator[list[Any]]:
    stream = rows(place, report.remark)
    while block := list(itertools.islice(stream, BLOCK)):
        yield block


_here: tuple[_Job, Encoder] | None = None


def _start(job: _Job) -> None:
    """In each process of the pool."""
    global _here
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as cores
    _here = job, job.encoder()


def _end_with_the_driver() -> None:
    """Of a driver that is killed a process that waits for blocks would hear nothing."""
    if (driver := parent_process()) is not None:  # which is not the server that this one was forked from
        driver.join()
        os._exit(1)


def _encode_here(block: list[Any]) -> tuple[pa.RecordBatch, DropReport]:
    assert _here is not None
    job, encoder = _here
    return job.encode(encoder, block)


Encoded = Generator[tuple[pa.RecordBatch, DropReport, int], None, None]
"""Blocks in tokens, in their order: rows, what became of the block, and how many were read."""


def _encoded_here(job: _Job, place: Place, report: DropReport) -> Encoded:
    """In this process."""
    encoder = job.encoder()
    for block in _blocks(place, report):
        yield (*job.encode(encoder, block), len(block))


def _encoded(job: _Job, place: Place, report: DropReport) -> Encoded:
    """On all cores, with no more than two blocks for each in memory."""
    cores = len(os.sched_getaffinity(0))
    if cores == 1 or not _travels(job):
        yield from _encoded_here(job, place, report)
        return
    # Processes are forked from one that has no threads, and what it has loaded is shared by all of them.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    waiting: deque[tuple[Future[tuple[pa.RecordBatch, DropReport]], int]] = deque()
    with ProcessPoolExecutor(cores, context, _start, (job,)) as pool:
        try:
            for block in _blocks(place, report):
                waiting.append((pool.submit(_encode_here, block), len(block)))
                if len(waiting) >= 2 * cores:
                    future, size = waiting.popleft()
                    yield (*future.result(), size)
            for future, size in waiting:
                yield (*future.result(), size)
        except BrokenProcessPool:
            raise UserError(
                f"a process that tokenises {place.where} died, perhaps for want of memory: give the run more, or "
                "fewer cores (taskset)"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _travels(job: _Job) -> bool:
    """Whether other processes could make sense of the job.

    Not of a reader that a script defines in itself or a function in its body, nor of a tokenizer whose code came with
    its folder.
    """
    reader: Any = job.read_row.source.read_row
    homes = {getattr(thing, "__module__", "__main__") for thing in (reader, type(reader), type(job.tokenizer))}
    local = "<locals>" in getattr(reader, "__qualname__", type(reader).__qualname__)
    return not local and "__main__" not in homes and not any(home.startswith("transformers_modules") for home in homes)


# ---------------------------------------------------------------- tokens on disk


def _kept(job: _Job, place: Place, label: str, watch: Watch | None = None) -> tuple[pa.Table, DropReport]:
    """The tokens of a large data set, made where they are not there yet."""
    from filelock import FileLock

    entry = cache_folder() / _key(job, place)
    entry.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{entry}.lock"):
        found = _read(entry)
        if found is None:
            _make(job, place, entry, label, watch)
            found = _read(entry)
    assert found is not None
    return found


def _read(entry: Path) -> tuple[pa.Table, DropReport] | None:
    """A whole entry; None where there is none, or where it is broken."""
    try:
        told = json.loads((entry / "report.json").read_text(encoding="utf-8"))
        report = DropReport(told["kept"], Counter(told["dropped"]), Counter(told["remarks"]))
        table = pa.ipc.open_file(pa.memory_map(str(entry / "tokens.arrow"))).read_all()
    except (OSError, ValueError, KeyError, pa.ArrowInvalid):  # a disk that was full, a file that was cut
        return None
    return (table, report) if table.num_rows == report.kept else None


def _make(job: _Job, place: Place, entry: Path, label: str, watch: Watch | None) -> None:
    half = entry.with_name(f"{entry.name}.half")
    report, read, started = DropReport(), 0, time.monotonic()
    told = started
    shutil.rmtree(half, ignore_errors=True)  # of a process that died: nobody else holds the lock
    half.mkdir()
    try:
        schema = _schema(job.kind)
        with (
            pa.OSFile(str(half / "tokens.arrow"), "wb") as file,
            pa.ipc.new_file(file, schema) as writer,
            contextlib.closing(_encoded(job, place, report)) as batches,
        ):
            for batch, block, size in batches:
                report.add(block)
                writer.write_batch(batch)
                read += size
                if watch and time.monotonic() - told >= SECONDS_BETWEEN_CALLS:
                    told = time.monotonic()
                    watch(label, read, told - started)
        check_kept(report, place)
        (half / "report.json").write_text(json.dumps(vars(report)), encoding="utf-8")
        shutil.rmtree(entry, ignore_errors=True)
        half.rename(entry)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    if watch:
        watch(label, read, time.monotonic() - started)


def _key(job: _Job, place: Place) -> str:
    """A hash of all that the tokens depend on."""
    digest = hashlib.sha256()
    for part in (
        [_content(file) for file in place.all_files] or hub_dataset(place)._fingerprint,
        place.split if place.folder is not None else None,  # a folder that save_to_disk wrote has all of them
        _code(),
        "" if isinstance(job.read_row.source.read_row, MappedReader) else job.read_row.source.name,
        _reader_text(job.read_row.source.read_row),
        sorted((name, str(wanted)) for name, wanted in job.read_row.where.items()),
        job.read_row.column,
        repr(job.kind),  # of a class its name, of anything else all that it is set to
        job.max_length,
        job.template,
        _tokenizer_text(job.tokenizer),
        job.encoder().form,
        _probe(job.encoder()),
        (transformers.__version__, tokenizers.__version__),
    ):
        digest.update(repr(part).encode() + b"\0")
    return digest.hexdigest()[:32]


def _content(file: Path) -> tuple[str, str]:
    with file.open("rb") as stream:
        return file.suffix, hashlib.file_digest(stream, "sha256").hexdigest()


def _code() -> list[tuple[str, str]]:
    """What turns rows into tokens: another version of it makes other entries."""
    return [_content(file) for file in sorted(Path(__file__).parent.glob("*.py"))]


def _reader_text(reader: Any) -> str:
    """A reader with all that it is set to, readers in it too, and the files that they are written in."""
    home = reader if inspect.isfunction(reader) else type(reader)
    module = importlib.import_module(home.__module__) if home.__module__ != "__main__" else None
    file = getattr(module, "__file__", None)
    code = _content(Path(file)) if file else inspect.getsource(home)
    settings = {} if inspect.isfunction(reader) else vars(reader)
    state = [(name, _reader_text(value) if callable(value) else value) for name, value in sorted(settings.items())]
    return f"{home.__qualname__} {state} {code}"


def _tokenizer_text(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return repr((type(tokenizer).__qualname__, words, tokenizer.special_tokens_map, tokenizer.chat_template))


def _probe(encoder: Encoder) -> list[list[int] | str]:
    """How a few dialogues read: whatever else a template depends on shows here."""
    found: list[list[int] | str] = []
    for sample in (RawSample("a b"), RawSample(["a b", "c", "d"]), RawSample("a b", system="s")):
        try:
            found.append(encoder.prompt(sample))
        except UserError as error:  # a template that takes one turn only, or no system prompt
            found.append(str(error))
    return found
