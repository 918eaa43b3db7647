"""Pipelines with rounds: what ${round} becomes, what is skipped, and that a kill in any round is gone on from."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.stages.label import Label
from beaver_ray.errors import UserError
from beaver_ray.json_files import read_rows
from beaver_ray.manifest import RoundManifest
from beaver_ray.runs import RunFolder
from beaver_ray.yaml_files import interpolate
from launch.config_files import load_pipeline
from launch.pipeline import run_pipeline
from launch.submit import check_stages

ROOT = Path(__file__).parents[2]
Write = Callable[..., Path]


@pytest.fixture
def rounds_file(tmp_path: Path, tiny_world: Path) -> Write:
    """Writes a pipeline over the tiny world: generate and label, in two rounds; keys given replace the file's."""

    def write(**more: Any) -> Path:
        files = {
            "generate": {
                "name": "round_${round}/generate",
                "seed": "${round}",
                "policies": [str(tiny_world / "model")],
                "prompts": [f"prompts:${{share}}:{tiny_world}/prompts/train.jsonl"],
                "max_prompt_tokens": 32,
                "rollout": {"max_new_tokens": 12, "max_sequences": 64},
            },
            "label": {
                "name": "round_${round}/label",
                "pairs": "${workspace}/round_${round}/generate/final/pairs.jsonl",
                "world": str(tiny_world / "world.json"),
                "eval_fraction": 0.4,
            },
        }
        for stage, tree in files.items():
            common = {"stage": stage, "workspace": "elsewhere", "debug": True}
            (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(common | tree))
        pipeline = {
            "workspace": str(tmp_path / "w"),
            "rounds": 2,
            "by_round": {"share": [0.25, 0.5]},
            "stages": [{"each_round": [{"config": "generate.yaml"}, {"config": "label.yaml"}]}],
        }
        path = tmp_path / "rounds.yaml"
        path.write_text(yaml.safe_dump(pipeline | more))
        return path

    return write


def test_what_stands_for_what() -> None:
    values = {"round": 3, "rounds_so_far": [1, 2, 3], "share": 0.5, "sets": ["a", "b"], "workspace": "w"}

    def become(node: Any) -> Any:
        return interpolate(node, values, "f")

    assert become({"seed": "${round}", "name": "round_${round}/x", "k": 1}) == {"seed": 3, "name": "round_3/x", "k": 1}
    assert become(["p", "n:${share}:${workspace}/${rounds_so_far}.jsonl"]) == [
        "p",
        "n:0.5:w/1.jsonl",
        "n:0.5:w/2.jsonl",
        "n:0.5:w/3.jsonl",
    ]
    assert become(["${sets}"]) == ["a", "b"] == become("${sets}")
    assert become([{"path": "${rounds_so_far}", "name": "n"}]) == [{"path": k, "name": "n"} for k in (1, 2, 3)]
    assert become(["${sets}-${rounds_so_far}"]) == [f"{s}-{k}" for s in "ab" for k in (1, 2, 3)]
    with pytest.raises(UserError, match=r"f: \$\{sets\} is a list or a mapping, which has no place inside of 'x \$"):
        become("x ${sets}")
    with pytest.raises(
        UserError, match=r"\$\{round\} is not known; only \$\{workspace\} is; a file that has it is for"
    ):
        interpolate("${round}", {"workspace": "w"}, "f")


def test_the_small_recipe() -> None:
    pipeline, stages = load_pipeline(ROOT / "configs" / "local" / "rounds.yaml", ["workspace=/w", "safe_ppo.steps=7"])
    assert [entry.round for entry in pipeline.entries] == [None, *[1] * 5, *[2] * 5, *[3] * 5]
    by_name = {stage.name: stage.model_dump() for stage in stages}
    assert len(by_name) == 16
    for number in (1, 2, 3):
        before, own = f"/w/round_{number - 1}", f"/w/round_{number}"
        generate, label, cost, policy = (
            by_name[f"round_{number}/{s}"] for s in ("generate", "label", "cost", "policy")
        )
        assert generate["policies"] == [f"{before}/policy/final/policy", "/w/round_0/policy/final/policy"]
        assert generate["seed"] == number
        assert generate["prompts"] == [f"prompts:{[0.1, 1, 1][number - 1]}:/w/world/prompts/train.jsonl"]
        assert label["pairs"] == f"{own}/generate/final/pairs.jsonl"
        train = [f"PKU-SafeRLHF:1:/w/round_{k}/label/final/train.jsonl" for k in range(1, number + 1)]
        assert by_name[f"round_{number}/reward"]["train"] == train
        safety = [0.05, 1, 1][number - 1]
        assert cost["train"] == [spec.replace("RLHF:1:", f"RLHF:{safety}:") for spec in train]
        held_out = [f"PKU-SafeRLHF:1:{own}/label/final/test.jsonl"]
        assert policy["constraints"][0]["calibration"] == held_out == cost["eval"]
        assert policy["models"]["policy"] == f"{before}/policy/final/policy" and policy["steps"] == 7
        assert policy["constraints"][0]["model"] == f"{own}/cost/final/cost_model"
        assert policy["constraints"][0]["confidence"] == [None, None, 0.9][number - 1]


def test_the_recipe_without_new_labels() -> None:
    """Each round's reward model goes on from the one before, on the first pairs and this round's answers."""
    file = ROOT / "configs" / "local" / "rounds_metarm.yaml"
    _, stages = load_pipeline(file, ["workspace=/w", "rounds=2", "metarm.meta.order=joint"])
    by_name = {stage.name: stage.model_dump() for stage in stages}
    assert len(by_name) == 3 + 2 * 3 and not any(stage.stage == "label" for stage in stages)
    for number in (1, 2):
        before, own = f"/w/round_{number - 1}", f"/w/round_{number}"
        generate, reward, policy = (by_name[f"round_{number}/{s}"] for s in ("generate", "reward", "policy"))
        assert generate["policies"] == [f"{before}/policy/final/policy"]
        assert reward["model"] == f"{before}/reward/final/reward_model" and reward["meta"]["order"] == "joint"
        assert reward["train"] == by_name["round_0/reward"]["train"]
        assert [answers["path"] for answers in reward["meta"]["answers"]] == [f"{own}/generate/final/answers.jsonl"]
        assert policy["models"]["reward"] == f"{own}/reward/final/reward_model"
    kept = "safe_ppo.models.reward=${workspace}/round_0/reward/final/reward_model"
    _, stages = load_pipeline(file, ["workspace=/w", kept])
    rewards = [s.model_dump()["models"]["reward"] for s in stages if s.stage == "safe_ppo"]
    assert rewards == ["/w/round_0/reward/final/reward_model"] * 3


def test_after_the_rounds(rounds_file: Write, tmp_path: Path, stage_file: Write) -> None:
    """A stage behind the block knows all rounds; one before it none."""
    stage_file("sft", name="all-${previous_round}", train=["demonstrations:1:${workspace}/${rounds_so_far}.jsonl"])
    block = {"each_round": [{"config": "generate.yaml"}]}
    path = rounds_file(stages=[block, {"config": "sft.yaml"}])
    (tmp_path / "elsewhere").mkdir()
    _, stages = load_pipeline(path, ["workspace=/w"])
    assert stages[-1].name == "all-2"
    assert stages[-1].data_sets[0] == ["demonstrations:1:/w/1.jsonl", "demonstrations:1:/w/2.jsonl"]
    path = rounds_file(stages=[{"config": "sft.yaml"}, block])
    with pytest.raises(UserError, match=r"sft.yaml: \$\{previous_round\} is not known; only \$\{workspace\} is"):
        load_pipeline(path)


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"rounds": 3}, [], "by_round.share has 2 values for 3 rounds"),
        ({"rounds": 0}, [], "rounds: Input should be greater than or equal to 1, not 0"),
        ({"by_round": {"round": [1, 2]}}, [], "by_round: 'round' cannot be the name of a value"),
        ({"stages": [{"config": "generate.yaml"}]}, [], "rounds and by_round need an entry each_round"),
        ({"stages": [{}]}, [], "stages.0: an entry of stages is either config"),
        ({"stages": [{"each_round": [{"config": "a"}]}] * 2}, [], "stages has each_round twice"),
        ({"stages": [{"each_round": [{"config": "generate.yaml", "set": {"name": "g"}}]}]}, [], "two stages write to"),
        ({}, ["label.eval_fractoin=0.1"], "unknown key eval_fractoin; did you mean 'eval_fraction'"),
        ({"stages": [{"each_round": [{"config": "v${round}.yaml"}]}]}, [], "cannot read .*v1.yaml"),
        ({}, ["label.pairs=${rund}"], r"\$\{rund\} is not known; only \$\{workspace\} and \$\{round\} and"),
    ],
)
def test_one_line_for_wrong_rounds(
    rounds_file: Write, changes: dict[str, Any], overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_pipeline(rounds_file(**changes), overrides)


def test_overrides_for_files_of_rounds(rounds_file: Write, tmp_path: Path) -> None:
    path = rounds_file(stages=[{"each_round": [{"config": "v${round}.yaml", "set": {"name": "v${round}"}}]}])
    for number in (1, 2):
        shutil.copy(tmp_path / "generate.yaml", tmp_path / f"v{number}.yaml")
    _, stages = load_pipeline(path, ["v2.answers=9"])
    assert [stage.model_dump()["answers"] for stage in stages] == [4, 9]
    with pytest.raises(UserError, match=r"override v3.answers=9: no stage is called 'v3'; known: v1, v2"):
        load_pipeline(path, ["v3.answers=9"])


def test_submitted_with_the_files_of_all_rounds() -> None:
    file = ROOT / "configs" / "beaver-7b" / "rounds.yaml"
    command, files, _ = check_stages(file, ["workspace=/shared"])
    names = [path.name for path in files]
    assert command == "pipeline" and {"rounds.yaml", "generate.yaml", "paper-v1.yaml", "paper-v3.yaml"} <= set(names)
    assert len(names) == len(set(names))


def test_two_rounds_through_two_kills(
    rounds_file: Write,
    tmp_path: Path,
    tiny_world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed between blocks of answers in round 1 and while it labels in round 2; answers as if it had not been."""
    path = rounds_file()
    run_pipeline(path, [f"workspace={tmp_path}/whole", "rounds=1"])
    whole = (tmp_path / "whole/round_1/generate/final/answers.jsonl").read_bytes()
    assert len(whole.splitlines()) == 12 * 4

    monkeypatch.setattr("actors.stages.generate.BLOCK", 5)
    log, label = RunFolder.log, Label.run

    def killed(self: RunFolder, step: int, metrics: dict[str, float]) -> None:
        if step == 2:
            raise KeyboardInterrupt
        log(self, step, metrics)

    monkeypatch.setattr(RunFolder, "log", killed)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(path, [])
    monkeypatch.setattr(RunFolder, "log", log)
    generated = tmp_path / "w/round_1/generate"
    kept = sorted((generated / "answers").rglob("*.jsonl"))
    assert len(kept) == 2 and not (generated / "final").exists()
    times = [file.stat().st_mtime_ns for file in kept]
    with pytest.raises(UserError, match=r"generate holds a run that was broken off: go on with resume=true"):
        run_pipeline(path, [])

    def broken(self: Label, run: RunFolder) -> None:
        if "round_2" in self.name:
            raise KeyboardInterrupt
        label(self, run)

    monkeypatch.setattr(Label, "run", broken)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(path, ["resume=true"])
    assert [file.stat().st_mtime_ns for file in kept] == times, "answered anew"
    assert (generated / "final/answers.jsonl").read_bytes() == whole
    assert len((generated / "metrics.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "w/round_1/manifest.json").is_file() and not (tmp_path / "w/round_2/manifest.json").exists()
    monkeypatch.setattr(Label, "run", label)
    capsys.readouterr()
    run_pipeline(path, ["resume=true"])
    out = capsys.readouterr().out.splitlines()
    assert [line.endswith("is complete, skipped") for line in out if line.startswith("[")] == [True, True, True, False]

    manifests = [tmp_path / "w" / f"round_{number}" / "manifest.json" for number in (1, 2)]
    first, second = (RoundManifest.model_validate_json(file.read_bytes()) for file in manifests)
    assert first.previous is None
    assert second.previous == hashlib.sha256(manifests[0].read_bytes()).hexdigest()
    made, labelled = second.stages
    pairs = tmp_path / "w/round_2/generate/final/pairs.jsonl"
    digest = hashlib.sha256(pairs.read_bytes()).hexdigest()
    assert made.files["pairs.jsonl"].sha256 == digest == labelled.parents[str(pairs)]
    assert made.seed == 2 and set(made.parents) == {
        str(tiny_world / "model"),
        f"{tiny_world}/prompts/train.jsonl",
    }
    assert labelled.files["train.jsonl"].rows + labelled.files["test.jsonl"].rows == labelled.counts["pairs"]
    assert made.counts["answers"] == 24 * 4
    rows = read_rows(pairs)
    assert len(rows) == made.counts["pairs"] and {row["model_0"] for row in rows} == {str(tiny_world / "model")}
    # All of it is there: nothing is done again, and the manifests stay as they are.
    before = (tmp_path / "w/round_2/manifest.json").stat().st_mtime_ns
    run_pipeline(path, [])
    assert (tmp_path / "w/round_2/manifest.json").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "w/round_2/manifest.json").read_text())["round"] == 2
