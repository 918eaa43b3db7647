"""Two runs of a sweep at once on Ray, each with a driver and a trainer of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util import placement_group_table

from actors.driver.sweep import DRIVER, run_side_by_side
from beaver_ray.runs import read_metrics
from tests.actors.stages.test_supervised import config_of

pytestmark = pytest.mark.cluster


def test_side_by_side(tiny_world: Path, tmp_path: Path) -> None:
    """Both are complete, one that cannot read its data ends with its line, and the cluster is gone afterwards."""
    placement = {"threads": 1, "placement": {"trainer": {"cpus": 0.5}}}
    common = {"debug": False, "workspace": str(tmp_path), "cluster": placement, "epochs": 0.2}
    good = [config_of(tiny_world, "cost_model", name=f"run-{seed}", seed=seed, **common) for seed in (0, 1)]
    bad = config_of(tiny_world, "cost_model", name="bad", train=["PKU-SafeRLHF:1:/nowhere.jsonl"], **common)
    ended = {stage.name: error for stage, error in run_side_by_side([*good, bad])}
    assert ended["run-0"] is None and ended["run-1"] is None
    assert "/nowhere.jsonl" in str(ended["bad"]) and "\n" not in str(ended["bad"])
    assert not ray.is_initialized()
    losses = []
    for stage in good:
        assert (stage.folder / "final" / "cost_model").is_dir() and (stage.folder / "report.html").is_file()
        losses.append(read_metrics(stage.folder)[-1]["eval/loss"])
    assert losses[0] != losses[1]


def test_a_driver_that_is_killed_gives_its_room_back(
    tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the other run goes on: the room of the dead one is free, and its line says what ended it."""
    placement = {"threads": 1, "placement": {"trainer": {"cpus": 0.5}}}
    common = {"debug": False, "workspace": str(tmp_path), "cluster": placement, "epochs": 20}
    stages = [config_of(tiny_world, "cost_model", name=f"run-{seed}", seed=seed, **common) for seed in (0, 1)]

    def kill_first() -> None:
        soon(lambda: ray.is_initialized() and len(reserved()) == 2)
        ray.kill(ray.get_actor(f"{DRIVER}run-0"))

    killer = threading.Thread(target=kill_first)
    killer.start()
    runs = run_side_by_side(stages)
    stage, error = next(runs)
    killer.join()
    assert stage.name == "run-0" and error is not None and "\n" not in str(error)
    soon(lambda: len(reserved()) == 1)
    runs.close()  # type: ignore[attr-defined]
    assert not ray.is_initialized()


def reserved() -> list[Any]:
    """The placement groups of this cluster that have their room."""
    return [group for group in placement_group_table().values() if group["state"] == "CREATED"]


def soon(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end
        time.sleep(0.2)
