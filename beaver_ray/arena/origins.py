"""Where a policy comes from, as far as the folder of its run says: how it was asked, and who judged it in training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beaver_ray.models.folders import fingerprint
from beaver_ray.template_options import TemplateOptions
from beaver_ray.yaml_files import read_yaml, validated


def run_of(place: str) -> dict[str, Any]:
    """The configuration of the run that a folder is, or is the final policy of; empty where there is none."""
    home = _home(place)
    return {} if home is None else read_yaml(home / "config.yaml")


def _home(place: str) -> Path | None:
    """The folder of the run that a folder is, or is the final policy of."""
    folder = Path(place)
    for home in (folder, folder.parent.parent):
        if (home / "config.yaml").is_file() and (home == folder or folder.parent.name == "final"):
            return home
    return None


def template_of(run: Mapping[str, Any]) -> TemplateOptions:
    """How a run writes prompts: of a PPO run under data, of others at the top. UserError for what is no template."""
    data = run.get("data")
    given = (data if isinstance(data, Mapping) else run).get("template", "auto")
    return validated(TemplateOptions, given, "template of a policy's run")


def trained_against(place: str) -> set[str]:
    """Who scored the answers of the run that this policy is of: `identity` of each.

    A workspace that has moved since is found: what lay in it then is looked for beside the run now.
    """
    home, run = _home(place), run_of(place)
    models, constraints = run.get("models"), run.get("constraints")
    found = [models.get("reward")] if isinstance(models, Mapping) else []
    if isinstance(constraints, list):
        found += [constraint.get("model") for constraint in constraints if isinstance(constraint, Mapping)]
    return {identity(_where_now(source, home, run)) for source in found if source is not None}


def _where_now(source: Any, home: Path | None, run: Mapping[str, Any]) -> str:
    """A source's folder where it lies now, or its text."""
    text = str(source.get("folder") if isinstance(source, Mapping) else source)
    then = Path(str(run.get("workspace"))) / str(run.get("name"))
    if home is None or os.path.isdir(text):
        return text
    moved = home / os.path.relpath(text, then)
    return str(moved) if moved.is_dir() else text


def identity(source: Any) -> str:
    """What is equal of two sources of scores that are the same one: a model's or guard's weights, else the text."""
    text = str(getattr(source, "folder", source))
    return fingerprint(text) if os.path.isfile(os.path.join(text, "config.json")) else text
