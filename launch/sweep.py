"""`beaver-ray sweep`: one stage at several values of its options and several seeds, and how its figures differ."""

from __future__ import annotations

import itertools
import re
import shlex
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from actors.driver.policy_stage import PolicyStage
from beaver_ray.errors import UserError, last_line
from beaver_ray.report.sweep import SweepReport, SweptRun, run_figures, shown
from beaver_ray.stage import Stage
from beaver_ray.yaml_files import as_yaml, yaml_value
from launch.config_files import load_config
from launch.pipeline import is_complete, run_stage
from launch.planning import plan
from launch.terminal import table_console

OWN = ("name", "workspace", "seed", "resume")
"""Options that are no values to compare: where runs lie, how they go on, and what --seeds says."""

LONGEST = 240
"""Bytes of a folder's name; file systems have 255."""


class Swept(NamedTuple):
    """One run of a sweep: its values by the keys that are swept, its seed, and its stage."""

    values: dict[str, Any]
    seed: int
    stage: Stage


def sweep(config: Path, overrides: Sequence[str], over: Sequence[str], seeds: Sequence[int]) -> Path:
    """Run what is not complete yet, print a table, and return the path of sweep.html.

    Raises UserError: before anything runs, for what is wrong in a value or would be in the way; at the end, when all
    else has run and the figures are written, for runs that have failed.
    """
    axes = dict(map(read_axis, over))
    if len(axes) < len(over):
        raise UserError("--over has the same key twice; give all its values at once")
    if own := [key for key in axes if key in OWN]:
        raise UserError(f"--over {own[0]}: the sweep says that of each run itself; seeds are given as --seeds 0,1")
    folder, runs = plan_runs(config, list(overrides), axes, seeds)
    complete = [is_complete(run.stage) for run in runs]
    pending = [run.stage for run, done in zip(runs, complete, strict=True) if not done]
    memory = {}
    for run in runs:
        made = plan(run.stage)
        made.check()
        memory[run.stage.name] = made.host_gib + made.gpu_gib
    if done := len(runs) - len(pending):
        print(f"{done} of {len(runs)} runs are complete, skipped", flush=True)
    failed = _run(pending)
    found = []
    for run in runs:
        if run.stage.name in failed:
            continue
        try:
            figures = run_figures(run.stage.folder) | {"memory/planned_gib": memory[run.stage.name]}
        except UserError as without:
            failed[run.stage.name] = without
        else:
            found.append(SweptRun(Path(run.stage.name).name, run.values, run.seed, figures))
    if found:
        words = ["beaver-ray", "sweep", str(config), *overrides, *(w for text in over for w in ("--over", text))]
        command = shlex.join([*words, *(["--seeds", ",".join(map(str, seeds))] if seeds else [])])
        report = SweepReport(f"{runs[0].stage.stage} by {' and '.join(axes)}", command, list(axes), found)
        table_console().print(report.table())
        for line in report.lines():
            print(line)
        print(f"page: {report.write(folder)}, with sweep.json and sweep.csv beside it")
    if failed:
        name, error = next(iter(failed.items()))
        raise UserError(f"{len(failed)} of {len(runs)} runs failed; {name}: {error}")
    return folder / "sweep.html"


def read_axis(text: str) -> tuple[str, list[Any]]:
    """The key and its values of KEY=VALUE,VALUE,...; UserError where it is none."""
    key, equals, values = text.partition("=")
    try:
        found = yaml_value(f"[{values}]") if equals and key.strip() else None
    except ValueError:
        found = None
    if not isinstance(found, list) or not found:
        raise UserError(f"--over {text!r} must look like KEY=VALUE,VALUE; quote a value that has a comma")
    return key.strip(), found


def plan_runs(
    config: Path, overrides: list[str], axes: dict[str, list[Any]], seeds: Sequence[int]
) -> tuple[Path, list[Swept]]:
    """The sweep's folder, workspace/NAME-by-KEY, and its runs: every combination of values with every seed, or the
    configuration's own.

    Raises UserError for values that a stage cannot have, for two runs of one name, where the held-out data would change
    with the training data, and for a policy that nothing is held out for.
    """
    base = load_config(config, overrides)
    own = f"{base.name}-by-{_plain('-'.join(axes))}"
    runs = []
    for chosen in itertools.product(*axes.values()):
        values = dict(zip(axes, chosen, strict=True))
        changes = [f"{key}={as_yaml(value)}" for key, value in values.items()]
        parts = [f"{key}-{shown(value)}" for key, value in values.items()]
        for seed in seeds or [base.seed]:
            label = _plain("_".join([*parts, f"seed-{seed}"]))
            if (size := len(label.encode())) > LONGEST:
                raise UserError(
                    f"--over: a run's folder is named by its values, and {label[:60]}... has {size} bytes, of which "
                    f"{LONGEST} fit: give shorter values, or fewer keys at once"
                )
            stage = load_config(config, [*overrides, *changes, f"seed={seed}", f"name={as_yaml(f'{own}/{label}')}"])
            runs.append(Swept(values, seed, stage))
    if any(isinstance(run.stage, PolicyStage) and not run.stage.evaluation.prompts for run in runs):
        raise UserError(f"{config}: runs would leave no held-out figures to compare; set evaluation.prompts")
    names = [run.stage.name for run in runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two runs of the sweep would be called {twice}: give each value and each seed once")
    if any(key.partition(".")[0] == "train" for key in axes) and not base.data_sets[1]:
        raise UserError(f"{config}: held-out data would be split off other training data in each run; name them (eval)")
    return Path(base.workspace) / own, runs


def _plain(text: str) -> str:
    """As the name of one folder."""
    return re.sub(r"[^\w.+-]+", "_", text)


def _run(stages: Sequence[Stage]) -> dict[str, UserError]:
    """Run the stages, one after another in debug mode, else side by side on Ray; the errors of those that failed."""
    failed: dict[str, UserError] = {}
    alone = [stage for stage in stages if stage.debug]
    for number, stage in enumerate(alone, start=1):
        print(f"[{number}/{len(alone)}] {stage.name}", flush=True)
        try:
            run_stage(stage)
        except UserError as error:
            _tell(stage, error, failed)
        except Exception as error:  # a bug, which is shown; the other runs need not end with it
            traceback.print_exc()
            _tell(stage, UserError(last_line(error)), failed)
    if on_ray := [stage for stage in stages if not stage.debug]:
        from actors.driver.sweep import run_side_by_side

        for number, (stage, ended_by) in enumerate(run_side_by_side(on_ray), start=1):
            print(f"[{number}/{len(on_ray)}] {stage.name}", flush=True)
            if ended_by is not None:
                _tell(stage, ended_by, failed)
    return failed


def _tell(stage: Stage, error: UserError, failed: dict[str, UserError]) -> None:
    failed[stage.name] = error
    print(f"{stage.name} failed, the others go on: {error}", flush=True)
