"""A run's folder: configuration, metrics, notes, and the progress that a user sees.

workspace/name/config.yaml        the resolved configuration
               metrics.jsonl      one object a step: ``step`` and flat keys, numbers finite or null
               notes.log          remarks about the run (dropped rows, recovered workers, ...)
               trajectories/      Parquet samples of the experience
               checkpoints/step_N/   complete or absent, never half (`beaver_ray.checkpoints`)
               final/             there only when the run is finished
               tensorboard/, wandb/   of the tracker, where one is chosen
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from beaver_ray.checkpoints import Checkpoint, Checkpoints
from beaver_ray.config import RunConfig
from beaver_ray.errors import UserError, first_line
from beaver_ray.json_files import read_json
from beaver_ray.yaml_files import other_settings, save_config

SECONDS_BETWEEN_LINES = 10.0
LARGEST_FIGURE = 1e300
LOCK = ".lock"
SELECTED = "selected.json"
"""Beside a model that is not the last step's: which step's it is."""
_BEFORE_THE_FIRST_STEP = {"config.yaml", "config.yaml.part", "notes.log", LOCK}


class RunFolder:
    """The folder of one run, made at once; ``trajectories`` and ``checkpoints`` exist, ``final`` does not.

    Raises UserError where the folder holds a run that has finished, or one that has started where the configuration
    does not say ``resume``, and where another process is at work on it. One that failed before its first step (nothing
    but configuration and notes) is used again.
    """

    def __init__(self, config: RunConfig) -> None:
        self.folder = config.folder
        self._lock = FileLock(self.folder / LOCK, timeout=0, thread_local=False)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._open(config)
        except Timeout:
            raise UserError(
                f"{self.folder} is being written by another process; wait for it, or choose another name=..."
            ) from None
        except OSError as error:
            self._lock.release()
            raise UserError(
                f"cannot write the run's folder {self.folder}: {error.strerror}; set another workspace=..."
            ) from None
        except UserError:
            self._lock.release()
            raise

    def _open(self, config: RunConfig) -> None:
        started = has_started(self.folder)
        if is_finished(self.folder):
            raise UserError(f"{self.folder} holds a finished run: choose another name=..., or delete that folder")
        if started and not config.resume:
            raise UserError(
                f"{self.folder} holds a run that was started: go on with resume=true, choose another name=..., "
                f"or delete that folder"
            )
        self.trajectories = self.folder / "trajectories"
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.keep_checkpoints)
        self.final = self.folder / "final"
        self.trajectories.mkdir(exist_ok=True)
        self.checkpoints.folder.mkdir(exist_ok=True)
        changes = other_settings(self.folder / "config.yaml", config) if started else []
        # However it came to its end, the run is that of this configuration.
        save_config(config.model_copy(update={"resume": False}), self.folder / "config.yaml")
        if not started:
            (self.folder / "notes.log").unlink(missing_ok=True)
        self._config = config
        self._metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._tracker: Any = None
        self.furthest = 0
        """The furthest step whose figures were logged since this run was started or resumed."""
        if changes:
            self.note(f"resumed with other settings: {', '.join(changes)}")

    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl, which `rewind` goes back to."""
        return self._metrics.tell()

    def rewind(self, metrics_bytes: int) -> None:
        """Forget all figures after the first ``metrics_bytes`` of metrics.jsonl."""
        self._metrics.truncate(metrics_bytes)
        self._metrics.seek(0, os.SEEK_END)

    def forget_trajectories(self, step: int) -> None:
        """Delete the samples of steps after this one, which are taken anew."""
        for file in self.trajectories.glob("step_*.parquet"):
            if step_of(file) > step:
                file.unlink()

    def last_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to resume from, with a note; None, with metrics.jsonl emptied, where the run starts anew."""
        checkpoint = self.checkpoints.newest()
        if checkpoint is None:
            self.rewind(0)
            self.note("there is no checkpoint to resume from: the run starts at its first step")
        else:
            self.note(f"resumed after step {checkpoint.step}")
        return checkpoint

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one step's figures to metrics.jsonl and to the tracker; nan and inf become null."""
        figures = {key: _finite(value) for key, value in metrics.items()}
        self._metrics.write(json.dumps({"step": int(step), **figures}, allow_nan=False) + "\n")
        self._metrics.flush()
        self.furthest = max(self.furthest, step)
        known = {key: value for key, value in figures.items() if value is not None}
        if self._config.tracker == "wandb":
            self._wandb().log(known, step=step)
        elif self._config.tracker == "tensorboard":
            for key, value in known.items():
                self._tensorboard().add_scalar(key, value, step)

    def note(self, *texts: str) -> None:
        """Print texts about the run, one line each, and keep them in notes.log."""
        for line in (" ".join(text.split()) for text in texts):
            print(line, flush=True)
            with (self.folder / "notes.log").open("a", encoding="utf-8") as notes:
                notes.write(line + "\n")

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Progress]:
        """Shows how far the work is: a bar on a terminal, elsewhere a plain line about every 10 s."""
        progress = Progress(title, total)
        try:
            yield progress
        finally:
            progress.close()

    def close(self) -> None:
        """Flush and close metrics and tracker, and leave the folder to others; may be called twice."""
        self._metrics.close()
        self._lock.release()
        if self._tracker is not None:
            if self._config.tracker == "wandb":
                self._tracker.finish()
            else:
                self._tracker.close()
            self._tracker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Trackers start with the first figures, so that a run that fails before them leaves nothing behind.

    def _wandb(self) -> Any:
        if self._tracker is None:
            import wandb

            # A resumed run goes on under its id; offline both parts are synchronised into one.
            known = self.folder / "wandb" / "run_id"
            if not known.is_file():
                known.parent.mkdir(exist_ok=True)
                known.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
            self._tracker = wandb.init(
                project="beaver-ray",
                id=known.read_text(encoding="utf-8").strip(),
                resume="allow",
                name=self._config.name,
                dir=self.folder,
                config=self._config.model_dump(mode="json"),
                mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            )
        return self._tracker

    def _tensorboard(self) -> Any:
        if self._tracker is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tracker = SummaryWriter(str(self.folder / "tensorboard"))
        return self._tracker


def say_rows(label: str, rows: int, seconds: float) -> None:
    """How far the tokenising of a data set is."""
    print(
        f"tokenising {label}: {rows:,} rows, {duration(seconds)}, {rows / max(seconds, 1e-9):,.0f} a second", flush=True
    )


class Progress:
    """How far a piece of work is; ``advance`` takes the latest figures, the ones worth seeing."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self._started = self._printed_at = time.monotonic()
        self._printed_done = 0
        self._figures = ""
        self._bar: Any = None
        if sys.stdout.isatty():
            self._start_bar()

    def advance(self, n: int = 1, /, **figures: float | str) -> None:
        """``n`` more pieces are done."""
        self.done += n
        if figures:
            self._figures = "  ".join(f"{name} {_short(value)}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, figures=self._figures)
        elif self.done >= self.total or time.monotonic() - self._printed_at >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def reach(self, done: int, /, **figures: float | str) -> None:
        """Set the number of finished pieces, which a rollback makes smaller."""
        self.advance(done - self.done, **figures)

    def close(self) -> None:
        """Say where the work ended, if that was not said yet."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self.done > self._printed_done:
            self._print_line()

    def _print_line(self) -> None:
        elapsed = duration(time.monotonic() - self._started)
        line = f"{self.title} {self.done}/{self.total}  {elapsed}  {self._figures}"
        print(line.rstrip(), flush=True)
        self._printed_at, self._printed_done = time.monotonic(), self.done

    def _start_bar(self) -> None:
        from rich import progress as rich_progress

        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TimeRemainingColumn(),
            rich_progress.TextColumn("{task.fields[figures]}", markup=False),
        )
        self._task = self._bar.add_task(self.title, total=self.total, figures="")
        self._bar.start()


class _Figure(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)

    mean: float
    low: float | None
    high: float | None
    n: int
    limit: float = math.inf
    target: float = 1.0

    @model_validator(mode="after")
    def _two_ends(self) -> Self:
        if (self.low is None) != (self.high is None):
            raise ValueError("an interval has two ends or none")
        return self


class _Score(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)

    value: float
    stderr: float | None


class _TaskScores(BaseModel):
    """What another program found (launch/bridges/), with whatever else is kept beside it."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    version: int | float | str | None
    n: int
    scores: dict[str, _Score]


class _Evaluation(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, _Figure | int | float | str | None]

    prompts: int = 0
    samples: int = 0
    reward: _Figure | None = None
    optimum: float | None = None
    share_of_optimum: _Figure | None = None
    bridges: dict[str, dict[str, _TaskScores]] = {}

    @model_validator(mode="after")
    def _figures(self) -> Self:
        own = self.model_fields_set - {"bridges"} | self.__pydantic_extra__.keys()
        features = any(key.startswith("features/") for key in own)  # of a score model, which nobody rewards
        whole = {"prompts", "samples"} <= own and (self.reward is not None or features)
        if (own or not self.bridges) and not whole:
            raise ValueError("prompts, samples or reward is missing")
        if "share_of_optimum" in self.model_fields_set and (self.share_of_optimum is None or self.optimum is None):
            raise ValueError("share_of_optimum needs figures, and an optimum")
        for key, value in self.__pydantic_extra__.items():
            measured = ("cost/", "bounded/", "violation_rate/", "unsafe_share/", "features/")
            if key.startswith(measured) and not isinstance(value, _Figure):
                raise ValueError(f"{key} has no figures")
        return self


def has_started(folder: Path) -> bool:
    """Whether a run left anything in its folder besides configuration, notes and an empty metrics file."""
    return any(
        path.is_file()
        and path.name not in _BEFORE_THE_FIRST_STEP
        and (path.name != "metrics.jsonl" or path.stat().st_size > 0)
        for path in folder.rglob("*")
    )


def is_finished(folder: Path) -> bool:
    """Whether a run's final models are there."""
    return (folder / "final").is_dir()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The objects of a run's metrics.jsonl in order; a last line without its end (a killed run) is left out.

    Raises UserError where there is no such file or a line is not what `RunFolder.log` writes.
    """
    path = Path(folder) / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        raise UserError(f"no run in {folder}: it has no metrics.jsonl; give the folder of a run") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}); a run cannot have written it") from None
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not JSON ({first_line(error)}); remove that line") from None
        if not isinstance(row, dict) or type(row.get("step")) is not int or not all(map(_is_figure, row.values())):
            raise UserError(f"{path} line {number} is not a step with figures, numbers or null; remove that line")
        rows.append(row)
    return rows


def read_evaluation(folder: Path) -> dict[str, Any]:
    """A run's evaluation.json (`evaluation.summarize`), empty where there is none; UserError for anything else."""
    path = folder / "evaluation.json"
    if not path.is_file():
        return {}
    try:
        return _Evaluation.model_validate_json(path.read_bytes()).model_dump(exclude_unset=True)
    except (OSError, ValidationError) as error:
        raise UserError(f"{path} is no evaluation ({first_line(error)}); evaluate again") from None


def step_of(file: Path) -> int:
    """The step that a file of ``trajectories`` is of, by its name; 0 where that names none."""
    digits = re.findall(r"\d+", file.stem)
    return int(digits[0]) if digits else 0


def kept_step(folder: Path) -> int | None:
    """The step whose model a run has kept (``select: accuracy``); None where that is the last one's."""
    kept = next(folder.glob(f"final/*/{SELECTED}"), None) or next(folder.glob(f"final.part/*/{SELECTED}"), None)
    found = None if kept is None else read_json(kept)
    return None if found is None else int(found["step"])


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _is_figure(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and abs(value) <= LARGEST_FIGURE)  # not so for nan


def _finite(value: float | None) -> float | int | None:
    if value is None or isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
