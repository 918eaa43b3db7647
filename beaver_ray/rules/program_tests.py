"""The tests of a prompt's row: what `run_program` is told of them, and by which of its reports an answer passes them.

Tests are Python code, inputs of a whole program with their outputs, or arguments of a function with what it gives. The
outputs that are wanted are told to no program: of them a report has a hash.
"""

from __future__ import annotations

import ast
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from beaver_ray.rules.run_program import given, printed

SITES_NAMES = """
import array, bisect, collections, copy, datetime, functools, heapq, itertools, json, math, operator, random, re, string
import sys, typing
from typing import *
from collections import *
from bisect import *
from functools import *
from heapq import *
from itertools import *
from math import ceil, comb, factorial, floor, gcd, inf, isqrt, lcm, log, log2, pi, sqrt
"""
"""What the sites that functions and methods come from let a program name without an import."""


@dataclass
class RowTests:
    """The tests of one row."""

    told: list[str | dict[str, Any]] = field(default_factory=list)
    """For `run_program`: Python code, {"input": text} or {"call": name, "arguments": list}."""
    accepted: list[set[str]] = field(default_factory=list)
    """For each test that counts the reports of which one says that it is passed."""
    names: set[str] = field(default_factory=set)
    """What the tests name: code that defines one of these is the code that is meant."""
    setup: str = ""
    """Python code that is run before the program, in its names."""

    def add_code(self, text: str) -> None:
        """A test that is Python code."""
        body = _parsed(text)
        self.names |= {node.id for node in ast.walk(ast.Module(body, [])) if isinstance(node, ast.Name)}
        if not all(map(_is_idle, body)):
            self.accepted.append({f"passed {len(self.told)}"})
        self.told.append(text)

    def add_output(self, text: str, wanted: str) -> None:
        """A test of what the program prints for an input."""
        if wanted.strip():
            self.accepted.append({f"printed {len(self.told)} {printed(wanted)}"})
        self.told.append({"input": text})

    def add_call(self, name: str, arguments: list[Any], wanted: Any) -> None:
        """A test of what the function gives for these arguments. What is wanted may stand in a list of its own."""
        forms = [wanted, *(wanted if isinstance(wanted, list) and len(wanted) == 1 else [])]
        self.accepted.append({f"gave {len(self.told)} {given(form)}" for form in forms})
        self.told.append({"call": name, "arguments": arguments})
        self.names |= {name, "Solution"}
        if not self.setup.startswith(SITES_NAMES):
            self.setup = SITES_NAMES + self.setup


def read_tests(row: Any, entry_point: Any, setup: Any) -> RowTests:
    """The tests of a row; none where it has none.

    entry_point, setup: what the row says of them, or None. ValueError for what is no test, no Python, or nothing that a
    program could fail.
    """
    found = RowTests(setup=_text(setup, "setup must be a text or a list of texts") if setup else "")
    _parsed(found.setup)
    name = entry_point if isinstance(entry_point, str) and entry_point.strip() else None
    if name is not None:
        found.names.add(name)
    if row is None:
        return found
    listed = _listed(row) if isinstance(row, str) else row
    items = [listed] if isinstance(listed, Mapping) else listed
    if not isinstance(items, Sequence) or not all(isinstance(item, str | Mapping) for item in items):
        raise ValueError(
            f"a row's tests must be texts, or inputs with their outputs, or a list of such, not {row!r:.100}"
        )
    codes = [_with_its_cases_run(item) for item in items if isinstance(item, str) and item.strip()]
    if name is not None and (place := _check_that_nobody_calls(codes)) is not None:
        codes[place] = f"{codes[place]}\ncheck({name})"
    for code in codes:
        found.add_code(code)
    for item in items:
        if isinstance(item, Mapping):
            _add_inputs(found, item, name)
    if found.told and not found.accepted:
        raise ValueError(
            "a row's tests must check something, and not only define what nobody calls, compare without an assert, or "
            f"want no output: {row!r:.200}"
        )
    return found


@contextlib.contextmanager
def long_numbers() -> Iterator[None]:
    """Numbers of any length may be read and written meanwhile; Python stops at 4,300 digits, and APPS does not."""
    most = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(most)


def _listed(text: str) -> Any:
    """The list or mapping that the text is, in JSON or as Python writes it (pandas in a CSV file), or the text itself
    as the one test."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            tests = read(text)
            return tests if isinstance(tests, list | dict) else [text]
    return [text]


def _add_inputs(found: RowTests, test: Mapping[str, Any], entry_point: str | None) -> None:
    """Those of {"input": ..., "output": ...} or {"inputs": [...], "outputs": [...]}.

    They are of the whole program, but with fn_name (APPS) arguments of that function, or method of a class Solution;
    with "testtype": "functional" (LiveCodeBench) of the entry point, as lines of JSON.
    """
    inputs, outputs = (_one_or_several(test.get(side, test.get(f"{side}s"))) for side in ("input", "output"))
    if len(inputs) != len(outputs):
        raise ValueError(f"a row's tests have {len(inputs)} inputs and {len(outputs)} outputs: {test!r:.200}")
    name, functional = test.get("fn_name"), test.get("testtype") == "functional"
    if functional and not name:
        if entry_point is None:
            raise ValueError(
                f"a row's test is of a function that it does not name: give it an entry_point: {test!r:.200}"
            )
        name = entry_point
    for value, wanted in zip(inputs, outputs, strict=True):
        if functional:
            lines = _text(value).splitlines()
            found.add_call(str(name), [_json(line) for line in lines if line.strip()], _json(_text(wanted)))
        elif name:
            found.add_call(str(name), value if isinstance(value, list) else [value], wanted)
        else:
            found.add_output(_text(value), _text(wanted))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"a functional test has arguments and outputs in JSON, not {text!r:.100}: {error}") from None


def _one_or_several(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]


def _text(found: Any, what: str = "tests must have texts as inputs and outputs") -> str:
    """What may be a list of lines, as one text."""
    lines = _one_or_several(found)
    if not all(isinstance(line, str) for line in lines):
        raise ValueError(f"a row's {what}, not {found!r:.100}")
    return "\n".join(lines)


def _with_its_cases_run(test: str) -> str:
    """The test, and behind it a run of its test cases of unittest, where it has any, which must succeed.

    unittest.main() would end in SystemExit however they went, and so is left out.
    """
    body = _parsed(test)
    cases: list[str] = []
    for part in body:
        if isinstance(part, ast.ClassDef):
            bases = {ast.unparse(base).rpartition(".")[2] for base in part.bases}
            if not bases.isdisjoint({"TestCase", "IsolatedAsyncioTestCase", *cases}):
                cases.append(part.name)
    if not cases:
        return test
    kept = [part for part in body if not _calls(part, "unittest.main", "main")]
    return f"{ast.unparse(ast.Module(kept, []))}\n{_RUN_CASES.format(', '.join(cases))}"


_RUN_CASES = """
def _run_test_cases(*cases):
    import unittest
    result, load = unittest.TestResult(), unittest.TestLoader().loadTestsFromTestCase
    unittest.TestSuite(map(load, cases)).run(result)
    assert result.wasSuccessful() and result.testsRun > len(result.skipped)
_run_test_cases({})"""


def _calls(statement: ast.stmt, *names: str) -> bool:
    """Whether it is a call of one of these, and nothing else."""
    called = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(called, ast.Call) and ast.unparse(called.func) in names


def _check_that_nobody_calls(codes: Sequence[str]) -> int | None:
    """Which of them defines a function ``check``, where nothing outside of functions and classes calls it."""
    found, called = None, set()
    for place, code in enumerate(codes):
        for part in _parsed(code):
            if isinstance(part, ast.FunctionDef):
                found = place if part.name == "check" else found
            elif not isinstance(part, ast.ClassDef):
                called |= {ast.unparse(node.func) for node in ast.walk(part) if isinstance(node, ast.Call)}
    return None if "check" in called else found


def _parsed(test: str) -> list[ast.stmt]:
    """Its statements. ValueError where it is no Python."""
    try:
        return ast.parse(test).body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"a row's tests and setup must be Python: {error}: {test!r:.200}") from None


_PREPARING = (
    *("random.seed", "np.random.seed", "numpy.random.seed", "sys.setrecursionlimit"),
    *("warnings.filterwarnings", "warnings.simplefilter"),
)


def _is_idle(statement: ast.stmt) -> bool:
    """Whether it checks nothing: definitions, imports, values and comparisons by themselves, names for values."""
    if isinstance(statement, ast.Assign | ast.AnnAssign):  # METADATA = {...}, as in HumanEval
        return not any(isinstance(part, ast.Call | ast.Subscript | ast.Attribute) for part in ast.walk(statement))
    # unittest.main ends in SystemExit, or in a result that nobody looks at.
    if _calls(statement, *_PREPARING, "unittest.main"):
        return True
    if isinstance(statement, ast.Expr):  # "add(1, 2) == 3" lacks its assert
        called = any(isinstance(part, ast.Call | ast.Await) for part in ast.walk(statement))
        return not called or isinstance(statement.value, ast.Compare)
    if isinstance(statement, ast.Assert):  # of a tuple, assert (x == 3, "message"), it is always true
        return isinstance(statement.test, ast.Tuple) and bool(statement.test.elts)
    if isinstance(statement, ast.If):  # a test is not __main__
        return ast.unparse(statement.test) == "__name__ == '__main__'" and not statement.orelse
    return isinstance(
        statement, ast.Pass | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom
    )
