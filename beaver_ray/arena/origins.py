"""Where a policy comes from, as far as the folder of its run says: how it was asked, and who judged it in training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from beaver_ray.errors import UserError
from beaver_ray.template_options import TemplateOptions
from beaver_ray.yaml_files import one_line, read_yaml


def run_of(place: str) -> dict[str, Any]:
    """The configuration of the run that a folder is, or is the final policy of; empty where there is none."""
    folder = Path(place)
    for home in (folder, folder.parent.parent):
        if (home / "config.yaml").is_file() and (home == folder or folder.parent.name == "final"):
            return read_yaml(home / "config.yaml")
    return {}


def template_of(run: Mapping[str, Any]) -> TemplateOptions:
    """How a run writes prompts: of a PPO run under data, of others at the top. UserError for what is no template."""
    data = run.get("data")
    given = (data if isinstance(data, Mapping) else run).get("template", "auto")
    try:
        return TemplateOptions.model_validate(given)
    except ValidationError as error:
        raise UserError(one_line(error, TemplateOptions, "template of a policy's run")) from None


def trained_against(run: Mapping[str, Any]) -> set[str]:
    """Who scored a run's answers in training: real paths of folders, addresses and functions as they were written."""
    models, constraints = run.get("models"), run.get("constraints")
    found = [models.get("reward")] if isinstance(models, Mapping) else []
    if isinstance(constraints, list):
        found += [constraint.get("model") for constraint in constraints if isinstance(constraint, Mapping)]
    return {identity(source) for source in found if source is not None}


def identity(source: Any) -> str:
    """What is equal of two options that mean the same source of scores: a guard is its folder."""
    text = source.get("folder") if isinstance(source, Mapping) else getattr(source, "folder", source)
    return os.path.realpath(str(text)) if os.path.isdir(str(text)) else str(text)
