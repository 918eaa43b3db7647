"""What an answer says at last, be it a text or a number."""

# ruff: noqa: RUF001 (characters that look alike are told apart on purpose)

from __future__ import annotations

import time

import pytest

from beaver_ray.rules.answers import exact_answer, final_answer, numeric_answer


def test_the_last_thing_said_counts() -> None:
    assert final_answer(r"so \boxed{3} or rather \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert final_answer(r"\boxed{a{b}c} and \boxed{never closed") == "a{b}c"
    assert final_answer("First 3.\n#### 18\nBye") == "18"
    assert final_answer("The answer is 4. No: the final answer is: 5\nI am sure.") == "5"
    assert final_answer("所以答案是：12。") == "12。"
    assert final_answer("The answer is 4.\nThe result isn't 5, for the solution isolates x.") == "4."
    assert final_answer("The answer is北京") == "北京", "what has no spaces may follow"
    assert final_answer("just this") == "just this" and final_answer("") == ""


def test_a_thought_without_end_says_nothing() -> None:
    assert numeric_answer(["p"], [r"<think>I guess \boxed{7}"], answer=["7"]) == [0.0]
    assert exact_answer(["p"] * 2, ["<think>C", "<think>\nok\n</think>\n\nC"], answer=["C"] * 2) == [0.0, 1.0]


def test_what_closes_an_answer_is_not_the_answer() -> None:
    named = [
        "**Answer: Paris**\n\nI hope this solution is helpful.",
        "Answer: Paris\nExplanation: The result is that it is large.",
        "It is Paris, so the result is Paris.\nI hope the solution is clear.",
        "#### Solution\nWe look it up.\n\nThe result is Paris.",
        "Let me know what you think: the answer is Paris",
    ]
    assert exact_answer(["p"] * 5, named, answer=["Paris"] * 5) == [1.0] * 5
    squares = [
        "The answer is:\n\\[\nx^2\n\\]",
        "The answer is:\n$$\nx^2\n$$",
        "The answer is:\n```\nx^2\n```",
        r"\[x^2\]",
    ]
    assert exact_answer(["p"] * 4, squares, answer=["x^2"] * 4) == [1.0] * 4


@pytest.mark.parametrize(
    "right", [r"As $2 + 2 = 4$, it is $\boxed{\frac{1}{4}}$.", "2 + 2 = 4\n#### \\frac14", r"\frac{1}{4}"]
)
def test_a_row_may_hold_its_working(right: str) -> None:
    said = [r"So it is \boxed{\dfrac{1}{4}}.", "The answer is 4", right]
    assert exact_answer(["q"] * 3, said, answer=[right] * 3) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("response", "text", "number"),
    [
        ("<think>5 or 6?</think>\n<answer> 7 </answer>", "7", 7),
        ("<answer>1</answer> No: <answer>so the answer is 2 apples.\n</answer> 3", "2 apples", 2),
        (r"<answer>It is \boxed{4}, not 5</answer> \boxed{6}", "4", 4),
        ("<answer>8", "8", 8),
        ("<think><answer>1</answer></think> 9", "9", 9),
        ("<answer></answer> 3", "", None),
    ],
)
def test_what_stands_in_tags_is_the_answer(response: str, text: str, number: int | None) -> None:
    assert final_answer(response) == text or exact_answer(["q"], [response], answer=[text]) == [1.0]
    assert numeric_answer(["q"] * 2, [response] * 2, answer=[number, 3]) == [float(number is not None), 0.0]


def test_large_answers_take_no_time() -> None:
    started = time.monotonic()
    pieces = (
        "1,",
        "\\boxed{",
        "answer is ",
        "1e",
        "-",
        "\\frac{",
        "1/",
        "1.",
        "\\times 10",
        "{}",
        "9",
        "9^9 ",
        "\n#",
        " ",
        "\\sqrt{",
        "π ",
        "x = ",
        "answer is x = x = ",
        "#### ",
        "####$$`",
        "\\left(",
        "- ",
        "-( 1 / ",
        "minus ",
        "负",
        "** - ",
    )
    for piece in pieces:
        numeric_answer(["p"], [piece * 200_000], answer=["1"])
        exact_answer(["p"], [piece * 200_000], answer=["1"])
    assert time.monotonic() - started < 30
