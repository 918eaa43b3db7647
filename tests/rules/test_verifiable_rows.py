"""Rows of public data sets whose answers can be verified, read by the mappings of docs/verifiers.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from beaver_ray.data.mixing import load_mix
from beaver_ray.rules.answers import exact_answer, numeric_answer
from beaver_ray.rules.programs import passes_tests
from beaver_ray.yaml_files import yaml_value

PAGE = (Path(__file__).parents[2] / "docs" / "verifiers.md").read_text(encoding="utf-8")
MAPPINGS = dict(re.findall(r"^\| ([\w, -]+) \| `(\{path: FILE, .*?\})`", PAGE, re.MULTILINE))
ADD = "def add(a, b):\n    return a + b"
SUM = "print(sum(map(int, input().split())))"
CASES = "import unittest\nclass TestCases(unittest.TestCase):\n    def test_it(self): self.assertEqual(add(1, 2), 3)"
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "MBPP": ({"text": "Add.", "code": ADD, "test_list": ["assert add(1, 2) == 3"], "test_setup_code": ""}, ADD, SUM),
    "HumanEval": (
        {
            "prompt": 'from typing import List\n\n\ndef add(a: int, b: int) -> int:\n    """ Add. """\n',
            "entry_point": "add",
            "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(1, 2) == 3\n",
        },
        "def add(a: int, b: int, more: List[int] = ()) -> int:\n    return a + b + sum(more)",
        "def add(a, b):\n    return a",
    ),
    "BigCodeBench": (
        {"instruct_prompt": "Add.", "complete_prompt": "def", "test": CASES, "entry_point": "add"},
        ADD,
        "def add(a, b):\n    return a",
    ),
    "APPS, TACO": (
        {"question": "Add.", "input_output": json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})},
        SUM,
        ADD,
    ),
    "CodeContests": ({"description": "Add.", "public_tests": {"input": ["1 2\n"], "output": ["3\n"]}}, SUM, ADD),
    "GSM8K, for numeric_answer": ({"question": "1,000 and 2?", "answer": "1,000 + 2\n#### 1,002"}, "#### 1002", "1003"),
    "MATH, for exact_answer": (
        {"problem": "A quarter?", "level": "1", "solution": r"It is $\boxed{\frac{1}{4}}$."},
        r"\boxed{\frac14}",
        "4",
    ),
}


def test_the_page_names_them() -> None:
    assert {name.replace("`", "") for name in MAPPINGS} == ROWS.keys()


@pytest.mark.parametrize("name", list(ROWS))
def test_right_and_wrong_answers(name: str, tmp_path: Path) -> None:
    row, right, wrong = ROWS[name]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    entry = yaml_value(MAPPINGS[name].replace("FILE", str(tmp_path / "rows.jsonl")))
    ((sample,), _) = load_mix([entry])
    fields = {field: [value] * 2 for field, value in sample.fields.items()}
    judge: Any = passes_tests
    if "answer" in fields:
        judge = numeric_answer if "numeric" in name else exact_answer
    else:
        fields["namespaces"] = False  # type: ignore[assignment]
    assert judge(["p"] * 2, [right, wrong], **fields) == [1.0, 0.0]
