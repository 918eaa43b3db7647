"""A version of the policy's weights for everybody who wants to read it, bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

from ray.exceptions import RayError

from actors.machine.handles import Group
from actors.machine.waits import (
    WaitTimeoutError,
    WeightsLostError,
    WeightsMissingError,
    WeightsUnreadableError,
    WorkerDiedError,
    all_here,
    fetch,
)
from beaver_ray.errors import cause
from beaver_ray.weights import Bucket, Layout, PublishedWeights, verify


class Publisher(Protocol):
    """What a rank of the policy does for it; see `actors.roles.policy.PolicyTrainer`."""

    def layout(self) -> Layout:
        """What lies where in every version."""
        ...

    def bucket(self, version: int, index: int, direct: bool = False) -> Bucket | None:
        """One bucket of the weights as they are; None of the ranks that only help to gather it."""
        ...

    def trial(self) -> PublishedWeights:
        """A version of one tensor, to be tried whether others can read it on its device."""
        ...


class Reader(Protocol):
    """What a generator does with a version."""

    def read(self, weights: PublishedWeights, timeout_s: float) -> object:
        """Read all of it and use none of it; raises WeightsUnreadableError where that cannot be."""
        ...


def publish(policy: Group, version: int, direct: bool = False) -> PublishedWeights:
    """Make the policy's weights, as they are when it comes to this call, readable as ``version``.

    Returns at once: the ranks gather and pack one bucket after another, before anything else that is asked of them.
    ``direct``: they stay on the first rank's device, where generators read them.
    """
    layout = policy.wait(policy.workers[0].call(Publisher.layout), "laying out weights")
    buckets = [policy.call(Publisher.bucket, version, index, direct)[0] for index in range(len(layout.bucket_bytes))]
    return PublishedWeights(version, layout, tuple(buckets))


def checked_buckets(weights: PublishedWeights, timeout_s: float) -> Iterator[Bucket]:
    """The buckets of a version, each as soon as it is made: shared memory under Ray, or what was read off a device.

    Raises WeightsMissingError where one does not come (WeightsLostError where its maker died, WeightsUnreadableError
    where it stays on another device), ValueError for a damaged one.
    """
    for index, reference in enumerate(weights.buckets):
        what = f"weights version {weights.version}, bucket {index} of {len(weights.buckets)}"
        try:
            bucket = _read(fetch(reference, what, timeout_s), what, timeout_s)
        except WorkerDiedError as error:
            raise WeightsLostError(str(error)) from None
        except (WaitTimeoutError, RayError) as error:
            raise WeightsMissingError(f"{what} did not come: {error}") from None
        # While this one is loaded, those that are made already come from the policy's node to this one.
        all_here(weights.buckets[index + 1 :])
        verify(weights, index, bucket)
        yield bucket


def _read(bucket: Bucket, what: str, timeout_s: float) -> Bucket:
    """The bucket with its bytes here, or on this process's device."""
    try:
        return replace(bucket, data=fetch(bucket.data, what, timeout_s))
    except (WorkerDiedError, WaitTimeoutError, RayError) as error:
        raise WeightsUnreadableError(f"{what} cannot be read where it lies: {cause(error)}") from None
