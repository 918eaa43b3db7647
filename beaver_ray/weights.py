"""Model weights as numbered versions: a few large flat buckets of bytes, and a layout that says what lies where.

The layout follows from names, dtypes and shapes alone and is the same for every version. A version is announced with
it before its buckets exist: the trainer gathers and packs bucket i + 1 while a generator loads bucket i. A bucket
carries its version, its number and a checksum, so that a torn or mixed-up one is found before its bytes reach a
model; a generator takes its tensors as views, without a copy.

What to send is the sender's business. It must be `state_dict()`, not `named_parameters()`: with tied
embeddings the receiver needs `lm_head.weight` as well as the embedding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

BUCKET_BYTES = 128 * 2**20
"""Size of a bucket between trainer and generators: large enough that calls cost nothing, and a few fill a pipeline."""

ALIGNMENT = 64
"""Bytes. Every tensor starts at a multiple of it: a cache line, and a multiple of every element size."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes at `offset` of bucket number `bucket`."""

    name: str
    dtype: str  # torch's own name without the module: "float32", "bfloat16", ...
    shape: tuple[int, ...]
    bucket: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class AdapterInfo:
    """How a LoRA adapter is added to the weights of the folder `base`: W + alpha / rank * B @ A."""

    rank: int
    alpha: float
    base: str


@dataclass(frozen=True)
class Layout:
    """What lies where in every version; `bucket_bytes` has one item a bucket."""

    entries: tuple[TensorEntry, ...]
    bucket_bytes: tuple[int, ...]
    adapter: AdapterInfo | None = None
    """The tensors are those of an adapter alone; None for a whole model."""

    @property
    def total_bytes(self) -> int:
        return sum(self.bucket_bytes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.entries)

    def entries_of(self, index: int) -> tuple[TensorEntry, ...]:
        """The tensors of bucket ``index``, in their order."""
        return tuple(entry for entry in self.entries if entry.bucket == index)


@dataclass(frozen=True, eq=False)
class Bucket:
    """Some of a version's tensors. `data` is flat uint8: an array, a tensor on any device, or a reference to a tensor;
    `checksum` is that of `checksum_of`."""

    version: int
    index: int
    data: Any
    checksum: int


@dataclass(frozen=True)
class PublishedWeights:
    """A version: its layout, and its buckets or references to them, which may not be there yet."""

    version: int
    layout: Layout
    buckets: tuple[Any, ...]


def plan_layout(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    bucket_bytes: int = BUCKET_BYTES,
    adapter: AdapterInfo | None = None,
) -> Layout:
    """Lay tensors of these names, dtypes and shapes into buckets of at most `bucket_bytes` bytes, in their order.

    A tensor larger than a bucket gets a bucket of its own. Raises ValueError for a name that comes twice.
    """
    if bucket_bytes < ALIGNMENT:
        raise ValueError(f"bucket_bytes is {bucket_bytes}; it must be at least {ALIGNMENT}")
    entries: dict[str, TensorEntry] = {}
    sizes: list[int] = []
    for name, dtype, shape in tensors:
        if name in entries:
            raise ValueError(f"tensor '{name}' is given twice")
        nbytes = math.prod(shape) * dtype.itemsize
        start = math.ceil(sizes[-1] / ALIGNMENT) * ALIGNMENT if sizes else 0
        if not sizes or start + nbytes > bucket_bytes:
            start = 0
            sizes.append(0)
        entries[name] = TensorEntry(name, str(dtype).removeprefix("torch."), shape, len(sizes) - 1, start, nbytes)
        sizes[-1] = start + nbytes
    return Layout(tuple(entries.values()), tuple(sizes), adapter)


def pack_bucket(
    layout: Layout,
    version: int,
    index: int,
    tensors: Iterable[tuple[str, torch.Tensor]],
    memory: np.ndarray | torch.Tensor | None = None,
) -> Bucket:
    """Copy the tensors of bucket `index`, given in the layout's order, into flat memory.

    `tensors` is consumed lazily; none is held once its bytes are copied. `memory`, a flat uint8 array or tensor of at
    least the bucket's size, is what the bucket then lies in until its owner writes there again: the first touch of
    fresh memory costs some 30 times a later one. Raises ValueError for tensors that are not the layout's.
    """
    size = layout.bucket_bytes[index]
    data = np.empty(size, dtype=np.uint8) if memory is None else memory[:size]
    flat = flat_tensor(data)
    used = 0
    for entry, (name, tensor) in zip(layout.entries_of(index), tensors, strict=True):
        dtype = str(tensor.dtype).removeprefix("torch.")
        if (name, dtype, tuple(tensor.shape)) != (entry.name, entry.dtype, entry.shape):
            raise ValueError(
                f"weights version {version}, bucket {index}: expected {entry.name}, {entry.dtype} {entry.shape}; "
                f"got {name}, {dtype} {tuple(tensor.shape)}"
            )
        end = entry.offset + entry.nbytes
        # No earlier bytes stay in the gaps: equal weights have equal checksums.
        flat[used : entry.offset] = 0
        _copy_in(tensor, flat[entry.offset : end])
        used = end
    return Bucket(version, index, data, checksum_of(data))


def verify(weights: PublishedWeights, index: int, bucket: Bucket) -> None:
    """Raise ValueError unless `bucket` is bucket number `index` of this version, and as it was packed."""
    size = weights.layout.bucket_bytes[index]
    where = f"weights version {weights.version}, bucket {index} of {len(weights.layout.bucket_bytes)}"
    if (bucket.version, bucket.index) != (weights.version, index):
        raise ValueError(f"{where}: got bucket {bucket.index} of version {bucket.version}")
    data = bucket.data
    if data.dtype not in (np.uint8, torch.uint8) or tuple(data.shape) != (size,):
        raise ValueError(f"{where}: expected {size} flat uint8 bytes, got {data.dtype} {tuple(data.shape)}")
    checksum = checksum_of(data)
    if checksum != bucket.checksum:
        raise ValueError(f"{where}: checksum is {checksum:016x}, expected {bucket.checksum:016x}")


def checksum_of(data: np.ndarray | torch.Tensor) -> int:
    """Of flat bytes: the xxh3 (64 bit) of an array; of a tensor, which may lie on a GPU, the sum modulo 2^64 of its
    8-byte words and of the bytes after them."""
    if isinstance(data, np.ndarray):
        return xxhash.xxh3_64_intdigest(np.ascontiguousarray(data).data)
    whole = data.numel() // 8 * 8
    return int(data[:whole].view(torch.int64).sum() + data[whole:].sum()) % 2**64


def unpack(layout: Layout, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the named tensors of one bucket as views of its bytes; the views keep the bucket alive.

    The views must not be written to: an array from the object store is shared memory.
    """
    yield from views(layout, bucket.index, flat_tensor(bucket.data))


def flat_tensor(data: np.ndarray | torch.Tensor) -> torch.Tensor:
    """A bucket's bytes as a flat uint8 tensor that shares their memory."""
    if isinstance(data, torch.Tensor):
        return data
    with warnings.catch_warnings():
        # torch warns that it cannot mark a tensor read-only; nothing here writes to it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(data)


def views(layout: Layout, index: int, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the named tensors of bucket `index` as views of `flat`: its bytes, uint8, on any device."""
    for entry in layout.entries_of(index):
        dtype = getattr(torch, entry.dtype)
        part = flat[entry.offset : entry.offset + entry.nbytes]
        # torch refuses to see an empty slice as another dtype.
        whole = part.view(dtype) if entry.nbytes else torch.empty(0, dtype=dtype, device=flat.device)
        yield entry.name, whole.view(entry.shape)


def _copy_in(tensor: torch.Tensor, target: torch.Tensor) -> None:
    # One copy straight into the bucket, whatever the tensor's device and strides.
    if tensor.numel() == 0:
        return
    target.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
