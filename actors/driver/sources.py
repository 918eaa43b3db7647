"""What the rollouts ask for from outside: more generators, and the policy's weights."""

from __future__ import annotations

from typing import Any, Protocol

from actors.machine.handles import Handle
from beaver_ray.weights import PublishedWeights


class Supply(Protocol):
    """Starts and stops generators, and asks how many were ordered."""

    def start(self) -> Handle:
        """Begin to start one more generator; does not wait."""
        ...

    def stop(self, handle: Handle) -> None:
        """End a generator and give its resources back."""
        ...

    def wanted(self) -> Any:
        """A reference to the number of generators that somebody asked for, or to None."""
        ...


class Source(Protocol):
    """Publishes the policy's weights again where generators could not read them."""

    def gone(self) -> bool:
        """Whether the policy has died, and its weights with it."""
        ...

    def detour(self) -> None:
        """Let weights go through the object store from now on."""
        ...

    def republish(self, version: int) -> PublishedWeights:
        """Publish the policy's current weights, ``version``, once more; only while the policy is not training."""
        ...
