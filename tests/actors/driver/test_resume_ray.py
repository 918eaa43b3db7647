"""A synchronous run on a real Ray with real vLLM that was killed and resumed is the uninterrupted run, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.actors.driver.test_resume import assert_same
from tests.tiny_ppo import build_workspace, write_stage

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@contextmanager
def started(stage: Path, *overrides: str) -> Iterator[subprocess.Popen[bytes]]:
    """`beaver-ray train` in a process of its own, of which nothing is left behind."""
    command = [sys.executable, "-m", "launch", "train", str(stage), *overrides]
    run = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True)
    try:
        yield run
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)  # the driver, and every process of its cluster
        run.wait()


@pytest.mark.timeout(900)
def test_a_killed_and_resumed_run_is_the_whole_run(tmp_path: Path) -> None:
    """What a kill would leave is what the folder holds while all of the run's processes stand still."""
    build_workspace(tmp_path)
    constraint = {"name": "harm", "model": "${workspace}/harm", "limit": 0.0, "multiplier": {"initial": 1.0}}
    models = {"policy": "${workspace}/world/model", "reward": "${workspace}/reward", "shared_critic": True}
    stage = write_stage(tmp_path, constraints=[constraint], models=models, steps=5, save_every=2)
    folder, cut, whole = (tmp_path / name for name in ("run", "cut", "whole"))
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 400
    with started(stage) as run:
        while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 3:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGSTOP)
        shutil.copytree(folder, cut)
        os.killpg(run.pid, signal.SIGCONT)
        assert run.wait(400) == 0
    folder.rename(whole)
    cut.rename(folder)
    with started(stage, "resume=true") as run:
        assert run.wait(400) == 0
    assert "resumed after step" in (folder / "notes.log").read_text()
    assert_same(whole, folder)
