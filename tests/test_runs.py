from __future__ import annotations

import json
import math
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.driver.trainer_stage import TrainerStage
from actors.stages import stages
from beaver_ray import runs
from beaver_ray.errors import UserError
from beaver_ray.runs import RunFolder, duration, has_started, is_finished, read_metrics
from beaver_ray.yaml_files import other_settings, save_config
from launch.config_files import load_config


def config(workspace: Path, **more: Any) -> TrainerStage:
    given = {"workspace": str(workspace), "name": "one", "stage": "sft", "model": "m", "train": ["d"]} | more
    return stages()["sft"](**given)


def test_config_is_kept_as_it_can_be_read_back(tmp_path: Path) -> None:
    with RunFolder(config(tmp_path, epochs=1.5)) as run:
        assert run.folder == tmp_path / "one"
        assert run.trajectories.is_dir() and run.checkpoints.folder.is_dir() and not run.final.exists()
    assert load_config(run.folder / "config.yaml") == config(tmp_path, epochs=1.5)


def test_a_kill_amid_the_configuration_leaves_the_one_before(tmp_path: Path) -> None:
    """It is written beside the file, which a link holds as it was."""
    with RunFolder(config(tmp_path)) as run:
        run.log(1, {"loss": 1.0})
    before = (run.folder / "config.yaml").read_text()
    os.link(run.folder / "config.yaml", tmp_path / "kept.yaml")
    RunFolder(config(tmp_path, epochs=1.5).model_copy(update={"resume": True})).close()
    assert (tmp_path / "kept.yaml").read_text() == before != (run.folder / "config.yaml").read_text()
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "config.yaml.part").write_text("stage: s")
    assert not has_started(fresh)


def test_what_is_set_otherwise(tmp_path: Path) -> None:
    """Entries that a list has more or less too, and those that became a mapping."""
    before = config(tmp_path, epochs=2).model_copy(update={"resume": True})
    path = tmp_path / "config.yaml"
    save_config(before, path)

    def changes(**more: Any) -> list[str]:
        return other_settings(path, config(tmp_path, **{"epochs": 2, **more}))

    assert changes() == []
    assert changes(epochs=1) == ["epochs 2.0 -> 1.0"]
    assert changes(train=["d", "e"]) == ["train.1 nothing -> e"]
    mapped = {"name": "d", "where": {"kind": "a"}}
    assert changes(train=[mapped]) == ["train.0 d -> {name: d, proportion: 1.0, where: {kind: a}}"]
    assert changes(eval=["e"]) == ["eval.0 nothing -> e"]
    save_config(config(tmp_path, epochs=2, train=["c", "d", mapped]), path)
    assert changes(train=["c", "d"]) == ["train.2 {name: d, proportion: 1.0, where: {kind: a}} -> nothing"]
    assert changes(train=["c", "d", {**mapped, "where": {"kind": "b", "level": 1}}]) == [
        "train.2.where.kind a -> b",
        "train.2.where.level nothing -> 1",
    ]
    # Of an earlier version, which had fewer options.
    tree = {k: v for k, v in before.model_dump(mode="json").items() if k not in ("epochs", "train")}
    tree["engine"].pop("offload")
    path.write_text(yaml.safe_dump({**tree, "gone": 1}))
    assert changes(epochs=1) == []


def test_metrics_are_one_object_a_line_and_finite(tmp_path: Path) -> None:
    with RunFolder(config(tmp_path)) as run:
        run.log(1, {"loss": 0.5, "rows": 3, "ratio": math.nan})
        run.log(2, {"loss": math.inf})
        # Flushed: another process sees it at once.
        assert read_metrics(run.folder) == [
            {"step": 1, "loss": 0.5, "rows": 3, "ratio": None},
            {"step": 2, "loss": None},
        ]
    first = (run.folder / "metrics.jsonl").read_text().splitlines()[0]
    assert first.startswith('{"step": 1') and json.loads(first)


def test_metrics_of_a_killed_run_and_of_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\noops\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match=r"no run in .*nowhere"):
        read_metrics(tmp_path / "nowhere")


def test_started_and_finished_runs_are_not_overwritten(tmp_path: Path) -> None:
    RunFolder(config(tmp_path)).close()
    with RunFolder(config(tmp_path)) as run:  # nothing but configuration: used again
        run.note("a")
        assert not has_started(run.folder)
    with RunFolder(config(tmp_path)) as run:
        assert not (run.folder / "notes.log").exists()
        run.log(1, {"loss": 1.0})
    with pytest.raises(
        UserError, match=r"one holds a run that was started: go on with resume=true, choose another name=.* delete"
    ):
        RunFolder(config(tmp_path))
    assert not is_finished(run.folder)
    (run.final / "policy").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a finished run"):
        RunFolder(config(tmp_path))
    assert read_metrics(run.folder) == [{"step": 1, "loss": 1.0}]


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    with RunFolder(config(tmp_path)) as run:
        run.log(1, {"loss": 1.0})
        again = config(tmp_path).model_copy(update={"resume": True})
        with pytest.raises(UserError, match=r"one is being written by another process; wait for it, or choose another"):
            RunFolder(again)
        assert read_metrics(run.folder) == [{"step": 1, "loss": 1.0}]
    RunFolder(again).close()
    with pytest.raises(UserError, match="holds a run that was started"):
        RunFolder(config(tmp_path))
    RunFolder(again).close()  # who was refused holds nothing


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the run's folder .*workspace="):
        RunFolder(config(tmp_path / "file"))


def test_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(config(tmp_path)) as run:
        run.note("12 of 300 prompts\nare longer than 64 tokens")
    assert capsys.readouterr().out == "12 of 300 prompts are longer than 64 tokens\n"
    assert (run.folder / "notes.log").read_text() == "12 of 300 prompts are longer than 64 tokens\n"


def test_plain_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    with RunFolder(config(tmp_path)) as run, run.progress("Training", 100) as progress:
        for _ in range(100):
            now[0] += 0.25
            progress.advance(reward=1.23456, harm=-2)
    assert capsys.readouterr().out.splitlines() == [
        "Training 40/100  0:00:10  reward 1.235  harm -2",
        "Training 80/100  0:00:20  reward 1.235  harm -2",
        "Training 100/100  0:00:25  reward 1.235  harm -2",
    ]


def test_progress_that_ends_early_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), RunFolder(config(tmp_path)) as run, run.progress("Scoring", 9) as progress:
        progress.advance(4)
        raise KeyError
    assert capsys.readouterr().out == "Scoring 4/9  0:00:00\n"


def test_bar_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    code = "from beaver_ray.runs import Progress as P; p = P('Training', 3); p.advance(3, loss=0.25); p.close()"
    subprocess.run([sys.executable, "-c", code], stdout=theirs, check=True, env={**os.environ, "TERM": "xterm"})
    text = os.read(ours, 10000).decode()
    assert "3/3" in text and "━" in text and "loss 0.25" in text


def test_tensorboard(tmp_path: Path) -> None:
    with RunFolder(config(tmp_path, tracker="tensorboard")) as run:
        run.log(1, {"loss": 0.5, "gap": math.nan})
    assert list((run.folder / "tensorboard").glob("events.*"))


def test_wandb_is_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    with RunFolder(config(tmp_path, tracker="wandb")) as run:
        run.log(1, {"loss": 0.5})
    assert list((run.folder / "wandb").glob("offline-run-*"))


def test_a_resumed_run_is_the_same_run_for_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for name, steps in (("one", (1, 2)), ("one", (3,)), ("two", (1,))):
        with RunFolder(config(tmp_path, tracker="wandb", resume=True).model_copy(update={"name": name})) as run:
            for step in steps:
                run.log(step, {"loss": 0.5})
            ids.append(run._tracker.id)
        time.sleep(1.0)  # its folders are named by the second
    assert ids[0] == ids[1] != ids[2]
    assert len(list((tmp_path / "one" / "wandb").glob(f"offline-run-*-{ids[0]}"))) == 2


def test_duration() -> None:
    assert [duration(s) for s in (0, 59.6, 3661)] == ["0:00:00", "0:01:00", "1:01:01"]
