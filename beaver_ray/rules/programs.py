"""Whether the Python code in an answer compiles, and passes the tests of its prompt's row. It runs confined."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from beaver_ray.rules import run_program
from beaver_ray.rules.thoughts import opens_a_thought, without_thoughts

LONGEST = 200_000  # characters; longer code is not run and passes nothing
LEAST_MIB = 32  # below some 20 Python itself does not run
STARTING_S = 20.0  # for a process to start and to end, on a busy machine, beside what its program may take

# As CommonMark has it, a line closes a block that stands at most 3 spaces further in than its opening and has the same
# sign, at least as often: a docstring may hold a block of its own.
_OPENS = r"^([ \t]*)(`{3,}|~{3,})(?![`~])[ \t]*(\w*)[^\n]*\n"
_CLOSES = r"^(?!\1(?: {4}| {0,3}\t))[ \t]*\2"
_BLOCK = re.compile(rf"{_OPENS}(.*?)(?:{_CLOSES}|\Z)", re.DOTALL | re.MULTILINE)


def passes_tests(
    prompts: list[str],
    responses: list[str],
    *,
    tests: list[Any],
    entry_point: list[Any] | None = None,
    share: bool = True,
    seconds: float = 5.0,
    memory_mib: int = 1024,
    at_once: int = 2,
    namespaces: bool = True,
) -> list[float]:
    """The share of its row's ``tests`` that the code in each answer passes, or with share=False 1 where it passes all.

    tests: one or a list (also as JSON). A text is Python code, run after those before it in the names of the answer's
    code, and has failed where it raises; one that only defines or imports is run for those after it and does not count,
    but for test cases of unittest, which are run. {"input": ..., "output": ...}, or two lists of them, is a test of the
    whole program: what it prints for this standard input, compared as `run_program.printed` says. A row without any
    gives 0; ValueError for a row whose tests every program would pass, and for a test that is no Python, which none
    would. entry_point: the name of what is asked for, which rows may leave out; tests that only define a function
    ``check``, as in HumanEval, are called with it. seconds (of CPU time, whole ones; 4 times as long by the clock),
    memory_mib: for an answer with all its tests; what ran out of them has passed the tests before. at_once: answers
    that run at the same time.
    namespaces: ask the kernel for what `run_program` says; ValueError where it has none to give, and then, with False,
    the rest of it is all that stands between the program and this machine.
    """
    rows = [_tests_of(row, name) for row, name in zip(tests, entry_point or [None] * len(tests), strict=True)]
    if not LEAST_MIB <= memory_mib < 1e6:
        raise ValueError(f"memory_mib must be {LEAST_MIB} or more, of which Python takes some 20, not {memory_mib}")
    if not 0 < seconds < 1e6:
        raise ValueError(f"seconds must be above 0, not {seconds}")
    limits = {"seconds": seconds, "memory_mib": int(memory_mib), "namespaces": namespaces}
    # The outputs that are wanted stay here.
    told = [[test if isinstance(test, str) else {"input": test["input"]} for test in row] for row in rows]
    jobs = [
        {"program": code_of(response), "names": NAMES if _RUN_CALL in row else "", "tests": row, "run": True, **limits}
        for response, row in zip(responses, told, strict=True)
    ]
    counted = [{_report_of(n, test) for n, test in enumerate(row) if _does_something(test)} for row in rows]
    with ThreadPoolExecutor(max(1, at_once)) as pool:
        passed = [reports & wanted for reports, wanted in zip(pool.map(_reports, jobs), counted, strict=True)]
    if share:
        return [len(had) / len(wanted) if wanted else 0.0 for had, wanted in zip(passed, counted, strict=True)]
    return [float(bool(wanted) and had == wanted) for had, wanted in zip(passed, counted, strict=True)]


def compiles(prompts: list[str], responses: list[str], *, at_once: int = 2) -> list[float]:
    """1 where the code in the answer is Python, else 0. Nothing of it is run.

    An answer without code gives 0, and so do expressions that call nothing: "Sorry, no" is one.
    """
    fixed = {"tests": [], "run": False, "namespaces": False, "seconds": 5.0, "memory_mib": 1024}
    with ThreadPoolExecutor(max(1, at_once)) as pool:
        return [float(bool(said)) for said in pool.map(_reports, ({"program": code_of(r), **fixed} for r in responses))]


def code_of(response: str) -> str:
    """The first block in ``` or ~~~ that says it is Python, else the first that says nothing, else the whole answer.

    Of a block that stands further in, as in a list, the margin is none of the code. Thoughts before </think> hold none,
    but where no <think> opens them a block may hold that word itself.
    """
    thought = len(response) - len(without_thoughts(response))
    if thought and (opens_a_thought(response) or not _in_a_block(response, thought)):
        response = response[thought:]
    found = _BLOCK.findall(response)
    blocks = [(language.lower(), textwrap.dedent(code) if margin else code) for margin, _, language, code in found]
    for wanted in (("python", "py", "python3", "py3", "ipython"), ("",)):
        for language, code in blocks:
            if language in wanted:
                return code
    return "" if blocks else response


def _in_a_block(response: str, place: int) -> bool:
    return any(block.start() < place < block.end() for block in _BLOCK.finditer(response))


def _reports(job: dict[str, Any]) -> set[str]:
    """What `run_program` says of the job: "passed NUMBER" for each test, or that the program compiles.

    ValueError where there are no namespaces.
    """
    if len(job["program"]) > LONGEST or not job["program"].strip():
        return set()
    word = secrets.token_hex(16)
    with _fresh_folder() as folder, tempfile.TemporaryFile() as said:
        with tempfile.TemporaryFile() as told:
            told.write(json.dumps({**job, "word": word, "folder": folder}).encode("utf-8", "surrogatepass"))
            told.seek(0)
            _run(run_program.WAITS * job["seconds"], folder, told, said)
        said.seek(0)
        lines = said.read(1 << 20).decode(errors="replace").splitlines()
    reports = {line.removeprefix(f"{word} ") for line in lines if line.startswith(f"{word} ")}
    if refused := next((line for line in reports if line.startswith("refused ")), None):
        raise ValueError(
            f"the kernel gives programs no namespaces here ({refused.removeprefix('refused ')}); allow user "
            "namespaces, or say namespaces=False to run answers' code with the limits and refusals that are left"
        )
    return reports


@contextlib.contextmanager
def _fresh_folder() -> Iterator[str]:
    """A folder that is removed afterwards, whatever a program has left in it; what cannot be removed stays.

    tempfile's own ends with an error where folders lie deeper in each other than Python recurses.
    """
    folder = tempfile.mkdtemp(prefix="program-")
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            os.chmod(folder, 0o700)
            while entries := list(os.scandir(folder)):
                for entry in entries:
                    if not entry.is_dir(follow_symlinks=False):
                        os.unlink(entry.path)
                        continue
                    os.chmod(entry.path, 0o700)
                    for inner in list(os.scandir(entry.path)):  # comes up here, so that paths stay short
                        if inner.is_dir(follow_symlinks=False):
                            os.chmod(inner.path, 0o700)
                        os.rename(inner.path, os.path.join(folder, secrets.token_hex(16)))
                    os.rmdir(entry.path)
            os.rmdir(folder)


def _run(seconds: float, folder: str, told: Any, said: Any) -> None:
    """Start the process and wait for its end, or make it end when its time is up."""
    environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    process = subprocess.Popen(
        [sys.executable, "-I", run_program.__file__],
        stdin=told,
        stdout=said,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds + STARTING_S)
    finally:
        # What it has started is of its group and ends with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


Test = str | dict[str, str]
"""Python code, or an `input` of a program and the `output` that is wanted."""


NAMES = """
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


def _report_of(number: int, test: Test) -> str:
    """What `run_program` says of a program that passes this test."""
    return f"passed {number}" if isinstance(test, str) else f"printed {number} {run_program.printed(test['output'])}"


def _tests_of(row: Any, entry_point: Any) -> list[Test]:
    """The tests of a row that are not blank; ValueError for what is none or no Python, and where nothing is checked."""
    if row is None:
        return []
    found = _listed(row) if isinstance(row, str) else row
    items = [found] if isinstance(found, Mapping) else found
    if not isinstance(items, Sequence) or not all(isinstance(item, str | Mapping) for item in items):
        raise ValueError(
            f"a row's tests must be texts, or inputs with their outputs, or a list of such, not {row!r:.100}"
        )
    tests: list[Test] = []
    for item in items:
        if isinstance(item, Mapping):
            tests += _inputs_and_outputs(item)
        elif item.strip():
            tests.append(_with_its_cases_run(item))
    if isinstance(entry_point, str) and (place := _check_that_nobody_calls(tests)) is not None:
        tests[place] = f"{tests[place]}\ncheck({entry_point})"
    if tests and not any(map(_does_something, tests)):
        raise ValueError(
            "a row's tests must check something, and not only define what nobody calls, compare without an assert, or "
            f"want no output: {row!r:.200}"
        )
    return tests


def _listed(text: str) -> Any:
    """The list or mapping that the text is, in JSON or as Python writes it (pandas in a CSV file), or the text itself
    as the one test."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            tests = read(text)
            return tests if isinstance(tests, list | dict) else [text]
    return [text]


def _inputs_and_outputs(test: Mapping[str, Any]) -> list[Test]:
    """{"input": ..., "output": ...}, or {"inputs": [...], "outputs": [...]}, as one test for each input.

    With fn_name inputs are lists of arguments of that function, or method of a class Solution, as in APPS.
    """
    inputs, outputs = (_one_or_several(test.get(side, test.get(f"{side}s"))) for side in ("input", "output"))
    if len(inputs) != len(outputs):
        raise ValueError(f"a row's tests have {len(inputs)} inputs and {len(outputs)} outputs: {test!r:.200}")
    pairs = list(zip(inputs, outputs, strict=True))
    if name := test.get("fn_name"):
        return [_RUN_CALL, *(f"assert _gives({str(name)!r}, {given!r}, {wanted!r})" for given, wanted in pairs)]
    return [{"input": _text(given), "output": _text(wanted)} for given, wanted in pairs]


def _one_or_several(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]


def _text(found: Any) -> str:
    """An input or output, which may be a list of lines."""
    lines = _one_or_several(found)
    if not all(isinstance(line, str) for line in lines):
        raise ValueError(f"a row's tests must have texts as inputs and outputs, not {found!r:.100}")
    return "\n".join(lines)


_RUN_CALL = """
def _gives(name, arguments, wanted):
    owner = globals().get("Solution")
    called = getattr(owner(), name) if hasattr(owner, name) else globals()[name]
    given = _with_lists(called(*arguments) if isinstance(arguments, list) else called(arguments))
    return given == wanted or [given] == wanted

def _with_lists(value):
    return [_with_lists(part) for part in value] if isinstance(value, (list, tuple)) else value
"""


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


def _check_that_nobody_calls(tests: list[Test]) -> int | None:
    """Which of them defines a function ``check``, where nothing outside of functions and classes calls it."""
    found, called = None, set()
    for place, test in enumerate(tests):
        for part in _parsed(test) if isinstance(test, str) else []:
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
        raise ValueError(f"a row's tests must be Python: {error}: {test!r:.200}") from None


def _does_something(test: Test) -> bool:
    """Whether there is a program that fails it. ValueError where it is no Python."""
    return bool(test["output"].strip()) if isinstance(test, dict) else not all(map(_is_idle, _parsed(test)))


def _is_idle(statement: ast.stmt) -> bool:
    """Whether it checks nothing: definitions, imports, values and comparisons by themselves, names for values."""
    if isinstance(statement, ast.Assign | ast.AnnAssign):  # METADATA = {...}, as in HumanEval
        return not any(isinstance(part, ast.Call | ast.Subscript | ast.Attribute) for part in ast.walk(statement))
    if _calls(statement, "unittest.main"):  # ends in SystemExit, or in a result that nobody looks at
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
