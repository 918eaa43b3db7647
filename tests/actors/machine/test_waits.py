"""Waits on a real Ray: deadlines that say who was silent, errors that pass through, and no wait outside waits.py."""

from __future__ import annotations

import ast
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.machine import waits
from actors.machine.cluster import RayHandle
from actors.machine.handles import Group
from actors.machine.waits import WaitTimeoutError, fetch, wait_any
from beaver_ray.errors import UserError
from tests.actors.sleepers import Sleeper

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def sleepers() -> Iterator[list[Any]]:
    ray.init(address="local", num_cpus=2, log_to_driver=False, logging_level="ERROR")
    actor: Any = ray.remote(Sleeper)
    actors = [actor.options(name=f"sleeper-{i}", num_cpus=0.1).remote() for i in range(2)]
    fetch([a.sleep.remote(0.0) for a in actors], "the sleepers' start", 60)
    yield actors
    ray.shutdown()


def test_fetch_gives_values(sleepers: list[Any]) -> None:
    assert fetch(7, "a plain value", 0.0) == 7
    assert fetch([7, "a"], "plain values", 0.0) == [7, "a"]
    assert fetch(sleepers[0].sleep.remote(0.0), "an answer", 30) == 0.0
    assert fetch([a.sleep.remote(0.01) for a in sleepers], "two answers", 30) == [0.01, 0.01]


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """A file that is not there yet; what waits for it does not outlive its test."""
    yield tmp_path / "gate"
    (tmp_path / "gate").touch()


def test_fetch_at_its_deadline_names_who_was_silent_and_what_it_was_doing(sleepers: list[Any], gate: Path) -> None:
    answers = [sleepers[0].sleep.remote(0.0), sleepers[1].until.remote(str(gate))]
    with pytest.raises(WaitTimeoutError) as caught:
        fetch(answers, "policy (training)", 3.0)
    message = str(caught.value)
    assert "policy (training): 1 of 2 answers did not come within 3 s" in message
    assert "sleeper-1 (alive, node " in message and "was running" in message and "until for" in message
    assert "sleeper-0" not in message
    gate.touch()
    assert fetch(answers, "the same answers later", 30) == [0.0, str(gate)]


def test_what_is_served_meanwhile_takes_of_the_same_time(
    sleepers: list[Any], gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # To ask the cluster who was silent takes as long as its dashboard does.
    monkeypatch.setattr(waits, "describe", lambda refs: "silent")
    monkeypatch.setattr(waits, "_SECONDS_TO_COME", 0.1)

    def serve(references: list[Any], what: str, timeout_s: float) -> None:
        time.sleep(timeout_s)

    handle = RayHandle("sleeper-0", sleepers[0])
    group = Group("policy", [handle], 2.0, serve)
    started = time.monotonic()
    answer = handle.call(Sleeper.until, str(gate))
    with pytest.raises(WaitTimeoutError, match=r"policy \(training\): the answer did not come within 2 s; silent"):
        group.wait(answer, "training")
    assert time.monotonic() - started < 3.5
    gate.touch()
    assert fetch(answer, "the same answer later", 30) == str(gate)


def test_wait_any(sleepers: list[Any], gate: Path) -> None:
    slow, quick = sleepers[0].until.remote(str(gate)), sleepers[1].sleep.remote(0.0)
    assert wait_any([slow, quick], "generators", 30) == quick
    with pytest.raises(WaitTimeoutError, match=r"generators \(2 sequences\): none of 1 answers came within 0\.1 s"):
        wait_any([slow], "generators (2 sequences)", 0.1)
    assert wait_any([slow, "in this process"], "generators", 0.0) == "in this process"
    gate.touch()
    assert wait_any([slow], "generators", 30) == slow


def test_a_users_mistake_passes_through_and_a_bug_keeps_its_traceback(sleepers: list[Any]) -> None:
    with pytest.raises(UserError) as caught:
        fetch(sleepers[0].complain.remote(), "saving", 30)
    assert type(caught.value) is UserError and str(caught.value) == "the disk of /data is full: free some space"
    with pytest.raises(ZeroDivisionError, match="sleepers"):
        fetch(sleepers[0].fail.remote(), "saving", 30)


def test_a_group_waits_under_its_name(sleepers: list[Any]) -> None:
    handles = [RayHandle(f"critic-{i}", actor) for i, actor in enumerate(sleepers)]
    group = Group("critic", handles, timeout_s=0.1)
    with pytest.raises(WaitTimeoutError, match=r"critic \(sleep\): 2 of 2 answers"):
        group.run(Sleeper.sleep, 1.0)
    assert [group.next().name for _ in range(3)] == ["critic-0", "critic-1", "critic-0"]


def test_nothing_waits_outside_waits_py() -> None:
    found = []
    for folder in ("beaver_ray", "actors", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.relative_to(ROOT) != Path("actors/machine/waits.py"):
                found += [f"{path.relative_to(ROOT)}:{line}" for line in bare_waits(path.read_text(encoding="utf-8"))]
    assert found == []


def test_bare_waits_are_found() -> None:
    source = "import ray\nfrom ray import get\nray.get(r)\nray.wait([r])\nself.pg.wait(3)\ngroup.ready()\nd.get(1)\n"
    assert bare_waits(source) == [2, 3, 4, 5, 6]
    assert bare_waits("import ray\ngroup.wait(refs, 'training')\nroles.rollout.wait(c.sequences, 'evaluating')") == []


def bare_waits(source: str) -> list[int]:
    """Lines with ray.get or ray.wait, an import of either, or a placement group's wait(seconds) or ready().

    A `Group`'s own wait has two arguments: what to wait for and what it is doing. A child ``process`` is none of Ray's.
    """
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "ray":
            if {"get", "wait"} & {alias.name for alias in node.names}:
                lines.append(node.lineno)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, owner = node.func.attr, node.func.value
            of_ray = isinstance(owner, ast.Name) and owner.id == "ray" and name in ("get", "wait")
            of_a_process = isinstance(owner, ast.Name) and owner.id == "process"  # of the subprocess module
            few = name == "wait" and len(node.args) + len(node.keywords) < 2
            if of_ray or name == "ready" or (few and not of_a_process):
                lines.append(node.lineno)
    return sorted(lines)
