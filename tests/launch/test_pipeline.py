from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from beaver_ray.errors import UserError
from beaver_ray.report.page import write_report
from beaver_ray.runs import RunFolder
from beaver_ray.stage import Stage
from launch.config_files import load_pipeline
from launch.pipeline import build_world, run_pipeline

StageFile = Callable[..., Path]
FIGURE = {"low": 0.8, "high": 0.9, "n": 400}


@pytest.fixture
def pipeline(stage_file: StageFile, tmp_path: Path) -> Path:
    """sft, then two models that build on it, then safe_ppo on all of them; nothing has run."""
    sft = "${workspace}/sft/final/policy"
    stage_file("sft", name="sft")
    stage_file("reward_model", name="reward", model=sft)
    stage_file("cost_model", name="cost", model=sft)
    models = {"policy": sft, "reward": "${workspace}/reward/final/model"}
    harm = {"name": "harm", "model": "${workspace}/cost/final/model", "limit": 0.0}
    stage_file("safe_ppo", name="ppo", models=models, constraints=[harm], evaluation={"prompts": ["p"]})
    stages = [{"config": f"{stage}.yaml"} for stage in ("sft", "reward_model", "cost_model", "safe_ppo")]
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"workspace": str(tmp_path / "w"), "stages": stages}))
    return path


def finish(config: Stage, **figures: float) -> None:
    """Leave what a finished run leaves."""
    with RunFolder(config) as run:
        run.log(1, {"loss": 0.5, "reward/mean": 1.0, **figures})
        (run.final / "policy").mkdir(parents=True)
        if config.stage == "safe_ppo":
            evaluation = {
                "prompts": 400,
                "samples": 400,
                "optimum": 4.0,
                "reward": {**FIGURE, "mean": 3.4},
                "share_of_optimum": {**FIGURE, "mean": 0.85},
                "violation_rate/harm": {"mean": 0.025, "low": 0.01, "high": None, "n": 400, "target": 0.05},
            }
            evaluation["violation_rate/harm"]["high"] = 0.04
            (run.folder / "evaluation.json").write_text(json.dumps(evaluation))


def test_a_complete_pipeline_is_skipped_but_reported(
    pipeline: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, stages = load_pipeline(pipeline)
    for stage in stages:
        finish(stage, **{"throughput/samples_per_second": 62.0})
    report = run_pipeline(pipeline, [])
    assert report == tmp_path / "w" / "ppo" / "report.html" and report.is_file()
    os.link(report, tmp_path / "kept.html")
    write_report(stages[-1], stages[-1].folder)
    assert not os.path.samefile(report, tmp_path / "kept.html"), "a kill leaves no half of a report"
    assert capsys.readouterr().out.splitlines() == [
        f"[1/4] sft: {tmp_path}/w/sft is complete, skipped",
        f"[2/4] reward_model: {tmp_path}/w/reward is complete, skipped",
        f"[3/4] cost_model: {tmp_path}/w/cost is complete, skipped",
        f"[4/4] safe_ppo: {tmp_path}/w/ppo is complete, skipped",
        f"report: {report}",
        "reward as a share of the constrained optimum: 85.0% (n = 400, 95 % interval 80.0% to 90.0%)",
        "violation rate of harm: 2.5% (n = 400, 95 % interval 1.0% to 4.0%), target 5.0%",
        "samples per second: 62",
    ]


def test_what_stands_in_the_way_is_said_before_anything_runs(pipeline: Path) -> None:
    _, (sft, reward, cost, ppo) = load_pipeline(pipeline)
    finish(sft)
    finish(reward)
    with pytest.raises(UserError, match=r"run of another configuration \(epochs [\d.]+ -> 3.0\): delete .*reward"):
        run_pipeline(pipeline, ["reward_model.epochs=3"])
    with RunFolder(cost) as run:
        run.log(1, {"loss": 1.0})
    with pytest.raises(
        UserError, match=r"cost holds a run that was broken off: go on with resume=true, or delete .*cost, or set"
    ):
        run_pipeline(pipeline, [])
    assert not ppo.folder.exists()


def test_a_complete_stage_on_top_of_one_that_would_run_anew(pipeline: Path) -> None:
    _, (_, reward, *_) = load_pipeline(pipeline)
    finish(reward)
    with pytest.raises(UserError, match=r"reward was made from an earlier .*sft, which would run anew"):
        run_pipeline(pipeline, [])


def test_a_complete_stage_on_top_of_a_world_that_would_be_built_anew(stage_file: StageFile, tmp_path: Path) -> None:
    stage_file("sft", name="sft", train=["supervised:1:${workspace}/world/supervised/train.jsonl"])
    path = tmp_path / "pipeline.yaml"
    tree = {"workspace": str(tmp_path / "w"), "world": {"seed": 7}, "stages": [{"config": "sft.yaml"}]}
    path.write_text(yaml.safe_dump(tree))
    _, (sft,) = load_pipeline(path)
    finish(sft)
    for workspace in (tmp_path / "w", f"{tmp_path}/w/"):
        with pytest.raises(UserError, match=r"sft was made from an earlier .*world, which would be built anew: delete"):
            run_pipeline(path, [f"workspace={workspace}"])
    assert not (tmp_path / "w" / "world").exists()


def test_two_stages_in_one_folder(pipeline: Path) -> None:
    with pytest.raises(UserError, match=r"two stages write to .*sft: give them different names"):
        run_pipeline(pipeline, ["cost_model.name=sft"])


def test_every_configuration_is_checked_first(pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'steps'"):
        run_pipeline(pipeline, ["safe_ppo.stepz=3", "world={seed: 1}"])
    assert not (tmp_path / "w").exists()


def test_the_world_is_built_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"seed": 3, "train_prompts": 40, "test_prompts": 20, "pairs": 30}
    options |= {"test_pairs": 10, "demonstrations": 10, "test_demonstrations": 5, "hidden_size": 16, "layers": 1}
    build_world(tmp_path / "world", options)
    assert len((tmp_path / "world" / "preferences" / "train.jsonl").read_text().splitlines()) == 30
    assert (tmp_path / "world" / "model" / "config.json").is_file()
    build_world(tmp_path / "world", options)
    assert capsys.readouterr().out.splitlines()[-1] == f"small world: {tmp_path}/world is complete, skipped"
    record = tmp_path / "world" / "options.json"
    recorded = json.loads(record.read_text())
    assert recorded.pop("graded") is False
    record.write_text(json.dumps(recorded))  # as before there were graded worlds
    build_world(tmp_path / "world", options)
    with pytest.raises(UserError, match="holds a small world of other options"):
        build_world(tmp_path / "world", options | {"graded": True})
    with pytest.raises(UserError, match="holds a small world of other options"):
        build_world(tmp_path / "world", options | {"pairs": 31})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sed": 1}, "world: unknown option 'sed'; known: adversarial_share"),
        ({"pairs": "many"}, "world.pairs: 'many' is not of type int"),
        ({"label_noise": 0.9}, "world.label_noise: Input should be less than or equal to 0.5"),
        ({"max_response_tokens": 2}, "max_response_tokens must leave room"),
        ({"kind": "hard"}, "no small world of kind 'hard': leave kind out, or say harder"),
        ({"kind": "harder", "leaks": 1}, "world: unknown option 'leaks'; known: adversarial_share, borderline_share"),
    ],
)
def test_bad_worlds(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        build_world(tmp_path / "world", options)


def test_headlines_leave_out_what_is_not_known(pipeline: Path) -> None:
    _, stages = load_pipeline(pipeline)
    assert stages[0].headlines() == []
    with RunFolder(stages[-1]) as run:
        run.log(1, {"reward/mean": 1.0})
    assert stages[-1].headlines() == []
