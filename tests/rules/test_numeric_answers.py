"""Whether an answer says the right number."""

from __future__ import annotations

from typing import Any

import pytest

from beaver_ray.rules.answers import numeric_answer


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
