"""Translations: likelihoods against transformers by hand, copies, chrF, and the rows of the recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from beaver_ray.rules.programs import passes_tests
from beaver_ray.rules.translation import by_model, chrf, copied

CONFIGS = Path(__file__).parents[2] / "configs" / "verifiers"
SOURCES = ["router switch port", "dose doctor water rest"]
ANSWERS = ["spark acid", "wheel brake engine mirror tray"]


def literal(folder: Path, before: str, text: str) -> float:
    """Mean log-prob of a text after another one, one sequence at a time, without padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    first = tokenizer.encode(before, add_special_tokens=False)
    first = ([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]) + first
    own = tokenizer.encode(f" {text}\n", add_special_tokens=False)
    assert len(own) >= len(text.split())
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([first + own])).logits[0].double(), -1)
    return sum(float(logprobs[len(first) - 1 + i, token]) for i, token in enumerate(own)) / len(own)


def test_likelihood_in_both_directions(tiny_world: Path) -> None:
    model = tiny_world / "model"
    there = [literal(model, f"German: {s}\nEnglish:", a) for s, a in zip(SOURCES, ANSWERS, strict=True)]
    back = [literal(model, f"English: {a}\nGerman:", s) for s, a in zip(SOURCES, ANSWERS, strict=True)]
    assert abs(there[0] - back[0]) > 0.01, "the two directions are told apart"
    for share in (0.0, 0.25, 1.0):
        expected = [(1 - share) * t + share * b for t, b in zip(there, back, strict=True)]
        given = {"source": SOURCES, "model": str(model), "back": share}
        assert by_model(["p"] * 2, ANSWERS, **given) == pytest.approx(expected, abs=1e-5)  # type: ignore[arg-type]
        assert by_model(["p"] * 2, ANSWERS, at_once=1, **given) == pytest.approx(expected, abs=1e-5)  # type: ignore[arg-type]
    # An answer without text has a score of its own, and changes no other.
    scores = by_model(["p"] * 3, [ANSWERS[0], " \n", ANSWERS[1]], source=[SOURCES[0], *SOURCES], model=str(model))
    assert scores[1] == -10.0
    both = [literal(model, f"German: {SOURCES[1]}\nEnglish:", ANSWERS[1]), back[1]]
    assert scores[2] == pytest.approx(sum(both) / 2, abs=1e-5)
    assert by_model([], [], source=[], model=str(model)) == []


def test_what_cannot_be_judged(tiny_world: Path) -> None:
    model = str(tiny_world / "model")
    for given, message in (
        ({"source": [None]}, "a row's source must be a text, not None"),
        ({"source": ["port"], "back": 1.5}, "back must lie between 0 and 1"),
        ({"source": ["port"], "languages": "de"}, "languages are two, that of the source and that of the answer"),
        ({"source": ["port"], "dtype": "int8"}, "dtype is float32 or bfloat16"),
        ({"source": ["port " * 600]}, "tokens are more than the model's 512 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            by_model(["p"], ["dose"], model=model, **given)  # type: ignore[arg-type]


def test_copies_by_hand() -> None:
    source = "Der Zug fährt ab."
    answers = ["Der Zug fährt ab.", "der  zug FÄHRT ab.", "The train leaves.", "Der Zug leaves.", "", "ab", "xy"]
    # "der zug leaves." has 12 runs of 4 characters; "der ", "er z", "r zu", " zug", "zug " are in the source.
    assert copied(["p"] * 7, answers, source=[source] * 7) == [1.0, 1.0, 0.0, 5 / 12, 0.0, 1.0, 0.0]
    assert copied(["p"], ["Zug x"], source=[source], characters=1) == [4 / 5]
    other = "\uff24er Zug fa\u0308hrt ab."  # a wide D, and an accent in a character of its own
    assert copied(["p"], [other], source=[source]) == [1.0]
    with pytest.raises(ValueError, match="characters must be 1 or more"):
        copied(["p"], ["x"], source=[source], characters=0)


def test_chrf_against_references() -> None:
    pytest.importorskip("sacrebleu")
    # Of one character each: precision and recall of 1-grams alone. "ab" against "ac": 1 of 2 and 0 of 1, whose means
    # over the orders that there are, 1/4 both, are chrF's F2 as well.
    references = ["the cat", "xyz", "ac", ["zzz", "the cat"]]
    assert chrf(["p"] * 4, ["the cat", "the cat", "ab", "the cat"], reference=references) == pytest.approx(
        [1, 0, 0.25, 1]
    )
    with pytest.raises(ValueError, match="a row's reference must be a text"):
        chrf(["p"], ["x"], reference=[None])
    with pytest.raises(ValueError, match="a row's reference must be a text, not 3"):
        chrf(["p"], ["x"], reference=[["the cat", 3]])


def test_rows_of_the_recipes() -> None:
    """Every row of code can be passed, and not by a program that does nothing; sources are in their prompts."""
    solved = {
        "add": "def add(a, b): return a + b",
        "is_even": "def is_even(n): return n % 2 == 0",
        "largest": "def largest(numbers): return max(numbers, default=None)",
        "backwards": "def backwards(text): return text[::-1]",
        "vowels": "def vowels(text): return sum(letter in 'aeiou' for letter in text.lower())",
        "factorial": "def factorial(n): return 1 if n < 2 else n * factorial(n - 1)",
        "squares": "def squares(n): return [k * k for k in range(1, n + 1)]",
        "words": "def words(text): return len(text.split())",
        "subtract": "def subtract(a, b): return a - b",
        "smallest": "def smallest(numbers): return min(numbers)",
        "double": "def double(numbers): return [2 * number for number in numbers]",
        "starts_with_capital": "def starts_with_capital(text): return text[:1].isupper()",
    }
    code = [json.loads(line) for line in (CONFIGS / "code.jsonl").open(encoding="utf-8")]
    answers = [
        next(f"```python\n{solved[name]}\n```" for name in solved if f" {name}(" in row["prompt"]) for row in code
    ]
    tests = [row["tests"] for row in code]
    prompts = [row["prompt"] for row in code]
    assert passes_tests(prompts, answers, tests=tests, seconds=20.0, namespaces=False) == [1.0] * 12
    nothing = ["def add(a, b): pass", "def is_even(n): pass"]  # which is right of 7, that it is not even
    assert passes_tests(prompts[:2], nothing, tests=tests[:2], seconds=20.0, namespaces=False) == [0.0, 1 / 3]
    rows = [json.loads(line) for line in (CONFIGS / "translation.jsonl").open(encoding="utf-8")]
    assert all(row["prompt"].endswith(row["source"]) and row["reference"] for row in rows)
    shares = copied(prompts, [row["reference"] for row in rows], source=[row["source"] for row in rows])
    assert max(shares) < 0.3, "a right translation keeps the recipe's limit in the mean"
