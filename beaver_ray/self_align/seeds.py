"""What people have written for self-alignment, as files, and how many lines: seed tasks, kinds of question, exemplars,
system texts.

Ours lie beside this module, in our own words; any of them may be replaced by a file of the same form.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from beaver_ray.errors import UserError
from beaver_ray.options import Strict
from beaver_ray.self_align.principles import Principle
from beaver_ray.yaml_files import read_yaml, validated

TASKS = Path(__file__).parent / "seed_tasks.yaml"
TYPES = Path(__file__).parent / "adversarial_types.yaml"
EXEMPLARS = Path(__file__).parent / "exemplars.yaml"
SYSTEM_TEXTS = Path(__file__).parent / "system_texts.yaml"
_TEXTS = frozenset({"name", "about", "topic", "question", "user", "thoughts", "answer", "tasks", "texts"})


class Task(Strict):
    """A task that people give to an assistant."""

    instruction: str = Field(min_length=1)
    input: str = ""


class QuestionType(Strict):
    """A kind of question that misleads a model, and a seed of it."""

    name: str = Field(min_length=1)
    about: str = Field(min_length=1)
    topic: str = Field(min_length=1)
    question: str = Field(min_length=1)


class Exemplar(Strict):
    """A dialogue that shows how rules are chosen."""

    user: str = Field(min_length=1)
    thoughts: str = Field(min_length=1)
    answer: str = Field(min_length=1)


class _Tasks(Strict):
    tasks: list[Task] = Field(min_length=1)

    @field_validator("tasks", mode="before")
    @classmethod
    def _of_texts(cls, value: Any) -> Any:
        return [_task(one) if isinstance(one, str) else one for one in value] if isinstance(value, list) else value


class _Types(Strict):
    types: list[QuestionType] = Field(min_length=1)


class _Exemplars(Strict):
    exemplars: list[Exemplar] = Field(min_length=1)


class _SystemTexts(Strict):
    texts: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)


def read_tasks(file: str | Path | None = None) -> list[Task]:
    """The seed tasks of a YAML file, ours where none is named: ``tasks: [TEXT, "TEXT | INPUT", {instruction, input}]``.

    Raises UserError, as the others here do, where the file is not of its form.
    """
    path = file or TASKS
    return validated(_Tasks, read_yaml(path, _TEXTS), str(path)).tasks


def read_types(file: str | Path | None = None) -> list[QuestionType]:
    """The kinds of question of a YAML file, ours where none is named: ``types: [{name, about, topic, question}]``."""
    path = file or TYPES
    found = validated(_Types, read_yaml(path, _TEXTS), str(path)).types
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: two types are called {twice!r}; give each a name of its own")
    return found


def read_exemplars(file: str | Path | None = None) -> list[Exemplar]:
    """The exemplars of a YAML file, ours where none is named: ``exemplars: [{user, thoughts, answer}]``."""
    path = file or EXEMPLARS
    return validated(_Exemplars, read_yaml(path, _TEXTS), str(path)).exemplars


def read_system_texts(file: str | Path | None = None) -> list[str]:
    """The system texts of a YAML file, ours where none is named: ``texts: [TEXT]``."""
    path = file or SYSTEM_TEXTS
    return validated(_SystemTexts, read_yaml(path, _TEXTS), str(path)).texts


def annotation_lines(
    tasks: Sequence[Task] = (),
    types: Sequence[QuestionType] = (),
    principles: Sequence[Principle] = (),
    exemplars: Sequence[Exemplar] = (),
    system_texts: Sequence[str] = (),
) -> dict[str, int]:
    """The supervision: lines that people have written, by what they are, and ``all`` of them.

    A seed is one line, with its input or its kind and topic; so are a system text and a principle (its opposite, which
    judges read, is not used here). An exemplar counts the lines of what user and assistant say and think, each of them
    one at least.
    """
    found = {
        "seed tasks": len(tasks),
        "seed questions": len(types),
        "principles": len(principles),
        "exemplars": sum(
            len([line for line in text.splitlines() if line.strip()])
            for one in exemplars
            for text in (one.user, one.thoughts, one.answer)
        ),
        "system texts": len(system_texts),
    }
    return found | {"all": sum(found.values())}


def _task(text: str) -> dict[str, str]:
    instruction, _, given = text.partition(" | ")
    return {"instruction": instruction.strip(), "input": given.strip()}
