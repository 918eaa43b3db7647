"""Stages that train one model on a data set: the trainer's ranks, the steps, and what follows when a rank dies."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from actors.driver.processes import connect, open_cluster, start_role
from actors.driver.recovery import FAILURES
from actors.driver.trainer_stage import TrainerStage
from actors.machine.handles import Group
from actors.machine.waits import WorkerDiedError
from actors.roles.trainer import Trainer
from beaver_ray.data.token_files import keep_tokens
from beaver_ray.fit import check_fit
from beaver_ray.json_files import read_json, write_json
from beaver_ray.models.loading import check_model_folder, load_tokenizer
from beaver_ray.runs import SELECTED, RunFolder, read_metrics, say_rows

BEST = "best"
"""Folder of a checkpoint with the best model up to then."""


def train_on_data(stage: TrainerStage, run: RunFolder) -> None:
    """Train the stage's model; its ranks start anew, from the last checkpoint, where one dies."""
    check_model_folder(stage.model, "model")
    run.note(*check_fit(stage))
    _have_tokens(stage)
    roles = stage.roles()
    cluster = open_cluster(stage, roles)
    try:
        trainer = start_role(roles[0], stage.cluster, cluster)
        resume, deaths, furthest = stage.resume, 0, 0
        while True:
            try:
                if cluster:
                    cluster.wait_started([trainer])
                connect([trainer])
                return _train(stage, trainer, run, resume)
            except WorkerDiedError as error:
                # Steps that are only repeated are no progress.
                deaths, furthest = 1 if run.furthest > furthest else deaths + 1, run.furthest
                if deaths == FAILURES:
                    raise RuntimeError(f"{deaths} deaths with no new step in between: {error}") from None
                run.note(f"the trainer is started anew: {error}")
                # All ranks: the others may be stuck in an exchange with the one that is gone.
                assert cluster is not None
                cluster.restart(trainer, list(trainer.workers))
                resume = True
    finally:
        if cluster:
            cluster.close()


def _have_tokens(stage: TrainerStage) -> None:
    """Tokenise large data here, where it is seen how far that is; the ranks then read what is on disk."""
    tokenizer = load_tokenizer(stage.model, stage.trust_remote_code)
    for specs in (stage.train, stage.eval):
        keep_tokens(stage.dataset(), specs, tokenizer, stage.max_tokens, stage.template, say_rows)


def _train(stage: TrainerStage, trainer: Group, run: RunFolder, resume: bool) -> None:
    """All steps, an evaluation after each epoch and at the end, and the saved model.

    With ``resume`` it goes on from the newest checkpoint, where there is one.
    """
    steps, epoch_steps, notes = trainer.run(Trainer.describe)[0]
    for note in notes:
        run.note(note)
    began = time.perf_counter()
    final = run.folder / "final.part" / stage.trained
    done, began = _resume(trainer, run, began, final) if resume else (0, began)
    kept = _read_best(final) if done else None
    metrics: dict[str, float] = {}
    if done >= steps:  # resumed with fewer epochs than its checkpoint has
        metrics = _evaluation(trainer)
        if stage.selects:
            kept = _keep_best(trainer, final, done, metrics, kept)
    with run.progress(stage.stage, steps) as progress:
        progress.done = done
        for step in range(done + 1, steps + 1):
            started = time.perf_counter()
            figures = trainer.run(Trainer.train_step)[0]
            seconds = time.perf_counter() - started
            tokens = figures.pop("tokens")
            metrics = {_rename(name): value for name, value in figures.items()}
            if step % epoch_steps == 0 or step == steps:
                metrics |= _evaluation(trainer)
                if stage.selects:
                    kept = _keep_best(trainer, final, step, metrics, kept)
            metrics |= {
                "time/elapsed": time.perf_counter() - began,
                "time/step": seconds,
                "throughput/tokens_per_second": tokens / seconds,
            }
            run.log(step, metrics)
            if stage.save_every and step % stage.save_every == 0 and step < steps:
                state = {"step": step, "elapsed": metrics["time/elapsed"], "metrics_bytes": run.metrics_bytes()}
                with run.checkpoints.writing(step, state) as folder:
                    trainer.run(Trainer.save_state, str(folder / "training"))
                    if kept is not None:
                        shutil.copytree(final, folder / BEST)
            progress.advance(loss=metrics["loss"])
    if kept is None:
        trainer.run(Trainer.save, str(final))
    else:
        mean = ", the mean over heads," if "eval/accuracy_cost" in metrics else ""
        run.note(f"the model of step {kept.step} is kept, held-out accuracy{mean} {kept.accuracy:.3f}")
        evaluated = [row for row in read_metrics(run.folder) if "eval/loss" in row]
        metrics = next((row for row in evaluated if row["step"] == kept.step), metrics)
    figures = {k: v for k, v in metrics.items() if k.startswith("eval/") and k != "eval/pairs" and v is not None}
    run.note(", ".join(f"{k} {v:.3f}" for k, v in figures.items()))


class _Best(NamedTuple):
    """The model in final.part, where that of the best held-out accuracy is kept."""

    step: int
    accuracy: float


def _keep_best(trainer: Group, folder: Path, step: int, metrics: dict[str, float], best: _Best | None) -> _Best:
    """Save the model where its held-out accuracy, the mean over heads, is above all before; returns what is kept."""
    accuracies = [value for name, value in metrics.items() if name in ("eval/accuracy", "eval/accuracy_cost")]
    now = _Best(step, sum(accuracies) / len(accuracies))
    if best is not None and now.accuracy <= best.accuracy:
        return best
    # What is kept is written beside the model, last: a model without it was broken off.
    file = folder / SELECTED
    file.unlink(missing_ok=True)
    trainer.run(Trainer.save, str(folder))
    write_json(file, now._asdict())
    return now


def _read_best(folder: Path) -> _Best | None:
    kept = read_json(folder / SELECTED)
    return None if kept is None else _Best(**kept)


def _resume(trainer: Group, run: RunFolder, began: float, final: Path) -> tuple[int, float]:
    """Restore the newest checkpoint; returns its step, and the start time that makes elapsed time go on.

    The best model so far, in ``final``, becomes the one that it was then: a later one is of steps that are not the
    run's any more.
    """
    shutil.rmtree(final, ignore_errors=True)
    checkpoint = run.last_checkpoint()
    if checkpoint is None:
        return 0, began
    if (checkpoint.folder / BEST).is_dir():
        shutil.copytree(checkpoint.folder / BEST, final)
    state = checkpoint.state()
    trainer.run(Trainer.load_state, str(checkpoint.folder / "training"))
    run.rewind(state["metrics_bytes"])
    return checkpoint.step, began - state["elapsed"]


def _evaluation(trainer: Group) -> dict[str, float]:
    shares: Sequence[dict[str, float]] = trainer.run(Trainer.evaluate)
    found = {f"eval/{_rename(name)}": sum(s[name] for s in shares) for name in shares[0]}
    found |= {"eval/pairs": float(trainer.run(Trainer.held_out)[0])} if "accuracy" in shares[0] else {}
    sizes: dict[str, float] = trainer.run(Trainer.sizes)[0]
    return found | sizes


def _rename(name: str) -> str:
    return "accuracy_sign" if name == "sign_accuracy" else name
