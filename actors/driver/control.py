"""Orders to a running job from outside: how many rollout workers it should have.

The job starts one small actor under a name that the command line can find, and asks it now and then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray
from ray.util import list_named_actors

from actors.machine.cluster import Cluster, RayHandle, join_ray
from actors.machine.handles import Handle
from actors.machine.waits import fetch
from beaver_ray.errors import UserError

if TYPE_CHECKING:
    from actors.roles.generator import GeneratorSpec

NAMESPACE, PREFIX = "beaver-ray", "control:"
ANSWER_S = 30.0
ALWAYS: dict[str, Any] = {"max_restarts": -1, "max_task_retries": -1}  # Ray starts it anew wherever it can


class Control:
    """Actor that keeps the number of rollout workers ordered by `beaver-ray scale`; None until there is an order."""

    def __init__(self) -> None:
        self.rollouts: int | None = None

    def want_rollouts(self, count: int) -> None:
        """Order ``count`` rollout workers."""
        self.rollouts = count

    def wanted_rollouts(self) -> int | None:
        """The number of rollout workers last ordered, or None."""
        return self.rollouts


class GeneratorSupply:
    """Starts and stops rollout workers on a cluster, and asks how many were ordered."""

    def __init__(self, cluster: Cluster, spec: GeneratorSpec, run: str) -> None:
        self.cluster, self.spec = cluster, spec
        actor: Any = ray.remote(Control)
        try:
            self.control = actor.options(name=PREFIX + run, namespace=NAMESPACE, num_cpus=0, **ALWAYS).remote()
        except ValueError:
            raise UserError(f"a run called {run!r} is going on on this cluster already; set another name=...") from None
        cluster.actors["control"] = self.control

    def start(self) -> RayHandle:
        """Begin to start one more generator."""
        from actors.roles.generator import VllmGenerator  # the actor in this module needs no vLLM

        return self.cluster.start_another("rollout", VllmGenerator, (self.spec,))

    def stop(self, handle: Handle) -> None:
        """End a generator and give its resources back."""
        self.cluster.stop(handle)

    def wanted(self) -> Any:
        """A reference to the number of generators that somebody asked for, or to None."""
        return self.control.wanted_rollouts.remote()


def order_rollouts(run: str, count: int, address: str) -> None:
    """Tell the run of that name on the cluster at ``address`` to have ``count`` rollout workers.

    Raises UserError where no cluster answers or no such run is going on there.
    """
    join_ray(address, "--address, RAY_ADDRESS", namespace=NAMESPACE)
    try:
        going_on = [name.removeprefix(PREFIX) for name in list_named_actors() if name.startswith(PREFIX)]
        if run not in going_on:
            raise UserError(f"no run called {run!r} is going on there; going on: {', '.join(going_on) or 'none'}")
        control: Any = ray.get_actor(PREFIX + run)
        fetch(control.want_rollouts.remote(count), f"the run {run}", ANSWER_S)
    finally:
        ray.shutdown()
