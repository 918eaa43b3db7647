"""Roles that do nothing, in a module that Ray's workers import in no time."""

from __future__ import annotations

import os
import time
from typing import Any

import ray

from beaver_ray.errors import UserError


class Sleeper:
    """Takes its time, to start and to answer."""

    def __init__(self, start_seconds: float = 0.0) -> None:
        time.sleep(start_seconds)

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def until(self, gate: str) -> str:
        """The name of a file, as soon as that is there."""
        while not os.path.exists(gate):
            time.sleep(0.01)
        return gate

    def complain(self) -> None:
        raise UserError("the disk of /data is full: free some space")

    def fail(self) -> None:
        raise ZeroDivisionError("a bug")

    def place(self) -> dict[str, Any]:
        """Where this worker lies and what its environment is."""
        context = ray.get_runtime_context()
        names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        return {"group": context.get_placement_group_id(), "pid": os.getpid(), **{n: os.environ.get(n) for n in names}}


class Broken:
    """Cannot start, by the user's mistake or by a bug."""

    def __init__(self, bug: bool) -> None:
        if bug:
            raise ZeroDivisionError("a bug")
        raise UserError("reward model: no model in '/models/none' (no config.json there)")
