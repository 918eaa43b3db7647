"""Model weights as numbered versions: a few large flat buckets of bytes and a manifest that says what lies
where.

The trainer packs its tensors one by one (under ZeRO-3 each is gathered only when it is asked for) and hands
every full bucket to `put`, usually `ray.put`; a generator takes the buckets in order and unpacks them as
views, without a copy. A bucket is identified by (version, index) and carries a checksum, so that a torn or
mixed-up bucket is found before its bytes reach a model.

What to send is the sender's business. It must be `state_dict()`, not `named_parameters()`: with tied
embeddings the receiver needs `lm_head.weight` as well as the embedding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
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
class Manifest:
    """The contents of one version; `bucket_bytes` and `checksums` (xxh3, 64 bit) have one item a bucket."""

    version: int
    entries: tuple[TensorEntry, ...]
    bucket_bytes: tuple[int, ...]
    checksums: tuple[int, ...]
    adapter: AdapterInfo | None = None
    """The tensors are those of an adapter alone; None for a whole model."""

    @property
    def total_bytes(self) -> int:
        return sum(self.bucket_bytes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.entries)


@dataclass(frozen=True)
class PublishedWeights:
    """A manifest and its buckets: flat uint8 numpy arrays, or whatever `put` gave back for them."""

    manifest: Manifest
    buckets: tuple[Any, ...]

    @property
    def version(self) -> int:
        return self.manifest.version


def pack(
    tensors: Iterable[tuple[str, torch.Tensor]],
    version: int,
    bucket_bytes: int = BUCKET_BYTES,
    put: Callable[[np.ndarray], Any] | None = None,
    buffer: np.ndarray | None = None,
    adapter: AdapterInfo | None = None,
) -> PublishedWeights:
    """Pack named tensors into buckets of at most `bucket_bytes` bytes, in the order in which they come.

    `tensors` is consumed lazily; no tensor is held once its bytes are copied. A tensor larger than a bucket
    gets a bucket of its own.

    `put` is called with every full bucket and must COPY it (as `ray.put` does): the next bucket is written
    into the same memory, because the first touch of fresh memory costs some 30 times a later one. `buffer`,
    a flat uint8 array of at least `bucket_bytes`, lets the caller keep that memory from one version to the
    next. Without `put` the arrays themselves are kept, and each bucket is written into fresh memory.
    """
    if bucket_bytes < ALIGNMENT:
        raise ValueError(f"bucket_bytes is {bucket_bytes}; it must be at least {ALIGNMENT}")
    if buffer is not None and (put is None or buffer.dtype != np.uint8 or buffer.size < bucket_bytes):
        raise ValueError("buffer must be a flat uint8 array of at least bucket_bytes, and needs a put that copies")

    entries: list[TensorEntry] = []
    sizes: list[int] = []
    checksums: list[int] = []
    buckets: list[Any] = []
    seen: set[str] = set()
    current: np.ndarray | None = None
    used = 0

    def emit(filled: np.ndarray) -> None:
        sizes.append(filled.size)
        checksums.append(xxhash.xxh3_64_intdigest(filled.data))
        buckets.append(filled if put is None else put(filled))

    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"weights version {version}: tensor '{name}' is given twice")
        seen.add(name)
        nbytes = tensor.numel() * tensor.element_size()
        start = math.ceil(used / ALIGNMENT) * ALIGNMENT
        if current is not None and start + nbytes > bucket_bytes:
            emit(current[:used])
            current, used, start = None, 0, 0
        if nbytes > bucket_bytes:
            target = np.empty(nbytes, dtype=np.uint8)
        else:
            if current is None:
                if buffer is None or put is None:
                    buffer = np.empty(bucket_bytes, dtype=np.uint8)
                current = buffer
            target = current
        # No bytes of an earlier bucket stay in the gaps: equal weights have equal checksums.
        target[used:start] = 0
        _copy_in(tensor, target[start : start + nbytes])
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(TensorEntry(name, dtype, tuple(tensor.shape), len(sizes), start, nbytes))
        if nbytes > bucket_bytes:
            emit(target)
        else:
            used = start + nbytes
    if current is not None:
        emit(current[:used])
    manifest = Manifest(version, tuple(entries), tuple(sizes), tuple(checksums), adapter)
    return PublishedWeights(manifest, tuple(buckets))


def verify(manifest: Manifest, index: int, bucket: np.ndarray) -> None:
    """Raise ValueError unless `bucket` is, byte for byte, bucket number `index` of the manifest's version."""
    where = f"weights version {manifest.version}, bucket {index} of {len(manifest.bucket_bytes)}"
    if bucket.dtype != np.uint8 or bucket.ndim != 1 or bucket.size != manifest.bucket_bytes[index]:
        raise ValueError(
            f"{where}: expected {manifest.bucket_bytes[index]} flat uint8 bytes, got {bucket.dtype} {bucket.shape}"
        )
    checksum = xxhash.xxh3_64_intdigest(np.ascontiguousarray(bucket).data)
    if checksum != manifest.checksums[index]:
        raise ValueError(f"{where}: checksum is {checksum:016x}, expected {manifest.checksums[index]:016x}")


def unpack(
    manifest: Manifest, index: int, bucket: np.ndarray, check: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the named tensors of one bucket as CPU views of its bytes; the views keep the bucket alive.

    The views must not be written to: an array from the object store is shared memory. `check=False` leaves
    the checksum out, for a bucket that `verify` has already passed.
    """
    if check:
        verify(manifest, index, bucket)
    yield from views(manifest, index, flat_tensor(bucket))


def flat_tensor(bucket: np.ndarray) -> torch.Tensor:
    """A bucket's bytes as a flat uint8 CPU tensor that shares its memory."""
    with warnings.catch_warnings():
        # torch warns that it cannot mark a tensor read-only; nothing here writes to it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(bucket)


def views(manifest: Manifest, index: int, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the named tensors of bucket `index` as views of `flat`: its bytes, uint8, on any device."""
    for entry in manifest.entries:
        if entry.bucket == index:
            dtype = getattr(torch, entry.dtype)
            part = flat[entry.offset : entry.offset + entry.nbytes]
            # torch refuses to see an empty slice as another dtype.
            whole = part.view(dtype) if entry.nbytes else torch.empty(0, dtype=dtype, device=flat.device)
            yield entry.name, whole.view(entry.shape)


def _copy_in(tensor: torch.Tensor, target: np.ndarray) -> None:
    # One copy straight into the bucket, whatever the tensor's device and strides.
    if tensor.numel() == 0:
        return
    torch.from_numpy(target).view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
