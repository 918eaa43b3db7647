"""Broken run folders: they are read, or refused with one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beaver_ray.errors import UserError
from beaver_ray.runs import read_evaluation, read_metrics
from beaver_ray.verdicts import Certificate, Reliability
from tests.fuzzing import accepted, damaged, mutated, scalars
from tests.test_report import RELIABILITY, VERDICTS, make_ppo_run, report

ROW: dict[str, Any] = {"step": 1, "reward/mean": 0.5, "kl/reference": None, "time/elapsed": 2.0, "time/train": 1.0}
FIGURE = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 20, "target": 0.1}
EVALUATION: dict[str, Any] = {
    "judged_by": "x",
    "prompts": 20,
    "samples": 40,
    "reward": FIGURE,
    "violation_rate/harm": FIGURE,
    "optimum": 1.0,
    "share_of_optimum": FIGURE,
    "cost/harm": {**FIGURE, "low": None, "high": None},
}
files = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


metrics = st.lists(st.just(ROW) | mutated(ROW) | scalars, max_size=4).map(as_lines) | damaged(as_lines([ROW] * 3))
verdicts = {
    record.name(): mutated(record.model_dump(mode="json")).map(lambda tree: json.dumps(tree).encode())
    | damaged(record.model_dump_json().encode())
    for record in (VERDICTS, RELIABILITY)
}
evaluations = mutated(EVALUATION).map(lambda tree: json.dumps(tree).encode()) | damaged(json.dumps(EVALUATION).encode())


@files
@given(content=metrics | st.sampled_from([b"[" * 100_000 + b"\n", b"9" * 5000 + b"\n", b"\xff\n", b"\n"]))
def test_broken_metrics(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    for row in accepted(lambda: read_metrics(tmp_path)) or ():
        assert all(value is None or abs(value) < 1e301 for value in row.values())


@files
@given(content=evaluations)
def test_broken_evaluations(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "evaluation.json").write_bytes(content)
    accepted(lambda: read_evaluation(tmp_path))


@pytest.mark.parametrize("kind", [Certificate, Reliability])
@files
@given(data=st.data())
def test_broken_verdicts(tmp_path: Path, kind: type[Certificate | Reliability], data: st.DataObject) -> None:
    (tmp_path / kind.name()).write_bytes(data.draw(verdicts[kind.name()]))
    accepted(lambda: kind.read(tmp_path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_ppo_run(tmp_path_factory.mktemp("runs"), steps=3)
    VERDICTS.write(folder)
    RELIABILITY.write(folder)
    return folder


@settings(files, max_examples=25)
@given(data=st.data())
def test_reports_of_broken_runs(tmp_path: Path, whole: Path, data: st.DataObject) -> None:
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    changed = {"metrics.jsonl": metrics, "evaluation.json": evaluations, **verdicts}
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    for name in data.draw(st.sampled_from([[name] for name in changed] + [list(changed), []])):
        (folder / name).write_bytes(data.draw(changed[name]))
    file = data.draw(st.sampled_from(files))
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    accepted(lambda: report(folder))


@pytest.mark.parametrize("line", ["3", "[1]", "{}", '{"step": "1"}', '{"step": 1, "a": "b"}', '{"step": 1, "a": NaN}'])
def test_lines_that_are_no_steps(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match="line 2 is not a step with figures"):
        read_metrics(tmp_path)


def test_an_evaluation_comes_back_as_it_was(tmp_path: Path) -> None:
    assert read_evaluation(tmp_path) == {}
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    found = read_evaluation(tmp_path)
    assert found == EVALUATION and type(found["prompts"]) is int
    for change in (
        {"reward": 3},
        {"share_of_optimum": None},
        {"optimum": None},
        {"violation_rate/harm": 0.1},
        {"cost/harm": {**FIGURE, "limit": None}},
        {"cost/harm": {**FIGURE, "high": None}},
    ):
        (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION | change))
        with pytest.raises(UserError, match=r"evaluation\.json is no evaluation .*; evaluate again"):
            read_evaluation(tmp_path)
