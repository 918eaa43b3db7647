"""A version of weights in one call."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch

from beaver_ray.weights import BUCKET_BYTES, AdapterInfo, PublishedWeights, pack_bucket, plan_layout


def pack(
    tensors: Iterable[tuple[str, torch.Tensor]],
    version: int,
    bucket_bytes: int = BUCKET_BYTES,
    adapter: AdapterInfo | None = None,
) -> PublishedWeights:
    """A whole version at once, for tensors that are all at hand; each bucket in fresh memory."""
    given = list(tensors)
    layout = plan_layout([(name, t.dtype, tuple(t.shape)) for name, t in given], bucket_bytes, adapter)
    rest = iter(given)
    buckets = [
        pack_bucket(layout, version, index, islice(rest, len(layout.entries_of(index))))
        for index in range(len(layout.bucket_bytes))
    ]
    return PublishedWeights(version, layout, tuple(buckets))
