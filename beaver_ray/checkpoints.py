"""Checkpoints of a run: complete or absent, never half.

checkpoints/step_N/    everything that the run goes on from after step N; state.json is the driver's part
checkpoints/step_N.part/    one that is being written, or was when its writer died; never read
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beaver_ray.errors import UserError

STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its step and its folder."""

    step: int
    folder: Path

    def state(self) -> dict[str, Any]:
        """The driver's state, from state.json."""
        state: dict[str, Any] = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        return state


class Checkpoints:
    """The checkpoints in ``folder``, of which the newest ``keep`` stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def complete(self) -> list[Checkpoint]:
        """All complete checkpoints, oldest first."""
        found = []
        for path in self.folder.glob("step_*"):
            number = path.name.removeprefix("step_")
            if number.isdigit() and (path / STATE).is_file():
                found.append(Checkpoint(int(number), path))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint; None where there is none."""
        return next(reversed(self.complete()), None)

    @contextmanager
    def writing(self, step: int, state: dict[str, Any]) -> Iterator[Path]:
        """A folder to fill; what is in it when the block ends becomes the checkpoint of ``step``.

        An error in the block, or in writing, leaves all earlier checkpoints as they were. Raises UserError where the
        disk is full or cannot be written.
        """
        part, whole = self.folder / f"step_{step}.part", self.folder / f"step_{step}"
        try:
            for leftover in self.folder.glob("step_*.part"):
                shutil.rmtree(leftover)
            part.mkdir(parents=True)
            yield part
            (part / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
            for path in [*part.rglob("*"), part]:
                _to_disk(path)
            if whole.exists():  # of a time before a rollback
                _remove(whole)
            part.rename(whole)
            _to_disk(self.folder)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise UserError(
                f"cannot write the checkpoint of step {step} to {self.folder}: {error.strerror or error}; "
                f"free some space and go on with resume=true"
            ) from None
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        for old in self.complete()[: -self.keep]:
            _remove(old.folder)


def _remove(folder: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that a half-deleted one is never taken for complete."""
    going = folder.with_name(f"{folder.name}.old.part")
    folder.rename(going)
    shutil.rmtree(going)


def _to_disk(path: Path) -> None:
    """fsync, since a rename may reach the disk before what was written earlier."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
