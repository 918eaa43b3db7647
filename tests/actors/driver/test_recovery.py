"""What is done about deaths, and when they end a run: of one process three times, with no new step in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from actors.driver.recovery import Recovery
from actors.machine.waits import WorkerDiedError
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


class Mending(Recovery):
    """``stateless``: who is found dead and restarted at each attempt; ``ranks``: those that are dead all the while."""

    def __init__(self, run: RunFolder, stateless: list[list[str]], ranks: Sequence[str] = ()) -> None:
        super().__init__(*[cast(Any, None)] * 3, run, None)
        self.stateless, self.ranks = stateless, list(ranks)
        self.rollouts = cast(Any, SimpleNamespace(renew=lambda: False))

    def _trained(self) -> dict[str, Any]:
        return {}

    def _dead(self, groups: Any) -> list[str]:
        return self.ranks

    def _restart_stateless(self, error: WorkerDiedError) -> list[str]:
        return self.stateless.pop(0)


def dying(times: int, asked: list[bool]) -> Callable[[bool], str]:
    """An action in which something dies so many times before it returns."""

    def action(again: bool) -> str:
        asked.append(again)
        if len(asked) <= times:
            raise WorkerDiedError("killed")
        return "done"

    return action


def test_an_action_goes_on_as_long_as_what_dies_can_be_had_again(tiny_world: Path, tmp_path: Path) -> None:
    with RunFolder(ppo_config(tiny_world, workspace=str(tmp_path))) as run:
        asked: list[bool] = []
        assert Mending(run, [["reward"], ["cost"]]).survive(dying(2, asked)) == "done"
        assert asked == [False, True, True]
        # Whatever it was, it is tried once more; then the run has to go back.
        with pytest.raises(WorkerDiedError, match="killed"):
            Mending(run, [[]]).survive(dying(2, []))
        # A rank's death matters as long as there is something to train.
        with pytest.raises(WorkerDiedError, match="killed"):
            Mending(run, [["reward"]], ["policy-1"]).survive(dying(1, []))
        assert Mending(run, [["reward"]], ["policy-1"]).survive(dying(1, []), needs_trained=False) == "done"
        with pytest.raises(RuntimeError, match="reward died 3 times"):
            Mending(run, [["reward"]] * 9).survive(dying(9, []))
