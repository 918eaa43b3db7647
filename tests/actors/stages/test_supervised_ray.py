"""A supervised stage on a real Ray, whose ranks die."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from actors.driver.train import train
from actors.driver.trainer_stage import TrainerStage
from actors.roles.trainer import Trainer
from actors.stages import stages
from beaver_ray.runs import RunFolder, read_metrics
from tests.actors.driver.test_resume import assert_same

pytestmark = pytest.mark.cluster


class Dying(Trainer):
    """Its process ends in the first step."""

    def train_step(self) -> dict[str, float]:
        os._exit(1)


def stage(world: Path, workspace: Path, name: str) -> TrainerStage:
    tree = {
        "stage": "reward_model",
        "name": name,
        "workspace": str(workspace),
        "model": str(world / "model"),
        "train": [f"PKU-SafeRLHF:1:{world}/preferences/train.jsonl"],
        "epochs": 1,
        "batch_size": 20,
        "max_tokens": 64,
        "save_every": 4,
        "engine": {"micro_batch_tokens": 1024, "zero_stage": 2},
        "cluster": {"placement": {"trainer": {"workers": 2, "cpus": 0.5}}},
    }
    return stages()[tree["stage"]].model_validate(tree)


@pytest.mark.timeout(600)
def test_a_dead_rank_costs_no_more_than_the_steps_since_the_last_checkpoint(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(stage(tiny_world, tmp_path, "whole"))
    log = RunFolder.log
    deaths = []

    def log_and_kill(self: RunFolder, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        # Once before the first checkpoint, and once after it.
        if step == (2, 6, None)[len(deaths)]:
            processes = psutil.Process().children(recursive=True)
            ranks = [p for p in processes if p.name().startswith("ray::") and "Trainer" in " ".join(p.cmdline())]
            assert len(ranks) == 2
            deaths.append(ranks[len(deaths)].pid)
            ranks[len(deaths) - 1].kill()

    monkeypatch.setattr(RunFolder, "log", log_and_kill)
    folder = train(stage(tiny_world, tmp_path, "killed"))
    assert len(deaths) == 2
    assert [row["step"] for row in read_metrics(folder)] == list(range(1, 13))
    notes = (folder / "notes.log").read_text()
    assert notes.count("the trainer is started anew: ") == 2
    assert "the run starts at its first step" in notes and "resumed after step 4" in notes
    assert_same(whole, folder)


def test_what_dies_again_and_again_ends_the_stage(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.roles.trainer.Trainer", Dying)
    with pytest.raises(RuntimeError, match=r"3 deaths with no new step in between: .*trainer"):
        train(stage(tiny_world, tmp_path, "dying"))
