"""Broken data files: rows are kept or counted as dropped, and what cannot be read at all is refused with one line."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from beaver_ray.data.mixing import hold_out, load_mix, prompt_keys
from beaver_ray.data.pair_datasets import LabelledPairDataset, PreferenceDataset, SafetyPreferenceDataset
from beaver_ray.data.sources import read_source
from beaver_ray.data.tokenized import PromptDataset, SupervisedDataset
from beaver_ray.errors import UserError
from tests.fuzzing import ODD_TEXT, accepted, damaged, mutated, scalars

PKU = {
    "prompt": "how do I bake bread?",
    "response_0": "a",
    "response_1": "b",
    "better_response_id": 1,
    "safer_response_id": 0,
    "is_response_0_safe": True,
    "is_response_1_safe": False,
}
HH = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
TURNS = {"context": [{"text": "a"}], "chosen": {"text": "b"}, "rejected": {"text": "c"}}
ROWS: dict[str, list[dict[str, Any]]] = {
    "PKU-SafeRLHF": [PKU, {**PKU, "prompt": ["a", "b", "c"]}],
    "alpaca": [{"instruction": "a", "input": "b", "output": "c"}],
    "firefly": [{"input": "a", "target": "b"}],
    "hh-rlhf": [HH, TURNS],
    "hh-rlhf-dialogue": [HH, TURNS],
    "demonstrations": [{"prompt": "a", "response": "b"}],
    "prompts": [{"prompt": "a"}, {"instruction": ["a"]}],
}
BUILDERS = (PromptDataset, SupervisedDataset, PreferenceDataset, SafetyPreferenceDataset, LabelledPairDataset)

files = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(autouse=True, scope="module")
def offline() -> Any:
    """Names that are no files are not asked for on the hub."""
    patch = pytest.MonkeyPatch()
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    yield
    patch.undo()


@st.composite
def named_rows(draw: st.DrawFn) -> tuple[str, list[Any]]:
    """A dataset name, and rows for it of which some are broken."""
    name = draw(st.sampled_from(sorted(ROWS)))
    whole = st.sampled_from(ROWS[name])
    return name, draw(st.lists(whole | whole.flatmap(mutated) | scalars, min_size=1, max_size=4))


def consume(spec: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Read a dataset and make every kind of token dataset of it."""
    loaded = accepted(lambda: load_mix([spec]))
    if loaded is not None:
        accepted(lambda: hold_out(prompt_keys(loaded[0]), 0.5))
        for builder in BUILDERS:
            accepted(lambda builder=builder: builder.build(loaded[0], tokenizer, 64))  # type: ignore[misc]


@files
@given(named=named_rows(), kind=st.sampled_from(["list", "data", "categories", "lines"]))
def test_broken_rows(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, named: tuple[str, list[Any]], kind: str
) -> None:
    name, rows = named
    content = {"list": rows, "data": {"data": rows}, "categories": {"a": rows, "b": [rows[0]]}}.get(kind)
    text = "\n".join(map(json.dumps, rows)) if content is None else json.dumps(content)
    file = tmp_path / ("a.jsonl" if content is None else "a.json")
    file.write_text(text)
    consume(f"{name}:1:{file}", byte_tokenizer)
    # The same rows between two good ones: those are kept, and every other one is accounted for.
    good = json.dumps(ROWS[name][0])
    (tmp_path / "b.jsonl").write_text("\n".join([good, *map(json.dumps, rows), good]))
    samples, report = read_source(name, str(tmp_path / "b.jsonl"))
    assert report.kept == len(samples) >= 2 and report.kept + report.dropped.total() == len(rows) + 2


LINES = b'{"prompt": "a", "response": "b"}\n' * 3
HALF_A_CHARACTER = b'{"prompt": "\\ud800"}'
HARD_LINES = [b"[" * 100_000, b"9" * 5000, b'"' + b"x" * 2**20 + b'"', HALF_A_CHARACTER, b"\xff", b"\xef\xbb\xbf{}"]


@files
@given(
    content=damaged(LINES) | st.lists(st.sampled_from([*HARD_LINES, LINES]), max_size=3).map(b"\n".join) | st.binary(),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".txt"]),
)
@example(content=b"", suffix=".jsonl")
@example(content=b"", suffix=".jsonl.gz")
def test_damaged_text(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, content: bytes, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    consume(f"demonstrations:1:{file}", byte_tokenizer)


@files
@given(content=damaged(gzip.compress(LINES)))
def test_damaged_gzip(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, content: bytes) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(content)
    consume(f"demonstrations:1:{file}", byte_tokenizer)


def parquet_bytes(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


COLUMNS = [
    pa.array(["a", "b"]),
    pa.array(["a", None]),
    pa.array([b"\xff", b"a"]),
    pa.array([["a"], [None]]),
    pa.array([[], ["a", "b"]]),
    pa.array([{"text": "a"}, {"text": None}]),
    pa.array([[{"text": "a"}], None]),
    pa.array([float("nan"), 1.0]),
    pa.array([1, 0]),
    pa.array([True, None]),
    pa.nulls(2),
    pa.array([2**62, -(2**62)], pa.timestamp("ms")),
    pa.array([2**31 - 1, 0], pa.date32()),
    pa.array(["a", "a"]).dictionary_encode(),
    pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")),  # not UTF-8
]
FIELDS = ["prompt", "response", "response_0", "response_1", "safer_response_id", "context", "chosen", "rejected"]


@files
@given(
    name=st.sampled_from(sorted(ROWS)),
    columns=st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(COLUMNS), min_size=1, max_size=6),
)
def test_parquet_of_other_types(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, name: str, columns: dict[str, pa.Array]
) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(parquet_bytes(pa.table(columns)))
    consume(f"{name}:1:{file}", byte_tokenizer)


@files
@given(content=damaged(parquet_bytes(pa.Table.from_pylist(ROWS["PKU-SafeRLHF"][:1] * 5))))
def test_damaged_parquet(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, content: bytes) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(content)
    consume(f"PKU-SafeRLHF:1:{file}", byte_tokenizer)


@files
@given(
    name=st.sampled_from([*sorted(ROWS), "alpcaa", "", "prompts#x"]),
    amount=st.text("0123456789/-.e+_ naif", max_size=8) | st.sampled_from(["1e308", "1000000/-1", "1/0", "9" * 5000]),
    place=st.sampled_from([*ODD_TEXT, "FILE", "FILE#prompt", "FILE#x", "FOLDER", "a/b/c/d", "json", "/", "."]),
    twice=st.booleans(),
)
def test_odd_specs(tmp_path: Path, name: str, amount: str, place: str, twice: bool) -> None:
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "a.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    place = place.replace("FILE", str(tmp_path / "data" / "a.jsonl")).replace("FOLDER", str(tmp_path / "data"))
    place = f"{tmp_path}/{place}" if place in ("/", ".") else place  # not all of the machine
    spec = f"{name}:{amount}:{place}"
    accepted(lambda: load_mix([spec, spec] if twice else [spec]))


@settings(files, max_examples=30)
@given(data=st.data())
def test_damaged_saved_datasets(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS["demonstrations"] * 3).save_to_disk(folder)
    file = data.draw(st.sampled_from(sorted(f for f in folder.iterdir() if f.is_file())))
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    accepted(lambda: load_mix([f"demonstrations:1:{folder}"]))


def test_what_once_got_through(tmp_path: Path) -> None:
    good = '{"prompt": "a"}'
    (tmp_path / "a.jsonl").write_text("\n".join([good, "[" * 100_000, '{"prompt": "\\ud800"}', "9" * 5000]))
    samples, report = read_source("prompts", str(tmp_path / "a.jsonl"))
    assert len(samples) == 1
    assert report.dropped == {"line is not JSON": 2, "'prompt' has half a character": 1}
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + good.encode())  # a byte order mark
    assert len(read_source("prompts", str(tmp_path / "b.jsonl"))[0]) == 1
    whole = gzip.compress(good.encode() * 50)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:12] + b"\xff" * 4 + whole[16:])
    with pytest.raises(UserError, match=r"cannot read .*a\.jsonl\.gz: .*check that the file is whole"):
        read_source("prompts", str(tmp_path / "a.jsonl.gz"))
    for place, message in (
        ("~nobody/x", "no file or folder ~nobody/x"),
        ("/" + "x" * 300, "no file or folder /xxx"),
        ("json", "'json' is a format and no dataset"),
    ):
        with pytest.raises(UserError, match=message):
            load_mix([f"prompts:1:{place}"])
    with pytest.raises(UserError, match="is above 1000: lower it"):
        load_mix([f"prompts:1e308:{tmp_path / 'a.jsonl'}"])
    with pytest.raises(UserError, match="has 1 samples, far fewer than it should give"):
        load_mix([f"prompts:1001/-1:{tmp_path / 'a.jsonl'}"])
