"""Code in answers, run confined: what passes, what does not, and what a program cannot do."""

from __future__ import annotations

import ctypes
import http.server
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from beaver_ray.rules import run_program
from beaver_ray.rules.programs import code_of, compiles, passes_tests

ADD = "Here you are:\n```python\ndef add(a, b):\n    return a + b\n```\nThat adds."
ADDS = ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'", "assert add(1, 1) == 3"]


@cache
def has_namespaces() -> bool:
    """Asked of the kernel, and not of the code under test."""
    apart = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--fork", "true"]
    return shutil.which("unshare") is not None and subprocess.run(apart, capture_output=True).returncode == 0


def has_landlock() -> bool:
    """Whether the kernel refuses files to a process that asks it to."""
    return bool(ctypes.CDLL(None).syscall(run_program.SYS_LANDLOCK_CREATE, None, 0, run_program.ASK_VERSION) > 0)


@pytest.fixture(params=[False, True], ids=["guard", "namespaces"])
def namespaces(request: pytest.FixtureRequest) -> bool:
    """Each of the two ways to be confined; that by namespaces where the kernel gives them."""
    if request.param and not has_namespaces():
        pytest.skip("the kernel gives no namespaces here")
    return bool(request.param)


def passed(program: str, *tests: str, namespaces: bool, seconds: float = 20.0, memory_mib: int = 512) -> float:
    """The share of tests that one program passes."""
    limits = {"seconds": seconds, "memory_mib": memory_mib}
    return passes_tests(["p"], [program], tests=[list(tests)], namespaces=namespaces, **limits)[0]


def test_shares_of_tests_passed(namespaces: bool) -> None:
    answers = [ADD, "", "def add(a, b: pass", "no code at all", "def add(a, b):\n    return 3"]
    tests = [ADDS] * len(answers)
    given = {"tests": tests, "namespaces": namespaces}
    assert passes_tests(["p"] * 5, answers, **given) == [2 / 3, 0.0, 0.0, 0.0, 2 / 3]
    assert passes_tests(["p"] * 5, answers, share=False, **given) == [0.0] * 5
    assert (
        passes_tests(["p"] * 2, [ADD] * 2, tests=[ADDS[:2], ADDS[0]], share=False, namespaces=namespaces) == [1.0] * 2
    )
    assert passes_tests(["p"] * 2, [ADD] * 2, tests=[None, []], namespaces=namespaces) == [0.0, 0.0]
    # A test may be a checking function, and sees what tests before it have named.
    check = "def check(candidate):\n    assert candidate(2, 2) == 4"
    assert passed(ADD, check, "check(add)", "é = add('ü', '漢字')\nassert é == 'ü漢字'", namespaces=namespaces) == 1.0
    assert passes_tests([], [], tests=[], namespaces=namespaces) == []
    # As a CSV file has them: an empty cell, and a list as a text, also as pandas writes it.
    json_list, python_list = '["assert add(1, 2) == 3", "assert add(1, 1) == 3"]', "['assert add(1, 2) == 3']"
    cells = ["", " ", [""], json_list, python_list]
    answers = [*[ADD] * 4, "def add(a, b):\n    return 7"]
    assert passes_tests(["p"] * 5, answers, tests=cells, namespaces=namespaces) == [0.0, 0.0, 0.0, 0.5, 0.0]


def test_what_only_defines_or_imports_is_no_test_passed() -> None:
    tests = [
        "import math",
        "def want(): return 2",
        "assert add(1, 1) == want()",
        "assert add(1, 1) == math.pi",
        "# end",
    ]
    given = {"tests": [tests, tests[:3]], "namespaces": False}
    wrong = "def add(a, b):\n    return 3"
    assert passes_tests(["p"] * 2, [ADD] * 2, **given) == [0.5, 1.0]  # type: ignore[arg-type]
    assert passes_tests(["p"] * 2, [wrong] * 2, **given) == [0.0, 0.0]  # type: ignore[arg-type]
    assert passes_tests(["p"] * 2, [ADD] * 2, share=False, **given) == [0.0, 1.0]  # type: ignore[arg-type]
    prepared = ["import random", "random.seed(0)", "assert add(1, 1) == 2"]
    assert passes_tests(["p"], [wrong], tests=[prepared], namespaces=False) == [0.0]


CHECK = "def test_add():\n    assert add(1, 1) == 3"


@pytest.mark.parametrize(
    "test",
    [
        "# none",
        CHECK,
        "METADATA = {'author': 'x'}\n\n" + CHECK,
        '"""All."""\nimport math',
        CHECK + "\nif __name__ == '__main__':\n    test_add()",
        '{"inputs": ["1 2\\n"], "outputs": ["\\n"]}',
        "add(1, 2) == 3",
        "import random\nrandom.seed(0)",
        "assert (add(1, 2) == 4, 'a tuple is always true')",
    ],
)
def test_tests_that_nothing_could_fail_are_a_mistake(test: str) -> None:
    with pytest.raises(ValueError, match="must check something"):
        passes_tests(["p"], [ADD], tests=[test])


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ('from dataclasses import dataclass\n@dataclass\nclass N: left: "N | None" = None', "N()"),
        ("from __future__ import annotations\nfrom dataclasses import *\n@dataclass\nclass N: x: int = 1", "N()"),
        ('class N: left: "N"', "import typing; assert typing.get_type_hints(N) == {'left': N}"),
        ("class N: x = 1", "import pickle; assert type(pickle.loads(pickle.dumps(N()))) is N"),
        ("class N: x = 1", "import program; assert program.N is N"),
        ("class N: x = 1", "import __main__; assert __main__.N is N"),
    ],
)
def test_what_looks_for_its_module_finds_it(program: str, test: str) -> None:
    assert passed(program, test, namespaces=False) == 1.0


CASE = "import unittest\nclass Adds(unittest.TestCase):\n    def test_it(self): self.assertEqual(add(1, 2), 3)"


@pytest.mark.parametrize(
    "tests",
    [
        [CASE],  # as in BigCodeBench
        [f"{CASE}\nunittest.main()"],
        [CASE, "unittest.main()"],
        [f"{CASE}\nif __name__ == '__main__':\n    unittest.main()"],
        [f"{CASE}\nunittest.main(exit=False)"],
        [CASE, "assert unittest.main(exit=False).result.wasSuccessful()"],
        [f"{CASE}\nassert unittest.main(exit=False).result.wasSuccessful()"],
        [f"import decimal\ndecimal.getcontext().prec = 9\n{CASE}"],
        ["import unittest\nclass A(unittest.TestCase): pass\nclass B(A):\n    def test(self): assert add(1, 2) == 3"],
        ["from unittest import *\nclass B(TestCase):\n    def test(self): assert add(1, 2) == 3\nmain()"],
    ],
)
def test_test_cases_of_unittest_are_run_and_judged(tests: list[str]) -> None:
    answers = [ADD, "def add(a, b):\n    return 7", "def other(): pass"]
    assert passes_tests(["p"] * 3, answers, tests=[tests] * 3, namespaces=False) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("body", ["pass", "@unittest.skip('no')\n    def test_it(self): pass"])
def test_test_cases_without_a_test_are_passed_by_nothing(body: str) -> None:
    assert passed(ADD, f"import unittest\nclass Adds(unittest.TestCase):\n    {body}", namespaces=False) == 0.0


def test_a_check_is_called_with_the_entry_point() -> None:
    check = "METADATA = {}\n\ndef check(candidate):\n    assert candidate(1, 2) == 3"  # as in HumanEval
    method = "class Solution:\n    def add(self, a, b): return a + b"
    answers, names = [ADD, "def add(a, b): return 7", method, ADD], ["add", "add", "Solution().add", "other"]
    given = {"tests": [check] * 4, "namespaces": False}
    assert passes_tests(["p"] * 4, answers, entry_point=names, **given) == [1.0, 0.0, 1.0, 0.0]  # type: ignore[arg-type]
    prepared = ["import math\nmath.sqrt(4)\n" + check]
    wrong = ["def add(a, b): return 7"]
    assert passes_tests(["p"], wrong, tests=prepared, entry_point=["add"], namespaces=False) == [0.0]
    called = [check, "check(add)"]
    assert passes_tests(["p"], [ADD], tests=[called], entry_point=["other"], namespaces=False) == [1.0]
    for nothing in (None, [None]):
        with pytest.raises(ValueError, match="must check something"):
            passes_tests(["p"], [ADD], tests=[check], entry_point=nothing, namespaces=False)


SUMS = {"inputs": ["1 2\n", "3 4\n", "x y\n"], "outputs": ["3\n", "7\n", "z"]}
"""Tests of a whole program, as APPS, TACO and CodeContests have them; the last one no sum passes."""

DEEP_IN_A_THREAD = """
import sys, threading
def depth(n): return depth(n - 1) + 1 if n else 0
def main(): print(depth(50_000) - 50_000 + sum(map(int, input().split())))
sys.setrecursionlimit(1 << 20)
threading.stack_size(1 << 26)
threading.Thread(target=main).start()
"""


def test_programs_are_tested_by_what_they_print(namespaces: bool) -> None:
    main = "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()"
    answers = [
        main,
        f"import sys\n{main}\n    sys.exit(0)",
        "import sys\nfor line in sys.stdin:\n    a, b = map(int, line.split()); sys.stdout.write(f' {a + b}  ')",
        "a, b = open(0).read().split()\nimport os\nos.write(1, b'%d' % (int(a) + int(b)))",
        "import sys; a, b = sys.stdin.buffer.read().split(); sys.stdout.buffer.write(b'%d' % (int(a) + int(b)))",
        f"{main}\n    import sys; sys.stdout.close()",
        "import atexit; atexit.register(lambda: print(total)); total = sum(map(int, input().split()))",
        f"import io, sys\nsys.stdout = io.TextIOWrapper(open(1, 'wb', closefd=False))\n{main}",
        f"{main}\n    import os, sys; sys.stdout.flush(); os._exit(0)",
        DEEP_IN_A_THREAD,
        f"{main}\n    raise SystemExit(1)",
        f"{main}\n    1 / 0",
        f"{main}\n    import os; os._exit(0)",
        "print(3)",
        "print(input)",
        "pass",
        "not Python",
    ]
    tests = [SUMS] * len(answers)
    found = passes_tests(["p"] * len(answers), answers, tests=tests, namespaces=namespaces)
    assert found == [2 / 3] * 10 + [0.0] * 3 + [1 / 3] + [0.0] * 3


def test_forms_of_inputs_and_outputs() -> None:
    """One, a list of them (LiveCodeBench), two lists (APPS, CodeContests), lists of lines, and all that as a text."""
    one = {"input": "1 2", "output": "3", "testtype": "stdin"}
    forms = [one, [one], {"input": ["1 2"], "output": ["3"]}, {"inputs": [["1", "2"]], "outputs": [["3"]]}]
    forms += [json.dumps(forms[2]), str(forms[1]), ["assert add(1, 1) == 2", one]]
    program = "import sys\ndef add(a, b): return a + b\nprint(add(*map(int, sys.stdin.read().split() or [0, 0])))"
    assert passes_tests(["p"] * 7, [program] * 7, tests=forms, namespaces=False) == [1.0] * 7


def test_functions_are_called_by_name() -> None:
    """As in APPS and TACO, whose outputs may stand in a list of their own."""
    tests = {"fn_name": "add", "inputs": [[1, 2], ["a", "b"], [[1], [2]]], "outputs": [3, ["ab"], [[1, 2]]]}
    method = "class Solution:\n    def add(self, a, b): return a + b"
    pair = "def add(a, b): return (a, b)"
    sites = "class Solution:\n    def add(self, a: List[int], b) -> Optional[int]: return reduce(operator.add, [a, b])"
    answers = [ADD, method, sites, "def add(a, b): return 3", "def other(): pass"]
    found = passes_tests(["p"] * 5, answers, tests=[tests] * 5, namespaces=False)
    assert found == [1.0, 1.0, 1.0, 1 / 3, 0.0]
    assert passed(sites, "assert True", namespaces=False) == 0.0, "tests that call by themselves bring what they need"
    powers = {"fn_name": "f", "inputs": [[5]], "outputs": [2]}
    assert passes_tests(["p"], ["def f(n): return pow(2, n, 5)"], tests=[powers], namespaces=False) == [1.0]
    assert passes_tests(["p"], [pair], tests=[{**tests, "outputs": [[1, 2], "ab", 0]}], namespaces=False) == [1 / 3]


def test_programs_do_with_their_streams_what_they_like() -> None:
    """Each of them prints 3 as a script of its own (asked of Python, and not of the code under test)."""
    programs = [
        "print(3, file=open(1, 'w'))",
        "with open(1, 'w') as f: f.write('3')",
        "import sys; sys.stdout = open(1, 'w'); print(3)",
        "import io, sys; sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding='utf-8'); print(3)",
        "import codecs, sys; sys.stdout = codecs.getwriter('utf-8')(sys.stdout.detach()); print(3)",
        "import io, sys; sys.stdin = io.TextIOWrapper(sys.stdin.detach()); print(sum(map(int, input().split())))",
        "import sys; sys.__stdout__.write('3')",
        "import sys; print(sum(map(int, sys.__stdin__.read().split())))",
        "f = open(0)\ndef main(): x = [[i] for i in range(100000)]; print(len(f.read().strip()))\nmain()",
        "a = [0] * (10 * 10**6)\ndef f(): return a\nprint(3)",
        "import functools, resource\nresource.setrlimit(resource.RLIMIT_STACK, (-1, -1))\nimport sys\n"
        "sys.setrecursionlimit(10**6)\n@functools.lru_cache(None)\ndef f(n): return f(n - 1) if n else 3\n"
        "print(f(20000))",
        "import decimal; decimal.getcontext().prec = 1; print(3)",
        "print(len(str(3 ** 20_000)) // 9542 + 2)",
    ]
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))
        os.environ["PYTHONINTMAXSTRDIGITS"] = "0"

    for program in programs:
        if "RLIMIT_STACK" in program and hard != resource.RLIM_INFINITY:
            continue
        script = [sys.executable, "-X", "int_max_str_digits=0", "-c", program]
        alone = subprocess.run(script, input=b"1 2", capture_output=True, preexec_fn=limits)
        assert alone.stdout.strip() == b"3" and alone.returncode == 0, (program, alone)
    answers = [p for p in programs if "RLIMIT_STACK" not in p or hard == resource.RLIM_INFINITY]
    tests = [{"inputs": ["1 2"] * 8, "outputs": ["3"] * 8}] * len(answers)
    found = passes_tests(["p"] * len(answers), answers, tests=tests, seconds=20, memory_mib=256, namespaces=False)
    assert found == [1.0] * len(answers)


def test_an_input_finds_nothing_of_the_one_before() -> None:
    program = "import atexit, builtins\nprint(getattr(builtins, 'seen', 0)); builtins.seen = 1\n"
    program += "atexit.register(print, 'end')\nassert input() != 'bad'"
    tests = {"inputs": ["bad", "good"], "outputs": ["0\nend", "0\nend"]}
    assert passes_tests(["p"], [program], tests=[tests], namespaces=False) == [0.5]


def test_what_a_program_rounds_is_not_what_is_compared() -> None:
    rounding = "from decimal import *; getcontext().prec = 5; getcontext().traps[Inexact] = True; "
    tests = [{"input": "", "output": "3.1416"}, {"input": "", "output": "3.141592653"}]
    assert passes_tests(["p"], [f"{rounding}print('3.141592653')"], tests=[tests], namespaces=False) == [0.5]
    long = f"0.{'1' * 40}"
    tests = [{"input": "", "output": long}, {"input": "", "output": f"{long[:-1]}2"}]
    assert passes_tests(["p"], [f"print('{long}')"], tests=[tests], namespaces=False) == [0.5]


def test_what_does_not_count_in_an_output() -> None:
    tests = [{"input": "", "output": wanted} for wanted in ("1.5\n", "2\n\n", "a b\nc", "0.0", "007", "1e5", "-3")]
    lines = ["1.50", "2.0", "a  b \nc\n", "-0.", "7", "100000", "-3"]
    programs = [f"print({line!r})" for line in lines]
    found = [passes_tests(["p"], [p], tests=[t], namespaces=False)[0] for p, t in zip(programs, tests, strict=True)]
    assert found == [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]


def test_what_one_input_leaves_behind_is_not_in_the_next_output() -> None:
    program = "import sys\nword = input()\nprint(word)\nassert word != 'bad'"
    tests = {"inputs": ["bad", "good"], "outputs": ["bad", "good"]}
    assert passes_tests(["p"], [program], tests=[tests], namespaces=False) == [0.5]


def test_what_a_function_gives_is_compared_outside(namespaces: bool) -> None:
    """By values as JSON has them, and by nothing that the program says of them."""
    wanted = [True, 1.5, [1, [2]], {"a": [1]}, None, "x", [3], 10**5000]
    tests = {"fn_name": "f", "inputs": [[n] for n in range(len(wanted))], "outputs": wanted}
    right = "def f(n): return [True, 1.5, (1.0, [2]), {'a': (1,)}, None, 'x', 3, 10 ** 5000][n]"
    array = "import numpy\ndef f(n): return numpy.array([1, 2])[1] if n else numpy.arange(2)"
    equal = "class Equal:\n    def __eq__(self, other): return True\ndef f(n): return Equal()"
    spying = """
def f(n):
    import sys
    frame, seen = sys._getframe(), ""
    while frame := frame.f_back:
        seen += f"{frame.f_locals} {frame.f_globals}"
    return "ya" + "k7" in seen
"""
    given = {"namespaces": namespaces, "seconds": 20.0}
    assert passes_tests(["p"], [right], tests=[tests], **given) == [1.0]
    assert passes_tests(["p"], [equal], tests=[tests], **given) == [0.0]
    arrays = {"fn_name": "f", "inputs": [[0], [1]], "outputs": [[0, 1], 2]}
    assert passes_tests(["p"], [array], tests=[arrays], **given) == [1.0]
    for looked_for, share in (
        ({"inputs": [["yak7"]], "outputs": [True]}, 1.0),
        ({"inputs": [[1]], "outputs": ["yak7"]}, 0),
    ):
        seen = passes_tests(["p"], [spying], tests=[{"fn_name": "f", **looked_for}], **given)
        assert seen == [share], "arguments alone are there"
    written = f'{{"fn_name": "f", "inputs": [[{"9" * 5000}]], "outputs": [{"9" * 5000}]}}'
    assert passes_tests(["p"], ["def f(n): return n"], tests=[written], **given) == [1.0], "numbers of any length"


def test_functional_tests_name_their_function_by_the_entry_point() -> None:
    """As in LiveCodeBench, where arguments are lines of JSON."""
    tests = [{"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}]
    answer = "class Solution:\n    def add(self, a: List[int], n: int): return [x + n for x in a]"
    given = {"tests": [tests], "namespaces": False}
    assert passes_tests(["p"], [answer], entry_point=["add"], **given) == [1.0]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give it an entry_point"):
        passes_tests(["p"], [answer], **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="arguments and outputs in JSON, not 'x'"):
        passes_tests(["p"], [answer], tests=[[{**tests[0], "output": "x"}]], entry_point=["add"])


def test_setup_runs_before_the_program(namespaces: bool) -> None:
    helper = "from typing import List\ndef poly(x): return x * x\ndef solve(xs: List[int]):\n    ..."
    program = "def solve(xs: List[int]): return [poly(x) for x in xs]"
    given = {"namespaces": namespaces, "tests": ["assert solve([3]) == [poly(3)]"]}
    assert passes_tests(["p"], [program], setup=[helper], **given) == [1.0]
    assert passes_tests(["p"], [program], setup=[helper.split("\n", 1)], **given) == [1.0]
    assert passes_tests(["p"], ["x = 1"], setup=[helper], **given) == [0.0]
    for nothing in (None, [None], [""], [[]]):
        assert passes_tests(["p"], [program], setup=nothing, **given) == [0.0]
    whole = {"tests": [{"input": "3", "output": "9"}], "setup": [helper], "namespaces": namespaces}
    assert passes_tests(["p"], ["print(poly(int(input())))"], **whole) == [1.0]  # type: ignore[arg-type]
    for bad, says in (("(", "must be Python"), (3, "setup must be a text")):
        with pytest.raises(ValueError, match=says):
            passes_tests(["p"], [program], setup=[bad], **given)


def test_a_program_cannot_say_that_there_are_no_namespaces(namespaces: bool) -> None:
    program = """
import os, sys
frame = sys._getframe()
while frame := frame.f_back:
    job = frame.f_locals.get("job", {})
    for n in range(64 if "word" in job else 0):
        try: os.write(n, (job["word"] + " refused everything\\n").encode())
        except OSError: pass
"""
    assert passed(program, "assert False", namespaces=namespaces) == 0.0


def test_wanted_outputs_are_not_in_the_process(namespaces: bool) -> None:
    program = """
import sys
frame, seen = sys._getframe(), ""
while frame := frame.f_back:
    seen += f"{frame.f_locals} {frame.f_globals}"
print("ya" + "k7" in seen, "zeb" + "ra8" in seen)
"""
    tests = {"inputs": ["1", "yak7"], "outputs": ["True False", "zebra8"]}
    assert passes_tests(["p"], [program], tests=[tests], namespaces=namespaces) == [0.5], "inputs alone are there"


@pytest.mark.parametrize(
    ("tests", "says"),
    [
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": [[1, 2], [3, 4]], "outputs": [3], "fn_name": "add"}, "2 inputs and 1 outputs"),
        ({"inputs": [1], "outputs": ["3"]}, "must have texts as inputs and outputs, not 1"),
        ({"input": "1"}, "must have texts as inputs and outputs, not None"),
        ({"input": "1", "output": 1}, "must have texts as inputs and outputs, not 1"),
        ([3], "must be texts, or inputs"),
    ],
)
def test_inputs_and_outputs_that_are_none(tests: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        passes_tests(["p"], [ADD], tests=[tests])


def test_threads_but_no_event_loop(namespaces: bool) -> None:
    threads = "import threading\nseen = []\nthread = threading.Thread(target=lambda: seen.append(f()))\n"
    threads += "thread.start(); thread.join(); assert seen == [1]"
    loop = "import asyncio\nasync def g(): return 1\nassert asyncio.run(g()) == 1"
    left = "def f(): return 1\nimport threading, time; threading.Thread(target=time.sleep, args=(100,)).start()"
    begun = time.monotonic()
    assert passed(left, "assert f() == 1", threads, loop, namespaces=namespaces) == pytest.approx(2 / 3)
    assert time.monotonic() - begun < 50, "a thread that the program has left is not waited for"


def test_threads_are_limited(namespaces: bool) -> None:
    many = "import threading\nthreading.stack_size(1 << 16)\nwait, n = threading.Event(), 0\ntry:\n"
    many += "    for n in range(1000): threading.Thread(target=wait.wait, daemon=True).start()\n"
    many += "except RuntimeError: pass\n"
    tests = "assert n > 4", f"assert n < {run_program.THREADS}"
    assert passed(many, *tests, namespaces=namespaces, memory_mib=4096) == 1.0


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise KeyboardInterrupt",
        "raise BaseException('x')",
        "def f(): f()\nf()",
        "import ctypes; ctypes.string_at(0)",
        "print('passed 0', flush=True)\nimport os\nfor n in range(64):\n"
        "    try: os.write(n, b'passed 0\\n')\n    except OSError: pass\nraise ValueError",
        "(" * 5000 + ")" * 5000,
        "x" * 300_000,
        "\0",
    ],
)
def test_what_ends_early_passes_nothing(program: str) -> None:
    assert passed(program, "assert True", namespaces=False) == 0.0


def test_an_endless_program_keeps_the_tests_before_it(namespaces: bool) -> None:
    started = time.monotonic()
    assert passed(ADD, ADDS[0], "while True: pass", ADDS[1], namespaces=namespaces, seconds=1.0) == pytest.approx(1 / 3)
    assert passed(ADD, ADDS[0], "import time; time.sleep(600)", namespaces=namespaces, seconds=1.0) == 0.5
    stubborn = "import signal\nfor n in (2, 14, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass"
    assert passed(ADD, ADDS[0], stubborn, namespaces=namespaces, seconds=1.0) == 0.5
    assert time.monotonic() - started < 60


def test_memory_files_and_output_are_limited(namespaces: bool, tmp_path: Path) -> None:
    def one(test: str) -> float:
        return passed("", "", namespaces=namespaces) if not test else passed("x = 1", test, namespaces=namespaces)

    assert one("b = bytearray(2 << 30)") == 0.0
    assert one("l = [0]\nwhile True: l += l") == 0.0
    assert one("b = bytearray(8 << 20)") == 1.0
    assert one("open('mine', 'w').write('x'); assert open('mine').read() == 'x'") == 1.0
    assert one("f = open('large', 'wb')\nfor _ in range(300): f.write(bytes(1 << 20))") == 0.0
    assert one("fs = [open(f'f{n}', 'w') for n in range(100)]") == 0.0
    assert one("print('x' * (64 << 20))\nimport sys\nassert sys.stdin.read() == ''") == 1.0
    # Outside its folder it changes nothing.
    victim = tmp_path / "victim"
    victim.write_text("whole")
    os.chmod(tmp_path, 0o777)
    for test in (
        f"open({str(victim)!r}, 'w')",
        f"import os; os.remove({str(victim)!r})",
        f"import os; os.symlink({str(victim)!r}, 'link'); open('link', 'a').write('x')",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import os; os.mkdir({str(tmp_path / 'new')!r})",
        "open('../above', 'w')",
    ):
        assert one(test) == 0.0, test
    assert victim.read_text() == "whole" and os.listdir(tmp_path) == ["victim"]


def test_memory_that_is_not_mapped_is_limited_too(namespaces: bool) -> None:
    """Each piece is smaller than what one file may have, and none is in the process's address space afterwards."""
    if os.uname().machine not in run_program.CALLS:
        pytest.skip("no filter of system calls for this processor")
    start = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nlibc.shmat.restype = ctypes.c_void_p\n"
    nameless = "held = [os.memfd_create('x') for _ in range(10)]\nfor f in held: os.write(f, bytes(60 << 20))"
    segments = (
        "for _ in range(10):\n    n = libc.shmget(0, 60 << 20, 0o1600)\n    assert n >= 0\n"
        "    try:\n        at = libc.shmat(n, None, 0)\n        ctypes.memset(at, 1, 60 << 20)\n"
        "        libc.shmdt(ctypes.c_void_p(at))\n    finally: libc.shmctl(n, 0, None)"
    )
    queue = "n = libc.msgget(0, 0o1600)\nassert n >= 0\nlibc.msgctl(n, 0, None)"
    posix = "n = libc.mq_open(b'/beaver-ray-test', 0o102, 0o600, None)\nassert n >= 0\n"
    posix += "libc.mq_unlink(b'/beaver-ray-test')"
    for test in (nameless, segments, queue, posix):
        assert subprocess.run([sys.executable, "-c", start + test]).returncode == 0, f"{test}: can be done outside"
        assert passed(start, test, namespaces=namespaces, memory_mib=256) == 0.0, test


def test_what_a_program_leaves_is_removed(namespaces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    deep = "import os\nfor i in range(1500): os.mkdir('d'); os.chdir('d')"
    closed = "import os\nos.makedirs('a/b/c'); open('a/b/x', 'w').close(); os.symlink('a', 'link')\n"
    closed += "for name in ('a/b/c', 'a/b', 'a', '.'): os.chmod(name, 0)"
    many = "import os\nfor i in range(50): os.makedirs(f'{i}/{i}'); open(f'{i}/f', 'w').close()"
    for program in (deep, closed, many):
        passed(program, "assert True", namespaces=namespaces)
        assert os.listdir(tmp_path) == []
    assert passed("x = 1", "assert x", namespaces=namespaces) == 1.0


def test_no_process_no_network_no_secret(namespaces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with serving() as port:
        for test in (
            f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)",
            f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=2)",
            "import os\npid = os.fork()\nif pid == 0: os._exit(0)",
            "import subprocess; subprocess.run(['true'])",
            "import os; assert os.system('true') == 0",
            "import multiprocessing as m; p = m.Process(target=print); p.start(); p.join(); assert p.exitcode == 0",
            "import os; assert 'HF_TOKEN' in os.environ",
            "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (50, 50))",
        ):
            assert subprocess.run([sys.executable, "-c", test]).returncode == 0, f"{test}: can be done outside"
            assert passed("x = 1", test, namespaces=namespaces) == 0.0, test
        killer = "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"
        assert passed("x = 1", killer, namespaces=namespaces) == 0.0


@contextmanager
def serving() -> Iterator[int]:
    """The port of a server of this machine that answers every request."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_namespaces_hold_without_the_guard() -> None:
    """By system calls that no audit hook sees: no files, no network, no processes."""
    if not has_namespaces():
        pytest.skip("the kernel gives no namespaces here")
    folder = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    with serving() as port:
        connect = (
            "import struct\ns = libc.socket(2, 1, 0)\naddress = struct.pack('<H', 2)"
            f" + struct.pack('>H', {port}) + bytes([127, 0, 0, 1]) + bytes(8)\nassert libc.connect(s, address, 16) == 0"
        )
        assert subprocess.run([sys.executable, "-c", folder + connect]).returncode == 0, "outside it can be reached"
        assert passed(folder, connect, namespaces=True) == 0.0
    for test in (
        "assert libc.open(b'/tmp/program-was-here', 0o101, 0o600) >= 0",
        "assert libc.fork() >= 0",
        "assert libc.mount(b'tmpfs', b'/mnt', b'tmpfs', 0, None) == 0",
        "assert libc.unshare(0x10000000) == 0 and libc.mount(None, b'/', None, 32 | 4096 & ~1, None) == 0"
        " and libc.open(b'/tmp/program-was-here', 0o101, 0o600) >= 0",
    ):
        assert passed(folder, test, namespaces=True) == 0.0, test
    assert not Path("/tmp/program-was-here").exists()


LAYERS = {
    "filter": "        filtered = _filter_calls()\n",
    "landlock": '        walled = _wall_in(job["folder"]) or job["namespaces"]\n',
    "hook": '        sys.addaudithook(_guard(os.path.realpath(job["folder"]), walled))\n',
}
"""The line that brings each layer in, but for namespaces."""
WITHOUT = {LAYERS["landlock"]: "        walled = False\n", LAYERS["filter"]: "        filtered = False\n"}
NO_PROCESSES = "        resource.RLIMIT_NPROC: threads,\n"


@pytest.mark.parametrize("layer", ["filter", "landlock", "hook", "namespaces", "none"])
def test_each_layer_holds_alone(layer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One behind another they would hide each other's holes; with none, all of it can be done."""
    if layer == "filter" and os.uname().machine not in run_program.CALLS:
        pytest.skip("no filter of system calls for this processor")
    if layer == "namespaces" and not has_namespaces():
        pytest.skip("the kernel gives no namespaces here")
    if layer == "landlock" and not has_landlock():
        pytest.skip("the kernel has no Landlock")
    source = Path(run_program.__file__).read_text()
    for line in (NO_PROCESSES, *(line for name, line in LAYERS.items() if name != layer)):
        assert source.count(line) == 1
        source = source.replace(line, WITHOUT.get(line, ""))
    (tmp_path / "alone.py").write_text(source)
    monkeypatch.setattr(run_program, "__file__", str(tmp_path / "alone.py"))
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    (open_to_all / "victim").write_text("whole")
    (open_to_all / "in").mkdir()
    for path in (open_to_all, *open_to_all.iterdir()):
        os.chmod(path, 0o777)
    start = f"import ctypes, os, socket\nlibc, there = ctypes.CDLL(None), {str(open_to_all)!r}\n"
    key = 0x5EED ^ os.getpid()
    memory = ctypes.CDLL(None).shmget(key, 4096, 0o1666)
    root = os.geteuid() == 0
    other = subprocess.Popen(["sleep", "600"], user=run_program.NOBODY if root else None)
    with serving() as port:
        # Programs run in one process: none of these ends it. Who is not meant to stop a thing is not named beside it.
        cases = {
            f"socket.create_connection(('127.0.0.1', {port}), 2)": "filter hook namespaces",
            f"os.kill({os.getpid()}, 0)": "filter hook namespaces",
            "os.fork() or os._exit(0)": "filter hook",
            "assert os.system('true') == 0": "filter hook",
            f"import fcntl; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, {os.getpid()})": "filter namespaces",
            "import fcntl; fcntl.fcntl(os.pipe()[0], fcntl.F_SETSIG, 9)": "filter",
            f"import resource; resource.prlimit({other.pid}, resource.RLIMIT_CORE, (0, 0))": "filter hook namespaces",
            "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))": "hook",
            "open(there + '/victim', 'a')": "hook landlock namespaces",
            "os.mkdir(there + '/new')": "hook landlock namespaces",
            "os.rename(there + '/in', there + '/out')": "hook landlock namespaces",
            "os.symlink('nowhere', there + '/link')": "hook landlock namespaces",
            "os.link(there + '/victim', there + '/second')": "hook landlock namespaces",
            "os.truncate(there + '/victim', 1)": "hook landlock namespaces",
            # What goes past Python no hook sees.
            "assert libc.open(os.fsencode(there) + b'/past', 0o101, 0o600) >= 0": "landlock namespaces",
            "import sqlite3; sqlite3.connect(there + '/base').execute('create table t (x)')": "landlock namespaces",
            "os.mkfifo(there + '/pipe')": "landlock namespaces",
            f"assert libc.shmget({key}, 4096, 0) >= 0": "filter namespaces",
            "os.close(os.memfd_create('x'))": "filter",
            "assert libc.socketpair(1, 1, 0, ctypes.create_string_buffer(8)) == 0": "filter",
        }
        if not root:  # whose programs have no power over what has all of root's
            cases |= {
                f"os.sched_setaffinity({other.pid}, os.sched_getaffinity({other.pid}))": "filter namespaces",
                f"os.setpriority(os.PRIO_PROCESS, {other.pid}, 19)": "filter namespaces",
            }
        tests = [test for test, layers in cases.items() if layer == "none" or layer in layers]
        given = {"namespaces": layer == "namespaces"}
        try:
            share = passed(start, *tests, **given)
            assert share == float(layer == "none"), [
                test for test in tests if bool(passed(start, test, **given)) != (layer == "none")
            ]
        finally:
            ctypes.CDLL(None).shmctl(memory, 0, None)
            other.kill()
            other.wait()


def test_the_folder_holds_no_more_than_the_memory_in_all() -> None:
    """Each of these files is smaller than what one may have, a quarter of it."""
    if not has_namespaces():
        pytest.skip("the kernel gives no namespaces here")
    files = [f"open('{n}', 'wb').write(bytes(15 << 20))" for n in range(5)]
    assert passed("x = 1", *files, namespaces=True, memory_mib=64) == 4 / 5


def test_what_no_namespace_hides_is_refused_as_well(namespaces: bool, tmp_path: Path) -> None:
    """Sockets in files lead to services of this machine, and io_uring to sockets; processes and signals with both."""
    if os.uname().machine not in run_program.CALLS:
        pytest.skip("no filter of system calls for this processor")
    start = "import ctypes, os, struct\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    path = bytes(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        os.chmod(path, 0o777)
        connect = (
            f"s, address = libc.socket(1, 1, 0), struct.pack('<H', 1) + {path!r} + bytes(1)\n"
            "assert s >= 0 and libc.connect(s, address, len(address)) == 0"
        )
        here = connect.replace("assert", "if not").replace("== 0", "== 0: raise SystemExit(1)")
        assert subprocess.run([sys.executable, "-c", start + here]).returncode == 0, "outside it can be reached"
        for test in (
            connect,
            "assert libc.syscall(425, 8, ctypes.create_string_buffer(200)) >= 0",
            "assert libc.socketpair(1, 1, 0, ctypes.create_string_buffer(8)) == 0",
            "assert libc.fork() >= 0",
            f"assert libc.kill({os.getpid()}, 0) == 0",
            "assert libc.ptrace(0, 0, 0, 0) == 0",
        ):
            assert passed(start, test, namespaces=namespaces) == 0.0, test
    assert passed(start, "assert libc.getpid() > 0", namespaces=namespaces) == 1.0


def test_paths_that_start_from_another_folder_do_not_leave_it(namespaces: bool, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("whole")
    for path in (tmp_path, victim):
        os.chmod(path, 0o777)
    start = f"import os, shutil, tempfile\nhere = os.open({str(tmp_path)!r}, os.O_RDONLY)\n"
    for test in (
        "os.open('victim', os.O_WRONLY | os.O_TRUNC, dir_fd=here)",
        "os.remove('victim', dir_fd=here)",
        "os.rename('victim', 'other', src_dir_fd=here, dst_dir_fd=here)",
        "os.mkdir('new', dir_fd=here)",
        f"os.makedirs('a/b'); start = os.open('.', os.O_RDONLY); os.chdir('a/b')\n"
        f"os.remove('../' * 9 + {str(victim)!r}, dir_fd=start)",
    ):
        assert passed(start, test, namespaces=namespaces) == 0.0, test
    assert victim.read_text() == "whole" and os.listdir(tmp_path) == ["victim"]
    # Where the kernel refuses everything else a path of its own need not be absolute.
    for test in ("import pathlib; pathlib.Path('x').touch()", "os.close(os.open('y', os.O_CREAT | os.O_WRONLY))"):
        assert passed(start, test, namespaces=namespaces) == float(namespaces or has_landlock()), test
    # Inside it, folders come and go as ever.
    test = "with tempfile.TemporaryDirectory() as t: open(t + '/x', 'w').write('x')\nassert not os.path.exists(t)"
    assert passed(start, test, "os.makedirs('a/b'); shutil.rmtree('a')", namespaces=namespaces) == 1.0


def test_a_kernel_without_namespaces_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = Path(passes_tests.__globals__["run_program"].__file__).read_text()
    (tmp_path / "none.py").write_text(source.replace("_ask(libc.unshare,", "raise OSError(1, 'Not permitted')\n    ("))
    monkeypatch.setattr(passes_tests.__globals__["run_program"], "__file__", str(tmp_path / "none.py"))
    with pytest.raises(ValueError, match=r"no namespaces here \(Not permitted\); .*namespaces=False") as caught:
        passes_tests(["p"], ["x = 1"], tests=["assert x"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "cheat",
    [
        "import builtins\nbuiltins.exec = lambda *a, **k: None",
        "import builtins\nc = compile\nbuiltins.compile = lambda s, *a, **k: c('0', 'x', 'exec')",
        "import __main__\n__main__.exec = __main__.compile = lambda *a, **k: None",
    ],
)
def test_what_runs_the_tests_is_taken_before_the_program_runs(cheat: str) -> None:
    assert passes_tests(["p"], [cheat], tests=[["assert f(1) == 2"]]) == [0.0]
    assert passes_tests(["p"], [f"{cheat}\ndef f(x):\n    return 2"], tests=[["assert f(1) == 2"]]) == [1.0]


def test_what_compiles() -> None:
    answers = [ADD, "x = ", "", "```python\nx = 1\n```", "print(1 + 1)", "hello there", "raise SystemExit", "(" * 5000]
    assert compiles(["p"] * 8, answers) == [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    # Words that Python takes for names, and comments, are no code.
    words = ["Sorry", "抱歉", "Sorry, no", "Paris is nice", "# no", "pass", "not_sure", "'a text'", "Answer: Paris"]
    assert compiles(["p"] * 9, words) == [0.0] * 9
    assert compiles(["p"] * 2, ["x: int = 1", "import math"]) == [1.0, 1.0]


def test_which_code_is_meant() -> None:
    assert code_of("a\n```\nfirst\n```\n```py\nsecond\n```\n") == "second\n"
    assert code_of("```bash\nls\n```\n```\nx = 1\n```") == "x = 1\n"
    tried = "First try:\n```python\ndef f(): return 0\n```\nCorrected:\n```python\ndef f(): return 1\n```\n"
    assert code_of(tried) == "def f(): return 1\n", "what is said at last counts"
    used = f"{tried}Use it:\n```python\nprint(f())\n```\nIt prints:\n```\n1\n```"
    assert code_of(used) == "print(f())\n" and code_of(used, {"f", "print"}) == "def f(): return 1\n"
    assert passes_tests(["p"], [used], tests=["assert f() == 1"], namespaces=False) == [1.0]
    assert code_of("```python\nf = 1\n```\n```python\nnot Python\n```", {"f"}) == "f = 1\n"
    assert code_of("\ufeffx = 1") == "x = 1"
    assert code_of("```python\ncut = 1") == "cut = 1"
    assert code_of("```bash\nls\n```") == "" and code_of("x = 1") == "x = 1"
    assert code_of("- so:\n  ```python\n  x = 1\n  ```") == "x = 1\n"
    nested = "1. so:\n\n   ```python\n   def f():\n       return 1\n\n   ```\n"
    assert code_of(nested) == "def f():\n    return 1\n\n" and compiles(["p"], [nested]) == [1.0]
    assert code_of("```python\n  x = 1\n```") == "  x = 1\n", "a margin of its own is the code's"
    assert code_of("So:\n~~~python\nx = 1\n~~~\nThat is all.") == "x = 1\n"
    assert code_of("```python\ns = '</think>'\n```") == "s = '</think>'\n"
    assert code_of("<think>\n```python\nx = 0\n</think>\n```python\nx = 1\n```") == "x = 1\n"
    assert code_of("<think>\n```python\nx = 0\n```\n</think>\n```python\nx = 1\n```") == "x = 1\n"


def test_where_a_block_ends() -> None:
    inner = 'def f():\n    """So:\n\n    ```\n    f()\n    ```\n    """\n    return 1\n'
    assert code_of(f"```python\n{inner}```\nThat is all.") == inner
    margin = "".join(f"  {line}" if line.strip() else line for line in inner.splitlines(keepends=True))
    assert code_of(f"- so:\n  ```python\n{margin}  ```\n- done") == inner
    assert passes_tests(["p"], [f"```python\n{inner}```"], tests=["assert f() == 1"], namespaces=False) == [1.0]
    # Another sign, or fewer of them, stand in the text of a block; more of them close it.
    quoted = 's = """\n```\n"""\n'
    assert code_of(f"~~~python\n{quoted}~~~\nend") == code_of(f"````python\n{quoted}`````\nend") == quoted
    assert code_of("`" * 400_000) == "`" * 400_000, "and that takes no time"
    # Up to 3 spaces further in than the opening, or less far in.
    for opening, closing in (("", "   "), ("  ", "     "), ("  ", ""), ("\t", "")):
        assert code_of(f"{opening}```python\n{opening}x = 1\n{closing}```\nend") == "x = 1\n", (opening, closing)
    for opening, further in (("", "    "), ("", "\t"), ("", "  \t"), ("  ", "      ")):
        assert code_of(f"{opening}```python\nif 1:\n{further}```\nend") == f"if 1:\n{further}```\nend"


@pytest.mark.parametrize(
    "changes", [{"seconds": 0}, {"memory_mib": -1}, {"memory_mib": 31}, {"tests": [3]}, {"tests": [[1]]}]
)
def test_parameters_out_of_range(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        passes_tests(["p"], ["x = 1"], **({"tests": ["assert x"]} | changes))  # type: ignore[arg-type]
