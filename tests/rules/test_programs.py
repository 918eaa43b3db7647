"""Code in answers: which of it is meant, and what passes which tests."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

from beaver_ray.rules.programs import code_of, compiles, passes_tests
from tests.rules.running import ADD, ADDS, passed


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
