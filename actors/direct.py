"""Weights straight from the policy's GPU into the generators', past the object store: Ray Direct Transport over NIXL.

A bucket stays on the device that it was packed on, and whoever wants it reads it from there, one-sided: by NVLink or
CUDA IPC inside a node, by RDMA between nodes, whatever UCX finds. Nobody else has to take part, so that generators
still come for new weights when they are ready, join late and die without disturbing others.
`SafePpoConfig.direct_weights` says when.

Tried: between processes on CPUs, with tensors in main memory. Not tried so far: GPUs. Ray 2.60 keeps a description of
every bucket in each process that has read it (its issue 57962): about 40 KB a bucket, measured over 2,400 of them. It
gives up a read after 60 s.
"""

from __future__ import annotations

import ray
import torch

TRANSPORT = "NIXL"


def put(data: torch.Tensor) -> ray.ObjectRef:
    """A reference by which other processes read ``data`` where it lies; it must not be written to any more."""
    return ray.put(data, _tensor_transport=TRANSPORT)
