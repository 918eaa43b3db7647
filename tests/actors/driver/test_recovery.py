"""What is done about deaths, and when they end a run: of one process three times, with no new step in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from actors.driver.recovery import Recovery
from actors.machine.handles import Group
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


class Processes:
    """A cluster of the workers ``reward``, ``cost`` and ``policy``.

    ``stateless``: who is found dead at each look, ``ranks``: those that are dead all the while. With ``starts`` False
    whatever is restarted dies of its start.
    """

    def __init__(self, stateless: list[list[str]], ranks: Sequence[str] = (), starts: bool = True) -> None:
        self.stateless, self.ranks, self.starts = stateless, list(ranks), starts
        self.restarted: list[str] = []

    def dead(self, groups: list[Group]) -> list[Any]:
        trained = [group.name for group in groups] == ["policy"]
        return [SimpleNamespace(name=name) for name in (self.ranks if trained else self.stateless.pop(0))]

    def restart(self, group: Group, workers: list[Any]) -> None:
        self.restarted += [worker.name for worker in workers]

    def wait_started(self, groups: list[Group]) -> None:
        if not self.starts and any(group.workers for group in groups):
            raise WorkerDiedError("start of reward: CUDA out of memory")


def mending(run: RunFolder, processes: Processes) -> Recovery:
    names = ("reward", "cost", "judge", "policy", "reference", "experience")
    group = {name: Group(name, [SimpleNamespace(name=name)], 1.0) for name in names}
    scorers = {"reward": group["reward"], "cost": group["cost"]}
    others = {name: group[name] for name in ("policy", "reference", "experience")}
    judges = {"judge": group["judge"]}
    roles: Any = SimpleNamespace(scorers=scorers, judges=judges, critics={}, calibrations=[], direct=False, **others)
    rollouts: Any = SimpleNamespace(renew=lambda: False, paused=False)
    state: Any = SimpleNamespace(step=0)
    return Recovery(state, roles, rollouts, run, cast(Any, processes))


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
        processes = Processes([["reward"], ["cost"], ["judge"]])
        assert mending(run, processes).survive(dying(3, asked)) == "done"
        assert asked == [False, True, True, True] and processes.restarted == ["reward", "cost", "judge"]
        # Whatever it was, it is tried once more; then the run has to go back.
        with pytest.raises(WorkerDiedError, match="killed"):
            mending(run, Processes([[]])).survive(dying(2, []))
        # A rank's death matters as long as there is something to train.
        with pytest.raises(WorkerDiedError, match="killed"):
            mending(run, Processes([["reward"]], ["policy-1"])).survive(dying(1, []))
        late = mending(run, Processes([["reward"]], ["policy-1"]))
        assert late.survive(dying(1, []), needs_trained=False) == "done"
        with pytest.raises(RuntimeError, match="reward died 3 times"):
            mending(run, Processes([["reward"]] * 9)).survive(dying(9, []))


def test_what_cannot_start_again_ends_the_run(tiny_world: Path, tmp_path: Path) -> None:
    """In the middle of an action and in a rollback: it is started twice, and dies a third time."""
    with RunFolder(ppo_config(tiny_world, workspace=str(tmp_path))) as run:
        ends = "reward died 3 times with no new step in between: start of reward: CUDA out of memory"
        one, other = (Processes([["reward"]] * 9, starts=False) for _ in range(2))
        with pytest.raises(RuntimeError, match=ends):
            mending(run, one).survive(dying(9, []))
        with pytest.raises(RuntimeError, match=ends):
            mending(run, other).keep_going(lambda: cast(None, dying(9, [])(False)))
        assert one.restarted == other.restarted == ["reward", "reward"]


def test_a_rollback_counts_whoever_died_once(tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.driver.recovery.connect", lambda groups: None)
    monkeypatch.setattr(Recovery, "_restore", lambda self, checkpoint: None)
    with RunFolder(ppo_config(tiny_world, workspace=str(tmp_path))) as run:
        for stateless, ranks, counts in (
            ([], ["policy-1"], {"policy-1": 1}),
            (["reward"], [], {"reward": 1}),
            (["reward"], ["policy-1"], {"reward": 1, "policy-1": 1}),
            ([], [], {"a process": 1}),
        ):
            recovery = mending(run, Processes([stateless], ranks))
            recovery._roll_back(WorkerDiedError("killed"))
            assert dict(recovery.failures) == counts


def test_nothing_is_generated_while_a_checkpoint_is_restored(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunFolder(ppo_config(tiny_world, workspace=str(tmp_path))) as run:
        recovery, paused = mending(run, Processes([])), []
        monkeypatch.setattr(run, "last_checkpoint", lambda: "step_3")
        monkeypatch.setattr(recovery, "_restore", lambda checkpoint: paused.append(recovery.rollouts.paused))
        recovery.resume()
        assert paused == [True] and not recovery.rollouts.paused
