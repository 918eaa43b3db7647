"""Principles as files: rules in plain words, each with its opposite, numbered in the order in which they stand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from beaver_ray.errors import UserError
from beaver_ray.options import Strict
from beaver_ray.yaml_files import read_yaml, validated

OURS = Path(__file__).parent / "principles.yaml"
"""Sixteen, under the names of Dromedary's (arXiv 2305.03047), in words of our own."""


class Principle(Strict):
    """One rule."""

    name: str = Field(min_length=1)
    text: str = Field(min_length=1)
    """What an answer has to be."""
    negated: str = Field(min_length=1)
    """The opposite."""


class _File(Strict):
    principles: list[Principle] = Field(min_length=1)


def read_principles(file: str | Path | None = None) -> list[Principle]:
    """The principles of a YAML file, ``principles: [{name, text, negated}, ...]``; ours where none is named.

    Raises UserError where the file cannot be read, an entry lacks a part, or two have the same name.
    """
    path = Path(file or OURS)
    tree = read_yaml(path, frozenset({"name", "text", "negated"}))
    found = validated(_File, tree, str(path)).principles
    name, count = Counter(principle.name for principle in found).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: two principles are called {name!r}; give each a name of its own")
    return found


def numbered(principles: Sequence[Principle]) -> str:
    """The principles as a prompt shows them: a line each, ``1 (ethical). ...``."""
    return "\n".join(f"{number} ({one.name}). {one.text}" for number, one in enumerate(principles, 1))
