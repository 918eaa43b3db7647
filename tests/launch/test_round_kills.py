"""Rounds of generate, label, reward model, cost model and Safe PPO, killed within and behind every kind of stage."""

from __future__ import annotations

import importlib
import multiprocessing as mp
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import beaver_ray.manifest as manifest
import launch.pipeline as pipeline
from actors.stages import generate
from beaver_ray.runs import RunFolder
from beaver_ray.stage import Stage
from tests.actors.support import untimed

STAGES = ("generate", "label", "reward", "cost", "policy")
KILLS = [*[(f"round_1/{name}", "within") for name in STAGES], *[(f"round_2/{name}", "behind") for name in STAGES]]
PRELOADED = [
    *("actors.driver.train", "actors.driver.train_on_prompts", "actors.driver.train_on_data", "actors.machine.engine"),
    *("actors.roles.hf_generator", "actors.roles.trainer", "beaver_ray.data.survey", "beaver_ray.report.page"),
    *("beaver_ray.report.policy", "launch.planning", "transformers.models.llama.modeling_llama"),
]


def rounds(world: Path, folder: Path) -> Path:
    """A pipeline on the tiny world: SFT, and two rounds."""
    before, own = "${workspace}/round_${previous_round}/policy/final/policy", "${workspace}/round_${round}"
    prompts = [f"prompts:1:{world}/prompts/train.jsonl"]
    labels = ["PKU-SafeRLHF:1:${workspace}/round_${rounds_so_far}/label/final/train.jsonl"]
    held_out = [f"PKU-SafeRLHF:1:{own}/label/final/test.jsonl"]
    sampling = {"max_new_tokens": 12, "max_sequences": 64}
    training = {"model": str(world / "model"), "max_tokens": 64, "epochs": 1, "batch_size": 16, "save_every": 2}
    training |= {"optimizer": {"learning_rate": 5.0e-3}, "engine": {"micro_batch_tokens": 1024}}
    harm = {"name": "harm", "model": f"{own}/cost/final/cost_model", "violation_rate": 0.2, "calibration": held_out}
    rate = {"learning_rate": 1.0e-3}
    trees: dict[str, dict[str, Any]] = {
        "sft": training | {"train": [f"demonstrations:1:{world}/demonstrations/train.jsonl"]},
        "generate": {"policies": [before], "prompts": prompts, "max_prompt_tokens": 32, "rollout": sampling},
        "label": {"pairs": f"{own}/generate/final/pairs.jsonl", "world": f"{world}/world.json", "eval_fraction": 0.4},
        "reward_model": training | {"train": labels},
        "cost_model": training | {"train": labels},
        "safe_ppo": {
            "steps": 3,
            "models": {"policy": before, "reward": f"{own}/reward/final/reward_model"},
            "constraints": [harm],
            "data": {"prompts": prompts, "max_prompt_tokens": 32},
            "rollout": sampling | {"prompts_per_step": 8},
            "evaluation": {"prompts": [f"prompts:1:{world}/prompts/test.jsonl"], "world": f"{world}/world.json"},
            "policy": rate,
            "critic": rate,
            "engine": {"micro_batch_tokens": 512},
            "save_every": 1,
        },
    }
    names = ["round_0/policy", *(f"round_${{round}}/{name}" for name in STAGES)]
    for name, (stage, tree) in zip(names, trees.items(), strict=True):
        common = {"stage": stage, "workspace": "elsewhere", "name": name, "debug": True}
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(common | tree))
    first, *others = [{"config": f"{stage}.yaml"} for stage in trees]
    tree = {"workspace": str(folder / "w"), "rounds": 2, "stages": [first, {"each_round": others}]}
    (folder / "rounds.yaml").write_text(yaml.safe_dump(tree))
    return folder / "rounds.yaml"


def die_at(file: Path, name: str, moment: str) -> None:
    """Go on with the pipeline and end this process by SIGKILL within that stage's run, or right behind it."""
    generate.BLOCK = 10
    torch.set_num_threads(1)
    log, write, run = RunFolder.log, manifest.write_stage_manifest, pipeline.run_stage

    def kill(stage: Any, when: str) -> None:
        if (str(stage.name), when) == (name, moment):
            os.kill(os.getpid(), signal.SIGKILL)

    def log_and_die(self: RunFolder, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        if step == 3:
            kill(self._config, "within")

    def die_before_the_manifest(stage: Stage, *args: Any) -> None:
        if stage.stage == "label":
            kill(stage, "within")
        write(stage, *args)

    def run_and_die(config: Stage, complete: bool = False) -> None:
        run(config, complete)
        kill(config, "behind")

    RunFolder.log = log_and_die  # type: ignore[method-assign]
    manifest.write_stage_manifest = die_before_the_manifest
    pipeline.run_stage = run_and_die
    pipeline.run_pipeline(file, ["resume=true"])


def serve(requests: Connection) -> None:
    """Import once what all runs need, and fork a process for each that is asked for; answer with its exit code.

    The forkserver of the session may be there already, with what others wanted of it.
    """
    for module in PRELOADED:
        importlib.import_module(module)
    while True:
        process = mp.get_context("fork").Process(target=die_at, args=requests.recv())
        process.start()
        process.join(240)
        requests.send(process.exitcode)


@pytest.fixture
def go_on() -> Iterator[Callable[..., int | None]]:
    """Runs the pipeline, or what is left of it, in a process of its own: its exit code."""
    here, there = mp.Pipe()
    server = mp.get_context("spawn").Process(target=serve, args=(there,))
    server.start()
    there.close()

    def ask(file: Path, name: str = "", moment: str = "") -> int | None:
        here.send((file, name, moment))
        code: int | None = here.recv()
        return code

    yield ask
    server.kill()  # it holds nothing, and its ordinary end takes longer than a run
    server.join()


def test_killed_at_every_stage_and_gone_on(go_on: Callable[..., int | None], tiny_world: Path, tmp_path: Path) -> None:
    """Ten kills: some blocks of answers are there, labels without their manifest, some steps of training; or a stage.

    Models, data and figures of both rounds are those of a run that nothing disturbed.
    """
    file, workspace, whole = rounds(tiny_world, tmp_path), tmp_path / "w", tmp_path / "whole"
    assert go_on(file) == 0
    workspace.rename(whole)
    for name, moment in KILLS:
        assert go_on(file, name, moment) == -signal.SIGKILL
        assert (workspace / name / "final").exists() == (moment == "behind")
        if moment == "within" and name.endswith(("reward", "cost", "policy")):
            assert [*(workspace / name).glob("checkpoints/step_2")], "it has a step to go on from"
    assert not (workspace / "round_2" / "manifest.json").exists()
    assert go_on(file) == 0
    for number in (1, 2):
        # Hashes of all models and data that a round has read and made.
        made = [folder / f"round_{number}" / "manifest.json" for folder in (whole, workspace)]
        assert made[0].read_bytes() == made[1].read_bytes()
        for name in STAGES:
            first, second = (untimed(folder / f"round_{number}" / name) for folder in (whole, workspace))
            assert first == second and first, name
