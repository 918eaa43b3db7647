"""Two runs of a sweep at once on Ray, each with a driver and a trainer of its own."""

from __future__ import annotations

from pathlib import Path

import ray

from actors.driver.sweep import run_side_by_side
from beaver_ray.runs import read_metrics
from tests.actors.stages.test_supervised import config_of


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
