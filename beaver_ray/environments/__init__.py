"""Who a policy talks to when a dialogue goes on after its answer: a class in a Python file, here or of the user's own.

    class CLASS:
        def __init__(self, dialogue: list[str], fields: dict[str, Any], seed: int, **parameters): ...
        def reply(self, answer: str) -> str | None: ...

One object for each dialogue. `dialogue` are the prompt's turns, user and assistant by turns, `fields` is what else its
row says, `parameters` are what the configuration sets. `reply` is given each answer and returns what the user says to
it, or None where the dialogue ends. The same dialogue, fields, seed and answers must give the same replies: a dialogue
that is lost with its generator is held again.
"""

from __future__ import annotations

import ast

from beaver_ray.errors import UserError
from beaver_ray.user_code import UserCode

GIVEN = ("dialogue", "fields", "seed")


def environment_code(text: str) -> UserCode:
    """The class that ``rollout.environment`` names. ValueError for a text that names none."""
    return UserCode(text, "an environment", ast.ClassDef, GIVEN)


def check_environment(text: str) -> None:
    """UserError where there is no such class, or where its file may not be run; it is not run here."""
    code, part = environment_code(text), "rollout.environment"
    found = code.find(part)
    assert isinstance(found, ast.ClassDef)
    methods = {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}
    if "reply" not in methods and not found.bases:
        raise UserError(f"{part}: {code.name} in {code.file} has no method reply(self, answer)")
    if "__init__" not in methods and not found.bases and not found.decorator_list:
        raise UserError(f"{part}: {code.name} in {code.file} has no method __init__(self, dialogue, fields, seed)")
    if "__init__" in methods:
        code.check_keywords(part, methods["__init__"].args)
