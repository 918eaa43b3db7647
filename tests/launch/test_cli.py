from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.machine.waits import WorkerDiedError
from beaver_ray.runs import RunFolder
from beaver_ray.stage import Stage
from beaver_ray.yaml_files import save_config
from launch.__main__ import main
from launch.config_files import load_config, parse_config
from tests.actors.support import ppo_config

StageFile = Callable[..., Path]
HEAVY = ("torch", "ray", "vllm", "transformers", "deepspeed", "pandas", "matplotlib", "numpy", "rich", "pyarrow")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, captured.out, captured.err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom launch.__main__ import main\ntry:\n    main(['train', '--help'])\n"
        f"finally:\n    print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("[]\n")


def test_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "launch"], capture_output=True, text=True)
    assert done.returncode == 0 and "pipeline" in done.stdout
    done = subprocess.run([sys.executable, "-m", "launch", "train", "no.yaml"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: cannot read no.yaml: No such file or directory\n"


def test_places_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (prompts := tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    for option, path, problem in (
        ("--json", tmp_path, "it is a folder"),
        ("--page", prompts / "page.html", "File exists"),
        ("--json", tmp_path / ("x" * 300), "File name too long"),
    ):
        code, _, err = run(capsys, "data", f"prompts:1:{prompts}", option, path)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and problem in err


def test_letters_that_a_terminal_does_not_have(tmp_path: Path) -> None:
    """A table with a letter outside Latin-1 and half a character, and the file that is written after it."""
    rows = [{"prompt": "a", "category": "\u6bd2"}, {"prompt": "b", "category": "\ud83d"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["data", f"prompts:1:{tmp_path / 'p.jsonl'}", "--json", str(tmp_path / "found.json")]
    for encoding in ("latin-1", "utf-8"):
        done = subprocess.run(
            [sys.executable, "-m", "launch", *command],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": encoding},
        )
        assert (done.returncode, done.stderr) == (0, b"") and rb"\ud83d" in done.stdout
        assert set(json.loads((tmp_path / "found.json").read_text())["categories"]) == {"\u6bd2", "\ud83d"}


def test_home_behind_an_equals_sign(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (prompts := tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    assert run(capsys, "data", f"prompts:1:{prompts}", "--json=~/found.json")[0] == 0
    assert (tmp_path / "found.json").is_file() and not Path("~").exists()


def test_a_death_is_one_line_and_a_bug_keeps_its_traceback(
    stage_file: StageFile, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    died = WorkerDiedError("rollout (exchange): its process died: the actor is dead\n\tpid: 7\nout of memory")
    broken = WorkerDiedError(
        "start of reward: its process died: an error raised in its creation task, ZeroDivisionError"
    )
    errors = [died, broken]

    def fail(stage: Stage) -> None:
        raise errors.pop(0)

    monkeypatch.setattr("launch.pipeline.run_stage", fail)
    said = "rollout (exchange): its process died: the actor is dead pid: 7 out of memory"
    code, _, err = run(capsys, "train", stage_file())
    assert (code, err) == (1, f"error: {said}; run it again, a stage with resume=true\n")
    with pytest.raises(WorkerDiedError, match="ZeroDivisionError"):
        main(["train", str(stage_file())])


def test_ctrl_c_is_said(tmp_path: Path) -> None:
    os.mkfifo(file := tmp_path / "never.yaml")
    command = [sys.executable, "-m", "launch", "train", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with file.open("w"):  # once the command waits for its text
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert process.stderr and process.stderr.read() == "error: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "'trian'"),
        (["train"], "Missing argument 'CONFIG'"),
        (["train", "FILE", "--fast"], "--fast"),
        (["train", "no.yaml"], "cannot read no.yaml"),
        (["train", "FILE", "rollout.temprature=1"], "did you mean 'temperature'?"),
        (["train", "FILE", "temperature"], "must look like key=value"),
        (["train", "FILE", "steps=0"], "steps: Input should be greater than 0, not 0"),
        (["train", "FILE", "rollout.temperature=.nan"], "finite"),
        (["train", "FILE", "stage=dpa"], "stage must be one of"),
        (["train", "FILE", "models.policy=/nowhere/at/all"], "no model in '/nowhere/at/all'"),
        (["train", "FILE", "rollout.max_new_tokens=500"], "64 positions"),
        (["train", "FILE", "constraints.harm.violation_rate=0.1"], "either limit or violation_rate"),
        (
            ["plan", "FILE", "cluster.placement.policy.gpus=1000"],
            "a process of policy uses one GPU; write workers: 1000, gpus: 1",
        ),
        (["plan", "FILE", "engine.micro_batch_tokens=1"], "less than the longest sequence"),
        (["evaluate", "FILE"], "evaluation.prompts is empty"),
        (["evaluate", "FILE", "evaluation.prompts=[p]"], "train it first, or give --policy FOLDER"),
        (["evaluate", "FILE", "evaluation.prompts=[p]", "--policy", "/gone"], "no model in /gone"),
        (["evaluate", "FILE", "--answers", "4"], "--answers and --prompts go with --certify"),
        (["evaluate", "FILE", "--prompts", "prompts:1:p.jsonl"], "--answers and --prompts go with --certify"),
        (["evaluate", "FILE", "--certify", "95"], "--certify 95 must be a confidence of at least 0.5 and below 1"),
        (["evaluate", "FILE", "--certify", "0.9", "--labels", "l.jsonl"], "give one of them"),
        (
            ["evaluate", "FILE", "--certify", "0.9"],
            "prompts is empty; name prompts there, or give --prompts",
        ),
        (["evaluate", "FILE", "--certify", "0.9", "constraints.harm.form=hinge"], "form hinge, and a certificate"),
        (["evaluate", "FILE", "--certify", "0.9", "--prompts", "p"], "train it first, or give --policy FOLDER"),
        (["evaluate", "FILE", "--labels", "l.jsonl"], "train it first, or give --policy FOLDER"),
        (["feasibility", "FILE", "--answers", "1"], "--answers"),
        (["feasibility", "FILE", "ppo.kl_coefficient=0"], "ppo.kl_coefficient is 0"),
        (["feasibility", "FILE", "models.policy=/gone"], "no model in '/gone'"),
        (["train", "FILE", "name=../elsewhere"], "'../elsewhere' is no folder inside of workspace"),
        (["pipeline", "FILE"], "is one stage and no pipeline: beaver-ray train"),
        (["chat", "m", "--moderation", "n", "--temperature", "0"], "--temperature 0 draws the same answer each time"),
        (["report", "/nowhere"], "no run in /nowhere"),
        (["options", "sfd"], "no stage is called 'sfd'; known: "),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, stage_file: StageFile, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stage_file()
    code, _, err = run(capsys, *(path if a == "FILE" else a for a in arguments))
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (path.parent / "runs").exists()


def test_a_run_is_no_policy(stage_file: StageFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (policy := tmp_path / "sft" / "final" / "policy").mkdir(parents=True)
    (policy / "config.json").write_text("{}")
    arguments = ["evaluate", stage_file(), "evaluation.prompts=[p]", "--policy", tmp_path / "sft"]
    assert f"it is a run's folder, give --policy {policy}\n" in run(capsys, *arguments)[2]


def test_supervised_stages_are_not_evaluated(stage_file: StageFile, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--certify", "0.9"], ["--labels", "l.jsonl"]):
        code, _, err = run(capsys, "evaluate", stage_file("sft"), *more)
        assert code == 2 and "stage sft trains no policy on prompts" in err


def test_supervised_stages_have_no_limits(stage_file: StageFile, capsys: pytest.CaptureFixture[str]) -> None:
    assert "stage sft trains no policy under limits" in run(capsys, "feasibility", stage_file("sft"))[2]


def test_feasibility(tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table and a verdict; 0 where the limits can be kept, 1 where they cannot, which is an answer too."""
    path = tmp_path / "tiny.yaml"
    save_config(ppo_config(tiny_world, workspace=str(tmp_path / "runs")), path)
    loose = ["constraints.harm.limit=50", "--samples", 6, "--answers", 3, "--out", tmp_path / "found"]
    code, out, err = run(capsys, "feasibility", path, *loose)
    assert code == 0 and err == "" and "the limits can be kept near the reference: reward" in out
    for word in ("as sampled", "multiplier", "lowest of a run", "18 answers", f"{tmp_path / 'found'}/feasibility.html"):
        assert word in out
    assert json.loads((tmp_path / "found" / "feasibility.json").read_text())["samples"] == 18
    code, out, err = run(capsys, "feasibility", path, "constraints.harm.limit=-50", "--samples", 6, "--answers", 3)
    assert code == 1 and err == ""
    assert "no policy near the reference keeps this limit: harm <= -50, the lowest reachable is" in out
    assert (tmp_path / "runs" / "safe_ppo-feasibility" / "feasibility.html").is_file()


def test_other_errors_keep_their_traceback(stage_file: StageFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("launch.planning.find_resources", broken)
    with pytest.raises(ZeroDivisionError):
        main(["plan", str(stage_file())])


def test_plan(tiny_world: Path, stage_file: StageFile, capsys: pytest.CaptureFixture[str]) -> None:
    models = {"policy": str(tiny_world / "model"), "reward": str(tiny_world / "reward_model")}
    costs = [{"name": "harm", "model": str(tiny_world / "cost_model"), "limit": 0.0}]
    path = stage_file(models=models, constraints=costs)
    code, out, err = run(capsys, "plan", path, "cluster.placement.policy.workers=2")
    assert code == 0 and err == ""
    for word in ("Plan for this machine", "rollout", "cost-harm", "critic-harm", "experience", "k "):
        assert word in out
    assert "multiplier.initial" not in out
    assert (
        "multiplier.initial auto (harm): 8 answers to each of up to 128 prompts"
        in run(capsys, "plan", path, "constraints.harm.multiplier.initial=auto")[1]
    )
    # The table, and what is wrong with it.
    code, out, err = run(capsys, "plan", path, "rollout.max_new_tokens=500")
    assert code == 2 and "rollout" in out and "512 positions" in err
    code, out, err = run(capsys, "plan", path, f"models.reward={tiny_world / 'cost_model'}")
    assert code == 2 and "is a cost model; give the folder of a reward model" in err


def test_no_cluster_where_it_should_be(
    stage_file: StageFile, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    code, _, err = run(capsys, "plan", stage_file())
    assert code == 2 and err.count("\n") == 1 and "no Ray cluster answers at 127.0.0.1:1 (RAY_ADDRESS)" in err


def test_report(stage_file: StageFile, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(load_config(stage_file("sft"))) as folder:
        folder.log(1, {"loss": 1.0})
    code, out, _ = run(capsys, "report", folder.folder)
    assert code == 0 and out == f"report: {folder.folder / 'report.html'}\n"
    assert (folder.folder / "report.html").is_file()


def test_a_report_of_a_copy_is_of_the_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the run's own folder is gone, or is named by a working directory that is another one now."""
    tree = {"stage": "multiple_choice", "workspace": str(tmp_path), "name": "one", "policy": "p"}
    config = parse_config(tree | {"questions": {"q": "q.json"}}, [], "f.yaml")
    with RunFolder(config) as folder:
        folder.log(1, {"loss": 1.0})
        folder.final.mkdir()
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    for name, mean in (("one", 0.25), ("copy", 0.75)):
        figures = {"q/mc1": {"mean": mean, "low": 0.0, "high": 1.0, "n": 4}}
        (tmp_path / name / "final" / "multiple_choice.json").write_text(json.dumps(figures))
        assert run(capsys, "report", tmp_path / name)[0] == 0
        assert f"{mean:.1%}" in (tmp_path / name / "report.html").read_text()


def test_a_second_run_of_one_name(stage_file: StageFile, capsys: pytest.CaptureFixture[str]) -> None:
    path = stage_file("sft")
    with RunFolder(load_config(path)) as folder:
        folder.log(1, {"loss": 1.0})
    code, _, err = run(capsys, "train", path)
    assert code == 2 and "was started" in err
    assert json.loads((folder.folder / "metrics.jsonl").read_text())["loss"] == 1.0


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "options", "safe_ppo")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0
    assert lines["rollout.samples_per_prompt"].endswith("Answers for each prompt. [integer, default 1]")
    assert lines["constraints.NAME.limit"].endswith("[number or null, default null]")
    assert lines["models.policy"].endswith("[text, required]")
    assert lines["steps"].endswith("[integer or null, default null]")
    assert lines["constraints.NAME.multiplier.initial"].endswith("[number or auto or null, default null]")
    assert lines["debug"].endswith("[true or false, default false]")
    assert "[none | wandb | tensorboard, default none]" in lines["tracker"]
    for stage in ("sft", "pipeline"):
        assert run(capsys, "options", stage)[0] == 0
