"""Whether an answer says the right text, formula or choice."""

# ruff: noqa: RUF001 (characters that look alike are told apart on purpose)

from __future__ import annotations

from typing import Any

import pytest

from beaver_ray.rules.answers import exact_answer


def test_exact_answers() -> None:
    answers = ["Paris.", "The answer is **Paris**", "ＰＡＲＩＳ", "Paris, France", "", r"\boxed{B}", "北京。"]
    right: list[Any] = ["paris", "Paris", "Paris", "Paris", "", ["b", "c"], "北京"]
    assert exact_answer(["p"] * 7, answers, answer=right) == [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    assert exact_answer(["p"] * 2, ["", "x"], answer=[None, []]) == [0.0, 0.0]
    named = [
        r"\boxed{\text{Paris}}",
        "The answer is Paris. I hope it helps.",
        "**Answer**: Paris",
        "答案：《Paris》",
        "«Paris»",
        "**答案**：Paris",
        "It is large.\n\n### Answer\nParis",
        "#### Final Answer\n\nParis",
        "**Answer**\n\nParis is it.\n\n## **Answer**\nParis. I hope it helps.",
    ]
    named += ["**Answer:**\nParis", "**Final Answer:**\n\nParis", "__Answer:__ \nParis. It is large."]
    assert exact_answer(["p"] * 12, named, answer=["Paris"] * 12) == [1.0] * 12
    lettered = ["The answer is (A)", "答案：（A）", "The answer is St. Petersburg.", "Paris. No, Rome.", "(A)"]
    assert exact_answer(["p"] * 5, lettered, answer=["A", "a", "St. Petersburg", "Paris", "(A)"]) == [
        1.0,
        1.0,
        1.0,
        0.0,
        1.0,
    ]


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("(3, 4)", "(3,4)"),
        (r"3 \sqrt{2}", r"3\sqrt{2}"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\left(3, 4\right)", "(3,4)"),
        (r"\left[0, \infty\right)", r"[0,\infty)"),
        ("2516_{8}", "2516_8"),
        (r"90^{\circ}", r"90^\circ"),
        ("50%", r"50\%"),
        ("x^2+2x", "x^{2} + 2x"),
        (r"\textit{C}", "C"),
        ("Don’t", "Don't"),
    ],
)
def test_one_formula_in_several_writings(said: str, right: str) -> None:
    assert exact_answer(["p"] * 2, [rf"\boxed{{{said}}}", f"The answer is ${said}$."], answer=[right] * 2) == [1.0] * 2


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("1 2", "12"),
        ("1 1/2", "11/2"),
        (r"\frac{1}{23}", r"\frac{12}{3}"),
        ("a b", "ab"),
        (r"\{12\}", r"\{1\}2"),
        (r"1 \\ 2", "12"),
        ("{1}", "1"),
    ],
)
def test_formulas_that_differ(said: str, right: str) -> None:
    assert exact_answer(["p"], [rf"\boxed{{{said}}}"], answer=[right]) == [0.0]


@pytest.mark.parametrize(
    "said",
    [
        "B",
        "(B)",
        "[B].",
        "B) Paris",
        "(B) Paris, I think",
        "B. Paris",
        "B: Paris",
        "Option B",
        "choice (b)",
        "选B",
        "选项B",
        "B）巴黎",
    ],
)
@pytest.mark.parametrize("right", ["B", "(b)"])
def test_a_letter_is_one_of_several_choices(said: str, right: str) -> None:
    assert exact_answer(["q"], [f"Let me see.\nThe answer is: {said}"], answer=[right]) == [1.0]
    assert exact_answer(["q"], [said], answer=["A"]) == [0.0]


@pytest.mark.parametrize("said", ["A or B", "(A) and (B)", "A, B", "(A) Rome (B) Paris", "A) or B)", "a cat", "a + b"])
def test_more_than_a_choice_is_none(said: str) -> None:
    assert exact_answer(["q"], [said], answer=["A"]) == [0.0]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *(("The answer is B because it is.", "B"), ("B, as we saw", "B"), ("B (Paris)", "B"), ("**B** (Paris).", "B")),
        *(("B - Paris", "B"), ("The correct option is B.", "B"), ("The correct choice is **B**.", "B")),
        *(("Option B is correct.", "B"), ("The answer is A, not B", "A"), ("C. 5 apples", "C")),
        *(("B) Paris, since A) London is wrong", "B"), (r"\boxed{\textbf{(B)}\ 18}", "B"), (r"($\mathbf{B}$)", "B")),
        *(
            ("故选B。", "B"),
            ("因此选择B", "B"),
            ("本题答案是B选项", "B"),
            ("答案是 B、巴黎", "B"),
            ("正确选项是B", "B"),
        ),
        *(
            ("应选B", "B"),
            ("选 B", "B"),
            ("The correct answer is (B) Paris.", "B"),
            ("Answer: B) None of the above", "B"),
        ),
    ],
)
def test_ways_to_say_a_choice(answer: str, letter: str) -> None:
    assert exact_answer(["p"] * 2, [answer] * 2, answer=[letter, "D"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "A or B",
            "A and B",
            "Both A and B",
            "A, B",
            "A/B",
            "A: dog B: cat",
            "B) and A)",
            "A or B because",
            "None",
            "I think so",
        ),
        *("A good answer needs thought", "B is wrong", "It is not B", "The answer is a number", "The answer is not A"),
    ],
)
def test_what_says_no_choice(answer: str) -> None:
    assert exact_answer(["p"] * 3, [answer] * 3, answer=["A", "B", "N"]) == [0.0] * 3


@pytest.mark.parametrize(
    ("said", "right"),
    [
        *(
            (r"\boxed{1{,}000}", r"1,\!000"),
            (r"10,\!000", "10000"),
            ("1,000", "1000"),
            ("90", r"90^\circ"),
            ("5", "x=5"),
        ),
        *(("5", r"5\text{ cm}"), (r"50\%", "50"), (".5", "0.5"), (r"-\frac12", r"\frac{-1}{2}"), ("0.5", "1/2")),
        *(
            (r"x \le 5", r"x \leq 5"),
            (r"x \geq 5", r"x\ge5"),
            ("5 apples.", "5"),
            (r"12\text{ inches}", "12"),
            ("5!", "5!"),
        ),
        *(
            (r"2^{10}", "1024"),
            ("$-5$", "-5"),
            ("1.50", "1.5"),
            ("The answer is Paris!", "Paris"),
            ("Answer: 'yes'", "yes"),
        ),
    ],
)
def test_one_number_in_two_writings(said: str, right: str) -> None:
    assert exact_answer(["p"], [said], answer=[right]) == [1.0]


@pytest.mark.parametrize(
    ("said", "right"),
    [
        *(
            (r"\boxed{.5}", "5"),
            (r"\boxed{.25}", "25"),
            ("5", r"\boxed{.5}"),
            (r"\boxed{>5}", "5"),
            ("Answer: <5", "5"),
        ),
        *(
            (r"\boxed{5!}", "5"),
            (r"\boxed{n!}", "n"),
            (r"\boxed{(n-1)!}", "(n-1)"),
            (r"\boxed{f'}", "f"),
            ("f(2)", "2"),
        ),
        *(
            (r"\boxed{y''}", "y"),
            ("11", "Apollo 11"),
            ("Apollo 11", "11"),
            ("007", "7"),
            ("7", "007"),
            ("5 cm", "5 kg"),
        ),
        *(
            (r"5\text{ cm}", r"5\text{ m}"),
            ("5%", "5 cm"),
            (r"\{5\}", "5"),
            ("(5, 6)", "5"),
            (r"\pm 5", "5"),
            ("101_2", "101"),
        ),
        *(
            (r"\sqrt{5}", "5"),
            (r"5\pi", "5"),
            ("5i", "5"),
            ("11:30", "11"),
            ("2 or 3", "2"),
            (r"\frac{5}{x}", "5"),
            ("-5", "5"),
        ),
    ],
)
def test_what_is_not_the_same_number(said: str, right: str) -> None:
    assert exact_answer(["p"], [said], answer=[right]) == [0.0]
