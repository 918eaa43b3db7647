"""Tokens that are kept on disk are those that are made on the spot, for any mix and split."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from beaver_ray.data import token_files
from beaver_ray.data.mapping import Keeping
from beaver_ray.data.mixing import hold_out, load_mix, prompt_keys
from beaver_ray.data.pair_datasets import PreferenceDataset, SafetyPreferenceDataset
from beaver_ray.data.sources import find_source
from beaver_ray.data.token_files import keep_tokens, read_tokens
from beaver_ray.data.tokenized import SupervisedDataset
from beaver_ray.data_options import DataEntry

ROWS: list[Any] = [
    {
        "prompt": f"question {number % 23}",
        "response_0": "yes " * (number % 7 + 1),
        "response_1": "no " * (number % 5),
        "better_response_id": number % 2,
        "safer_response_id": 0,
        "is_response_0_safe": number % 3 > 0 or None,
        "is_response_1_safe": False,
        "strength_mean": number / 8,
        "safety_strength_mean": -number / 4,
    }
    for number in range(60)
]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Rows of which some are broken, in a file that counts as large."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_files, "LARGE", 1)
    monkeypatch.setattr(token_files, "BLOCK", 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # one test below starts processes
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*ROWS, 7]) + "\n{half a row\n")
    yield path


def entries(file: Path) -> list[str]:
    return sorted(p.name for p in (file.parent / "cache" / "beaver-ray").iterdir() if p.is_dir())


@pytest.mark.parametrize("kind", [SupervisedDataset, PreferenceDataset, SafetyPreferenceDataset])
def test_kept_tokens_are_those_of_the_samples(file: Path, byte_tokenizer: PreTrainedTokenizerFast, kind: Any) -> None:
    specs = [
        f"PKU-SafeRLHF:2.3:{file}",
        {"name": "PKU-SafeRLHF", "path": str(file), "where": {"better_response_id": 1}},
    ]
    mix = read_tokens(kind, specs, byte_tokenizer, 60)
    samples, reports = load_mix(specs)
    assert [r.line() for r in mix.reports.values()] == [r.line() for r in reports.values()]
    assert np.array_equal(mix.keys, prompt_keys(samples))
    held_N = hold_out(prompt_keys(samples), 0.3, 5)
    for side, mask in zip(mix.split(0.3, 5), (~held_N, held_N), strict=True):
        found = side.dataset()
        wanted = kind.build([s for s, chosen in zip(samples, mask, strict=True) if chosen], byte_tokenizer, 60)
        assert found.report == wanted.report
        for name, value in vars(wanted).items():
            if name not in ("report", "samples"):  # files keep no samples
                assert [list(np.atleast_1d(r)) for r in getattr(found, name)] == [list(np.atleast_1d(r)) for r in value]


def test_an_entry_is_made_once_for_each_content(
    file: Path, byte_tokenizer: PreTrainedTokenizerFast, llama_tokenizer: PreTrainedTokenizerFast
) -> None:
    def tokens(tokenizer: Any = byte_tokenizer, longest: int = 60) -> int:
        spec = f"PKU-SafeRLHF:1:{file}"
        return len(read_tokens(SupervisedDataset, [spec], tokenizer, longest).dataset().tokens.flat)

    said: list[tuple[str, int]] = []
    spec = f"PKU-SafeRLHF:1:{file}"
    keep_tokens(
        SupervisedDataset, [spec], byte_tokenizer, 60, "auto", lambda label, rows, _: said.append((label, rows))
    )
    assert said == [(spec, 62)]
    (entry,) = entries(file)
    whole = file.parent / "cache" / "beaver-ray" / entry / "tokens.arrow"
    made, count = whole.stat().st_mtime_ns, tokens()
    assert whole.stat().st_mtime_ns == made and entries(file) == [entry]
    # A file that was cut is made again; so is one that a process left half.
    whole.write_bytes(whole.read_bytes()[:-50])
    whole.parent.with_name(f"{entry}.half").mkdir()
    assert tokens() == count and entries(file) == [entry]
    # Whatever tokens depend on makes another entry.
    tokens(longest=50)
    tokens(llama_tokenizer)
    file.write_text(file.read_text().replace("yes", "yea", 1))
    tokens()
    assert len(entries(file)) == 4


def test_a_mapping_is_kept_by_how_it_reads(file: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """Not by its file's name, nor by how much of it is taken."""
    fields = {"prompt": "prompt", "answer": "response_0"}
    copy = file.with_name("copy.jsonl")
    copy.write_bytes(file.read_bytes())

    def made(**more: Any) -> int:
        read_tokens(SupervisedDataset, [{"path": str(file), **fields, **more}], byte_tokenizer, 60)
        return len(entries(file))

    assert [made(), made(proportion=2), made(path=str(copy)), made(keep=["prompt"])] == [1, 1, 1, 2]
    assert [made(where={"better_response_id": 1}), made(where={"better_response_id": 0})] == [3, 4]
    assert made(answer="response_1") == 5


def test_each_split_of_a_saved_data_set_has_an_entry(file: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    import datasets

    words, saved = {"train": "yes", "test": "no"}, file.parent / "saved"
    rows = {split: datasets.Dataset.from_list([{"prompt": "q", "response": word}]) for split, word in words.items()}
    datasets.DatasetDict(rows).save_to_disk(str(saved))
    for split, word in words.items():
        spec = DataEntry(name="demonstrations", path=str(saved), split=split)
        kept = read_tokens(SupervisedDataset, [spec], byte_tokenizer, 60).dataset()
        assert len(kept) == 1 and word in byte_tokenizer.decode(kept.tokens[0])
    assert len(entries(file)) == 2


def test_on_all_cores_and_for_several_at_once(
    file: Path, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})

    def tokens(_: int) -> list[int]:
        spec = f"PKU-SafeRLHF:1:{file}"
        found: list[int] = read_tokens(SupervisedDataset, [spec], byte_tokenizer, 60).dataset().tokens.flat.tolist()
        return found

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(tokens, range(2))
    wanted = SupervisedDataset.build(load_mix([f"PKU-SafeRLHF:1:{file}"])[0], byte_tokenizer, 60)
    assert first == second == wanted.tokens.flat.tolist()
    assert len(entries(file)) == 1


def test_readers_in_readers_are_known_by_what_they_are(file: Path) -> None:
    """Not by where they lie in memory, which is elsewhere in each process."""
    places = ("HelpSteer2", "HelpSteer2/validation")
    texts = [token_files._reader_text(find_source(name).read_row) for name in places]
    texts += [token_files._reader_text(Keeping(find_source(name).read_row, ["a"])) for name in places]
    assert len(set(texts)) == 4 and not any(" at 0x" in text for text in texts)
    assert "helpsteer2" in texts[0] and "helpsteer2" in texts[2]


ENDLESS = """
import os, sys, time
os.sched_getaffinity = lambda _: {0, 1}
from transformers import AutoTokenizer
from beaver_ray.data import token_files
from beaver_ray.data.mixing import parse_spec
from beaver_ray.data.sources import DropReport
from beaver_ray.data.tokenized import SupervisedDataset
token_files.BLOCK = 1
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
job, place = token_files._job(SupervisedDataset, parse_spec(sys.argv[2]), tokenizer, 60, "auto")
blocks = token_files._encoded(job, place, DropReport())
next(blocks)
print("begun", flush=True)
time.sleep(600)
"""


def test_processes_end_with_a_driver_that_is_killed(
    tmp_path: Path, file: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
    mark = f"TOKENS_OF={tmp_path}"

    def living() -> list[int]:
        found = []
        for process in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if process.name.isdecimal() and mark in (process / "environ").read_bytes().decode().split("\0"):
                    found.append(int(process.name))
        return found

    words = [sys.executable, "-c", ENDLESS, str(tmp_path / "tokenizer"), f"PKU-SafeRLHF:1:{file}"]
    environment = {**os.environ, "TOKENS_OF": str(tmp_path)}
    driver = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert driver.stdout is not None and driver.stdout.readline() == "begun\n"
        assert len(living()) >= 3  # this one, what forks, and who tokenises
        driver.kill()
        driver.wait()
        deadline = time.monotonic() + 20
        while living() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert living() == []
    finally:
        for process in living():
            os.kill(process, signal.SIGKILL)
