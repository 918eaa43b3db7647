"""The one place that waits for another process: every wait has a name and a deadline.

Ray's own waits stand in this file only; a test keeps it so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.state import get_actor, list_tasks
from ray.util.state.exception import RayStateApiException

from beaver_ray.errors import UserError

_SECONDS_TO_ASK = 10


class WorkerDiedError(RuntimeError):
    """The process that owed an answer is gone; the message names it and says what Ray knows of its end."""


class WaitTimeoutError(RuntimeError):
    """Something did not answer in time; the message names it."""


def fetch(thing: Any, what: str, timeout_s: float) -> Any:
    """The value of an object reference, or of a list of them; anything else is returned as it is.

    Raises WaitTimeoutError that names ``what``, the processes that did not answer and what they were doing at the
    deadline, WorkerDiedError where their process ended, and UserError where the other side raised one.
    """
    refs = thing if isinstance(thing, list) else [thing]
    if not any(isinstance(ref, ray.ObjectRef) for ref in refs):
        return thing
    try:
        return ray.get(thing, timeout=timeout_s)
    except GetTimeoutError:
        _, late = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        count = f"{len(late)} of {len(refs)} answers" if len(refs) > 1 else "the answer"
        raise WaitTimeoutError(f"{what}: {count} did not come within {timeout_s:g} s; {describe(late)}") from None
    except RayActorError as error:
        raise WorkerDiedError(f"{what}: its process died: {error}") from None
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


def wait_any(refs: Sequence[Any], what: str, timeout_s: float) -> Any:
    """The first of ``refs`` that is ready; what is no reference is ready.

    Raises WaitTimeoutError that names ``what`` and the silent processes at the deadline.
    """
    for ref in refs:
        if not isinstance(ref, ray.ObjectRef):
            return ref
    ready, late = ray.wait(list(refs), num_returns=1, timeout=timeout_s, fetch_local=False)
    if not ready:
        raise WaitTimeoutError(f"{what}: none of {len(refs)} answers came within {timeout_s:g} s; {describe(late)}")
    return ready[0]


def wait_some(refs: Sequence[Any], what: str, timeout_s: float) -> list[Any]:
    """All of ``refs`` that are ready as soon as one is; see `wait_any`."""
    first = wait_any(refs, what, timeout_s)
    others = ready_now([ref for ref in refs if ref is not first])
    return [first, *others]


def ready_now(refs: Sequence[Any]) -> list[Any]:
    """Those of ``refs`` that are ready at this moment; what is no reference is ready."""
    pending = [ref for ref in refs if isinstance(ref, ray.ObjectRef)]
    if not pending:
        return list(refs)
    done, _ = ray.wait(pending, num_returns=len(pending), timeout=0, fetch_local=False)
    return [*done, *(ref for ref in refs if not isinstance(ref, ray.ObjectRef))]


def wait_placed(group: PlacementGroup, timeout_s: float) -> bool:
    """Whether Ray has reserved the group's bundles, at the latest at the deadline."""
    return group.wait(timeout_s)


def describe(refs: Sequence[Any]) -> str:
    """Who owes these answers, and what each of these processes was last seen doing."""
    actors = dict.fromkeys(ref.task_id().actor_id() for ref in refs if isinstance(ref, ray.ObjectRef))
    return "; ".join(_last_seen(actor.hex()) for actor in actors if not actor.is_nil()) or "no process owes them"


def _last_seen(actor_id: str) -> str:
    # Without an address it would look for any cluster on this machine.
    ask: dict[str, Any] = {"address": ray.get_runtime_context().gcs_address, "timeout": _SECONDS_TO_ASK}
    try:
        actor = get_actor(actor_id, **ask)
        running = list_tasks(filters=[("actor_id", "=", actor_id), ("state", "=", "RUNNING")], detail=True, **ask)
    except RayStateApiException:
        return f"actor {actor_id} (what it does is not known: the cluster's dashboard does not answer)"
    if actor is None:
        return f"actor {actor_id} (unknown to the cluster)"
    doing = [f"running {task.func_or_class_name} for {_seconds_since(task.start_time_ms)}" for task in running]
    state = f"{str(actor.state).lower()}, node {(actor.node_id or 'none yet')[:8]}, pid {actor.pid}"
    return f"{actor.name or actor.class_name} ({state}) was {', '.join(doing) or 'running nothing'}"


def _seconds_since(started_ms: float | None) -> str:
    return "an unknown time" if not started_ms else f"{time.time() - started_ms / 1000:.0f} s"
