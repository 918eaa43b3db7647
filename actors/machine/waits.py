"""The one place that waits for another process: every wait has a name and a deadline.

Ray's own waits stand in this file only; a test keeps it so.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.state import get_actor, list_tasks
from ray.util.state.exception import RayStateApiException

from beaver_ray.errors import UserError

_SECONDS_TO_ASK = 10
_SECONDS_TO_COME = 1.0  # for an answer that is there, from another node
_SECONDS_TO_DIE = 5.0  # the ranks of a group fail one after another when one of them has died
_LOST = (RayActorError, ObjectLostError)
POLL_S = 0.05


class WorkerDiedError(RuntimeError):
    """The process that owed an answer is gone, or its answer is, with its node; the message says what Ray knows."""


class WaitTimeoutError(RuntimeError):
    """Something did not answer in time; the message names it."""


class WeightsMissingError(RuntimeError):
    """New weights did not come, by no fault of the process that waited; the message says which bucket, and why."""


class WeightsLostError(WeightsMissingError, WorkerDiedError):
    """New weights did not come because the process that owed them is gone, or its node."""


class WeightsUnreadableError(WeightsMissingError):
    """New weights could not be read on the policy's device: the policy is gone, or this process cannot."""


def fetch(thing: Any, what: str, timeout_s: float, needs: Sequence[Sequence[Any]] = (), waited_s: float = 0.0) -> Any:
    """The value of an object reference, or of a list of them; anything else is returned as it is.

    ``waited_s``: how much of the time has gone by already.
    ``needs``: references that the answers wait for themselves, what comes first first. Raises WaitTimeoutError that
    names ``what``, the processes that did not answer and what they were doing at the deadline, WorkerDiedError where a
    process ended that an answer came or depended from, and the other side's UserError or WeightsMissingError.
    """
    refs = thing if isinstance(thing, list) else [thing]
    if not any(isinstance(ref, ray.ObjectRef) for ref in refs):
        return thing
    try:
        return ray.get(thing, timeout=max(timeout_s - waited_s, min(timeout_s, _SECONDS_TO_COME)))
    except GetTimeoutError:
        _, late = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        count = f"{len(late)} of {len(refs)} answers" if len(refs) > 1 else "the answer"
        silent = describe(next(filter(None, map(_late, needs)), late))
        raise WaitTimeoutError(f"{what}: {count} did not come within {timeout_s:g} s; {silent}") from None
    except _LOST as error:
        raise WorkerDiedError(f"{what}: its process died: {_brief(error)}") from None
    except RayTaskError as error:
        if isinstance(error.cause, (UserError, WeightsMissingError)):
            raise error.cause from None
        if death := _death(error, refs):
            raise WorkerDiedError(f"{what}: a process died: {_brief(death)}") from None
        raise


def _brief(error: Exception) -> str:
    """Ray's word of a death without colours, and without its guesses at causes, which fill a screen."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).partition(" Some common causes include")[0]


def _late(refs: Sequence[Any]) -> list[Any]:
    ready = ready_now(refs)
    return [ref for ref in refs if ref not in ready]


def _death(error: RayTaskError, refs: Sequence[Any]) -> Exception | None:
    """The death of another process that this error, or that of another of the answers, comes from."""
    if isinstance(error.cause, (*_LOST, WorkerDiedError)):
        return error.cause
    return next(iter(find_lost(refs, _SECONDS_TO_DIE).values()), None)


def find_lost(refs: Sequence[Any], timeout_s: float) -> dict[Any, Exception]:
    """Those of ``refs`` of which it is known, within that time, that they will not come; with Ray's word of why.

    Their process has ended, or the node that they lay on. What does come, comes to this process.
    """
    if not refs:
        return {}
    ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s, fetch_local=False)
    lost: dict[Any, Exception] = {}
    for ref in ready:
        try:
            ray.get(ref, timeout=timeout_s)
        except _LOST as error:
            lost[ref] = error
        except (RayTaskError, GetTimeoutError):
            continue
    return lost


def wait_any(refs: Sequence[Any], what: str, timeout_s: float, needs: Sequence[Sequence[Any]] = ()) -> Any:
    """The first of ``refs`` that is ready; what is no reference is ready.

    Raises WaitTimeoutError that names ``what`` and the silent processes at the deadline; ``needs`` as for `fetch`.
    """
    for ref in refs:
        if not isinstance(ref, ray.ObjectRef):
            return ref
    ready, late = ray.wait(list(refs), num_returns=1, timeout=timeout_s, fetch_local=False)
    if not ready:
        silent = describe(next(filter(None, map(_late, needs)), late))
        raise WaitTimeoutError(f"{what}: none of {len(refs)} answers came within {timeout_s:g} s; {silent}")
    return ready[0]


def wait_some(refs: Sequence[Any], what: str, timeout_s: float, needs: Sequence[Sequence[Any]] = ()) -> list[Any]:
    """Those of ``refs`` that are ready: several of many where they come within a moment, else the first.

    See `wait_any`. A wait costs as much as it has references, so that among many it is not for each of them.
    """
    if all(isinstance(ref, ray.ObjectRef) for ref in refs):
        several = max(1, len(refs) // 8)
        ray.wait(list(refs), num_returns=several, timeout=min(POLL_S, timeout_s), fetch_local=False)
    if ready := ready_now(refs):
        return ready
    return [wait_any(refs, what, timeout_s, needs)]


def ready_now(refs: Sequence[Any]) -> list[Any]:
    """Those of ``refs`` that are ready at this moment; what is no reference is ready."""
    pending = [ref for ref in refs if isinstance(ref, ray.ObjectRef)]
    if not pending:
        return list(refs)
    done, _ = ray.wait(pending, num_returns=len(pending), timeout=0, fetch_local=False)
    return [*done, *(ref for ref in refs if not isinstance(ref, ray.ObjectRef))]


def all_here(refs: Sequence[Any]) -> bool:
    """Whether all of ``refs`` lie on this node at this moment; those that only lie on another begin to come."""
    pending = [ref for ref in refs if isinstance(ref, ray.ObjectRef)]
    return not pending or not ray.wait(pending, num_returns=len(pending), timeout=0, fetch_local=True)[1]


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
    seen = f"{actor.name or actor.class_name} ({state}) was {', '.join(doing) or 'running nothing'}"
    return f"{seen}; its log: ray logs actor --id {actor_id}"


def _seconds_since(started_ms: float | None) -> str:
    return "an unknown time" if not started_ms else f"{time.time() - started_ms / 1000:.0f} s"
