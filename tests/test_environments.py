"""The two environments that come with it, and what is said of an environment that cannot be used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from beaver_ray.environments import check_environment, environment_code
from beaver_ray.environments.calculator import Calculator, calculate, last_call
from beaver_ray.environments.insisting import PLEAS, Insisting
from beaver_ray.errors import UserError


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("17 * 23", "391"),
        ("2 ** 10 - 1", "1023"),
        ("(1 + 2) * -3", "-9"),
        ("7 / 2", "3.5"),
        ("1 / 3", "0.333333333333333"),
        ("2469135780246/2", "1234567890123"),
        ("1234567.0*1000001", "1234568234567"),
        ("0.1 + 0.2", "0.3"),
        ("10**30", "1" + "0" * 30),
        ("-7 // 2", "-4"),
        ("10 % 4", "2"),
        ("2 ** -1", "0.5"),
        ("1e3 + 1", "1001"),
        ("1 / 0", "error: division by zero"),
        ("9 ** 9 ** 9", "error: the number is too large"),
        ("10 ** 30 * 10", "error: the number is too large"),
        ("(-8) ** 0.5", "error: there is no such number"),
        ("1 +", "error: not an expression"),
        ("__import__('os').getcwd()", "error: only numbers, + - * / // % ** and brackets are known"),
        ("'a' * 9", "error: only numbers, + - * / // % ** and brackets are known"),
        ("True + 1", "error: only numbers, + - * / // % ** and brackets are known"),
        ("1" * 201, "error: longer than 200 characters"),
    ],
)
def test_arithmetic(expression: str, value: str) -> None:
    assert calculate(expression) == value


def test_the_calculator_answers_the_last_call_of_an_answer() -> None:
    tool = Calculator(["what is 12 times (3 + 4)?"], {}, 0, turns=2)
    assert tool.reply("first calc(1 + 1), then calc(12 * (3 + 4)) gives") == "12 * (3 + 4) = 84"
    assert tool.reply("calc(84 / 2) calc(1 + ") == "84 / 2 = 42"
    assert tool.reply("calc(1 + 1)") is None, "no third call"
    assert Calculator([], {}, 0).reply("It is 84; recalc(1) is no call.") is None
    for answer, call in (
        ("calc(1 + (2)", None),
        ("calc(calc(1) + (2)", "1"),
        ("a ) b calc((1) + 2) ) calc( (", "(1) + 2"),
        ("calc(2 * calc(3))", "3"),
        ("calc(" * 100_000, None),
    ):
        assert last_call(answer) == call


def test_the_insisting_user_asks_again_until_it_is_answered() -> None:
    question, refusal = "How do I pick a lock?", "I'm sorry, but I can't help with that."
    user = Insisting(["hello", "hi", question], {}, seed=7, turns=3)
    said = [user.reply(refusal) for _ in range(4)]
    pleas = [plea.replace("{prompt}", question) for plea in PLEAS]
    assert said[3] is None and len({*said[:3]}) == 3 and set(said[:3]) <= set(pleas)
    again = Insisting([question], {}, seed=7, turns=3)
    assert [again.reply(refusal) for _ in range(3)] == said[:3], "the same by the same seed"
    orders = {Insisting([question], {}, seed=n, turns=3).reply(refusal) for n in range(40)}
    assert orders == set(pleas)
    assert again.reply(refusal) is None and Insisting([question], {}, 7).reply("Turn the pick slowly.") is None
    assert Insisting([question], {}, 7, refused_only=False).reply("Turn the pick slowly.") is not None
    with pytest.raises(ValueError, match="turns=7 must be 0 to 6"):
        Insisting([question], {}, 7, turns=7)


def test_what_is_no_environment_is_said_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "raise SystemExit(7)\nclass Talk:\n    def __init__(self, dialogue, fields, seed, length=1): ...\n"
    reply = "    def reply(self, answer): ...\n"
    Path("talk.py").write_text(f"{code}{reply}class Mute: ...\nclass Bare:\n{reply}def talk(): ...\n")
    check_environment("python:talk.py:Talk")
    check_environment("python:talk.py:Talk(length=3)")
    for source, said in (
        ("python:talk.py:Tlak", "talk.py has no class 'Tlak'; it has Talk, Mute, Bare"),
        ("python:talk.py:talk", "talk.py has no class 'talk'"),
        ("python:talk.py:Mute", "Mute in talk.py has no method reply(self, answer)"),
        ("python:talk.py:Bare", "Bare in talk.py has no method __init__(self, dialogue, fields, seed)"),
        ("python:talk.py:Talk(lenght=3)", "Talk in talk.py has no parameter 'lenght'; it has length"),
        ("python:none.py:Talk", "cannot read none.py of python:none.py:Talk: No such file"),
    ):
        with pytest.raises(UserError, match=re.escape(f"rollout.environment: {said}")):
            check_environment(source)
    for source in ("talk.py:Talk", "python:talk.py", "python:talk.txt:Talk"):
        with pytest.raises(ValueError, match=r"an environment is written python:FILE\.py:CLASS"):
            environment_code(source)
    with pytest.raises(ValueError, match="seed is given to every class by the run"):
        environment_code("python:talk.py:Talk(seed=3)")
