"""Roles as Ray actors on placement groups.

Every role has a placement group of its own, or shares the bundles of those that name the same group: worker i of each
lies in bundle i. Model and run folders are read and written by path on whichever node a role runs on, so that all
nodes must see them under the same path (a shared file system) unless everything runs on one.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import ceil
from typing import Any

import ray
from ray.exceptions import AuthenticationError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.machine.bundles import (
    GENERATORS,
    Bundle,
    come_one_by_one,
    group_labels,
    group_strategy,
    groups_of,
    make_bundles,
)
from actors.machine.handles import Group, Handle, Method, Startable
from actors.machine.waits import fetch, find_lost, wait_any, wait_placed
from beaver_ray.config import ClusterConfig, Placement
from beaver_ray.errors import UserError, first_line
from beaver_ray.gpus import cluster_address
from beaver_ray.runs import Progress

SECONDS_TO_ANSWER = 5.0  # a living process that is not busy; one that is dead is known to be at once


class RayHandle:
    """An actor of Ray."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name, self.actor = name, actor

    def call(self, method: Method, *args: Any, returns: int = 1) -> Any:
        """Start the method; gives an ObjectRef, or a list of ``returns`` of them."""
        return getattr(self.actor, method.__name__).options(num_returns=returns).remote(*args)


@dataclass(frozen=True)
class Launch:
    """How a worker is started: its role and class, what it is given and takes, its placement group and bundle."""

    name: str
    role: type
    args: tuple[Any, ...]
    placement: Placement
    place: tuple[str, int]


class Cluster:
    """A connection to Ray, and the placement groups of one run.

    ``roles`` are the roles that this run will start, with the kind that names each under cluster.placement; those that
    share a group are placed together, so all of them must be known at the start. ``address`` is that of a running
    cluster; without one RAY_ADDRESS says it, or a cluster is started on this machine. Raises UserError where none
    answers.
    """

    def __init__(self, config: ClusterConfig, roles: dict[str, str], address: str | None = None) -> None:
        self.config = config
        self.groups = groups_of(config, roles)
        self.bundles = {name: make_bundles(name, list(members.values())) for name, members in self.groups.items()}
        # Actors of one run carry one tag, so that `ray list actors` tells runs apart.
        self.tag = uuid.uuid4().hex[:6]
        self.placed: dict[str, PlacementGroup] = {}
        self.actors: dict[str, Any] = {}
        self.launches: dict[str, Launch] = {}  # how each worker was started
        self.launched = 0
        self.environment = _environment(config.threads)
        self.started = self.local = False
        if not ray.is_initialized():
            self._connect(cluster_address(address) or "local")

    def _connect(self, address: str) -> None:
        """Join the running cluster, or start one on this machine with as many logical CPUs as are asked for."""
        options: dict[str, Any] = {}
        self.local = address == "local"
        if self.local:
            cpus = sum(bundle.get("CPU", 0.0) for bundles in self.bundles.values() for bundle in bundles)
            options["num_cpus"] = max(os.cpu_count() or 1, ceil(cpus))
            options["dashboard_host"] = "127.0.0.1"  # whoever reaches the dashboard can run code
            # A local cluster inherits this process's environment; its workers then need none of their own, and those
            # that Ray has started ahead can be used.
            os.environ.update(self.environment)
            self.environment = {}
        join_ray(address, "RAY_ADDRESS", **options)
        self.started = True

    def start(self, name: str, role: type, arguments: Sequence[tuple[Any, ...]]) -> Group:
        """The workers of role ``name``, one for each entry of ``arguments``; `wait_started` waits for them."""
        group_name = next(g for g, members in self.groups.items() if name in members)
        members, bundles = self.groups[group_name], self.bundles[group_name]
        handles = []
        for index, args in enumerate(arguments):
            label = name if len(arguments) == 1 else f"{name}-{index}"
            alone = come_one_by_one(group_name, members)
            place = (label, 0) if alone else (group_name, index)
            if place[0] not in self.placed:
                needed = [bundles[index]] if alone else bundles
                self.placed[place[0]] = _reserve(group_name, needed, list(members.values()))
            handles.append(self._launch(label, Launch(name, role, args, members[name], place)))
        return Group(name, handles, self.config.step_timeout)

    def start_another(self, name: str, role: type, arguments: tuple[Any, ...]) -> RayHandle:
        """One more worker of role ``name``: where one has ended, or in a bundle of its own.

        Returns at once; where the cluster has no room the new worker starts when there is some.
        """
        placement = next(members[name] for members in self.groups.values() if name in members)
        self.launched += 1
        label = f"{name}-new-{self.launched}"
        ended = [
            worker for worker, launch in self.launches.items() if launch.name == name and worker not in self.actors
        ]
        if ended:
            place = self.launches.pop(ended[0]).place
        else:
            place = (label, 0)
            alone = placement.model_copy(update={"workers": 1})
            self.placed[label] = _reserve(label, make_bundles(label, [alone]), [alone])
        return self._launch(label, Launch(name, role, arguments, placement, place))

    def stop(self, handle: Handle) -> None:
        """End a worker; a bundle that was made for it alone is given back."""
        ray.kill(self.actors.pop(handle.name))
        group = self.launches[handle.name].place[0]
        if [launch.place[0] for launch in self.launches.values()].count(group) == 1:
            del self.launches[handle.name]
            remove_placement_group(self.placed.pop(group))

    def restart(self, group: Group, workers: Sequence[Handle]) -> None:
        """End these workers of a group and start each anew in its place; `wait_started` waits for them."""
        for worker in workers:
            ray.kill(self.actors.pop(worker.name))
            group.replace(worker, self._launch(worker.name, self.launches[worker.name]))

    def dead(self, groups: Sequence[Group]) -> list[Handle]:
        """The workers whose process has ended. One that is busy, or hangs, is not among them."""
        asked = {handle.call(Startable.started): handle for group in groups for handle in group.workers}
        return [asked[reference] for reference in find_lost(list(asked), SECONDS_TO_ANSWER)]

    def _launch(self, label: str, launch: Launch) -> RayHandle:
        placement, (group, bundle) = launch.placement, launch.place
        # Of one that died the name may be taken for a moment longer.
        again = f".{uuid.uuid4().hex[:4]}" if label in self.launches else ""
        options: dict[str, Any] = {
            "name": f"{label}{again}:{self.tag}",
            "num_cpus": placement.cpus,
            "num_gpus": placement.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self.placed[group],
                placement_group_bundle_index=bundle,
                placement_group_capture_child_tasks=True,
            ),
        }
        # Ray hides no GPU from an actor that asked for none.
        environment = self.environment | ({} if placement.gpus else _hidden_gpus())
        if environment:
            options["runtime_env"] = {"env_vars": environment}
        actor: Any = ray.remote(_reporting_start(launch.role))
        handle = RayHandle(label, actor.options(**options).remote(*launch.args))
        self.actors[label], self.launches[label] = handle.actor, launch
        return handle

    def wait_started(self, groups: Sequence[Group], grows: bool = False) -> list[Handle]:
        """Return when every actor's constructor has ended, within step_timeout for all of them together.

        With ``grows`` one generator is enough: the others leave their group and are returned, to join when they have
        found room and started. Raises the UserError of a constructor, UserError for a bundle that finds no room, and
        WaitTimeoutError.
        """
        handles = [handle for group in groups for handle in group.workers]
        if not handles:
            return []
        generators = {handle.name for group in groups if group.name == GENERATORS for handle in group.workers}
        deadline = time.monotonic() + self.config.step_timeout
        nodes = sum(node["Alive"] for node in ray.nodes())
        where = "1 node" if nodes == 1 else f"{nodes} nodes"
        print(f"starting {len(handles)} processes on {where}", flush=True)
        late = sorted(generators)[1:] if grows and not self.local else []
        for name in dict.fromkeys(self.launches[handle.name].place[0] for handle in handles if handle.name not in late):
            self._wait_placed(name, deadline)
        waiting = {handle.call(Startable.started): handle for handle in handles}
        started = 0
        with closing(Progress("processes started", len(handles))) as progress:
            while waiting:
                if grows and started and {handle.name for handle in waiting.values()} <= generators:
                    break
                what = f"start of {', '.join(handle.name for handle in waiting.values())}"
                ready = wait_any(list(waiting), what, max(0.0, deadline - time.monotonic()))
                handle = waiting.pop(ready)
                fetch(ready, f"start of {handle.name}", self.config.step_timeout)
                started += handle.name in generators
                progress.advance(last=handle.name)
        for group in groups:
            group.workers[:] = [handle for handle in group.workers if handle not in waiting.values()]
        return list(waiting.values())

    def _wait_placed(self, name: str, deadline: float) -> None:
        patience = max(0.0, deadline - time.monotonic())
        if self.local:
            # No node can join a cluster that this run has made for itself: what does not fit now never will.
            patience = min(patience, 10.0)
        if wait_placed(self.placed[name], patience):
            return
        launches = [launch for launch in self.launches.values() if launch.place[0] == name]
        names = dict.fromkeys(launch.name for launch in launches)
        here = [launch.placement for launch in launches]
        bundles = self.placed[name].bundle_specs
        nodes = [_amounts(node["Resources"]) for node in ray.nodes() if node["Alive"]]
        labels = group_labels(name, here)
        wanted = "".join(f", label {key}={value}" for key, value in labels.items())
        raise UserError(
            f"no room for {', '.join(names)}: {len(bundles)} bundle(s), the largest of {_amounts(bundles[0])}, "
            f"strategy {group_strategy(name, here)}{wanted}; free now: {_amounts(ray.available_resources())}; "
            f"nodes: {'; '.join(nodes)}. Change cluster.placement or add nodes"
        )

    def clear(self) -> None:
        """End this run's actors and give its resources back."""
        for actor in self.actors.values():
            ray.kill(actor)
        for group in self.placed.values():
            remove_placement_group(group)
        self.actors, self.placed, self.launches = {}, {}, {}

    def close(self) -> None:
        """End this run's actors and give its resources back; leave Ray where this run joined it."""
        if not ray.is_initialized():
            return
        self.clear()
        if self.started:
            ray.shutdown()


def join_ray(address: str, said_by: str, **options: Any) -> None:
    """ray.init; UserError, naming the options that the address was ``said_by``, where no cluster answers there."""
    # An error comes out where its answer is waited for; those that nobody waits for any more follow from it.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, ValueError, RuntimeError, AuthenticationError) as error:
        raise UserError(f"no Ray cluster answers at {address} ({said_by}): {first_line(error)}") from None


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray's own core would end this process instead."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _reserve(group: str, bundles: list[Bundle], members: Sequence[Placement]) -> PlacementGroup:
    """A placement group on nodes that have its members' labels."""
    labels = group_labels(group, members)
    selector = [labels] * len(bundles) if labels else None
    return placement_group(bundles, strategy=group_strategy(group, members), bundle_label_selector=selector)


def _reporting_start(role: type) -> type:
    """``role`` with a method `started` that raises the UserError of its constructor.

    Ray itself would give no more of an error in a constructor than the text of its traceback.
    """
    construct: Callable[..., None] = role.__init__  # type: ignore[misc]

    def constructor(self: Any, *args: Any) -> None:
        self.start_error = None
        try:
            construct(self, *args)
        except UserError as error:
            self.start_error = error

    def started(self: Any) -> None:
        if self.start_error is not None:
            raise self.start_error

    members = {"__init__": constructor, "started": started, "__module__": role.__module__, "__doc__": role.__doc__}
    return type(role.__name__, (role,), members)


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(kind, 0.0):g} {kind}" for kind in ("CPU", "GPU"))


def _hidden_gpus() -> dict[str, str]:
    """Environment that hides the node's GPUs from a role without any."""
    return {"CUDA_VISIBLE_DEVICES": ""} if ray.cluster_resources().get("GPU") else {}


def _environment(threads: int) -> dict[str, str]:
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME")
    passed = {name: os.environ[name] for name in names if name in os.environ}
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        **passed,
    }
