"""Roles without models, in a module of their own so that Ray's workers can import them."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from actors.exchange import Exchange
from actors.waits import fetch
from beaver_ray import experience
from beaver_ray.errors import UserError
from beaver_ray.weights import PublishedWeights, pack, unpack


class Sleeper:
    """Takes its time, to start and to answer."""

    def __init__(self, start_seconds: float = 0.0) -> None:
        time.sleep(start_seconds)

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

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


class Publisher:
    """Publishes new weights as the policy trainer does: buckets in Ray's object store, their memory used again."""

    def __init__(self, megabytes: int) -> None:
        self.weights = torch.zeros(megabytes * 2**18)
        self.buffer = np.empty(2**20, dtype=np.uint8)

    def publish(self, version: int) -> PublishedWeights:
        self.weights.fill_(version)
        parts = ((f"part{i}", part) for i, part in enumerate(self.weights.chunk(len(self.weights) // 2**18)))
        return pack(parts, version, 2**20, ray.put, self.buffer)


class Reader:
    """Reads published weights as a generator does."""

    def read(self, weights: PublishedWeights) -> float:
        total = 0.0
        for index, bucket in enumerate(weights.buckets):
            array = fetch(bucket, f"bucket {index}", 60)
            total += sum(float(tensor.sum()) for _, tensor in unpack(weights.manifest, index, array))
        return total


class LightGenerator:
    """Obeys the generators' interface without a model: an answer is its own sample id, and takes a moment.

    ``fails``: every exchange with prompts raises. ``dies``: the process ends in the middle of its second exchange.
    """

    def __init__(self, fails: bool = False, dies: bool = False) -> None:
        self.fails, self.dies = fails, dies
        self.version = self.calls = 0
        self.running: list[dict[str, Any]] = []

    def started(self) -> None:
        """The constructor has ended."""

    def exchange(self, prompts: pa.RecordBatch | None, request: Exchange) -> tuple[dict[str, Any], pa.RecordBatch]:
        self.calls += 1
        if self.fails and prompts is not None:
            raise ZeroDivisionError("a bug in the engine")
        if self.dies and self.calls == 2:
            os._exit(1)
        if request.weights is not None:
            self.version = request.weights.version
        if prompts is not None:
            self.running += [row | {"weight_version": self.version} for row in prompts.to_pylist()]
        time.sleep(0.02)
        done, self.running = self.running[: request.min_finished], self.running[request.min_finished :]
        columns = {name: [row[name] for row in done] for name in ("sample_id", "weight_version")}
        answers = experience.make_batch(columns | {"response_tokens": [[row["sample_id"]] for row in done]})
        ids, versions = columns.values()
        summary = {"sample_ids": ids, "versions": versions, "aborted": [], "generated_tokens": len(done)}
        return summary, answers
