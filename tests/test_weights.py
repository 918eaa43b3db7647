"""Packed buckets: what goes in comes out, bit for bit, and lies where the layout says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from beaver_ray.weights import TensorEntry, checksum_of, pack_bucket, plan_layout, unpack, verify
from tests.packed_weights import pack

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.bool]


def random_tensor(seed: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(seed))
    return values > 0 if dtype == torch.bool else (values / 7).to(dtype)


named_tensors = st.lists(
    st.tuples(st.integers(0, 1000), st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3).map(tuple)),
    max_size=12,
).map(lambda specs: [(f"t{i}", random_tensor(*spec)) for i, spec in enumerate(specs)])


@given(tensors=named_tensors, bucket_bytes=st.integers(64, 2000))
def test_round_trip(tensors: list[tuple[str, torch.Tensor]], bucket_bytes: int) -> None:
    packed = pack(tensors, version=3, bucket_bytes=bucket_bytes)
    for index, bucket in enumerate(packed.buckets):
        verify(packed, index, bucket)
    out = [pair for bucket in packed.buckets for pair in unpack(packed.layout, bucket)]
    assert [name for name, _ in out] == [name for name, _ in tensors]
    for (_, got), (name, sent) in zip(out, tensors, strict=True):
        assert got.dtype == sent.dtype and got.shape == sent.shape, name
        assert torch.equal(got, sent), name
    for entry in packed.layout.entries:
        assert entry.offset % 64 == 0
    for size, bucket in zip(packed.layout.bucket_bytes, packed.buckets, strict=True):
        alone = [e for e in packed.layout.entries if e.nbytes > bucket_bytes]
        assert size == bucket.data.size and (size <= bucket_bytes or size in {e.nbytes for e in alone})


def test_offsets_by_hand() -> None:
    tensors = [
        ("a", torch.float32, (10,)),  # 40 bytes at 0
        ("b", torch.bfloat16, (3, 7)),  # 42 bytes at 64, ends at 106
        ("c", torch.int64, (20,)),  # 160 bytes: 128 + 160 > 256, so the next bucket
        ("big", torch.float32, (75,)),  # 300 bytes > 256: a bucket of its own
        ("d", torch.float32, ()),  # 4 bytes, a fresh bucket
    ]
    layout = plan_layout(tensors, bucket_bytes=256)
    assert layout.entries == (
        TensorEntry("a", "float32", (10,), 0, 0, 40),
        TensorEntry("b", "bfloat16", (3, 7), 0, 64, 42),
        TensorEntry("c", "int64", (20,), 1, 0, 160),
        TensorEntry("big", "float32", (75,), 2, 0, 300),
        TensorEntry("d", "float32", (), 3, 0, 4),
    )
    assert layout.bucket_bytes == (106, 160, 300, 4)
    assert layout.total_bytes == 570
    assert [entry.name for entry in layout.entries_of(0)] == ["a", "b"]


def test_a_bucket_is_made_alone_from_tensors_asked_for_one_by_one_and_strides_do_not_matter() -> None:
    tensors = {f"t{i}": torch.arange(16.0).reshape(4, 4).T + i for i in range(6)}
    layout = plan_layout([(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()], bucket_bytes=128)
    memory = np.empty(128, dtype=np.uint8)

    def lazily() -> Iterator[tuple[str, torch.Tensor]]:
        yield "t2", tensors["t2"]
        # Already copied before the next one is asked for.
        assert torch.equal(torch.from_numpy(memory[:64]).view(torch.float32).view(4, 4), tensors["t2"])
        yield "t3", tensors["t3"]

    bucket = pack_bucket(layout, 9, 1, lazily(), memory)
    assert np.shares_memory(bucket.data, memory)
    for name, tensor in unpack(layout, bucket):
        assert torch.equal(tensor, tensors[name])
    whole = pack(tensors.items(), 9, 128)
    assert [b.index for b in whole.buckets] == [0, 1, 2] and whole.buckets[1].checksum == bucket.checksum


def test_equal_weights_have_equal_checksums_whatever_was_in_the_memory() -> None:
    tensors = [("a", torch.ones(3)), ("b", torch.ones(5))]
    layout = plan_layout([(name, t.dtype, tuple(t.shape)) for name, t in tensors], 256)
    one, two = (pack_bucket(layout, 1, 0, tensors, np.full(256, fill, dtype=np.uint8)) for fill in (0, 255))
    assert one.checksum == two.checksum


@pytest.mark.parametrize("size", [1, 7, 8, 64, 129])
def test_the_checksum_of_a_tensor_by_hand(size: int) -> None:
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    raw = bytes(data.tolist())
    whole = size - size % 8
    words = sum(int.from_bytes(raw[start : start + 8], "little") for start in range(0, whole, 8))
    assert checksum_of(data) == (words + sum(raw[whole:])) % 2**64
    for position in range(size):
        other = data.clone()
        other[position] ^= 1
        assert checksum_of(other) != checksum_of(data)


def test_a_bucket_in_a_tensor_is_the_bucket_in_an_array() -> None:
    tensors = [("a", torch.arange(5)), ("b", torch.tensor(1.5)), ("c", torch.empty(0)), ("d", torch.ones(3, 2).T)]
    packed = pack(tensors, version=2)
    memory = torch.full((packed.layout.total_bytes,), 255, dtype=torch.uint8)
    bucket = pack_bucket(packed.layout, 2, 0, tensors, memory)
    assert bucket.data.data_ptr() == memory.data_ptr()
    assert torch.equal(bucket.data, torch.from_numpy(packed.buckets[0].data))
    verify(packed, 0, bucket)
    assert all(
        torch.equal(got, sent) for (_, got), (_, sent) in zip(unpack(packed.layout, bucket), tensors, strict=True)
    )
    memory[3] += 1
    with pytest.raises(ValueError, match="weights version 2, bucket 0 of 1: checksum is"):
        verify(packed, 0, bucket)


def test_a_damaged_or_swapped_bucket_is_named() -> None:
    packed = pack([("a", torch.ones(16)), ("b", torch.zeros(16))], version=7, bucket_bytes=64)
    good = packed.buckets[1]
    data = good.data.copy()
    data[63] ^= 1
    with pytest.raises(ValueError, match="version 7, bucket 1 of 2: checksum"):
        verify(packed, 1, replace(good, data=data))
    with pytest.raises(ValueError, match="version 7, bucket 0 of 2: got bucket 1 of version 7"):
        verify(packed, 0, good)
    with pytest.raises(ValueError, match="version 7, bucket 1 of 2: got bucket 1 of version 6"):
        verify(packed, 1, replace(good, version=6))
    with pytest.raises(ValueError, match="bucket 1 of 2: expected 64 flat uint8 bytes"):
        verify(packed, 1, replace(good, data=good.data[:-1]))


def test_views_share_a_read_only_bucket_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    packed = pack([("a", torch.arange(4.0))], version=0)
    bucket = packed.buckets[0]
    bucket.data.flags.writeable = False
    ((_, view),) = unpack(packed.layout, bucket)
    assert view.data_ptr() == bucket.data.ctypes.data
    assert not [w for w in recwarn if "writable" in str(w.message)]


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="'a' is given twice"):
        pack([("a", torch.ones(1)), ("a", torch.ones(1))], 0)
    with pytest.raises(ValueError, match="at least 64"):
        pack([], 0, bucket_bytes=10)
    assert pack([], 0).buckets == ()


@pytest.mark.parametrize("other", [("b", torch.ones(2)), ("a", torch.ones(3)), ("a", torch.ones(2).half())])
def test_tensors_that_are_not_the_layouts_are_refused(other: tuple[str, torch.Tensor]) -> None:
    layout = plan_layout([("a", torch.float32, (2,))])
    with pytest.raises(ValueError, match=r"version 5, bucket 0: expected a, float32 \(2,\); got"):
        pack_bucket(layout, 5, 0, [other])
    with pytest.raises(ValueError, match=r"longer|shorter"):
        pack_bucket(layout, 5, 0, [("a", torch.ones(2))] * 2)
    with pytest.raises(ValueError, match=r"longer|shorter"):
        pack_bucket(layout, 5, 0, [])
