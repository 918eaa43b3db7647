"""A tool for arithmetic: the policy writes calc(EXPRESSION) into its answer, the next turn says what that is."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LONGEST = 200  # characters of an expression
LARGEST = 10**30  # whole numbers beyond it, and powers that would be, are not worked out

_BRACKET = re.compile(r"(\bcalc)?\(|\)")
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class Calculator:
    """Answers the last calc(...) of each answer with "EXPRESSION = VALUE", or says why it cannot.

    An answer without one ends the dialogue, and so does the one after ``turns`` calls.
    """

    def __init__(self, dialogue: Sequence[str], fields: Mapping[str, Any], seed: int, turns: int = 4) -> None:
        self.left = turns

    def reply(self, answer: str) -> str | None:
        """What the last call in the answer comes to; None where there is none, or one too many."""
        expression = last_call(answer)
        if expression is None or not self.left:
            return None
        self.left -= 1
        return f"{expression} = {calculate(expression)}"


def last_call(answer: str) -> str | None:
    """What stands in the brackets of the last calc(...), inner brackets included; None without a whole call."""
    opened: list[tuple[int, bool]] = []  # where each bracket that is open begins, and whether it is a call's
    last, expression = -1, None
    for bracket in _BRACKET.finditer(answer):
        if bracket[0] != ")":
            opened.append((bracket.end(), bracket[1] is not None))
        elif opened:
            start, called = opened.pop()
            if called and start > last:
                last, expression = start, answer[start : bracket.start()].strip()
    return expression


def calculate(expression: str) -> str:
    """The value of an expression of numbers, + - * / // % ** and brackets, or "error: ..." with the reason."""
    if len(expression) > LONGEST:
        return f"error: longer than {LONGEST} characters"
    try:
        value = _value(ast.parse(expression, mode="eval").body)
    except SyntaxError:
        return "error: not an expression"
    except OverflowError:
        return "error: the number is too large"
    except (ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        return f"error: {error}"
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value: Any = node.value
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        value = _UNARY[type(node.op)](_value(node.operand))
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        # Worked out in floating point first, so that no power fills the memory.
        if isinstance(node.op, ast.Pow) and abs(float(abs(left)) ** float(right)) > float(LARGEST):
            raise ValueError("the number is too large")
        value = _BINARY[type(node.op)](left, right)
    else:
        raise ValueError("only numbers, + - * / // % ** and brackets are known")
    if isinstance(value, complex) or abs(value) > LARGEST:
        raise ValueError("the number is too large" if not isinstance(value, complex) else "there is no such number")
    return value
