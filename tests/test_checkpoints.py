"""Checkpoints are complete or absent, whatever happens while one is written."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from beaver_ray.checkpoints import Checkpoints
from beaver_ray.errors import UserError


def write(checkpoints: Checkpoints, step: int) -> None:
    with checkpoints.writing(step, {"step": step}) as folder:
        (folder / "policy").mkdir()
        (folder / "policy" / "weights").write_bytes(bytes([step]) * 100)


def steps(checkpoints: Checkpoints) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints.complete()]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk on which nothing larger has room, as far as this process is concerned."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_the_newest_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.newest() is None
    for step in (8, 9, 10, 11):
        write(checkpoints, step)
    assert steps(checkpoints) == [10, 11]
    newest = checkpoints.newest()
    assert newest is not None and newest.state() == {"step": 11}
    assert (newest.folder / "policy" / "weights").read_bytes() == bytes([11]) * 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_11"]


def test_a_step_is_written_anew_after_a_rollback(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    write(checkpoints, 4)
    with checkpoints.writing(4, {"step": 4, "again": True}):
        pass
    newest = checkpoints.newest()
    assert newest is not None and newest.state() == {"step": 4, "again": True}
    assert [path.name for path in newest.folder.iterdir()] == ["state.json"]


def test_an_error_leaves_the_last_one_whole(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    write(checkpoints, 1)
    with pytest.raises(ZeroDivisionError), checkpoints.writing(2, {"step": 2}):
        raise ZeroDivisionError
    assert steps(checkpoints) == [1] and [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    write(checkpoints, 1)
    with (
        files_of_at_most(50),
        pytest.raises(UserError, match=r"cannot write the checkpoint of step 2 .*File too large; free some space"),
    ):
        write(checkpoints, 2)
    assert steps(checkpoints) == [1] and [path.name for path in tmp_path.iterdir()] == ["step_1"]


@pytest.mark.parametrize("moment", ["filling", "before the rename", "pruning"])
def test_a_writer_that_is_killed_leaves_whole_ones_only(tmp_path: Path, moment: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    write(checkpoints, 1)
    child = os.fork()
    if child == 0:
        try:
            if moment == "before the rename":
                Path.rename = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
            if moment == "pruning":
                # The folder of step 1 is about to be deleted.
                os.unlink = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
            with checkpoints.writing(2, {"step": 2}) as folder:
                (folder / "half").write_text("a")
                if moment == "filling":
                    os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)  # whatever happens, the tests go on in the parent alone
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert steps(checkpoints) == ([2] if moment == "pruning" else [1])
    write(checkpoints, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step_3"]
