"""A synchronous run on a real Ray with real vLLM that was killed and resumed is the uninterrupted run, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.actors.driver.test_resume import assert_same
from tests.tiny_ppo import build_workspace, write_stage

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(stage: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """`beaver-ray train` in a process of its own."""
    command = [sys.executable, "-m", "launch", "train", str(stage), *overrides]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True)


@pytest.mark.timeout(900)
def test_a_killed_and_resumed_run_is_the_whole_run(tmp_path: Path) -> None:
    build_workspace(tmp_path)
    constraint = {"name": "harm", "model": "${workspace}/harm", "limit": 0.0, "multiplier": {"initial": 1.0}}
    models = {"policy": "${workspace}/world/model", "reward": "${workspace}/reward", "shared_critic": True}
    changes = {"constraints": [constraint], "models": models, "steps": 5, "save_every": 2}
    whole, cut = (write_stage(tmp_path, name=name, **changes) for name in ("whole", "cut"))
    assert start(whole).wait() == 0
    run = start(cut)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 3:
        assert run.poll() is None
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)  # the driver, and every process of its cluster
    run.wait()
    assert start(cut, "resume=true").wait() == 0
    assert "resumed after step" in (tmp_path / "cut" / "notes.log").read_text()
    assert_same(tmp_path / "whole", tmp_path / "cut")
