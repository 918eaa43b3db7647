"""Configurations of stages and pipelines from YAML files and ``key=value`` overrides."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from actors.stages import stages
from beaver_ray.errors import UserError
from beaver_ray.options import near
from beaver_ray.pipeline_options import PipelineConfig, StageEntry
from beaver_ray.stage import Stage
from beaver_ray.yaml_files import apply_overrides, as_yaml, interpolate, one_line, read_yaml, text_options, validated


def load_config(path: str | Path, overrides: list[str] | None = None) -> Stage:
    """The stage's configuration from a YAML file and ``key=value`` overrides.

    Raises UserError, one line, for anything that is wrong in either.
    """
    tree = read_yaml(path, _texts())
    if "stages" in tree and "stage" not in tree:
        raise UserError(f"{path} is a pipeline, for beaver-ray pipeline and doctor; give the file of one of its stages")
    return parse_config(tree, overrides or [], str(path))


def load_run(folder: Path) -> Stage:
    """The stage whose run lies in ``folder``, as it was configured. UserError where none does."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise UserError(f"no run in {folder}: it has no config.yaml; give the folder of a run")
    return load_config(file)


def parse_config(
    tree: dict[str, Any], overrides: list[str], where: str, values: Mapping[str, Any] | None = None
) -> Stage:
    """The stage's configuration from an already read tree.

    where: names its origin in errors. values: what ${NAME} stands for besides ${workspace}.
    """
    tree = apply_overrides(tree, overrides, where, _texts())
    given = tree.get("workspace", "runs")
    workspace = "" if given is None else str(given).strip()
    if not workspace:
        raise UserError(f"{where}: workspace is empty; name a folder, as workspace=runs")
    if "${" in workspace:
        raise UserError(f"{where}: workspace is what ${{workspace}} stands for and cannot hold one itself")
    workspace = tree["workspace"] = _one_way(workspace)
    tree = interpolate(tree, {"workspace": workspace} | dict(values or {}), where)
    name = tree.get("stage")
    if not isinstance(name, str) or name not in stages():
        raise UserError(f"{where}: stage must be one of {', '.join(sorted(stages()))}")
    return validated(stages()[name], tree, where)


def load_pipeline(path: str | Path, overrides: list[str] | None = None) -> tuple[PipelineConfig, list[Stage]]:
    """A pipeline and the configuration of each of its `entries`, all checked before anything runs.

    An override whose first word is a stage's name (``safe_ppo.steps=20``) goes to that stage, in every round, any other
    to the pipeline itself.
    """
    tree = read_yaml(path, _texts())
    if "stage" in tree and "stages" not in tree:
        raise UserError(f"{path} is one stage and no pipeline: beaver-ray train {path}")
    names = _stage_names(tree)
    to_stage: dict[str, list[str]] = {}
    own: list[str] = []
    for override in overrides or []:
        first, rest = _of_stage(override, names)
        if rest:
            to_stage.setdefault(first, []).append(rest)
        else:
            own.append(override)
    try:
        pipeline = PipelineConfig.model_validate(apply_overrides(tree, own, str(path), _texts()))
        pipeline.workspace = _one_way(pipeline.workspace)
    except ValidationError as error:
        foreign = any(re.split("[.=]", override)[0] not in PipelineConfig.model_fields for override in own)
        hint = f"; options of a stage begin with its file's name: {', '.join(names)}" if foreign and names else ""
        raise UserError(one_line(error, PipelineConfig, str(path)) + hint) from None
    configs, entries = [], pipeline.entries
    for entry in entries:
        file = Path(path).parent / entry.config
        _check_sections(entry, path)
        settings = [f"{key}={as_yaml(value)}" for key, value in entry.set.items()]
        own = [f"workspace={as_yaml(pipeline.workspace)}", *(["resume=true"] if pipeline.resume else [])]
        changes = [*own, *settings, *to_stage.get(file.stem, [])]
        configs.append(parse_config(read_yaml(file, _texts()), changes, str(file), entry.values))
    files = {Path(entry.config).stem for entry in entries}
    if lost := [name for name in to_stage if name not in files]:
        name = lost[0]
        raise UserError(f"override {name}.{to_stage[name][0]}: no stage is called {name!r}{near(name, files)}")
    return pipeline, configs


def _one_way(workspace: str) -> str:
    """A workspace as it is written everywhere, so that a folder is found in what refers to it."""
    return str(Path(os.path.expanduser(workspace)))


def _check_sections(entry: StageEntry, path: str | Path) -> None:
    """UserError where ``set`` has a section and parts of it: the section's value would put the parts back."""
    for key, value in entry.set.items():
        if isinstance(value, dict) and (beside := [name for name in entry.set if name.startswith(f"{key}.")]):
            raise UserError(
                f"{path}: set of {entry.config} has {beside[0]}, and all of {key} besides; write "
                f"{', '.join(f'{key}.{name}' for name in value)} there too"
            )


def _of_stage(override: str, names: list[str]) -> tuple[str, str]:
    """The stage's file that an override begins with, and the rest of it; empty where it is the pipeline's own."""
    key, equals, value = override.partition("=")
    parts = key.split(".")
    found = [count for count in range(1, len(parts)) if ".".join(parts[:count]) in names]
    if not found and parts[0] not in PipelineConfig.model_fields and any(fnmatchcase(parts[0], n) for n in names):
        found = [1] if len(parts) > 1 else []
    if not found or not equals:
        return "", ""
    return ".".join(parts[: found[-1]]), f"{'.'.join(parts[found[-1] :])}={value}"


def _stage_names(tree: dict[str, Any]) -> list[str]:
    """Names of the files under ``stages``, as patterns where they hold a ${NAME}; the tree is not checked yet."""
    listed = tree.get("stages")
    entries = [entry for entry in (listed if isinstance(listed, list) else []) if isinstance(entry, dict)]
    blocks = [entry.get("each_round") for entry in entries]
    entries += [entry for block in blocks if isinstance(block, list) for entry in block if isinstance(entry, dict)]
    return [re.sub(r"\$\{[^}]*\}", "*", Path(str(e["config"])).stem) for e in entries if e.get("config")]


@cache
def _texts() -> frozenset[str]:
    return text_options([*stages().values(), PipelineConfig])
