"""The GPUs of this machine, and how the roles of a run share one where its configuration asks for none."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from typing import TypeVar

from beaver_ray.config import Placement, SafePpoConfig, StageConfig
from beaver_ray.signals import critics, scorers

PARTS = {
    "rollout": 6,
    "policy": 4,
    "reward_critic": 2,
    "cost_critic": 2,
    "reward": 1,
    "cost": 1,
    "reference": 1,
    "trainer": 1,
}
"""Of one GPU that all roles share, relative to each other. A generator keeps to its part; the others take what they
need, and their parts only say how many processes Ray puts on the GPU."""

MICRO_BATCH_TOKENS = 16_384
"""At least so many in one forward there: a recipe that asks for no GPU has micro-batches of a CPU's size, which leave a
GPU waiting (measured on an H100: 6.6 optimizer steps/s of a reward model of 1M parameters)."""

Stage = TypeVar("Stage", bound=StageConfig)


def visible_gpus() -> list[float]:
    """Memory in GiB of each NVIDIA GPU that this process may use; none where there is no driver."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    sizes = [float(line) / 1024 for line in answer.stdout.split()] if answer.returncode == 0 else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return sizes if visible is None else sizes[: len([d for d in visible.split(",") if d.strip()])]


def on_this_machine(config: Stage) -> Stage:
    """The configuration as it runs here: where it asks for no GPU and this machine has one, its roles share that.

    A run in one process, and one that joins a cluster, stay as they are. So does a machine whose GPUs are hidden
    (``CUDA_VISIBLE_DEVICES=``).
    """
    joins = os.environ.get("RAY_ADDRESS") not in (None, "local")
    asks = any(placement.gpus for placement in config.cluster.placement.values())
    if config.debug or joins or asks or not visible_gpus():
        return config
    return sharing_one_gpu(config)


def sharing_one_gpu(config: Stage) -> Stage:
    """All roles but the experience builder on parts of one GPU, whatever the configuration says of GPUs.

    One worker each: NCCL refuses two ranks on one GPU, and a second generator there would only halve the cache.
    Micro-batches are of MICRO_BATCH_TOKENS at least.
    """
    kinds = role_counts(config)
    whole = sum(PARTS[kind] * count for kind, count in kinds.items())
    placement: dict[str, Placement] = dict(config.cluster.placement)
    for kind in kinds:
        part = int(1e4 * PARTS[kind] / whole) / 1e4  # Ray counts in steps of 1/10000
        placement[kind] = config.cluster.of(kind).model_copy(update={"gpus": part, "workers": 1})
    cluster = config.cluster.model_copy(update={"placement": placement})
    tokens = max(config.engine.micro_batch_tokens, MICRO_BATCH_TOKENS)
    engine = config.engine.model_copy(update={"micro_batch_tokens": tokens})
    placed: Stage = config.model_copy(update={"cluster": cluster, "engine": engine})  # type: ignore[assignment]
    return placed


def role_counts(config: StageConfig) -> Counter[str]:
    """How many roles of each kind hold a model in this stage; the kind is the key under cluster.placement."""
    if not isinstance(config, SafePpoConfig):
        return Counter(["trainer"])
    kinds = ["rollout", "policy", *(s.kind for s in scorers(config)), *(c.kind for c in critics(config))]
    return Counter(kinds if config.models.adapter_off_is_reference else [*kinds, "reference"])
