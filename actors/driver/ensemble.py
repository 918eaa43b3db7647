"""An ensemble of score models, trained side by side on the cluster: who trains which, and what when one dies."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.driver.processes import open_cluster, start_role
from actors.driver.recovery import FAILURES
from actors.machine.handles import Group
from actors.machine.waits import WorkerDiedError, fetch, wait_any
from actors.roles.ensemble import EnsembleWorker, Scored
from beaver_ray.errors import UserError
from beaver_ray.manifest import file_hash, write_lines
from beaver_ray.models.folders import fingerprint
from beaver_ray.runs import RunFolder
from beaver_ray.stage import Stage

SECONDS = 20.0
"""Of training between two looks at a worker."""


def train_members(stage: Stage, members: Sequence[Any], folder: Path, run: RunFolder) -> dict[str, Scored]:
    """Train every member (stages reward_model of different names) and return what each says of its held-out pairs.

    What is known is kept in ``folder`` with a hash of what it was made of, so that a resumed run trains only the
    others. A worker that dies is started anew, and its member begins again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start = fingerprint(members[0].model)
    hashes = {path: file_hash(Path(path)) for path in {path for member in members for path in _files(member)}}
    made_of = {member.name: _made_of(member, start, hashes) for member in members}
    kept = {name: _read(folder / f"{name}.json", made) for name, made in made_of.items()}
    found = {name: scored for name, scored in kept.items() if scored is not None}
    pending = deque(member for member in members if member.name not in found)
    if found:
        run.note(f"{len(found)} of {len(members)} models of the ensemble are there already")
    if not pending:
        return found

    def finished(name: str, scored: Scored) -> None:
        found[name] = scored
        told = {"made_of": made_of[name], "loss": scored.loss, "differences": scored.differences_N.tolist()}
        write_lines(folder / f"{name}.json", [json.dumps(told) + "\n"])

    _work(stage, pending, run, finished)
    return found


def _work(stage: Stage, pending: deque[Any], run: RunFolder, finished: Callable[[str, Scored], None]) -> None:
    (role,) = stage.roles()
    cluster = open_cluster(stage, [role])
    seconds = SECONDS if cluster else float("inf")
    total, deaths = len(pending), 0
    try:
        group = start_role(role, stage.cluster, cluster)
        if cluster:
            cluster.wait_started([group])
        idle = list(group.workers)
        busy: dict[Any, tuple[Any, Any]] = {}  # reference -> (worker, member)
        with run.progress("models of the ensemble", total) as progress:
            while pending or busy:
                while idle and pending:
                    worker, member = idle.pop(), pending.popleft()
                    busy[worker.call(EnsembleWorker.work, member, seconds)] = worker, member
                what = f"training {', '.join(member.name for _, member in busy.values())}"
                ready = wait_any(list(busy), what, stage.cluster.step_timeout)
                worker, member = busy.pop(ready)
                try:
                    answer = fetch(ready, f"training {member.name}", stage.cluster.step_timeout)
                except WorkerDiedError as error:
                    deaths += 1
                    if deaths == FAILURES:
                        raise RuntimeError(f"{deaths} deaths with no member finished in between: {error}") from None
                    run.note(f"{worker.name} is started anew, and {member.name} begins again: {error}")
                    assert cluster is not None
                    place = group.workers.index(worker)
                    cluster.restart(group, [worker])
                    cluster.wait_started([Group(group.name, [group.workers[place]], 0.0)])
                    idle.append(group.workers[place])
                    pending.appendleft(member)
                    continue
                if isinstance(answer, Scored):
                    deaths = 0
                    finished(member.name, answer)
                    idle.append(worker)
                    progress.advance(loss=answer.loss)
                else:
                    busy[worker.call(EnsembleWorker.work, member, seconds)] = worker, member
    finally:
        if cluster:
            cluster.close()


def gather(found: Mapping[str, Scored], rows: Mapping[str, np.ndarray], members: int, count: int) -> np.ndarray:
    """The differences [M, N] of all members over all pairs; ``rows`` are those that a model scores, by its name "m_f".

    Raises UserError for scores that are not finite, RuntimeError where a model gives another number of them than it
    has pairs.
    """
    differences_MN = np.full((members, count), np.nan)
    for name, of_model in rows.items():
        scores = found[name].differences_N
        if len(scores) != len(of_model):
            raise RuntimeError(f"model {name} of the ensemble gives {len(scores)} scores of {len(of_model)} pairs")
        differences_MN[int(name.partition("_")[0]), of_model] = scores
    if not np.isfinite(differences_MN).all():
        raise UserError("a model of the ensemble gives scores that are not finite; lower the learning rate")
    return differences_MN


def _files(member: Any) -> list[str]:
    """The files that a member reads; many members read the same ones."""
    return [entry.path for entry in (*member.train, *member.eval)]


def _made_of(member: Any, start: str, hashes: Mapping[str, str]) -> str:
    """A hash of a member's options, data, and the hash of the model that it starts from; not of where it is trained."""
    options = member.model_dump_json(exclude={"cluster", "debug", "workspace", "train", "eval"})
    parts = [options, start, *(hashes[path] for path in _files(member))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _read(file: Path, made_of: str) -> Scored | None:
    """What was kept of a member; None where there is nothing, or of other options or data."""
    if not file.is_file():
        return None
    kept = json.loads(file.read_text(encoding="utf-8"))
    return Scored(np.array(kept["differences"]), kept["loss"]) if kept["made_of"] == made_of else None
