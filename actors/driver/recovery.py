"""Checkpoints, resumed runs, and the death of any process but a generator's, which `Rollouts` replaces by itself.

A scorer, the reference or the experience builder holds nothing of its own: it is started anew and asked again. The
ranks of a trained model hold what cannot be had again: where one dies, its group starts anew and the whole run goes
back to the last checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ray.exceptions import RayTaskError

from actors.driver.policy_stage import PolicyStage
from actors.driver.processes import Roles, connect, start_roles
from actors.driver.rollouts import Rollouts
from actors.driver.training_state import TrainingState
from actors.machine.cluster import Cluster
from actors.machine.handles import Group, Method
from actors.machine.ranks import TrainingRank
from actors.machine.waits import WaitTimeoutError, WeightsMissingError, WorkerDiedError
from actors.roles.scorer import ScorerBase
from actors.weights.publishing import publish
from beaver_ray.checkpoints import Checkpoint
from beaver_ray.errors import cause
from beaver_ray.runs import RunFolder
from beaver_ray.weights import PublishedWeights

FAILURES = 3  # so many in a row, with no new step in between, end the run

Result = TypeVar("Result")


def start_surely(stage: PolicyStage, cluster: Cluster | None, note: Callable[[str], None]) -> Roles:
    """Start every role, all anew where one dies before all are ready; raises at the FAILURES-th death."""
    for _ in range(FAILURES - 1):
        try:
            return start_roles(stage, cluster)
        except WorkerDiedError as error:
            note(f"all processes are started anew: {error}")
            assert cluster is not None
            cluster.clear()
    return start_roles(stage, cluster)


class PolicyWeights:
    """Publishes the policy's weights again, through the object store where generators cannot read its device."""

    def __init__(self, roles: Roles, cluster: Cluster, note: Callable[[str], None]) -> None:
        self.roles, self.cluster, self.note = roles, cluster, note

    def gone(self) -> bool:
        """Whether the policy has died, and its weights with it."""
        return bool(self.cluster.dead([self.roles.policy]))

    def detour(self) -> None:
        """Let weights go through the object store from now on."""
        self.roles.direct = False
        self.note("weights go through the object store from now on")

    def republish(self, version: int) -> PublishedWeights:
        """Publish the policy's current weights, ``version``, once more; only while the policy is not training."""
        return publish(self.roles.policy, version, self.roles.direct)


class Recovery:
    """Checkpoints, restarts of dead processes and rollbacks of one run; without a cluster only checkpoints."""

    def __init__(
        self, state: TrainingState, roles: Roles, rollouts: Rollouts, run: RunFolder, cluster: Cluster | None
    ) -> None:
        self.state, self.roles, self.rollouts, self.run, self.cluster = state, roles, rollouts, run, cluster
        self.failures: Counter[str] = Counter()
        """Deaths of each process since the run was at its furthest step."""
        self.furthest = 0
        if cluster:
            rollouts.source = PolicyWeights(roles, cluster, run.note)

    def keep_going(self, action: Callable[[], None]) -> None:
        """Run ``action``; roll back to the last checkpoint and run it again whenever a rank dies.

        Where a rank has died, whatever comes out is its death: the other ranks fail in an exchange with it or wait for
        it to the deadline, and their error may be known first, to somebody who waits for what is made of their answers.
        """
        died: WorkerDiedError | None = None
        while True:
            try:
                if died is not None:
                    self._roll_back(died)
                return action()
            except WorkerDiedError as error:
                died = error
            except (RayTaskError, WeightsMissingError, WaitTimeoutError) as error:
                dead = self._dead(list(self._trained().values())) if self.cluster else []
                if not dead:
                    raise
                died = WorkerDiedError(f"{', '.join(dead)} died, and so it came to this: {cause(error)}")

    def save(self) -> None:
        """Write a checkpoint after a step: models as Hugging Face folders, optimizers, data positions, driver's state.

        Raises UserError where it cannot be written; earlier ones stay.
        """
        state = self.state.state_dict() | {"metrics_bytes": self.run.metrics_bytes()}
        with self.run.checkpoints.writing(self.state.step, state) as folder:
            self.save_models(folder)
            self._call_trained(TrainingRank.save_state, folder / "training")

    def save_models(self, folder: Path) -> None:
        """Save the policy and every critic as Hugging Face folders."""
        self._call_trained(TrainingRank.save, folder)

    def resume(self) -> None:
        """Restore the newest checkpoint, where there is one."""
        if checkpoint := self.run.last_checkpoint():
            self.rollouts.paused = True  # what generators began before they are told of it would be thrown away
            self._restore(checkpoint)
            self.rollouts.paused = False

    def survive(self, action: Callable[[bool], Result], needs_trained: bool = True) -> Result:
        """What ``action`` returns; where something died in it that can be had again, once more with True.

        That are processes without state, which are restarted, and finished sequences that were lost with their node,
        which are asked for again. Other deaths come out as WorkerDiedError, as does a rank's where ``needs_trained``.
        """
        died: WorkerDiedError | None = None
        mended = True
        while True:
            try:
                if died is not None:
                    mended = self._mend(died)
                return action(died is not None)
            except WorkerDiedError as error:
                if not mended or (needs_trained and self._dead(list(self._trained().values()))):
                    raise
                died = error

    def _mend(self, error: WorkerDiedError) -> bool:
        """Restart dead stateless roles and request lost samples again; returns whether there were any."""
        restarted = self._restart_stateless(error)
        if not restarted:
            self._count(["a process"], error)
        return self.rollouts.renew() or bool(restarted)

    def _roll_back(self, error: WorkerDiedError) -> None:
        """Restart what died and restore the last checkpoint, or the initial state where there is none."""
        checkpoint = self.run.checkpoints.newest()
        last = checkpoint.step if checkpoint else 0
        again = f"; steps {last + 1} to {self.state.step + 1} are trained again" if last <= self.state.step else ""
        self.run.note(f"rolled back to step {last}{again}: {error}")
        self.rollouts.paused = True
        stateless = self._restart_stateless(error)
        groups = list(self._trained().values())
        dead = {group.name: self._dead([group]) for group in groups}
        ranks = [name for names in dead.values() for name in names]
        if ranks or not stateless:
            self._count(ranks or ["a process"], error)
        # Ranks may be stuck in an exchange with one that is gone. Without a checkpoint all models start anew.
        broken = [group for group in groups if checkpoint is None or dead[group.name]]
        assert self.cluster is not None
        for group in broken:
            self.cluster.restart(group, list(group.workers))
        self.cluster.wait_started(broken)
        connect(broken)
        self._restore(checkpoint)
        self.rollouts.paused = False

    def _restore(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is None:
            self.state.reset()
            self.run.rewind(0)
        else:
            state = checkpoint.state()
            self.state.load_state_dict(state)
            self._call_trained(TrainingRank.load_state, checkpoint.folder / "training")
            self.run.rewind(state["metrics_bytes"])
        self.run.forget_trajectories(self.state.step)
        weights = publish(self.roles.policy, self.state.step, self.roles.direct)
        self.rollouts.restart(self.state.schedule, self.state.prompts, self.state.pending(), weights)

    def _trained(self) -> dict[str, Group]:
        """The trained groups (policy and critics) by the folder that each is saved in."""
        return {"policy": self.roles.policy, **self.roles.critics}

    def _call_trained(self, method: Method, folder: Path) -> None:
        """Call ``method`` on policy and critics at the same time, each with its folder under ``folder``, and wait."""
        started = [(group, group.call(method, str(folder / name))) for name, group in self._trained().items()]
        for group, references in started:
            group.wait(references, method.__name__)

    def _dead(self, groups: list[Group]) -> list[str]:
        assert self.cluster is not None
        return [worker.name for worker in self.cluster.dead(groups)]

    def _restart_stateless(self, error: WorkerDiedError) -> list[str]:
        """Count and restart dead scorers, held-out judges, reference and experience builder; returns their names."""
        assert self.cluster is not None
        roles = self.roles
        groups = [*roles.scorers.values(), *roles.judges.values(), roles.reference, roles.experience]
        dead = self._dead(groups)
        for name in dead:
            self.run.note(f"{name} is started anew: {error}")
        if dead:
            self._count(dead, error)  # not after its start: one that dies of that would be started for ever
        for group in groups:
            self.cluster.restart(group, [worker for worker in group.workers if worker.name in dead])
        self.cluster.wait_started([Group(g.name, [w for w in g.workers if w.name in dead], 0.0) for g in groups])
        for name, column, calibration in roles.calibrations:
            group = roles.scorers[name]
            new = [worker for worker in group.workers if worker.name in dead]
            group.wait([worker.call(ScorerBase.set_calibration, column, calibration) for worker in new], "calibrating")
        return dead

    def _count(self, dead: list[str], error: WorkerDiedError) -> None:
        # Steps that are only repeated are no progress.
        if self.run.furthest > self.furthest:
            self.failures.clear()
        self.furthest = self.run.furthest
        self.failures.update(dead)
        name, count = self.failures.most_common(1)[0]
        if count == FAILURES:
            raise RuntimeError(f"{name} died {FAILURES} times with no new step in between: {error}")
