"""Python of the user's own that a run calls: a function or a class in a file, python:FILE.py:NAME(KEY=LITERAL, ...).

Whose code may be run is for whoever starts a run to say, not for its configuration, which may come from elsewhere: the
file lies below the folder where the command is started, or in one that the environment allows. Its text goes to the
process that runs it, so that other nodes need not have it.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from beaver_ray.errors import UserError, last_line

ALLOWED_CODE = "BEAVER_RAY_SCORE_CODE"
"""Environment variable with folders whose Python files may be run besides those below the folder where a command is
started; separated as in PATH."""
PREFIX = "python:"
RAISED = (Exception, SystemExit)
"""Whatever code of the user's own may raise that is its mistake; sys.exit would end the run without a word."""
_CALL = re.compile(r"(.+?\.py):([^\W\d]\w*)(\(.*\))?", re.DOTALL)


@dataclass(frozen=True)
class Code:
    """What the process is given that runs it."""

    source: str
    """What the configuration calls it."""
    name: str
    """Of the function or class."""
    keywords: Mapping[str, Any]
    """Parameters that the configuration sets."""
    text: str
    """Of the whole file."""
    file: str
    """Where that lies, or lay."""

    def load(self) -> Any:
        """The function or class, whose file's neighbours it can import. UserError where the file cannot be run."""
        folder = str(Path(self.file).parent)
        if folder not in sys.path:
            sys.path.append(folder)
        module = ModuleType(Path(self.file).stem)
        module.__file__ = self.file
        sys.modules.setdefault(module.__name__, module)
        try:
            exec(compile(self.text, self.file, "exec"), module.__dict__)
        except RAISED as error:
            raise UserError(f"{self.source}: {self.file} cannot be loaded: {last_line(error)}") from None
        return module.__dict__[self.name]


class UserCode:
    """A function or a class in a Python file, as the configuration names it.

    what: what messages call it. kind: ast.FunctionDef or ast.ClassDef. given: names that a run gives it, which no
    configuration sets. ValueError for a text that names none.
    """

    def __init__(
        self, text: str, what: str, kind: type[ast.FunctionDef | ast.ClassDef], given: Collection[str]
    ) -> None:
        self.text, self.kind, self.given = text, kind, given
        self.noun = "function" if kind is ast.FunctionDef else "class"
        found = _CALL.fullmatch(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else None
        if not found:
            name = self.noun.upper()
            raise ValueError(
                f"{what} is written python:FILE.py:{name} or python:FILE.py:{name}(key=value, ...), not {text!r}"
            )
        self.file, self.name = Path(found[1]), found[2]
        self.keywords = read_keywords(text, found[3] or "()")
        if taken := [key for key in self.keywords if key in given]:
            raise ValueError(f"{text!r}: {taken[0]} is given to every {self.noun} by the run and can be no parameter")

    def find(self, part: str) -> ast.FunctionDef | ast.ClassDef:
        """Its definition, which is not run. UserError where there is none, or where its file may not be run."""
        code = self.read(part)
        allowed = [Path.cwd(), *(Path(p) for p in os.environ.get(ALLOWED_CODE, "").split(os.pathsep) if p)]
        if not any(self.file.resolve().is_relative_to(folder.resolve()) for folder in allowed):
            raise UserError(
                f"{part}: {self.file} does not lie below {Path.cwd()}, where this was started, and "
                f"code of elsewhere is not run unasked; allow its folder with "
                f"export {ALLOWED_CODE}={self.file.resolve().parent}"
            )
        try:
            tree = ast.parse(code)
        except (SyntaxError, ValueError) as error:
            where = f" line {error.lineno}" if isinstance(error, SyntaxError) else ""
            raise UserError(f"{part}: {self.file}{where} is not Python: {error}") from None
        definitions = {node.name: node for node in tree.body if isinstance(node, self.kind)}
        if self.name not in definitions:
            known = ", ".join(definitions) or "none"
            raise UserError(f"{part}: {self.file} has no {self.noun} {self.name!r}; it has {known}")
        return definitions[self.name]

    def check_keywords(self, part: str, arguments: ast.arguments) -> None:
        """UserError where the configuration sets a parameter that these are without."""
        names = [a.arg for a in (*arguments.args, *arguments.kwonlyargs) if a.arg not in {*self.given, "self"}]
        unknown = [key for key in self.keywords if key not in names]
        if unknown and not arguments.kwarg:
            known = ", ".join(names) or "none"
            raise UserError(f"{part}: {self.name} in {self.file} has no parameter {unknown[0]!r}; it has {known}")

    def read(self, part: str) -> str:
        """The file's text. UserError where it cannot be read."""
        try:
            return self.file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{part}: cannot read {self.file} of {self.text}: {reason}") from None

    def pack(self) -> Code:
        """What a process needs to run it. UserError where the file cannot be read."""
        return Code(self.text, self.name, self.keywords, self.read(self.text), str(self.file.resolve()))


def read_keywords(text: str, call: str) -> dict[str, Any]:
    """The keyword arguments that a call in brackets has, literals all; ValueError for anything else."""
    try:
        tree = ast.parse(f"f{call}", mode="eval").body
        # A ")" inside may end the call early: f(a=1)(b=2) is a call of what a call returns.
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
            raise ValueError("one pair of brackets")
        if tree.args or any(keyword.arg is None for keyword in tree.keywords):
            raise ValueError("each by its name, key=value")
        names = [str(keyword.arg) for keyword in tree.keywords]
        if len(set(names)) < len(names):
            raise ValueError("each of them once")
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in tree.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{text!r}: parameters are numbers, texts in quotes, True, False, None, lists and dicts, "
            f"written (key=value, ...): {said}"
        ) from None
