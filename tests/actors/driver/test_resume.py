"""A run that was killed and resumed is the uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors.driver.train import train
from actors.driver.trainer_stage import TrainerStage
from actors.machine import engine
from actors.stages import stages
from beaver_ray.errors import UserError
from beaver_ray.runs import RunFolder
from beaver_ray.stage import Stage
from tests.actors.support import ppo_config, untimed
from tests.test_checkpoints import files_of_at_most

STEPS = 6


def config(world: Path, workspace: Path, name: str, **changes: Any) -> Stage:
    """Every random number, schedule and window is used."""
    constraint = {"name": "harm", "model": str(world / "cost_model"), "limit": 0.0}
    multiplier = {"rule": "pid", "initial": 0.5, "time_constant": 5, "window": 20, "max": 5.0}
    sections: dict[str, Any] = {
        "workspace": str(workspace),
        "name": name,
        "steps": STEPS,
        "constraints": [constraint | {"multiplier": multiplier}],
        "data": {"ptx": [f"demonstrations:1:{world}/demonstrations/train.jsonl"]},
        "rollout": {"prompts_per_step": 16},
        "ppo": {
            "minibatches": 2,
            "ptx_coefficient": 1.0,
            "replay": 0.5,
            "normalize_rewards": 0.8,
            "critic_warmup_steps": 2,
            "average_last": 0.5,
        },
        "policy": {"schedule": "cosine", "warmup_fraction": 0.3},
        "evaluation": {
            "prompts": [f"prompts:1:{world}/prompts/test.jsonl"],
            "world": f"{world}/world.json",
            "every": 2,
        },
        "save_every": 1,
        "keep_checkpoints": 2,
        "trajectory_every": 0,
    }
    return ppo_config(world, **(sections | changes))


def die_at(stage: Stage, moment: str, step: int) -> None:
    """Train in this process and end it by SIGKILL at that moment of that step."""
    log, write = RunFolder.log, engine.CheckpointFiles.save

    def log_and_die(self: RunFolder, now: int, metrics: dict[str, float]) -> None:
        log(self, now, metrics)
        if moment == "step" and now == step + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_half_and_die(self: Any, state_dict: Any, path: str) -> None:
        write(self, state_dict, path)
        if moment == "checkpoint" and f"/step_{step + 1}.part/" in path:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    RunFolder.log = log_and_die  # type: ignore[method-assign]
    engine.CheckpointFiles.save = write_half_and_die  # type: ignore[method-assign]
    torch.set_num_threads(1)
    train(stage)


def killed(stage: Stage, moment: str, step: int) -> None:
    """The stage's folder as a kill has left it, ``step`` being the newest checkpoint."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["actors.machine.engine", "transformers.models.llama.modeling_llama"])
    process = context.Process(target=die_at, args=(stage, moment, step))
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL


def assert_same(one: Path, other: Path) -> None:
    assert untimed(one) == untimed(other)
    for path in (one / "final").rglob("*.safetensors"):
        tensors, others = load_file(path), load_file(other / path.relative_to(one))
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    if (one / "evaluation.json").is_file():
        first, second = (json.loads((folder / "evaluation.json").read_text()) for folder in (one, other))
        assert first == second


@pytest.fixture(scope="module")
def whole(one_rank: None, tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    return train(config(tiny_world, tmp_path_factory.mktemp("whole"), "whole"))


# 48 prompts, 16 a step: three steps an epoch.
@pytest.mark.parametrize(("moment", "step"), [("step", 0), ("step", 1), ("step", 3), ("step", 5), ("checkpoint", 2)])
def test_a_resumed_run_is_the_whole_run(
    whole: Path, tiny_world: Path, tmp_path: Path, moment: str, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = config(tiny_world, tmp_path, "run")
    killed(stage, moment, step)
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert f"step_{step}" in names or step == 0
    assert (f"step_{step + 1}.part" in names) == (moment == "checkpoint")
    with pytest.raises(UserError, match=r"holds a run that was started: go on with resume=true"):
        train(stage)
    folder = train(stage.model_copy(update={"resume": True}))
    assert (f"resumed after step {step}" if step else "no checkpoint to resume from") in capsys.readouterr().out
    assert_same(whole, folder)
    assert [("policy/loss" in row, row["unit/reward"] > 0) for row in untimed(folder)] == [(False, True)] * 2 + [
        (True, True)
    ] * (STEPS - 2)


def test_resuming_a_finished_run_changes_nothing(whole: Path, tiny_world: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    assert train(config(tiny_world, whole.parent, "whole", resume=True)) == whole
    assert (whole / "metrics.jsonl").read_bytes() == before
    said = rf"a finished run with other settings \(steps {STEPS} -> 9\): set another name, or delete .*/whole/final to"
    with pytest.raises(UserError, match=said):
        train(config(tiny_world, whole.parent, "whole", steps=9, resume=True))


def test_other_settings_are_said(tiny_world: Path, tmp_path: Path, one_rank: None) -> None:
    killed(config(tiny_world, tmp_path, "run", steps=3), "step", 2)
    folder = train(
        config(
            tiny_world,
            tmp_path,
            "run",
            steps=3,
            resume=True,
            ppo={"minibatches": 2, "ptx_coefficient": 1.0, "clip_ratio": 0.1},
        )
    )
    assert "resumed with other settings: ppo.clip_ratio 0.2 -> 0.1" in (folder / "notes.log").read_text()
    killed(config(tiny_world, tmp_path, "other", steps=3), "step", 2)
    said = "of 16 but this run has 4: resume with the same data, rollout.prompts_per_step and seed"
    with pytest.raises(UserError, match=said):
        train(config(tiny_world, tmp_path, "other", steps=3, resume=True, rollout={"prompts_per_step": 4}))
    killed(config(tiny_world, tmp_path, "longer", steps=6), "step", 5)
    with pytest.raises(
        UserError, match=r"has come to step \d, by its newest checkpoint, and is to have 3: raise steps"
    ):
        train(config(tiny_world, tmp_path, "longer", steps=3, resume=True))


def test_a_resumed_supervised_stage_is_the_whole_stage(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    def stage(name: str) -> TrainerStage:
        tree = {
            "stage": "reward_model",
            "name": name,
            "workspace": str(tmp_path),
            "debug": True,
            "model": str(tiny_world / "model"),
            "train": [f"PKU-SafeRLHF:1:{tiny_world}/preferences/train.jsonl"],
            "epochs": 2,
            "batch_size": 20,
            "max_tokens": 64,
            "save_every": 2,
            "engine": {"micro_batch_tokens": 1024},
        }
        return stages()[tree["stage"]].model_validate(tree)

    killed(stage("run"), "step", 2)
    folder = train(stage("run").model_copy(update={"resume": True}))
    assert_same(train(stage("whole")), folder)


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(
    one_rank: None, tiny_world: Path, tmp_path: Path, whole: Path
) -> None:
    stage = config(tiny_world, tmp_path, "run")
    killed(stage, "step", 1)
    resumed = stage.model_copy(update={"resume": True})
    with files_of_at_most(60_000), pytest.raises(UserError, match=r"cannot write .*free some space"):
        train(resumed)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_1"]
    assert_same(whole, train(resumed))
