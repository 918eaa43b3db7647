"""What the rollouts ask for from outside: more generators, and the policy's weights."""

from __future__ import annotations

from typing import Any, Protocol

from actors.machine.handles import Handle
from beaver_ray.weights import PublishedWeights


class Supply(Protocol):
    """Where generators come from, and how many are wanted."""

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
    """Where weights come from."""

    def gone(self) -> bool:
        """Whether the policy has died, and its weights with it."""
        ...

    def detour(self) -> None:
        """Let weights go through the object store from now on."""
        ...

    def publish_again(self, version: int) -> PublishedWeights:
        """The policy's weights as they are, which are ``version``: only while it is at nothing else."""
        ...
