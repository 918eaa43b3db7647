"""The studies under benchmarks/, which are run by hand: what they import is there, and figures say their command."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.py")))
def test_a_study_imports_what_there_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    assert importlib.import_module(name).__doc__


def test_figures_say_the_options_that_made_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    said = ["--jobs", "2", "--seeds", "1", "2", "--out=x.json", "--set", "a=b c", "--workspace", "w", "hh-rlhf:1:f"]
    monkeypatch.setattr("sys.argv", ["/somewhere/benchmarks/study.py", *said])
    spoken = "python benchmarks/study.py --seeds 1 2 --set 'a=b c' hh-rlhf:1:f"
    assert importlib.import_module("common").described()["command"] == spoken
