"""Runs one program and its tests, in a process of its own that `programs` starts and `confinement` walls in.

What it is to do comes as JSON on its standard input, a file; what came of it goes to its standard output, a file too,
one line for each test that passed and each input that was answered, behind a word that the program is not told. Python
tests and calls of functions share one process with the program: one that looks for its tests there can make them pass.
Each input has its own. What is wanted for an input, or of a function for its arguments, is in none of them: what a
program printed or gave is told as a hash. Nothing is imported but the standard library, since it starts anew each time.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import hashlib
import io
import json
import os
import re
import resource
import signal
import sys
import types
from collections.abc import Callable, Iterator
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from typing import Any, Literal, NoReturn

from beaver_ray.rules.confinement import confine, enter_namespaces, give_up_root

LONGEST_OUTPUT = 16 << 20  # bytes; a program that prints more has not answered
WAITS = 4  # times its CPU time a program may take by the clock, as it may have to wait for its turn, or sleep

PROGRAM = "the program"  # the name of its code in traces
MOST_DIGITS = 10_000  # of a number with a point or an exponent; longer ones are compared as they are written
EXACT = Context(prec=MOST_DIGITS, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])
_NUMBER = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=e))(e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE)


def main() -> None:
    """Do what standard input says, and end without a word."""
    sys.set_int_max_str_digits(0)  # programs print long numbers, and where they come from nothing forbids that
    job = json.load(sys.stdin)
    report = _reporter(job["word"])
    give_up_root()
    try:
        if job["namespaces"]:
            enter_namespaces(job["folder"], job["memory_mib"])
        _go_on_in_a_child(WAITS * job["seconds"])
    except OSError as error:
        _refuse(error, report)
    if job["tests"] is None:
        _alone(job, report, lambda: _compile(job["program"], report))
        return
    inputs, others = {}, []  # of the whole program; and what is run in the names of the program
    for number, test in enumerate(job["tests"]):
        if isinstance(test, dict) and "input" in test:
            inputs[number] = test["input"]
        else:
            others.append((number, test))
    if others:
        _alone(job, report, lambda: _run(job["setup"], job["program"], others, report))
    for number, text in inputs.items():
        _answer(job, number, text, report)


def _alone(job: dict[str, Any], report: Callable[[str], None], work: Callable[[], None]) -> int:
    """Do the work in a process of its own, confined, within what is left of the job's time; its exit status."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    left = job["seconds"] - used.ru_utime - used.ru_stime
    if left <= 0:
        return 1
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        confine(job["folder"], left, job["memory_mib"] << 20, job["namespaces"], watched=job["tests"] is not None)
    except OSError as error:
        _refuse(error, report)
    report("confined")
    work()
    sys.exit(0)


def _refuse(error: OSError, report: Callable[[str], None]) -> NoReturn:
    """Say that the kernel does not let a program be confined, and end."""
    report(f"refused {error.strerror or error}")
    os._exit(1)


def _reporter(word: str) -> Callable[[str], None]:
    """Says a line to the parent; the program's own input and output lead nowhere from here on."""
    said = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)

    def report(line: str) -> None:
        os.write(said, f"{word} {line}\n".encode())

    return report


def _go_on_in_a_child(seconds: float) -> None:
    """Fork: the child goes on, the parent ends when it has, or kills it when its time is up.

    The child is the first process of a new process namespace, where there is one: with it all others in there end, and
    most signals do not reach it, an alarm of its own among them.
    """
    child = os.fork()
    if child:
        signal.signal(signal.SIGALRM, lambda number, frame: os.kill(child, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        os.waitpid(child, 0)
        os._exit(0)


def _compile(program: str, report: Callable[[str], None]) -> None:
    """Report whether it is Python that does something; nothing of it is run.

    Words are Python too ("Sorry, no"), and values that nothing is done with.
    """
    try:
        compile(program, PROGRAM, "exec", dont_inherit=True)
        statements = ast.parse(program).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return
    if not all(map(_only_says, statements)):
        report("compiles")


def _only_says(statement: ast.stmt) -> bool:
    """Whether it is a value, or a name with its kind ("Answer: Paris"), by which nothing is called or set."""
    named = isinstance(statement, ast.Expr) or (isinstance(statement, ast.AnnAssign) and statement.value is None)
    acts = any(isinstance(part, ast.Call | ast.Await | ast.NamedExpr) for part in ast.walk(statement))
    return isinstance(statement, ast.Pass) or (named and not acts)


def _run(setup: str, program: str, tests: list[tuple[int, Any]], report: Callable[[str], None]) -> None:
    """Run the program where the setup has run, then each test in its names; report what ends without an exception.

    Tests are made ready before the program runs, which may put something else in the place of what makes and runs them.
    """
    run, end, hashed = exec, os._exit, given
    ready: list[tuple[int, Any]] = []
    for number, test in tests:
        with contextlib.suppress(SyntaxError, ValueError, MemoryError, RecursionError):
            code = compile(test, f"test {number}", "exec", dont_inherit=True) if isinstance(test, str) else test
            ready.append((number, code))
    module = types.ModuleType("program")
    # Where dataclasses, typing and pickle look for what it defines, and unittest.main for test cases
    sys.modules["program"] = sys.modules["__main__"] = module
    try:
        run(setup, module.__dict__)
        run(compile(program, PROGRAM, "exec", dont_inherit=True), module.__dict__)
    except BaseException:  # whatever it may raise, SystemExit included
        end(0)
    for number, code in ready:
        try:
            if isinstance(code, dict):
                report(f"gave {number} {hashed(_call(module, code['call'], code['arguments']))}")
            else:
                run(code, module.__dict__)
                report(f"passed {number}")
        except BaseException:
            continue
    end(0)  # whatever threads or handlers the program has left


def _call(module: types.ModuleType, name: str, arguments: list[Any]) -> Any:
    """What the function of this name gives, or the method of the class Solution."""
    owner = getattr(module, "Solution", None)
    return getattr(owner() if hasattr(owner, name) else module, name)(*arguments)  # type: ignore[misc]


def _answer(job: dict[str, Any], number: int, text: str, report: Callable[[str], None]) -> None:
    """Run the whole program for one input; report what it printed where it ended as one without an error does."""
    with _memory_file(text.encode("utf-8", "surrogatepass")) as given, _memory_file(b"") as output:

        def run() -> None:
            os.dup2(given, 0)
            os.dup2(output, 1)
            sys.stdin = sys.__stdin__ = _text_stream(0, "r")  # type: ignore[misc]
            sys.stdout = sys.__stdout__ = _text_stream(1, "w")  # type: ignore[misc]
            _run_as_main(job["setup"], job["program"])

        if _alone(job, report, run) == 0 and (size := os.fstat(output).st_size) <= LONGEST_OUTPUT:
            report(f"printed {number} {printed(os.pread(output, size, 0).decode(errors='replace'))}")


def _run_as_main(setup: str, program: str) -> NoReturn:
    """Run the program where the setup has run, and end as Python ends, but that the process is not taken apart, which
    may take longer than the program."""
    end, run_handlers = os._exit, atexit._run_exitfuncs
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    status = 0
    try:
        exec(setup, module.__dict__)
        exec(compile(program, PROGRAM, "exec", dont_inherit=True), module.__dict__)
    except SystemExit as wanted:
        status = 1 if wanted.code else 0
    except BaseException:  # whatever it may raise
        status = 1
    if threading := sys.modules.get("threading"):
        threading._shutdown()  # waits for the threads that are no daemons
    run_handlers()
    if not sys.stdout.closed:
        sys.stdout.flush()  # the one that the program may have put there
    end(status)


@contextlib.contextmanager
def _memory_file(content: bytes) -> Iterator[int]:
    """The descriptor of a file without a name that holds this, at its start."""
    descriptor = os.memfd_create("stream")
    try:
        written = 0
        while written < len(content):
            written += os.write(descriptor, content[written:])
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _text_stream(descriptor: int, mode: Literal["r", "w"]) -> io.TextIOWrapper:
    return open(descriptor, mode, encoding="utf-8", closefd=False)


def printed(output: str) -> str:
    """A hash of an output that leaves out what does not count: spaces at the ends of lines and between words, empty
    lines at the end, and how a number with a point or an exponent is written (1.50, 1.5 and 15e-1 are equal, and so are
    2.0 and 2)."""
    found = hashlib.sha256()
    for line in io.StringIO(output.rstrip(), newline=None):
        found.update(json.dumps([_plain(word) for word in line.split()]).encode())
    return found.hexdigest()


def _plain(word: str) -> str:
    """The word, or where it is a number with a point or an exponent that number without either as far as it can be."""
    if len(word) > MOST_DIGITS or not _NUMBER.fullmatch(word):
        return word
    return f"{EXACT.plus(EXACT.normalize(Decimal(word))):f}"


def given(value: Any) -> str:
    """A hash of what a function gives, by which values that are equal in JSON are equal: tuples and lists, 2.0 and 2,
    True and 1. TypeError for what JSON has no form for, but an array or number of numpy's."""
    return hashlib.sha256(json.dumps(_in_json(value), sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def _in_json(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(value)
    if isinstance(value, list | tuple):
        return [_in_json(part) for part in value]
    if isinstance(value, dict):
        return {str(_in_json(key)): _in_json(part) for key, part in value.items()}
    if hasattr(value, "tolist"):
        return _in_json(value.tolist())
    raise TypeError(f"{type(value)} has no form in JSON")
