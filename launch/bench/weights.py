"""A version of the weights from a trainer to its generators through the object store, against its memory copies.

The path is that of training: the trainer makes one bucket after another, each by a call whose result lies in the object
store, and the generators (`actors.roles.generator.checked_buckets`, then a copy into the model's tensors) take each as
soon as it is there. The trainer holds every tensor in two shards, as under ZeRO-3 on two ranks, and puts them together
before they are packed. The same with all buckets made before the first is taken is measured beside it, and both once
more with a trainer that waits for every tensor as long as a link of LINK bytes/s would take: on one machine with few
cores all copies share the memory's bandwidth, and only waiting can be overlapped.

Every byte is copied once into a whole tensor, once into a bucket, once into the object store, and once in each
receiver; the limit is the time that these copies take one after another at the speed of warm memory, measured in the
same run in the same processes: one stream for the publisher, as many at a time as there are receivers for theirs.
Checksums, serialisation and calls are not in the limit.

Also: how many calls a version costs when its parameters are cut into ten times as many, and the same version into as
many real vLLM generators.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.machine.waits import fetch, wait_any
from actors.roles.generator import GeneratorSpec, VllmGenerator, checked_buckets
from beaver_ray.weights import (
    BUCKET_BYTES,
    Bucket,
    Layout,
    PublishedWeights,
    pack_bucket,
    plan_layout,
    unpack,
)
from launch.bench.measure import Figure, Goal, Outcome, copy_rate, interleave, local_ray, medians
from launch.bench.models import Shape, write_policy
from launch.bench.options import Options

RECEIVERS = 2
WAIT_S = 300.0
GB = 1e9
LINK = 3.125 * GB  # 25 Gbit/s
Shapes = list[tuple[str, tuple[int, ...]]]


def run(options: Options) -> Outcome:
    """Figures for about 1 GB of float32 (16 MB where small) and two receivers."""
    shape = Shape("256 KB", 64, 4, 4, 176, 1000) if options.small else Shape("1 GB", 1024, 16, 16, 2816, 32_000)
    shapes = llama_shapes(shape.hidden, shape.layers, shape.vocabulary)
    bucket = BUCKET_BYTES // 64 if options.small else BUCKET_BYTES
    repetitions = options.repetitions or (2 if options.small else 7)
    store_gib = 0.25 if options.small else 3.0
    with local_ray(cpus=RECEIVERS + 1, store_gib=store_gib):
        outcome = measure_transfer(shapes, bucket, repetitions, int(0.9 * store_gib * 2**30))
        outcome.figures += measure_calls(shapes, bucket)
        rates = [figure.value * GB for figure in outcome.figures if figure.name.startswith("warm copy")]
        real = measure_generators(shape, bucket, repetitions, *rates)
    outcome.figures += real.figures
    outcome.settings |= real.settings
    outcome.samples |= real.samples
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


def layout_of(shapes: Shapes, bucket_bytes: int) -> Layout:
    """The layout of float32 tensors."""
    return plan_layout([(name, torch.float32, shape) for name, shape in shapes], bucket_bytes)


class Publisher:
    """Holds the tensors of a model in two shards and makes its buckets as the policy trainer does."""

    def __init__(self, layout: Layout) -> None:
        torch.set_num_threads(1)
        self.layout = layout
        halves = {e.name: (e.nbytes // 8, e.nbytes // 4 - e.nbytes // 8) for e in layout.entries}
        self.shards = {name: [torch.full((n,), 0.5) for n in sizes] for name, sizes in halves.items()}
        self.whole = torch.zeros(max(e.nbytes for e in layout.entries) // 4)
        self.memory = np.zeros(max(layout.bucket_bytes), dtype=np.uint8)
        self.seconds = 0.0

    def bucket(self, version: int, index: int, link: float) -> Bucket:
        """One bucket of a new version, every tensor of it changed and come over a link of so many bytes/s."""
        started = time.perf_counter()
        bucket = pack_bucket(self.layout, version, index, self._gathered(version, index, link), self.memory)
        self.seconds += time.perf_counter() - started
        return bucket

    def _gathered(self, version: int, index: int, link: float) -> Iterator[tuple[str, torch.Tensor]]:
        for entry in self.layout.entries_of(index):
            time.sleep(entry.nbytes / link)
            shards = self.shards[entry.name]
            shards[1][-16:] = version
            yield entry.name, torch.cat(shards, out=self.whole[: entry.nbytes // 4]).view(entry.shape)

    def warm_store(self, size: int) -> None:
        """Touch `size` bytes of the object store: the first touch of a page costs some 30 times a later one."""
        held = [ray.put(self.memory) for _ in range(size // len(self.memory))]
        del held

    def made(self) -> float:
        """Seconds spent on buckets since the last call: gathering, copying and checksums."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def copy_rate(self, repetitions: int) -> float:
        """Bytes/s of a copy between two warm buffers of a bucket's size."""
        return copy_rate(len(self.memory), repetitions)


class Receiver:
    """Holds the tensors of a model and takes a version in as a generator does, bucket by bucket."""

    def __init__(self, layout: Layout) -> None:
        torch.set_num_threads(1)
        self.tensors = {entry.name: torch.zeros(entry.shape) for entry in layout.entries}
        self.bucket_bytes = max(layout.bucket_bytes)

    def pull(self, weights: PublishedWeights) -> dict[str, float]:
        """Seconds until all buckets were had and verified, copying left out, and of copying them into place."""
        started, copying = time.perf_counter(), 0.0
        for bucket in checked_buckets(weights, WAIT_S):
            had = time.perf_counter()
            for name, tensor in unpack(weights.layout, bucket):
                self.tensors[name].copy_(tensor)
            copying += time.perf_counter() - had
        return {"wait, fetch and verify": time.perf_counter() - started - copying, "copy into place": copying}

    def holds(self, version: int) -> bool:
        """Whether every tensor is that of `version`."""
        return all(bool((t.view(-1)[-16:] == version).all()) for t in self.tensors.values())

    def copy_rate(self, repetitions: int) -> float:
        """Bytes/s of a copy between two warm buffers of a bucket's size."""
        return copy_rate(self.bucket_bytes, repetitions)


def measure_transfer(shapes: Shapes, bucket: int, repetitions: int, store_bytes: int) -> Outcome:
    """Publish and pull both ways, in turns with the copies; `store_bytes` of the object store are touched before."""
    layout = layout_of(shapes, bucket)
    remote = {role: ray.remote(num_cpus=1)(role) for role in (Publisher, Receiver)}
    publisher: Any = remote[Publisher].remote(layout)
    receivers: Any = [remote[Receiver].remote(layout) for _ in range(RECEIVERS)]
    parts: dict[str, list[float]] = {}
    version = 0

    def transfer(way: str, pipelined: bool, link: float) -> None:
        nonlocal version
        version += 1
        buckets = [publisher.bucket.remote(version, index, link) for index in range(len(layout.bucket_bytes))]
        weights = PublishedWeights(version, layout, tuple(buckets))
        if not pipelined:
            wait_any(buckets[-1:], "making all buckets", WAIT_S)
        pulled = fetch([r.pull.remote(weights) for r in receivers], "pulling", WAIT_S)
        slowest = {part: max(times[part] for times in pulled) for part in pulled[0]}
        slowest["gather, pack and sum"] = fetch(publisher.made.remote(), "times", WAIT_S)
        for part, seconds in slowest.items():
            parts.setdefault(f"{way}: {part}", []).append(seconds)

    alone: list[float] = []
    together: list[float] = []

    def copies() -> None:
        alone.append(fetch(publisher.copy_rate.remote(5), "copying", WAIT_S))
        together.append(sum(fetch([r.copy_rate.remote(5) for r in receivers], "copying", WAIT_S)))

    fetch([actor.copy_rate.remote(1) for actor in (publisher, *receivers)], "starting", WAIT_S)
    cold = interleave({"transfer": lambda: transfer("cold", True, math.inf)}, 1, warmups=0)["transfer"][0]
    fetch(publisher.warm_store.remote(store_bytes), "touching the object store", WAIT_S)
    parts.clear()
    ways = {
        "pipelined": (True, math.inf),
        "made first": (False, math.inf),
        "pipelined, link": (True, LINK),
        "made first, link": (False, LINK),
    }
    sides = {way: partial(transfer, way, *how) for way, how in ways.items()} | {"copies": copies}
    seconds = interleave(sides, repetitions, warmups=2)
    if not all(fetch([r.holds.remote(version) for r in receivers], "checking", WAIT_S)):
        raise RuntimeError("a receiver does not hold the weights that were published last")
    size, times = layout.total_bytes, medians(seconds)
    rates = float(np.median(alone[2:])), float(np.median(together[2:]))
    figures = transfer_figures(size, times, cold, *rates)
    measured = {part: each[2:] for part, each in parts.items()}
    for part, middle in medians(measured).items():
        way = part.partition(":")[0]
        figures.append(Figure(part, middle, "s", middle / times[way], f"of {way}"))
    settings = {
        "bytes": size,
        "parameters": len(shapes),
        "receivers": RECEIVERS,
        "bucket_bytes": bucket,
        "bytes_copied": (3 + RECEIVERS) * size,
        "link_bytes_per_s": LINK,
    }
    for actor in (publisher, *receivers):
        ray.kill(actor)
    return Outcome(figures, settings, {**{way: seconds[way] for way in ways}, **measured})


def transfer_figures(size: int, times: dict[str, float], cold: float, rate_1: float, rate_n: float) -> list[Figure]:
    """What the ways of transfer took for `size` bytes, beside copies at `rate_1` bytes/s alone, `rate_n` together."""
    limit = 3 * size / rate_1 + RECEIVERS * size / rate_n
    wall = times["pipelined"]
    return [
        Figure("publish and pull", wall, "s", wall / limit, "time of the copies", Goal(3, at_most=True)),
        Figure("made first", times["made first"], "s", times["made first"] / limit, "time of the copies"),
        Figure("pipelined", wall, "s", wall / times["made first"], "of made first"),
        Figure("made first, link", times["made first, link"], "s"),
        Figure(
            "pipelined, link",
            times["pipelined, link"],
            "s",
            times["pipelined, link"] / times["made first, link"],
            "of made first, link",
            Goal(0.9, at_most=True),
        ),
        Figure("copies alone", limit, "s"),
        Figure("publish and pull, first version, cold memory", cold, "s", cold / limit, "time of the copies"),
        Figure("weights to each receiver", size / wall / GB, "GB/s"),
        Figure("warm copy, one stream", rate_1 / GB, "GB/s"),
        Figure(f"warm copy, {RECEIVERS} streams together", rate_n / GB, "GB/s"),
    ]


def measure_calls(shapes: Shapes, bucket: int) -> list[Figure]:
    """Calls of one version, with its parameters as they are and cut into ten times as many."""
    cut: Shapes = [(f"{name}.{part}", (-(-int(np.prod(shape)) // 10),)) for name, shape in shapes for part in range(10)]
    counts = []
    for version in (shapes, cut):
        buckets = len(layout_of(version, bucket).bucket_bytes)
        # A call for each bucket; for each receiver one with the layout, and a get for each bucket.
        counts.append(buckets + RECEIVERS * (1 + buckets))
    what = f"of those with {len(shapes):,} tensors"
    return [
        Figure(f"calls of a version of {len(shapes):,} tensors", counts[0], "calls"),
        Figure(f"calls of {len(cut):,} tensors of as many bytes", counts[1], "calls", counts[1] / counts[0], what),
    ]


def measure_generators(shape: Shape, bucket: int, repetitions: int, rate_1: float, rate_n: float) -> Outcome:
    """The same into RECEIVERS real vLLM engines.

    On a CPU each needs two copies, one into the model's tensors and one packed as oneDNN wants it, which takes half of
    its time.
    """
    # vLLM's CPU build holds a tied head in memory of its own.
    head = ("lm_head.weight", (shape.vocabulary, shape.hidden))
    layout = layout_of([*llama_shapes(shape.hidden, shape.layers, shape.vocabulary), head], bucket)
    publisher: Any = ray.remote(num_cpus=1)(Publisher).remote(layout)
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_policy(Path(folder) / "model", shape))
        spec = GeneratorSpec(model, dtype="float32", max_model_len=64, max_sequences=8, kv_cache_gib=0.1)
        generators: Any = [ray.remote(num_cpus=1)(VllmGenerator).remote(spec) for _ in range(RECEIVERS)]
        version = 0

        def update() -> None:
            nonlocal version
            version += 1
            buckets = [publisher.bucket.remote(version, index, math.inf) for index in range(len(layout.bucket_bytes))]
            weights = PublishedWeights(version, layout, tuple(buckets))
            fetch([g.update_weights.remote(weights) for g in generators], "the generators' updates", WAIT_S)

        seconds = interleave({"generators": update}, repetitions, warmups=2)
        for actor in (publisher, *generators):
            ray.kill(actor)
    wall, size = medians(seconds)["generators"], layout.total_bytes
    limit = 3 * size / rate_1 + RECEIVERS * 2 * size / rate_n
    figures = [
        Figure(
            f"{RECEIVERS} vLLM generators",
            wall,
            "s",
            wall / limit,
            "time of the copies, two in each",
            Goal(3, at_most=True),
        ),
        Figure("weights to each vLLM generator", size / wall / GB, "GB/s"),
    ]
    return Outcome(figures, {"bytes to vLLM": size}, seconds)
