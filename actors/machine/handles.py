"""How the training loop holds a role: the same calls whether it lives in this process or on a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.machine.waits import fetch

Method = Callable[..., Any]
"""A method of a worker's class, or of a base or protocol of it: `Critic.values`. Its name alone is called."""


class Handle(Protocol):
    """One worker of a role."""

    name: str

    def call(self, method: Method, *args: Any, returns: int = 1) -> Any:
        """Start a method; gives a reference to its result (or ``returns`` references) without waiting."""
        ...


class Startable(Protocol):
    """What every worker on a cluster can be asked, whatever its class."""

    def started(self) -> None:
        """Return when the constructor has ended."""
        ...


class LocalHandle:
    """A role in this very process: a call runs at once and its result is its own reference."""

    def __init__(self, name: str, role: Any) -> None:
        self.name, self.role = name, role

    def call(self, method: Method, *args: Any, returns: int = 1) -> Any:
        """Run the method; an exception comes out right here, where a debugger can catch it."""
        return getattr(self.role, method.__name__)(*args)


@dataclass
class Group:
    """All workers of a role."""

    name: str
    workers: list[Any]
    timeout_s: float
    meanwhile: Callable[[list[Any], str, float], None] | None = None
    """What goes on while the caller waits for this group: (references, what they are, seconds to wait at most)."""

    _turns: int = 0

    def call(self, method: Method, *args: Any) -> list[Any]:
        """Start a method on every worker; references in the order of ranks."""
        return [worker.call(method, *args) for worker in self.workers]

    def next(self) -> Handle:
        """The next worker, round robin."""
        self._turns += 1
        return self.workers[(self._turns - 1) % len(self.workers)]

    def replace(self, worker: Handle, other: Handle) -> None:
        """Put ``other`` in ``worker``'s place."""
        self.workers[self.workers.index(worker)] = other

    def wait(self, references: Any, doing: str, needs: Sequence[Sequence[Any]] = ()) -> Any:
        """Results of this group's calls; the error at the deadline names who is late and what it was doing.

        ``needs``: what the calls wait for themselves, what comes first first.
        """
        what, started = f"{self.name} ({doing})", time.monotonic()
        if self.meanwhile is not None:
            self.meanwhile(references if isinstance(references, list) else [references], what, self.timeout_s)
        return fetch(references, what, self.timeout_s, needs, time.monotonic() - started)

    def run(self, method: Method, *args: Any) -> list[Any]:
        """Call a method on every worker and wait for all results."""
        return self.wait(self.call(method, *args), method.__name__)
