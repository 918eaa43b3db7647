"""A version of the policy's weights for everybody who wants to read it, bucket by bucket."""

from __future__ import annotations

from typing import Protocol

from actors.machine.handles import Group
from beaver_ray.weights import Bucket, Layout, PublishedWeights


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
