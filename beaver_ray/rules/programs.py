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
from collections.abc import Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from beaver_ray.rules import run_program
from beaver_ray.rules.program_tests import long_numbers, read_tests
from beaver_ray.rules.thoughts import opens_a_thought, without_thoughts

LONGEST = 200_000  # characters; longer code is not run and passes nothing
ROOT = Path(run_program.__file__).parents[2]
# -I finds no package of a checkout. The program finds none there either, and no argument.
START = "import sys; sys.path.insert(0, sys.argv.pop()); from beaver_ray.rules.run_program import main; "
START += "del sys.path[0]; main()"
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
    setup: list[Any] | None = None,
    share: bool = True,
    seconds: float = 5.0,
    memory_mib: int = 1024,
    at_once: int = 2,
    namespaces: bool = True,
) -> list[float]:
    """The share of its row's ``tests`` that the code in each answer passes, or with share=False 1 where it passes all.

    tests: one or a list (also as JSON). A text is Python code, run after those before it in the names of the answer's
    code, and has failed where it raises; one that only defines, imports or seeds is run for those after it and does not
    count, but for test cases of unittest, which are run. {"input": ..., "output": ...}, or two lists of them, is a test
    of the whole program: what it prints for this standard input, compared as `run_program.printed` says; with "fn_name"
    of a function: what it gives for these arguments, compared as `run_program.given` says. A row without any gives 0;
    ValueError for a row whose tests every program would pass, and for a test that is no Python, which none would.
    entry_point: the name of what is asked for, which rows may leave out; tests that only define a function ``check``,
    as in HumanEval, are called with it. setup: Python code that rows may have run before the answer's, in its names.
    seconds (of CPU time, whole ones; 4 times as long by the clock), memory_mib: for an answer with all its tests; what
    ran out of them has passed the tests before. at_once: answers that run at the same time. namespaces: ask the kernel
    for what `confinement` says; ValueError where it has none to give, and then, with False, the rest of it is all that
    stands between the program and this machine.
    """
    if not LEAST_MIB <= memory_mib < 1e6:
        raise ValueError(f"memory_mib must be {LEAST_MIB} or more, of which Python takes some 20, not {memory_mib}")
    if not 0 < seconds < 1e6:
        raise ValueError(f"seconds must be above 0, not {seconds}")
    limits = {"seconds": seconds, "memory_mib": int(memory_mib), "namespaces": namespaces}
    none = [None] * len(tests)
    with long_numbers(), ThreadPoolExecutor(max(1, at_once)) as pool:
        rows = [read_tests(*row) for row in zip(tests, entry_point or none, setup or none, strict=True)]
        jobs = [
            {"program": code_of(response, row.names), "setup": row.setup, "tests": row.told, **limits}
            for response, row in zip(responses, rows, strict=True)
        ]
        said = list(pool.map(_reports, jobs))
    passed = [[not reports.isdisjoint(one) for one in row.accepted] for reports, row in zip(said, rows, strict=True)]
    if share:
        return [sum(had) / len(had) if had else 0.0 for had in passed]
    return [float(bool(had) and all(had)) for had in passed]


def compiles(prompts: list[str], responses: list[str], *, at_once: int = 2) -> list[float]:
    """1 where the code in the answer is Python, else 0. Nothing of it is run.

    An answer without code gives 0, and so do expressions that call nothing: "Sorry, no" is one.
    """
    fixed = {"tests": None, "namespaces": False, "seconds": 5.0, "memory_mib": 1024}
    with ThreadPoolExecutor(max(1, at_once)) as pool:
        said = pool.map(_reports, ({"program": code_of(response), **fixed} for response in responses))
        return [float("compiles" in reports) for reports in said]


def code_of(response: str, names: Set[str] = frozenset()) -> str:
    """The last block in ``` or ~~~ that says it is Python, else the last that says nothing, else the whole answer.

    Of several such blocks it is the last that defines one of ``names``, if any does: behind it a use of it may be
    shown. Of a block that stands further in, as in a list, the margin is none of the code. Thoughts before </think>
    hold none, but where no <think> opens them a block may hold that word itself.
    """
    response = response.removeprefix("\ufeff")  # a byte-order mark
    thought = len(response) - len(without_thoughts(response))
    if thought and (opens_a_thought(response) or not _in_a_block(response, thought)):
        response = response[thought:]
    found = _BLOCK.findall(response)
    blocks = [(language.lower(), textwrap.dedent(code) if margin else code) for margin, _, language, code in found]
    for wanted in (("python", "py", "python3", "py3", "ipython"), ("",)):
        if codes := [code for language, code in blocks if language in wanted]:
            defining = (code for code in reversed(codes) if not names.isdisjoint(_defined(code)))
            return codes[-1] if len(codes) == 1 or not names else next(defining, codes[-1])
    return "" if blocks else response


def _defined(code: str) -> Iterator[str]:
    """What the code defines: functions, classes, and names for values. Nothing where it is no Python."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        for statement in ast.parse(code).body:
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield statement.name
            elif isinstance(statement, ast.Assign):
                yield from (target.id for target in statement.targets if isinstance(target, ast.Name))


def _in_a_block(response: str, place: int) -> bool:
    return any(block.start() < place < block.end() for block in _BLOCK.finditer(response))


def _reports(job: dict[str, Any]) -> set[str]:
    """What `run_program` says of the job: of each test that is passed, or that the program compiles.

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
    reports = [line.removeprefix(f"{word} ") for line in lines if line.startswith(f"{word} ")]
    # Said before a program runs, which could say it as well.
    if reports and reports[0].startswith("refused "):
        raise ValueError(
            f"the kernel gives programs no namespaces here ({reports[0].removeprefix('refused ')}); allow user "
            "namespaces, or say namespaces=False to run answers' code with the limits and refusals that are left"
        )
    return set(reports)


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
        [sys.executable, "-I", "-c", START, str(ROOT)],
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
