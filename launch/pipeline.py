"""Stages in order, each feeding the next; what is complete already is skipped.

A stage is complete where its final/ is there and its config.yaml is the one that would run now. Everything
that can be known to go wrong is checked before the first stage starts. Stages under each_round run several times, and
each round leaves a manifest (`beaver_ray.manifest`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from beaver_ray.errors import UserError
from beaver_ray.json_files import read_json
from beaver_ray.runs import has_started, is_finished
from beaver_ray.stage import Stage
from beaver_ray.yaml_files import few_of, other_settings
from launch.config_files import load_pipeline, load_run

OPTIONS = "options.json"
"""Beside a small world: what it was built with."""


def run_pipeline(path: Path, overrides: list[str]) -> Path:
    """Run a pipeline's stages and return the last one's report.

    Raises UserError, before anything runs, for configurations that are wrong, for a stage that was started
    with another configuration or was broken off, and for a complete stage that builds on one that has yet
    to run, or on a small world that has yet to be built.
    """
    pipeline, stages = load_pipeline(path, overrides)
    complete = [is_complete(stage) for stage in stages]
    _check_order(stages, complete)
    if pipeline.world is not None:
        world = Path(pipeline.workspace) / "world"
        if not _is_built(world):
            _check_made_from(world, "be built", stages, complete)
        build_world(world, pipeline.world)
    rounds = [entry.round for entry in pipeline.entries]
    for number, (stage, done) in enumerate(zip(stages, complete, strict=True), start=1):
        title = f"[{number}/{len(stages)}] {stage.stage}: {stage.folder}"
        print(f"{title} is complete, skipped" if done else title, flush=True)
        run_stage(stage, done)
        _close_round(Path(pipeline.workspace), rounds, stages, complete, number - 1)
    report = stages[-1].folder / "report.html"
    print(f"report: {report}")
    for line in next(filter(None, (stage.headlines() for stage in reversed(stages))), []):
        print(line)
    return report


def _close_round(
    workspace: Path, rounds: list[int | None], stages: list[Stage], complete: list[bool], number: int
) -> None:
    """Write the manifest of a round after the last of its stages, ``stages[number]``, where it is not there."""
    current = rounds[number]
    if current is None or rounds[number + 1 : number + 2] == [current]:
        return
    from beaver_ray.manifest import MANIFEST, write_round

    own = [place for place, of in enumerate(rounds) if of == current]
    if not all(complete[place] for place in own) or not (workspace / f"round_{current}" / MANIFEST).is_file():
        print(f"round {current}: {write_round(workspace, current, [stages[place] for place in own])}", flush=True)


def run_stage(config: Stage, complete: bool = False) -> None:
    """Train one stage after checking that it fits, and write its report.

    Of a complete stage only a missing report is made up for.
    """
    from beaver_ray.report.page import write_report

    if not complete:
        from actors.driver.train import train
        from launch.planning import plan

        made = plan(config)
        made.check()
        for note in made.notes:
            print(note, flush=True)
        train(config)
    if not complete or not (config.folder / "report.html").is_file():
        write_report(config, config.folder)


def build_world(folder: Path, options: dict[str, Any]) -> None:
    """Build the small world with ``options``: its kind and fields, and sizes that ``build`` takes.

    Raises UserError for an unknown option, and where the folder holds a world of other options.
    """
    from beaver_ray.small_world.build import build
    from beaver_ray.small_world.harder import world_class

    kind = options.get("kind")
    fields = world_class(None if kind is None else str(kind))
    sizes: dict[str, Any] = build.__kwdefaults__ or {}
    known = sorted({*fields.model_fields, *sizes})
    for key, value in options.items():
        if key not in known:
            raise UserError(f"world: unknown option {key!r}; known: {', '.join(known)}")
        if key in sizes and type(value) is not type(sizes[key]):
            raise UserError(f"world.{key}: {value!r} is not of type {type(sizes[key]).__name__}")
        if key in sizes and type(value) is int and value < 1:
            raise UserError(f"world.{key}: {value} must be above 0")
    try:
        world = fields(**{key: value for key, value in options.items() if key not in sizes})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(["world", *(str(part) for part in first["loc"])])
        raise UserError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
    # All options with their defaults, so that a world of older defaults is not taken for this one.
    resolved = world.model_dump(mode="json") | sizes | {k: v for k, v in options.items() if k in sizes}
    record = folder / OPTIONS
    if _is_built(folder):
        # An option that is younger than the world has a default by which it is the same world.
        younger = {"graded": False}
        if younger | (read_json(record) or {}) == resolved:
            print(f"small world: {folder} is complete, skipped", flush=True)
            return
        raise UserError(f"{folder} holds a small world of other options: set another workspace=..., or delete it")
    print(f"small world: {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    build(folder, world, **{key: value for key, value in options.items() if key in sizes})
    record.write_text(json.dumps(resolved, indent=2) + "\n", encoding="utf-8")


def _is_built(world: Path) -> bool:
    return (world / "world.json").is_file() and (world / OPTIONS).is_file()


def is_complete(config: Stage) -> bool:
    """Whether the stage has run to its end as configured now; UserError where its folder is in the way."""
    folder = config.folder
    if not has_started(folder):
        return False
    advice = f"delete {folder}, or set another name or workspace"
    if not is_finished(folder):
        if config.resume:
            return False
        raise UserError(f"{folder} holds a run that was broken off: go on with resume=true, or {advice}")
    asked = config.model_copy(update={"resume": False})
    if not (folder / "config.yaml").is_file() or load_run(folder) != asked:
        settings = other_settings(folder / "config.yaml", asked)
        which = f" ({few_of(settings)})" if settings else ""
        raise UserError(f"{folder} holds a finished run of another configuration{which}: {advice}")
    return True


def _check_order(stages: list[Stage], complete: list[bool]) -> None:
    folders = [stage.folder for stage in stages]
    for number, stage in enumerate(stages):
        if stage.folder in folders[:number]:
            raise UserError(f"two stages write to {stage.folder}: give them different names")
        if not complete[number]:
            _check_made_from(stage.folder, "run", stages[number + 1 :], complete[number + 1 :])


def _check_made_from(folder: Path, what: str, stages: list[Stage], complete: list[bool]) -> None:
    """UserError for a complete one of ``stages`` that was made from what would anew be in ``folder``."""
    for stage, done in zip(stages, complete, strict=True):
        if done and _mentions(stage, folder):
            raise UserError(
                f"{stage.folder} was made from an earlier {folder}, which would {what} anew: "
                f"delete {stage.folder}, or set another workspace"
            )


def _mentions(config: BaseModel, folder: Path) -> bool:
    return any(f"{folder}/" in f"{text}/" for text in texts_of(config))


def texts_of(config: BaseModel) -> Iterator[str]:
    """Every text in a configuration, paths and data sets among them."""
    return _strings(config.model_dump(mode="json"))


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _strings(child)
