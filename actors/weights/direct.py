"""Weights straight from the policy's GPU into the generators', past the object store: Ray Direct Transport over NIXL.

A bucket stays on the device that it was packed on, and whoever wants it reads it from there, one-sided: by CUDA IPC or
NVLink inside a node, by RDMA between nodes, whatever UCX finds. Nobody else has to take part, so that generators still
come for new weights when they are ready, join late and die without disturbing others; a collective, such as NCCL's
broadcast, would need all of them at once. `PolicyConfig.direct_weights` says where it is possible, `obstacle` whether
it works there.

Tried: between processes on CPUs, with tensors in main memory. Not tried so far: GPUs. NIXL keeps one core busy in each
process that has taken part. Ray 2.60 keeps a description of every bucket in each process that has read it (its issue
57962): 20 to 40 KB a bucket, measured over 2,400 of them. It gives up a read after a minute.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import ray
import torch
from ray.exceptions import RayError

from actors.machine.handles import Group
from actors.machine.waits import WaitTimeoutError, WeightsMissingError, WorkerDiedError
from actors.weights.publishing import Publisher, Reader
from beaver_ray.errors import cause, first_line
from beaver_ray.weights import Bucket, Layout, PublishedWeights, pack_bucket, plan_layout

TRANSPORT = "NIXL"
TRIAL, TRIAL_S = 2**17, 60.0  # numbers of 8 bytes, and seconds to read them


def put(data: torch.Tensor) -> ray.ObjectRef:
    """A reference by which other processes read ``data`` where it lies; it must not be written to any more."""
    return ray.put(data, _tensor_transport=TRANSPORT)


def put_bucket(
    layout: Layout, version: int, index: int, tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device
) -> Bucket:
    """A bucket that stays on ``device``: instead of its bytes it has the reference by which others read them there.

    Where the device has no room for it, or it cannot be put there, it has its bytes after all.
    """
    try:
        memory = torch.empty(layout.bucket_bytes[index], dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return pack_bucket(layout, version, index, tensors)
    bucket = pack_bucket(layout, version, index, tensors, memory)
    try:
        return replace(bucket, data=put(memory))
    except Exception as error:  # whatever NIXL and the transports under it may raise
        print(f"bucket {index} of weights version {version} goes through the object store: {first_line(error)}")
        return replace(bucket, data=memory.cpu())


def trial_weights(device: torch.device) -> PublishedWeights:
    """A version of one tensor on ``device``; raises whatever NIXL raises where it cannot be put there."""
    numbers = torch.arange(TRIAL, device=device)
    layout = plan_layout([("trial", numbers.dtype, tuple(numbers.shape))])
    memory = torch.empty(layout.total_bytes, dtype=torch.uint8, device=device)
    bucket = pack_bucket(layout, 0, 0, [("trial", numbers)], memory)
    return PublishedWeights(0, layout, (replace(bucket, data=put(memory)),))


def obstacle(policy: Group, generators: Group) -> str | None:
    """Why these generators cannot read what the policy puts on its device; None where all of them have just done so."""
    patient = replace(generators, timeout_s=2 * TRIAL_S)  # those that fail should say why themselves
    try:
        trial = policy.wait(policy.workers[0].call(Publisher.trial), "putting a trial of weights on its device")
        patient.wait(patient.call(Reader.read, trial, TRIAL_S), "reading a trial of weights from the policy's device")
    except RayError as error:
        return cause(error)
    except (WaitTimeoutError, WeightsMissingError, WorkerDiedError) as error:
        return str(error).splitlines()[0]
    return None
