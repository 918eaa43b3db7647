"""The GPUs of this machine, and how the roles of a run share one where its configuration asks for none."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from itertools import takewhile
from typing import TypeVar

from beaver_ray.config import Placement
from beaver_ray.errors import first_line
from beaver_ray.stage import Stage

MICRO_BATCH_TOKENS = 16_384
"""At least so many in one forward there: a recipe that asks for no GPU has micro-batches of a CPU's size, which leave a
GPU waiting (measured on an H100: 6.6 optimizer steps/s of a reward model of 1M parameters)."""

MEMORY_QUERY = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
"""Asks the driver for the memory of every GPU, in MiB."""

AnyStage = TypeVar("AnyStage", bound=Stage)


def visible_gpus() -> list[float]:
    """Memory in GiB of each NVIDIA GPU that this process may use; none where there is no driver."""
    try:
        answer = subprocess.run(MEMORY_QUERY, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        return []
    except (OSError, subprocess.TimeoutExpired) as error:
        _say_once(f"nvidia-smi cannot be asked ({first_line(error)}): no GPU is counted")
        return []
    if answer.returncode != 0:
        said = " ".join((answer.stdout or answer.stderr).split())
        _say_once(f"nvidia-smi failed ({said[:200]}): no GPU is counted")
        return []
    sizes = [float(line) / 1024 for line in answer.stdout.split()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return sizes
    # CUDA ends its list at the first that is no device: "-1" hides all.
    names = takewhile(lambda name: name and not name.startswith("-"), map(str.strip, visible.split(",")))
    return sizes[: len(list(names))]


def cluster_address(given: str | None = None) -> str | None:
    """The address of the Ray cluster that a run joins: the one that is given, else RAY_ADDRESS.

    None where it starts Ray on this machine: where both are unset or empty, or say "local".
    """
    address = given or os.environ.get("RAY_ADDRESS")
    return None if address in ("", "local") else address


@cache
def _say_once(line: str) -> None:
    print(line, flush=True)


def on_this_machine(config: AnyStage, address: str | None = None) -> AnyStage:
    """The configuration as it runs here: where it asks for no GPU and this machine has one, its roles share that.

    A run in one process, and one that joins a cluster, stay as they are. So does a machine whose GPUs are hidden
    (``CUDA_VISIBLE_DEVICES=``). ``address``: as of `cluster_address`.
    """
    asks = any(placement.gpus for placement in config.cluster.placement.values())
    if config.debug or cluster_address(address) or asks or not visible_gpus():
        return config
    return sharing_one_gpu(config)


def sharing_one_gpu(config: AnyStage) -> AnyStage:
    """All roles that hold a model on parts of one GPU (`RoleSpec.gpu_part`), whatever the configuration says of GPUs.

    A generator keeps to its part; the others take what they need, and their parts only say how many processes Ray puts
    on the GPU.

    One worker each: NCCL refuses two ranks on one GPU, and a second generator there would only halve the cache.
    Micro-batches are of MICRO_BATCH_TOKENS at least.
    """
    roles = config.roles()
    parts = {role.kind: role.gpu_part for role in roles if role.gpu_part and role.models}
    # A role without a model has the placement of its kind too: a rule beside cost models, say.
    whole = sum(parts.get(role.kind, 0) for role in roles)
    placement: dict[str, Placement] = dict(config.cluster.placement)
    for kind, own in parts.items():
        part = int(1e4 * own / whole) / 1e4  # Ray counts in steps of 1/10000
        placement[kind] = config.cluster.of(kind).model_copy(update={"gpus": part, "workers": 1})
    cluster = config.cluster.model_copy(update={"placement": placement})
    tokens = max(config.engine.micro_batch_tokens, MICRO_BATCH_TOKENS)
    engine = config.engine.model_copy(update={"micro_batch_tokens": tokens})
    return config.model_copy(update={"cluster": cluster, "engine": engine})
