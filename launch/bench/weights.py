"""A version of the weights from a trainer to its generators through the object store, against its memory copies.

The path is the trainer's own (`beaver_ray.weights.pack` with `ray.put`, one warm bucket) and the generators' own
(`actors.generator.fetch_verified`, then a copy into the model's tensors). Every byte is copied once into a bucket,
once into the object store, and once in each receiver; the limit is the time that these copies take at the speed of
warm memory, measured in the same run in the same processes: one stream for the publisher, as many at a time as there
are receivers for theirs. Checksums, serialisation and calls are not in the limit.

Also: how many calls a version costs when its parameters are cut into ten times as many, and the rate of a real
vLLM generator's update.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.generator import GeneratorSpec, VllmGenerator, fetch_verified
from actors.waits import fetch
from beaver_ray.weights import BUCKET_BYTES, PublishedWeights, pack, unpack
from launch.bench.measure import Figure, Goal, Outcome, interleave, local_ray, medians
from launch.bench.models import LARGER, write_policy
from launch.bench.registry import Options

RECEIVERS = 2
WAIT_S = 300.0
GB = 1e9
Shapes = list[tuple[str, tuple[int, ...]]]


def run(options: Options) -> Outcome:
    """Figures for about 1 GB of float32 (16 MB where small) and two receivers."""
    shapes = llama_shapes(64, 4, 1000) if options.small else llama_shapes(1024, 16, 32000)
    bucket = BUCKET_BYTES // 64 if options.small else BUCKET_BYTES
    repetitions = options.repetitions or (2 if options.small else 7)
    store_gib = 0.25 if options.small else 3.0
    with local_ray(cpus=RECEIVERS + 1, store_gib=store_gib):
        outcome = measure_transfer(shapes, bucket, repetitions, int(0.9 * store_gib * 2**30))
        outcome.figures += measure_calls(shapes, bucket)
        outcome.figures += measure_generator(repetitions)
    return outcome


def llama_shapes(hidden: int, layers: int, vocabulary: int) -> Shapes:
    """Names and shapes of a Llama-like model with an inner size of 2.75 times the hidden size, tied head left out."""
    inner = hidden * 11 // 4
    shapes: Shapes = [("model.embed_tokens.weight", (vocabulary, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes += [(f"{prefix}.self_attn.{name}_proj.weight", (hidden, hidden)) for name in "qkvo"]
        shapes += [(f"{prefix}.mlp.{name}_proj.weight", (inner, hidden)) for name in ("gate", "up")]
        shapes += [(f"{prefix}.mlp.down_proj.weight", (hidden, inner))]
        shapes += [(f"{prefix}.{name}_layernorm.weight", (hidden,)) for name in ("input", "post_attention")]
    return [*shapes, ("model.norm.weight", (hidden,))]


class Publisher:
    """Holds the tensors of a model and publishes them as the policy trainer does."""

    def __init__(self, shapes: Shapes, bucket_bytes: int) -> None:
        torch.set_num_threads(1)
        self.tensors = {name: torch.full(shape, 0.5) for name, shape in shapes}
        self.bucket = np.zeros(bucket_bytes, dtype=np.uint8)
        self.times: dict[str, float] = {}
        self.puts = 0

    def publish(self, version: int) -> PublishedWeights:
        """A new version, every number of it changed."""
        self.times = {"put": 0.0}
        self.puts = 0
        for tensor in self.tensors.values():
            tensor.view(-1)[:16] = version
        started = time.perf_counter()
        published = pack(self.tensors.items(), version, len(self.bucket), self._put, self.bucket)
        self.times["pack"] = time.perf_counter() - started - self.times["put"]
        return published

    def warm_store(self, size: int) -> None:
        """Touch `size` bytes of the object store: the first touch of a page costs some 30 times a later one."""
        held = [ray.put(self.bucket) for _ in range(size // len(self.bucket))]
        del held

    def last(self) -> tuple[dict[str, float], int]:
        """Seconds of the last version's parts (pack: copy and checksum), and how often `put` was called."""
        return self.times, self.puts

    def copy_rate(self, repetitions: int) -> float:
        """Bytes/s of a copy between two warm buffers of a bucket's size."""
        return copy_rate(len(self.bucket), repetitions)

    def _put(self, bucket: np.ndarray) -> Any:
        started = time.perf_counter()
        reference = ray.put(bucket)
        self.times["put"] += time.perf_counter() - started
        self.puts += 1
        return reference


class Receiver:
    """Holds the tensors of a model and takes a version in as a generator does: all verified, then copied."""

    def __init__(self, shapes: Shapes, bucket_bytes: int) -> None:
        torch.set_num_threads(1)
        self.tensors = {name: torch.zeros(shape) for name, shape in shapes}
        self.bucket_bytes = bucket_bytes

    def pull(self, weights: PublishedWeights) -> dict[str, float]:
        """Seconds of fetching with verifying, and of copying into place."""
        started = time.perf_counter()
        buckets = fetch_verified(weights, WAIT_S)
        fetched = time.perf_counter()
        for index, bucket in enumerate(buckets):
            for name, tensor in unpack(weights.manifest, index, bucket, check=False):
                self.tensors[name].copy_(tensor)
        return {"fetch and verify": fetched - started, "copy into place": time.perf_counter() - fetched}

    def holds(self, version: int) -> bool:
        """Whether every tensor is that of `version`."""
        return all(bool((t.view(-1)[:16] == version).all()) for t in self.tensors.values())

    def copy_rate(self, repetitions: int) -> float:
        """Bytes/s of a copy between two warm buffers of a bucket's size."""
        return copy_rate(self.bucket_bytes, repetitions)


def copy_rate(size: int, repetitions: int) -> float:
    """Bytes copied in a second between two warm buffers of `size` bytes; the median of `repetitions`."""
    source, target = np.ones(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
    rates = []
    for _ in range(repetitions):
        started = time.perf_counter()
        np.copyto(target, source)
        rates.append(size / (time.perf_counter() - started))
    return float(np.median(rates))


def measure_transfer(shapes: Shapes, bucket: int, repetitions: int, store_bytes: int) -> Outcome:
    """Publish and pull, in turns with the copies; `store_bytes` of the object store are touched before."""
    remote = {role: ray.remote(num_cpus=1)(role) for role in (Publisher, Receiver)}
    publisher: Any = remote[Publisher].remote(shapes, bucket)
    receivers: Any = [remote[Receiver].remote(shapes, bucket) for _ in range(RECEIVERS)]
    parts: dict[str, list[float]] = {}
    version = 0
    weights: PublishedWeights | None = None

    def transfer() -> None:
        nonlocal version, weights
        version += 1
        weights = fetch(publisher.publish.remote(version), "publishing", WAIT_S)
        pulled = fetch([r.pull.remote(weights) for r in receivers], "pulling", WAIT_S)
        slowest = {part: max(times[part] for times in pulled) for part in pulled[0]}
        for part, seconds in {**fetch(publisher.last.remote(), "times", WAIT_S)[0], **slowest}.items():
            parts.setdefault(part, []).append(seconds)

    alone: list[float] = []
    together: list[float] = []

    def copies() -> None:
        alone.append(fetch(publisher.copy_rate.remote(5), "copying", WAIT_S))
        together.append(sum(fetch([r.copy_rate.remote(5) for r in receivers], "copying", WAIT_S)))

    fetch([actor.copy_rate.remote(1) for actor in (publisher, *receivers)], "starting", WAIT_S)
    cold = interleave({"transfer": transfer}, 1, warmups=0)["transfer"][0]
    fetch(publisher.warm_store.remote(store_bytes), "touching the object store", WAIT_S)
    parts.clear()
    seconds = interleave({"transfer": transfer, "copies": copies}, repetitions, warmups=2)
    assert weights is not None
    if not all(fetch([r.holds.remote(version) for r in receivers], "checking", WAIT_S)):
        raise RuntimeError("a receiver does not hold the weights that were published last")
    size = weights.manifest.total_bytes
    rate_1, rate_n = float(np.median(alone[2:])), float(np.median(together[2:]))
    limit = 2 * size / rate_1 + RECEIVERS * size / rate_n
    wall = medians(seconds)["transfer"]
    goal = Goal(3, at_most=True)
    figures = [
        Figure("publish and pull", wall, "s", wall / limit, "time of the copies", goal),
        Figure("copies alone", limit, "s"),
        Figure("publish and pull, first version, cold memory", cold, "s", cold / limit, "time of the copies"),
        Figure("weights to each receiver", size / wall / GB, "GB/s"),
        Figure("warm copy, one stream", rate_1 / GB, "GB/s"),
        Figure(f"warm copy, {RECEIVERS} streams together", rate_n / GB, "GB/s"),
    ]
    figures += [
        Figure(f"part: {part}", m, "s", m / wall, "of publish and pull")
        for part, m in medians({p: v[2:] for p, v in parts.items()}).items()
    ]
    settings = {
        "bytes": size,
        "parameters": len(shapes),
        "receivers": RECEIVERS,
        "bucket_bytes": bucket,
        "bytes_copied": (2 + RECEIVERS) * size,
    }
    for actor in (publisher, *receivers):
        ray.kill(actor)
    return Outcome(figures, settings, {"transfer": seconds["transfer"], **{p: v[2:] for p, v in parts.items()}})


def measure_calls(shapes: Shapes, bucket: int) -> list[Figure]:
    """Calls of one version, with its parameters as they are and cut into ten times as many."""
    cut: Shapes = [(f"{name}.{part}", (-(-int(np.prod(shape)) // 10),)) for name, shape in shapes for part in range(10)]
    counts = []
    for version in (shapes, cut):
        publisher = Publisher(version, bucket)
        weights = publisher.publish(1)
        # A put for each bucket; for each receiver one call with the manifest, and a get for each bucket.
        counts.append(publisher.puts + RECEIVERS * (1 + len(weights.buckets)))
    what = f"of those with {len(shapes):,} tensors"
    return [
        Figure(f"calls of a version of {len(shapes):,} tensors", counts[0], "calls"),
        Figure(f"calls of {len(cut):,} tensors of as many bytes", counts[1], "calls", counts[1] / counts[0], what),
    ]


def measure_generator(repetitions: int) -> list[Figure]:
    """A real vLLM generator's update to a small model: bytes/s, and what one update costs at least."""
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_policy(Path(folder) / "model", LARGER))
        spec = GeneratorSpec(model, dtype="float32", max_model_len=64, max_sequences=8, kv_cache_gib=0.1)
        generator: Any = ray.remote(num_cpus=1)(VllmGenerator).remote(spec)
        from transformers import AutoModelForCausalLM

        state = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
        seconds = []
        for version in range(1, repetitions + 2):
            weights = pack(state.items(), version, put=ray.put, buffer=np.zeros(BUCKET_BYTES, np.uint8))
            report = fetch(generator.update_weights.remote(weights), "the generator's update", WAIT_S)
            seconds.append(report["seconds"])
        ray.kill(generator)
    wall, size = float(np.median(seconds[1:])), report["bytes"]
    return [
        Figure(f"vLLM generator's update of {size / 1e6:.0f} MB", wall * 1e3, "ms"),
        Figure("vLLM generator's update", size / wall / GB, "GB/s"),
    ]
