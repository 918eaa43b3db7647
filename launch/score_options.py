"""How a command line names models and who scores: SOURCE, or NAME=SOURCE."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beaver_ray.errors import UserError
from beaver_ray.yaml_files import yaml_value


def named(text: str, option: str, what: str) -> tuple[str, str]:
    """NAME and the rest of NAME=REST. UserError where one of them is missing."""
    name, found, rest = text.partition("=")
    if not found or not name or not rest:
        raise UserError(f"{option} {text!r} must be NAME={what}")
    return name, rest


def short_names(models: Sequence[str]) -> list[str]:
    """What each model is called: the last part of its path, all of it where two would be called alike, and with a
    number where one is given twice."""
    short = [Path(text).name or text for text in models]
    names = [name if short.count(name) == 1 else text for name, text in zip(short, models, strict=True)]
    before = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name} ({number + 1})" if number else name for name, number in zip(names, before, strict=True)]


def source(text: str) -> Any:
    """A source as a configuration has it: {...} is a mapping."""
    try:
        return yaml_value(text) if text.startswith("{") else text
    except ValueError:
        raise UserError(f"{text!r} is no mapping in YAML; write {{key: value, ...}}") from None
