"""Configurations of stages and pipelines from YAML files and ``key=value`` overrides."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from actors.stages import stages
from beaver_ray.config import PipelineConfig
from beaver_ray.errors import UserError
from beaver_ray.stage import Stage
from beaver_ray.yaml_files import apply_overrides, as_yaml, interpolate, one_line, read_yaml, text_options


def load_config(path: str | Path, overrides: list[str] | None = None) -> Stage:
    """The stage's configuration from a YAML file and ``key=value`` overrides.

    Raises UserError, one line, for anything that is wrong in either.
    """
    return parse_config(read_yaml(path, _texts()), overrides or [], str(path))


def load_run(folder: Path) -> Stage:
    """The stage whose run lies in ``folder``, as it was configured. UserError where none does."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise UserError(f"no run in {folder}: it has no config.yaml; give the folder of a run")
    return load_config(file)


def template_of(model: Path) -> Any:
    """The template that a run's models are asked by; of other folders what their tokenizer has."""
    is_run = (model / "config.yaml").is_file() and (model / "final" / "policy").is_dir()
    return load_run(model).prompt_template if is_run else "auto"


def parse_config(tree: dict[str, Any], overrides: list[str], where: str) -> Stage:
    """The stage's configuration from an already read tree; ``where`` names its origin in errors."""
    tree = apply_overrides(tree, overrides, where, _texts())
    workspace = str(tree.get("workspace", "runs"))
    if "${" in workspace:
        raise UserError(f"{where}: workspace is what ${{workspace}} stands for and cannot hold one itself")
    tree = interpolate(tree, {"workspace": workspace}, where)
    name = tree.get("stage")
    if not isinstance(name, str) or name not in stages():
        raise UserError(f"{where}: stage must be one of {', '.join(sorted(stages()))}")
    try:
        return stages()[name].model_validate(tree)
    except ValidationError as error:
        raise UserError(one_line(error, stages()[name], where)) from None


def load_pipeline(path: str | Path, overrides: list[str] | None = None) -> tuple[PipelineConfig, list[Stage]]:
    """A pipeline and its stages' configurations, all checked before anything runs.

    An override whose first word is a stage's name (``safe_ppo.steps=20``) goes to that stage, any other to
    the pipeline itself.
    """
    tree = read_yaml(path, _texts())
    entries = tree.get("stages")
    names = (
        [Path(str(e.get("config", ""))).stem for e in entries if isinstance(e, dict)]
        if isinstance(entries, list)
        else []
    )
    to_stage: dict[str, list[str]] = {name: [] for name in names}
    own: list[str] = []
    for override in overrides or []:
        first, _, rest = override.partition(".")
        if first in to_stage and "=" in rest:
            to_stage[first].append(rest)
        else:
            own.append(override)
    try:
        pipeline = PipelineConfig.model_validate(apply_overrides(tree, own, str(path), _texts()))
    except ValidationError as error:
        raise UserError(one_line(error, PipelineConfig, str(path))) from None
    configs = []
    for entry in pipeline.stages:
        file = Path(path).parent / entry.config
        settings = [f"{key}={as_yaml(value)}" for key, value in entry.set.items()]
        own = [f"workspace={as_yaml(pipeline.workspace)}", *(["resume=true"] if pipeline.resume else [])]
        configs.append(load_config(file, [*own, *settings, *to_stage.get(file.stem, [])]))
    return pipeline, configs


@cache
def _texts() -> frozenset[str]:
    return text_options([*stages().values(), PipelineConfig])
