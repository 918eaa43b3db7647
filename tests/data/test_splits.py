"""Clones of data sets of the hub: the files that a name means are those that the `datasets` library would read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from beaver_ray.data.mixing import held_out_too, prompt_keys
from beaver_ray.data.sources import RawSample, read_source
from beaver_ray.errors import UserError

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def write(folder: Path, name: str, prompt: str | None = None) -> None:
    """A file of one pair whose prompt is the file's name, unless it is told."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"prompt": prompt or name, "response_0": "a", "response_1": "b"}
    with OPENERS.get(path.suffix, open)(path, "wt") as file:
        file.write(json.dumps(row) + "\n")


def read(name: str, folder: Path) -> list[Any]:
    return sorted(sample.input for sample in read_source(name, str(folder))[0])


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/train.jsonl
  - split: test
    path: [data/*/test.jsonl]
- config_name: alpaca
  data_files:
  - split: train
    path: data/alpaca/train.jsonl
---
# A card
"""
LAYOUTS = {
    "by file": ["data/a/train.jsonl", "data/a/test.jsonl", "data/b/train.jsonl", "data/b/test.jsonl"],
    "by folder": ["train/one.jsonl", "train/two.jsonl", "test/one.jsonl", "more/one.jsonl"],
    "in shards": [
        "data/train-00000-of-00002.jsonl",
        "data/train-00001-of-00002.jsonl",
        "data/test-00000-of-00001.jsonl",
    ],
    "with words around": ["my_train.jsonl", "latest.jsonl", "my-eval-2.jsonl", "constraint.jsonl"],
    "other words": ["training_set.jsonl", "validation.jsonl", "testing.jsonl"],
    "packed": ["round0/train.jsonl.xz", "round1/train.jsonl.gz", "round2/train.jsonl.bz2", "round0/test.jsonl.xz"],
    "no split": ["a.jsonl", "b/c.jsonl"],
    "hidden": ["train.jsonl", "test.jsonl", ".cache/train.jsonl", "__old__/train.jsonl"],
}


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_clone_is_read_as_the_library_reads_it(tmp_path: Path, layout: str) -> None:
    for name in LAYOUTS[layout]:
        write(tmp_path, name)
    (tmp_path / "README.md").write_text("# No card\n")
    (tmp_path / "dataset_infos.json").write_text('{"default": {"splits": {"train": {"name": "train"}}}}')
    (tmp_path / "dataset_infos.json").touch()
    patterns = datasets.data_files.get_data_patterns(str(tmp_path))
    files = datasets.data_files.DataFilesDict.from_patterns(patterns, str(tmp_path))
    for split in ("train", "test"):
        expected = sorted(str(Path(file).relative_to(tmp_path)) for file in files.get(split, []))
        name = "PKU-SafeRLHF/test" if split == "test" else "PKU-SafeRLHF"
        if expected:
            assert read(name, tmp_path) == expected
        else:
            with pytest.raises(UserError, match=f"no '{split}' split, only train"):
                read(name, tmp_path)
    assert read("PKU-SafeRLHF/train", tmp_path) == read("PKU-SafeRLHF", tmp_path)


def test_the_card_says_which_files(tmp_path: Path) -> None:
    for name in LAYOUTS["by file"] + ["data/a/train-old.jsonl"]:
        write(tmp_path, name)
    assert "data/a/train-old.jsonl" in read("PKU-SafeRLHF", tmp_path)
    (tmp_path / "README.md").write_text(CARD)
    assert read("PKU-SafeRLHF", tmp_path) == ["data/a/train.jsonl", "data/b/train.jsonl"]
    assert read("PKU-SafeRLHF/test", tmp_path) == ["data/a/test.jsonl", "data/b/test.jsonl"]
    (tmp_path / "README.md").write_text(CARD.replace("config_name: default", "config_name: other"))
    with pytest.raises(UserError, match=r"several subsets \(other, alpaca\)"):
        read("PKU-SafeRLHF", tmp_path)
    (tmp_path / "README.md").write_text(CARD.replace("split: train", "splt: train"))
    with pytest.raises(UserError, match=r"README.md does not say which files are data .*mend its 'configs'"):
        read("PKU-SafeRLHF", tmp_path)


def test_the_subset_that_a_name_means(tmp_path: Path) -> None:
    for subset in ("harmless-base", "helpful-base", "helpful-online"):
        for split in ("train", "test"):
            path = tmp_path / subset / f"{split}.jsonl.gz"
            path.parent.mkdir(exist_ok=True)
            talk = f"\n\nHuman: {subset} {split}\n\nAssistant:"
            with gzip.open(path, "wt") as file:
                file.write(json.dumps({"chosen": f"{talk} a", "rejected": f"{talk} b"}) + "\n")

    def inputs(name: str, folder: Path = tmp_path) -> list[str]:
        return sorted(sample.input[0] for sample in read_source(name, str(folder))[0])

    every = ["harmless-base train", "helpful-base train", "helpful-online train"]
    assert inputs("hh-rlhf") == inputs("hh-rlhf-dialogue") == every
    assert inputs("hh-rlhf-harmless-preference") == ["harmless-base train"]
    assert inputs("hh-rlhf-helpful-dialogue") == ["helpful-base train"]
    assert inputs("hh-rlhf-helpful-preference/test") == ["helpful-base test"]
    assert inputs("hh-rlhf-helpful-preference/test", tmp_path / "helpful-base") == ["helpful-base test"]
    (tmp_path / "harmless-base").rename(tmp_path / "x")
    with pytest.raises(UserError, match="no subset 'harmless-base', only helpful-base"):
        inputs("hh-rlhf-harmless-preference")


def test_a_name_without_a_split_takes_the_only_one(tmp_path: Path) -> None:
    write(tmp_path, "test.jsonl", "t")
    assert read("prompts", tmp_path) == ["t"]
    write(tmp_path, "validation.jsonl", "v")
    with pytest.raises(UserError, match="no 'train' split, only test, validation"):
        read("prompts", tmp_path)
    write(tmp_path, "train.jsonl", "r")
    assert read("prompts", tmp_path) == ["r"]


def test_files_about_the_data_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.jsonl", "a")
    for name in ("config.json", "dataset_info.json", "LICENSE.md"):
        (tmp_path / name).write_text('{"x": 1}')
    (tmp_path / "state.of.things.json").write_text('{"rows": 3}')
    monkeypatch.chdir(tmp_path.parent)
    for folder in (str(tmp_path), tmp_path.name):
        samples, report = read_source("prompts", folder)
        assert [sample.input for sample in samples] == ["a"]
        assert report.line() == "kept 1 of 1; 1 file without rows passed over (state.of.things.json)"


def test_held_out_prompts_that_are_trained_on() -> None:
    """Fault 23 of the published code."""
    train = prompt_keys([RawSample("a"), RawSample("a"), RawSample(["b"]), RawSample(["c", "d", "e"])])
    assert held_out_too(train, prompt_keys([RawSample("x"), RawSample(["c", "d", "f"])])) is None
    both = held_out_too(train, prompt_keys([RawSample("a "), RawSample("b"), RawSample("b"), RawSample("x")]))
    assert both is not None and both.startswith("2 of 3 held-out prompts are training prompts too")
