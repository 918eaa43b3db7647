"""Roles without models, in a module of their own so that Ray's workers can import them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch

from actors.machine.waits import WeightsUnreadableError
from actors.roles.exchange import Exchange
from actors.weights.direct import put_bucket, trial_weights
from actors.weights.publishing import checked_buckets
from beaver_ray import experience
from beaver_ray.weights import Bucket, Layout, PublishedWeights, pack_bucket, plan_layout, unpack


class Publisher:
    """Makes buckets of 1 MiB as the policy trainer does, their memory used again; every number is the version.

    ``gate``: all buckets but the first wait until this file exists. The second bucket ``ends`` the process, or fails.
    """

    def __init__(self, buckets: int, gate: str = "", ends: bool = False, fails: bool = False) -> None:
        self.plan = plan_layout([(f"part{i}", torch.float32, (2**18,)) for i in range(buckets)], 2**20)
        self.memory = np.empty(2**20, dtype=np.uint8)
        self.gate, self.ends, self.fails = gate, ends, fails

    def layout(self) -> Layout:
        return self.plan

    def trial(self) -> PublishedWeights:
        return trial_weights(torch.device("cpu"))

    def bucket(self, version: int, index: int, direct: bool) -> Bucket:
        while index and self.gate and not os.path.exists(self.gate):
            time.sleep(0.01)
        if index == 1 and self.fails:
            raise ZeroDivisionError("a bug in the policy")
        if index == 1 and self.ends:
            os._exit(1)
        tensors = [(f"part{index}", torch.full((2**18,), float(version)))]
        if direct:
            return put_bucket(self.plan, version, index, tensors, torch.device("cpu"))
        return pack_bucket(self.plan, version, index, tensors, self.memory)

    def process(self) -> tuple[int, int]:
        """(id of this process, MiB of memory that it holds)."""
        return os.getpid(), int(psutil.Process().memory_info().rss) // 2**20


def when_opened(bucket: Bucket, gate: str) -> Bucket:
    """The bucket, as soon as the file ``gate`` exists."""
    while not os.path.exists(gate):
        time.sleep(0.01)
    return bucket


class Reader:
    """Reads published weights as a generator does; with ``ends`` it dies of it.

    ``gate``: after the first bucket it makes the file ``gate``.half and waits until ``gate`` exists.
    """

    def __init__(self, ends: bool = False, gate: str = "") -> None:
        self.ends, self.gate = ends, gate

    def read(self, weights: PublishedWeights, timeout_s: float = 60.0) -> float:
        if self.ends:
            os._exit(1)
        total = 0.0
        for bucket in checked_buckets(weights, timeout_s):
            total += sum(float(tensor.sum()) for _, tensor in unpack(weights.layout, bucket))
            if self.gate and bucket.index == 0:
                Path(f"{self.gate}.half").touch()
                when_opened(bucket, self.gate)
        return total


def hide_nixl() -> None:
    """From now on this process is one where the package is not installed."""
    sys.modules["nixl"] = sys.modules["nixl._api"] = None  # type: ignore[assignment]


class Blind:
    """What a role is on a node without NIXL."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        hide_nixl()


class BlindPublisher(Blind, Publisher):
    """Cannot put weights on its device."""


class BlindReader(Blind, Reader):
    """Cannot read weights on another's."""


class LightGenerator:
    """Obeys the generators' interface without a model: an answer is its own sample id, and takes a moment.

    ``fails``: every exchange with prompts raises. ``dies``: the process ends in the middle of its second exchange.
    ``blind``: it cannot read weights that stay on another device. ``tokens``: how often an answer says its id.
    """

    def __init__(self, fails: bool = False, dies: bool = False, blind: bool = False, tokens: int = 1) -> None:
        self.fails, self.dies, self.blind, self.tokens = fails, dies, blind, tokens
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
            if self.blind and request.weights.buckets:
                raise WeightsUnreadableError("weights cannot be read where they lie: no NIXL here")
            self.version = [request.weights.version, *(b.version for b in checked_buckets(request.weights, 60))][-1]
        if prompts is not None:
            self.running += [row | {"weight_version": self.version} for row in prompts.to_pylist()]
        time.sleep(0.02)
        done, self.running = self.running[: request.min_finished], self.running[request.min_finished :]
        columns = {name: [row[name] for row in done] for name in ("sample_id", "weight_version")}
        responses = [[row["sample_id"]] * self.tokens for row in done]
        answers = experience.make_batch(columns | {"response_tokens": responses})
        ids, versions = columns.values()
        summary = {"sample_ids": ids, "versions": versions, "aborted": [], "generated_tokens": len(done)}
        summary["load_s"] = 0.0
        return summary, answers
