"""What `beaver-ray submit` sends, and what it refuses before it sends anything."""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobDetails, JobType

from beaver_ray.errors import UserError
from launch.submit import EXCLUDES, MIB, check_size, exit_code, passed_variables, shipped_files
from tests.launch.test_cli import run
from tests.launch.test_job_submit import free_ports

StageFile = Callable[..., Path]


@pytest.fixture
def config(checkout: Path, stage_file: StageFile) -> Iterator[Path]:
    """A stage's file inside of the checkout."""
    path = checkout / "configs" / "mine.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(stage_file().read_text())
    yield path
    path.unlink()


@pytest.fixture(autouse=True)
def same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets a variable; it is put back."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["workspace=runs"], "workspace 'runs' must be an absolute folder that all nodes see; add workspace=/..."),
        (["rollout.temprature=1"], "did you mean 'temperature'?"),
        (["--env", "NOT_SET_ANYWHERE"], "--env NOT_SET_ANYWHERE: no such variable is set here"),
        (["--address", "localhost:8265"], "must be a dashboard's address like http://HOST:8265"),
        (["--address", "http://127.0.0.1:PORT"], "no Ray cluster answers at http://127.0.0.1:"),
        (["--address", "http://no-such-host.invalid:8265"], "no Ray cluster answers at http://no-such-host.invalid"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (port,) = free_ports(1)
    code, out, err = run(capsys, "submit", config, *(a.replace("PORT", str(port)) for a in arguments))
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_something_else_that_answers(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        code, _, err = run(capsys, "submit", config, "--address", address)
    finally:
        server.shutdown()
    assert code == 2 and err.splitlines()[-1].startswith(f"error: no Ray cluster answers at {address}")


def test_a_config_outside_of_a_checkout(stage_file: StageFile, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "submit", stage_file())
    assert code == 2 and "lies in no checkout of Beaver on Ray" in err


def test_a_config_that_would_not_be_sent(checkout: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hidden = checkout / "runs" / "mine.yaml"
    hidden.parent.mkdir(exist_ok=True)
    hidden.write_text(config.read_text())
    code, _, err = run(capsys, "submit", hidden)
    hidden.unlink()
    assert code == 2 and f"{hidden} would not be sent" in err


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("models.policy", "{}"),
        ("data.prompts", "[{{path: {}, prompt: q}}]"),
        ("constraints.harm.calibration", "['PKU-SafeRLHF:1:{}']"),
        ("evaluation.world", "{}/config.json"),
        ("data.prompts", "['prompts:1:{}/config.json#q']"),
    ],
)
def test_models_and_data_that_would_not_be_sent(
    key: str, entry: str, checkout: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (port,) = free_ports(1)
    for folder, said in (("runs/m", "one: runs/m"), ("kept/m", "no Ray cluster answers")):
        (checkout / folder).mkdir(parents=True)
        (checkout / folder / "config.json").write_text("{}")
        address = ("--address", f"http://127.0.0.1:{port}")
        code, _, err = run(capsys, "submit", config, f"{key}={entry.format(folder)}", *address)
        assert code == 2 and said in err and (folder == "kept/m") != ("would not be sent" in err)
        shutil.rmtree(checkout / folder)


def test_a_pipeline_with_a_stage_elsewhere(
    checkout: Path, stage_file: StageFile, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = checkout / "configs" / "pipeline.yaml"
    pipeline.parent.mkdir(exist_ok=True)
    pipeline.write_text(f"workspace: /shared\nstages: [{{config: {stage_file('sft')}}}]\n")
    code, _, err = run(capsys, "submit", pipeline)
    pipeline.unlink()
    assert code == 2 and "sft.yaml lies in no checkout" in err


def test_a_checkout_that_is_too_large(checkout: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = checkout / "data" / "rows.jsonl"
    large.parent.mkdir()
    with large.open("wb") as stream:
        stream.truncate(101 * MIB)  # sparse: it takes no disk
    code, _, err = run(capsys, "submit", config)
    assert code == 2 and err.count("\n") == 1
    assert "too large to send: 10" in err and "at most 100; largest: data/ 101.0 MiB, " in err
    (checkout / ".gitignore").write_text("/data/\n")
    (port,) = free_ports(1)
    code, _, err = run(capsys, "submit", config, "--address", f"http://127.0.0.1:{port}")
    (checkout / ".gitignore").unlink()
    large.unlink()
    large.parent.rmdir()
    assert code == 2 and "no Ray cluster answers" in err


def test_the_three_largest_are_named() -> None:
    sizes = {"a/1": 3 * MIB, "a/b/2": 4 * MIB, "c": 2 * MIB, "d/3": 5 * MIB, "e": MIB // 2}
    check_size(Path("here"), sizes, most=sum(sizes.values()))
    with pytest.raises(UserError, match=r"14\.5 MiB, at most 14; largest: a/ 7\.0 MiB, d/ 5\.0 MiB, c 2\.0 MiB\. "):
        check_size(Path("here"), sizes, most=14 * MIB)


def test_what_is_measured_is_what_ray_sends(checkout: Path, config: Path, tmp_path: Path) -> None:
    left_out = [".git/config", ".venv/bin/python", "runs/a/metrics.jsonl", "actors/__pycache__/x.pyc", "build/x"]
    left_out += ["beaver_ray.egg-info/PKG-INFO", "secret.txt", "deep/er/notes.log"]
    for name in [*left_out, "deep/er/kept.txt"]:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(name)
    (checkout / ".gitignore").write_text("/secret.txt\n*.log\n")
    sizes = shipped_files(checkout)
    package = tmp_path / "package.zip"
    create_package(str(checkout), package, include_gitignore=True, excludes=EXCLUDES)
    with zipfile.ZipFile(package) as archive:
        sent = {entry.filename: entry.file_size for entry in archive.infolist() if not entry.is_dir()}
    assert sizes == sent
    assert {"launch/__main__.py", "configs/mine.yaml", "deep/er/kept.txt"} <= set(sizes)
    assert not set(left_out) & set(sizes)
    for name in [*left_out, "deep/er/kept.txt", ".gitignore"]:
        (checkout / name).unlink()


def test_secrets_travel_only_where_somebody_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("BEAVER_RAY_SCORE_CODE", "/shared/rules")
    assert passed_variables([]) == {"HF_HUB_OFFLINE": "1", "BEAVER_RAY_SCORE_CODE": "/shared/rules"}
    monkeypatch.delenv("BEAVER_RAY_SCORE_CODE")
    assert passed_variables(["WANDB_API_KEY"]) == {"HF_HUB_OFFLINE": "1", "WANDB_API_KEY": "secret"}


@pytest.mark.parametrize(
    ("status", "driver", "code", "said"),
    [
        ("SUCCEEDED", 0, 0, ""),
        ("FAILED", 3, 3, "job tiny failed\n"),
        ("FAILED", None, 1, "job tiny failed: it broke\n"),
        ("FAILED", -9, 1, "job tiny failed\n"),
        ("STOPPED", None, 1, "job tiny was stopped: it broke\n"),
    ],
)
def test_exit_codes(status: str, driver: int | None, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    details = JobDetails(
        type=JobType.SUBMISSION,
        submission_id="tiny",
        status=status,
        entrypoint="x",
        message="Traceback:\n  it broke\n",
        driver_exit_code=driver,
    )
    assert exit_code(details) == code
    assert capsys.readouterr().err == said


def test_help_says_what_the_variables_are(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "submit", "--help")
    assert code == 0 and "RAY_API_SERVER_ADDRESS" in out and "--no-wait" in out


def test_the_address_of_a_cluster_does_not_hide_the_one_given(config: Path) -> None:
    # Ray prefers RAY_ADDRESS to what it is told.
    (port,) = free_ports(1)
    done = subprocess.run(
        [sys.executable, "-m", "launch", "submit", str(config), "--address", f"http://127.0.0.1:{port}"],
        env=os.environ | {"RAY_ADDRESS": "127.0.0.1:1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and f"no Ray cluster answers at http://127.0.0.1:{port}" in done.stderr
