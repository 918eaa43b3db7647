"""Models that are trained side by side on the cluster: who trains which, in what order, and what when one dies."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.driver.processes import open_cluster, start_role
from actors.driver.recovery import FAILURES
from actors.machine.handles import Startable
from actors.machine.waits import WorkerDiedError, fetch, wait_any
from actors.roles.ensemble import EnsembleWorker, Scored
from beaver_ray.errors import UserError
from beaver_ray.json_files import write_lines
from beaver_ray.manifest import file_hash
from beaver_ray.models.folders import fingerprint
from beaver_ray.runs import RunFolder
from beaver_ray.stage import Stage

SECONDS = 20.0
"""Of training between two looks at a worker."""


def nobody(name: str, scored: Scored) -> Sequence[Any]:
    """No model waits for another one."""
    return ()


def train_members(
    stage: Stage,
    members: Sequence[Any],
    folder: Path,
    run: RunFolder,
    follow: Callable[[str, Scored], Sequence[Any]] = nobody,
    total: int | None = None,
) -> dict[str, Scored]:
    """Train every member (stages that train one model, of different names); what each says of its held-out rows.

    follow: the members that could not begin before this one was finished, as they learn from what it says; it is
    called once for each, also of one that was finished in an earlier run. total: members with all that follow.

    What is known is kept in ``folder`` with a hash of what it was made of, so that a resumed run trains only the
    others. A worker that dies is started anew, and its member begins again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    queue = _Queue(folder, follow)
    queue.add(members)
    if queue.found:
        run.note(f"{len(queue.found)} of {total or len(members)} models are there already")
    if queue.pending:
        _work(stage, queue, run, (total or len(members)) - len(queue.found))
    return queue.found


class _Queue:
    """Members that are to be trained, and what is known of those that were."""

    def __init__(self, folder: Path, follow: Callable[[str, Scored], Sequence[Any]]) -> None:
        self.folder, self.follow = folder, follow
        self.pending: deque[Any] = deque()
        self.found: dict[str, Scored] = {}
        self.made_of: dict[str, str] = {}
        self.hashes: dict[str, str] = {}

    def add(self, members: Sequence[Any]) -> None:
        """Take on members, and what follows those that are known already."""
        for member in members:
            for path in _files(member):
                self.hashes.setdefault(path, file_hash(Path(path)))
            if member.model not in self.hashes:
                self.hashes[member.model] = fingerprint(member.model)
            self.made_of[member.name] = _made_of(member, self.hashes)
            kept = _read(self.folder / f"{member.name}.json", self.made_of[member.name], member)
            if kept is None:
                self.pending.append(member)
            else:
                self._know(member.name, kept)

    def begin(self, member: Any) -> None:
        """Forget what is kept of a member that is trained now: it is of other options, or was broken off."""
        (self.folder / f"{member.name}.json").unlink(missing_ok=True)
        for folder in filter(Path.is_dir, map(Path, member.model_folders)):
            shutil.rmtree(folder)

    def finish(self, name: str, scored: Scored) -> None:
        """Keep what a member says."""
        told = {"made_of": self.made_of[name], "loss": scored.loss, "scores": scored.scores.tolist()}
        write_lines(self.folder / f"{name}.json", [json.dumps(told | {"told": scored.told}) + "\n"])
        self._know(name, scored)

    def _know(self, name: str, scored: Scored) -> None:
        self.found[name] = scored
        self.add(self.follow(name, scored))


def _work(stage: Stage, queue: _Queue, run: RunFolder, total: int) -> None:
    (role,) = stage.roles()
    cluster = open_cluster(stage, [role])
    seconds = SECONDS if cluster else float("inf")
    deaths, pending = 0, queue.pending
    try:
        group = start_role(role, stage.cluster, cluster)
        if cluster:
            cluster.wait_started([group])
        idle = list(group.workers)
        busy: dict[Any, tuple[Any, Any]] = {}  # reference -> (worker, member)
        with run.progress("models", total) as progress:
            while pending or busy:
                while idle and pending:
                    worker, member = idle.pop(), pending.popleft()
                    queue.begin(member)
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
                    queue.begin(member)
                    # It may die of its start as well, which is looked at as its work is, while the others go on.
                    busy[group.workers[place].call(Startable.started)] = group.workers[place], member
                    continue
                if isinstance(answer, Scored):
                    deaths = 0
                    queue.finish(member.name, answer)
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
        scores = found[name].scores
        if len(scores) != len(of_model):
            raise RuntimeError(f"model {name} of the ensemble gives {len(scores)} scores of {len(of_model)} pairs")
        differences_MN[int(name.partition("_")[0]), of_model] = scores
    if not np.isfinite(differences_MN).all():
        raise UserError("a model of the ensemble gives scores that are not finite; lower the learning rate")
    return differences_MN


def _files(member: Any) -> list[str]:
    """The files that a member reads; many members read the same ones."""
    return [*(entry.path for entry in (*member.train, *member.eval)), *member.label_files]


def _made_of(member: Any, hashes: Mapping[str, str]) -> str:
    """A hash of a member's options, data, and the model that it starts from; not of where it is trained or lies."""
    places = {"cluster", "debug", "workspace", "model", "train", "eval", *member.places}
    options = member.model_dump_json(exclude=places)
    parts = [options, hashes[member.model], *(hashes[path] for path in _files(member))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _read(file: Path, made_of: str, member: Any) -> Scored | None:
    """What was kept of a member; None where there is nothing, or of other options or data, or its model is gone."""
    if not file.is_file():
        return None
    kept = json.loads(file.read_text(encoding="utf-8"))
    there = all((Path(folder) / "config.json").is_file() for folder in member.model_folders)
    if not there or kept.get("made_of") != made_of:
        return None
    return Scored(np.array(kept["scores"]), kept["loss"], kept["told"])
