"""What a machine or a Ray cluster has for a run."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from beaver_ray.gpus import MEMORY_QUERY, cluster_address, visible_gpus
from beaver_ray.stage import Stage

GIB = 2.0**30
GPU_MEMORY_S = 30.0  # for the answers of all nodes to what memory their GPUs have
_gpu_gib: dict[str, float] = {}  # node's id to the answer


@dataclass(frozen=True)
class Node:
    """One node; ``cpus`` None where Ray is told how many to assume."""

    memory_gib: float
    gpus: float = 0
    gpu_gib: float = 0.0
    """Memory of the smallest of its GPUs; 0 where unknown."""
    cpus: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Resources:
    """What a machine or cluster has in all; ``cpus`` None where Ray is told how many to assume."""

    name: str
    memory_gib: float
    gpus: float = 0
    gpu_gib: float = 0.0
    """Memory of one GPU, of the largest where nodes differ; 0 where that of one is unknown."""
    cpus: float | None = None
    several: tuple[Node, ...] = ()
    """The nodes of a cluster; none of one machine."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """What a process or a bundle must fit into: the nodes of a cluster, or all of one machine."""
        return self.several or (Node(self.memory_gib, self.gpus, self.gpu_gib, self.cpus),)


def find_resources(stage: Stage) -> Resources:
    """This machine's resources, or those of the Ray cluster that the run would join."""
    address = cluster_address()
    return this_machine() if stage.debug or address is None else cluster_resources(address)


def this_machine() -> Resources:
    """Memory (a container's limit included) and GPUs of this machine; a local Ray is told its CPUs."""
    memory = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    gpus = visible_gpus()
    return Resources("this machine", memory / GIB, len(gpus), min(gpus, default=0.0))


def cluster_resources(address: str) -> Resources:
    """What the nodes of a Ray cluster have. UserError if it does not answer."""
    import ray

    from actors.machine.cluster import join_ray

    # Left connected for the run that follows: Ray may delete the folder that a job runs in when its process leaves.
    if not ray.is_initialized():
        join_ray(address, "RAY_ADDRESS")
    alive = [node for node in ray.nodes() if node["Alive"]]
    gpu_gib = gpu_memory([node["NodeID"] for node in alive if node["Resources"].get("GPU")])
    return of_nodes(f"the cluster at {address}", alive, gpu_gib)


def of_nodes(name: str, alive: list[dict[str, Any]], gpu_gib: Mapping[str, float]) -> Resources:
    """The resources of nodes as Ray lists them; ``gpu_gib``: the memory of a GPU by the node's id, where known."""
    nodes = tuple(
        Node(
            node["Resources"].get("memory", 0.0) / GIB,
            node["Resources"].get("GPU", 0.0),
            gpu_gib.get(node["NodeID"], 0.0),
            node["Resources"].get("CPU", 0.0),
            node["Labels"],
        )
        for node in alive
    )
    sizes = [node.gpu_gib for node in nodes if node.gpus]
    return Resources(
        name,
        sum(node.memory_gib for node in nodes),
        sum(node.gpus for node in nodes),
        max(sizes, default=0.0) if all(sizes) else 0.0,
        sum(node.cpus or 0.0 for node in nodes),
        nodes,
    )


def gpu_memory(nodes: Sequence[str]) -> dict[str, float]:
    """Id of each of these nodes to the GiB of its smallest GPU, asked by a task on it; only of those that answer, and
    those once.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from actors.machine.waits import WaitTimeoutError, WorkerDiedError, fetch

    ask: Any = ray.remote(num_cpus=0, max_retries=0)(_driver_question())
    asked = {}
    for node in (node for node in nodes if node not in _gpu_gib):
        place = NodeAffinitySchedulingStrategy(node, soft=False)
        asked[node] = ask.options(scheduling_strategy=place).remote()
    deadline = time.monotonic() + GPU_MEMORY_S
    for node, answer in asked.items():
        # What does not answer is not known, and whoever counts with it says so.
        with suppress(WaitTimeoutError, WorkerDiedError, RayError):
            if gib := fetch(answer, "memory of a node's GPUs", max(0.0, deadline - time.monotonic())):
                _gpu_gib[node] = gib
    return {node: _gpu_gib[node] for node in nodes if node in _gpu_gib}


def _driver_question() -> Callable[[], float]:
    """A function that asks the driver of the node that it runs on.

    Made in a function, so that it travels by value: nodes need nothing of this project for it.
    """
    query = MEMORY_QUERY

    def smallest_gib() -> float:
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
            return min(float(line) / 1024 for line in answer.stdout.split())
        except (OSError, ValueError, subprocess.SubprocessError):
            return 0.0

    return smallest_gib
