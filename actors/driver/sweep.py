"""Runs of a sweep side by side: the driver of each is a Ray actor, and so are its roles."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray

from actors.driver.processes import open_cluster
from actors.driver.train import train
from actors.machine.bundles import Bundle
from actors.machine.waits import fetch, wait_any
from beaver_ray.errors import UserError, last_line
from beaver_ray.gpus import on_this_machine
from beaver_ray.report.page import write_report
from beaver_ray.stage import Stage

LONGEST = 1e7
"""Seconds that a run may take: its own waits have the deadlines."""
DRIVER = "driver of "
"""Before a run's name, the name of its driver."""


def run_side_by_side(stages: Sequence[Stage]) -> Iterator[tuple[Stage, UserError | None]]:
    """Run the stages, as many at a time as the cluster has room for; each as it ends, with what ended it early.

    No run ends the others: what is no UserError has its traceback printed, and is one here. The cluster is the one that
    RAY_ADDRESS names, else one on this machine, which has room for at least one run.
    """
    placed = {stage.name: on_this_machine(stage) for stage in stages}
    largest = max(placed.values(), key=_cpus)
    cluster = open_cluster(largest, largest.roles())
    assert cluster is not None, "a run in one process has no cluster"
    # An actor for each: placement groups end with the actor that made them, however it ends, and not with a task.
    driver: Any = ray.remote(num_cpus=0)(Driver)
    try:
        at_once = rooms([bundle for group in cluster.bundles.values() for bundle in group], ray.cluster_resources())
        print(f"{len(stages)} runs, {min(at_once, len(stages))} at a time", flush=True)
        waiting = deque(stages)
        running: dict[Any, tuple[Stage, Any]] = {}
        while waiting or running:
            while waiting and len(running) < at_once:
                stage = waiting.popleft()
                actor = driver.options(name=DRIVER + stage.name).remote()
                running[actor.drive.remote(stage, placed[stage.name])] = stage, actor
            ready = wait_any(list(running), "a run of the sweep", LONGEST)
            stage, actor = running.pop(ready)
            try:
                fetch(ready, stage.name, LONGEST)
            except UserError as error:
                yield stage, error
            except Exception as error:  # a bug, or a driver that was killed, for memory say
                traceback.print_exc()
                yield stage, UserError(last_line(error))
            else:
                yield stage, None
            ray.kill(actor)
    finally:
        cluster.close()


def rooms(bundles: Sequence[Bundle], there: Mapping[str, float]) -> int:
    """How many runs of these bundles fit into a cluster's resources; one at least, which says itself what it lacks."""
    needs = {kind: sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in ("CPU", "GPU")}
    return max(1, min(int(there.get(kind, 0.0) / need + 1e-6) for kind, need in needs.items() if need))


def _cpus(stage: Stage) -> float:
    """Of all workers of all roles, as if none shared a bundle."""
    found = [stage.cluster.of(role.kind) for role in stage.roles()]
    return sum(placement.workers * placement.cpus for placement in found)


class Driver:
    """Drives one run, in a process of its own."""

    def drive(self, stage: Stage, placed: Stage) -> None:
        """Train, and write the report."""
        train(stage, placed)
        write_report(stage, stage.folder)
