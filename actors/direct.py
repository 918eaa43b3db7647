"""Weights straight from the policy's GPU into the generators', past the object store: Ray Direct Transport over NIXL.

A bucket stays on the device that it was packed on, and whoever wants it reads it from there, one-sided: by CUDA IPC or
NVLink inside a node, by RDMA between nodes, whatever UCX finds. Nobody else has to take part, so that generators still
come for new weights when they are ready, join late and die without disturbing others; a collective, such as NCCL's
broadcast, would need all of them at once. `SafePpoConfig.direct_weights` says where it is possible, `obstacle` whether
it works there.

Tried: between processes on CPUs, with tensors in main memory. Not tried so far: GPUs. NIXL keeps one core busy in each
process that takes part. Ray 2.60 keeps a description of every bucket in each process that has read it (its issue
57962): 20 to 40 KB a bucket, measured over 2,400 of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import ray
import torch
from ray.exceptions import RayError

from actors.handles import Group
from actors.waits import WaitTimeoutError, WeightsMissingError, WorkerDiedError, cause
from beaver_ray.weights import Bucket, Layout, pack_bucket

TRANSPORT = "NIXL"
TRIAL_S = 60.0  # to read 1 MiB


def put_bucket(
    layout: Layout, version: int, index: int, tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device
) -> Bucket:
    """A bucket that stays on ``device``: instead of its bytes it has the reference by which others read them there."""
    memory = torch.empty(layout.bucket_bytes[index], dtype=torch.uint8, device=device)
    bucket = pack_bucket(layout, version, index, tensors, memory)
    return replace(bucket, data=ray.put(memory, _tensor_transport=TRANSPORT))


def obstacle(policy: Group, generators: Group) -> str | None:
    """Why these generators cannot read what the policy puts on its device; None where all of them have just done so."""
    patient = replace(generators, timeout_s=2 * TRIAL_S)  # those that fail should say why themselves
    try:
        trial = policy.wait(policy.workers[0].call("trial"), "putting a trial of weights on its device")
        patient.wait(patient.call("read", trial, TRIAL_S), "reading a trial of weights from the policy's device")
    except RayError as error:
        return cause(error)
    except (WaitTimeoutError, WeightsMissingError, WorkerDiedError) as error:
        return str(error).splitlines()[0]
    return None
