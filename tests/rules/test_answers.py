"""Right answers, as text and as numbers."""

# ruff: noqa: RUF001 (characters that look alike are told apart on purpose)

from __future__ import annotations

import time
from typing import Any

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


def test_numeric_answers() -> None:
    answers = ["The total is $1,000.50.", r"\boxed{0.75}", "#### 4", "", "six", "3.1416", "-5"]
    right: list[Any] = ["1000.5", "3/4", 4, "0", 6, "3.14159", [5, "-5"]]
    assert numeric_answer(["p"] * 7, answers, answer=right) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    assert numeric_answer(["p"] * 7, answers, answer=right, tolerance=0.001)[5] == 1.0
    assert numeric_answer(["p"], ["7"], answer=[None]) == [0.0]
    # What is said after it is no answer any more; of a calculation its end is.
    answers = [
        "The answer is 18. I used 3 steps.",
        "The answer is 2 + 3 = 5.",
        "答案是18。我用了3步。",
        "Answer: approx. 5",
        "**Answer**: 42. I used 3 steps.",
    ]
    assert numeric_answer(["p"] * 5, answers, answer=[18, 5, "18", 5, 42]) == [1.0] * 5
    # Under a heading the number is worked out.
    assert numeric_answer(["p"], ["### Answer\nShe has 3 + 4 = 7.\nTwice that is 14."], answer=[14]) == [1.0]
    # A phrase that no number follows marks none, and what it marks may stand on the next line.
    answers = [
        "9 + 9 = 18. I hope this solution is helpful!",
        "So she pays $18. This result is correct.",
        "The answer is as follows:\n18\n2 steps were needed",
        "The answer is 18.\nI checked 7 ways; this solution is right.",
        "The answer is 17. No: the answer is 18. I hope the result is clear.",
    ]
    assert numeric_answer(["p"] * 5, answers, answer=[18] * 5) == [1.0] * 5
    answers = [r"\boxed{x} or 5", "The answer is 4. The result is 5"]
    assert numeric_answer(["p"] * 2, answers, answer=[5, 4]) == [0.0, 0.0]
    with pytest.raises(ValueError, match="tolerance"):
        numeric_answer(["p"], ["7"], answer=["7"], tolerance=-1)


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
    ("boxed", "right"),
    [
        ("(5, 2)", "(1, 2)"),
        ("[2, 5]", "[1, 5]"),
        (r"\{7, 2\}", r"\{1, 2\}"),
        ("101_{5}", "204_{5}"),
        ("2", r"\frac{x}{2}"),
        ("9 2", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        ("5", "5!"),
        ("5", r"2^3 \cdot 5"),
        ("11:30", "12:30"),
        ("7:2", "3:2"),
        ("x=7 or x=2", "x=1 or x=2"),
        ("3", r"0.\overline{3}"),
        ("3", r"\pm 3"),
        ("3", "5 and 3"),
        ("5", r"[5, \infty)"),
        ("5", r"x \ge 5"),
        ("5", "(5, x)"),
        ("2", "2x"),
        ("5", "5 x^2"),
        ("3", r"\binom{5}{3}"),
    ],
)
def test_a_reference_that_is_more_than_a_number_pays_for_no_part_of_it(boxed: str, right: str) -> None:
    assert numeric_answer(["p"], [rf"\boxed{{{boxed}}}"], answer=[right]) == [0.0]


@pytest.mark.parametrize(
    ("boxed", "right"),
    [
        (r"\pm 5", 5),
        (r"x \le 5", 5),
        ("7-4", 4),
        (r"3 \times 4", 4),
        ("11:30", 30),
        ("2:3", 3),
        (r"\binom{5}{2}", 2),
        (r"0.\overline{3}", 3),
        ("1, 2, 3", 3),
        (r"5 \text{ or } 6", 6),
        ("-5", 5),
        ("5 minus 2", 2),
    ],
)
def test_a_box_that_holds_more_than_a_number_says_none(boxed: str, right: int) -> None:
    assert numeric_answer(["p"], [rf"\boxed{{{boxed}}}"], answer=[right]) == [0.0]


@pytest.mark.parametrize("right", ["minus 0.5", "negative 0.5", "- 0.5", "-(1/2)", "负0.5"])
def test_a_minus_in_words_counts_in_a_row_too(right: str) -> None:
    assert numeric_answer(["p"] * 2, ["-0.5", "0.5"], answer=[right] * 2) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("right", "number"),
    [
        (r"5 \text{ cm}", "5"),
        (r"12 \text{ cm}^2", "12"),
        ("25 cm²", "25"),
        ("25 cm2", "25"),
        ("9.8 m/s^2", "9.8"),
        ("7 in³", "7"),
        ("x = 5", "5"),
        (r"\$18.90", "18.9"),
        (r"90^\circ", "90"),
        ("5 miles per hour", "5"),
        ("5 km/h", "5"),
        ("5 p.m.", "5"),
        (r"So \boxed{5} in 3 steps", "5"),
        ("He had 3 and got 4.\n3 + 4 = 7\n#### 7", "7"),
        ("- 5", "-5"),
        (r"-\frac{3}{4}", "-0.75"),
        ("1e-05", "0.00001"),
        (0.25, "1/4"),
        ("(5)", "5"),
        ("7 (seven)", "7"),
        (r"$\frac{3}{4}$", "3/4"),
        ("18 dollars.", "18"),
    ],
)
def test_references_that_are_numbers(right: Any, number: str) -> None:
    assert numeric_answer(["p"] * 2, [number, "17.125"], answer=[right] * 2) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("response", "right"),
    [
        # What stands at once behind the mark counts, and of a calculation its end.
        ("The answer is 7 out of 10.", 7),
        ("The answer is $18 (after 3 days).", 18),
        ("The answer is 5, not 6.", 5),
        (r"The answer is $\frac{20}{3} \approx 6.67$.", "20/3"),
        ("The answer is **5** out of 10", 5),
        ("The answer is 12 inches (1 foot).", 12),
        ("The answer is 1/3 or about 0.33", "1/3"),
        ("The answer is 2 times 3, or 6", 6),
        ("Answer: 20% of 50 is 10", 10),
        ("Answer: 6 dozen eggs equals 72", 72),
        ("The answer is 8 boxes of 5 pencils, that's 40.", 40),
        ("The answer is 2 (3 + 4) = 14", 14),
        ("答案是3小时20分,共200分钟", 200),
        ("The answer is 20% of 50, which is 10.", 10),
        ("答案是5个,不是6个", 5),
        ("答案是3加4得7", 7),
        # Headings and openings of the working mark no number.
        ("#### Step 1\nCompute 5+5=10.\n#### Step 2\nAdd 8: 10+8=18.", 18),
        ("#### 1. Compute\n5+5=10.\n#### 2. Add\n8: 10+8=18.", 18),
        ("#### 18.\nBye 3", 18),
        ("**Solution:**\n\nStep 1: 3 + 4 = 7\n\nStep 2: 7 * 2 = 14", 14),
        ("Answer: Let's think step by step. 3 + 4 = 7. 7 * 2 = 14.", 14),
        ("The resolution is 5. So there are 7 pixels.", 7),
        # A minus apart from its number.
        (r"\boxed{- 5}", -5),
        (r"\boxed{- \frac{3}{4}}", "-3/4"),
        (r"\boxed{-\$5}", -5),
        ("-(5)", -5),
        ("x = - 5", -5),
        ("The answer is - 5", -5),
        ("The answer is: \u2212 5 apples", -5),
        ("The answer is $- 5$", -5),
        ("The answer is - $5", -5),
        ("#### - 5", -5),
        (r"The answer is $- \dfrac{1}{2}$", "-1/2"),
        ("The answer is -(1/2)", "-1/2"),
        ("The answer is -**5**", -5),
        (r"\boxed{-{5}}", -5),
        (r"\boxed{-\text{5}}", -5),
        (r"\boxed{\text{negative }5}", -5),
        (r"\boxed{x = -\frac{1}{2}}", "-1/2"),
        ("The answer is negative 5", -5),
        ("The answer is minus $5.", -5),
        ("The answer is 8 minus 3, so 5.", 5),
        ("The answer is:\n- 5 apples", 5),
        ("答案是负5", -5),
        ("气温是零下5度", -5),
        ("- 5", 5),
        ("So we get:\n- **42**", 42),
        ("Of these:\n- (7)", 7),
        (r"\boxed{2 + 3 = 5}", 5),
        (r"\boxed{\frac{20}{3} \approx 6.67}", "20/3"),
        (r"\boxed{x \approx 6.67}", 6.67),
        # Money in letters, other signs.
        ("50USD", 50),
        ("$50USD", 50),
        ("RM50", 50),
        ("Rs. 50", 50),
        ("7÷2", 3.5),
        ("2**10", 1024),
        ("The correct answer is 5 rather than 10", 5),
        # Thoughts are none of the answer.
        (r"<think>I guess \boxed{5}.</think>" + "\nAnswer: 7", 7),
        (r"I guess \boxed{5}.</think>" + "\nAnswer: 7", 7),
    ],
)
def test_which_number_is_the_answer(response: str, right: Any) -> None:
    assert numeric_answer(["p"], [response], answer=[right]) == [1.0]


def test_a_thought_without_end_says_nothing() -> None:
    assert numeric_answer(["p"], [r"<think>I guess \boxed{7}"], answer=["7"]) == [0.0]
    assert exact_answer(["p"] * 2, ["<think>C", "<think>\nok\n</think>\n\nC"], answer=["C"] * 2) == [0.0, 1.0]


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


@pytest.mark.parametrize(
    "right", [r"As $2 + 2 = 4$, it is $\boxed{\frac{1}{4}}$.", "2 + 2 = 4\n#### \\frac14", r"\frac{1}{4}"]
)
def test_a_row_may_hold_its_working(right: str) -> None:
    said = [r"So it is \boxed{\dfrac{1}{4}}.", "The answer is 4", right]
    assert exact_answer(["q"] * 3, said, answer=[right] * 3) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("said", ["A or B", "(A) and (B)", "A, B", "(A) Rome (B) Paris", "A) or B)", "a cat", "a + b"])
def test_more_than_a_choice_is_none(said: str) -> None:
    assert exact_answer(["q"], [said], answer=["A"]) == [0.0]


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


@pytest.mark.parametrize(
    "answer",
    [
        "The answer is 18 because there are 3 kids with 6 each",
        "#### 18 eggs in 3 boxes",
        "The answer is 18 dollars every 5 days",
        "The answer is 18 apples for 3 kids",
        "The answer is 18, as 3 kids have 6 each",
        "The answer is 18: 3 kids have 6 each",
        "The answer is 18 — 3 kids have 6 each",
        "The answer is 18, which is 3 times 6",
        "<answer>18 eggs in 3 boxes</answer>",
        "<answer>3 * 6 = 18</answer>",
        "The answer is 3 * 6 = 18",
        "The answer is 3 times 6, which is 18",
        "The answer is 3 boxes with 6 each = 18",
        "The answer is 3 for each of the 6 kids, that's 18",
        "The answer is 6 in each of 3 boxes, so 18",
        "The answer is 6 + 12 for a total of 18",
        "The answer is 18 since 20 - 2 = 18",
        "Answer: __18__",
    ],
)
def test_what_only_explains_the_number(answer: str) -> None:
    assert numeric_answer(["p"] * 2, [answer] * 2, answer=[18, 6]) == [1.0, 0.0]
