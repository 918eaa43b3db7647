"""When deaths end a run: of one process three times, with no new step in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.recovery import Recovery
from actors.waits import WorkerDiedError
from beaver_ray.runs import RunFolder
from tests.actors.support import ppo_config


def test_only_new_steps_are_progress(tiny_world: Path, tmp_path: Path) -> None:
    death = WorkerDiedError("out of memory")
    nothing: Any = None
    with RunFolder(ppo_config(tiny_world, workspace=str(tmp_path))) as run:
        recovery = Recovery(nothing, nothing, nothing, run, None)
        run.log(1, {})
        recovery._count(["policy"], death)
        recovery._count(["policy"], death)
        run.log(2, {})
        recovery._count(["policy"], death)
        recovery._count(["reward"], death)
        run.rewind(0)
        run.log(1, {})
        run.log(2, {})
        recovery._count(["policy"], death)
        with pytest.raises(RuntimeError, match="policy died 3 times with no new step in between: out of memory"):
            recovery._count(["policy"], death)
