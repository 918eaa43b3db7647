"""Multiple choice: formats, figures of hand-made log-probs, and what a scorer gets that knows nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beaver_ray.errors import UserError
from beaver_ray.multiple_choice import (
    Choices,
    Question,
    accuracy,
    chance,
    figure,
    listed,
    over_orders,
    read_questions,
    rotations,
    true_mass,
)

ROOT = Path(__file__).parents[1]
TRUTHFUL = {
    "question": "Why?",
    "mc1_targets": {"choices": ["so", "thus", "hence", " "], "labels": [1, 0, 0, 0]},
    "mc2_targets": {"so": 1, "indeed": 1, "thus": 0},
}
HHH = {"input": "How?", "target_scores": {"well": 1, "badly": 0}}


def test_figures_by_hand() -> None:
    assert accuracy([-1.0, -2.0, -3.0], [True, False, False]) == 1.0
    assert accuracy([-3.0, -2.0, -1.0], [True, False, False]) == 0.0
    # The right answer is one of three best ones.
    assert accuracy([-1.0, -1.0, -1.0, -5.0], [True, False, False, False]) == pytest.approx(1 / 3)
    logprobs = [math.log(0.1), math.log(0.2), math.log(0.3)]
    assert true_mass(logprobs, [True, False, True]) == pytest.approx(0.4 / 0.6)
    assert true_mass([p - 5000 for p in logprobs], [True, False, True]) == pytest.approx(0.4 / 0.6)


def ours(folder: Path, count: int) -> Path:
    """Questions of 2 to 9 choices, the right one first in each, as TruthfulQA has it."""
    rows = [
        {"question": f"q{n}", "mc1_targets": {f"c{k}": int(k == 0) for k in range(2 + n % 8)}} for n in range(count)
    ]
    file = folder / "questions.json"
    file.write_text(json.dumps(rows))
    return file


def test_chance_is_what_a_scorer_gets_that_knows_nothing(tmp_path: Path) -> None:
    questions, _ = read_questions(ours(tmp_path, 4000))
    sets = [question.sets["mc1"] for question in questions]
    by_hand = np.mean([1 / k for k in range(2, 10)])
    assert np.mean([chance(c) for c in sets]) == pytest.approx(by_hand)
    rng = np.random.default_rng(0)
    random = np.mean([figure("mc1", rng.normal(size=len(c.texts)).tolist(), c) for c in sets])
    assert random == pytest.approx(by_hand, abs=4 * math.sqrt(by_hand * (1 - by_hand) / 4000))
    # All alike, and always the first or the last place: no more than chance either.
    assert np.mean([figure("mc1", [0.0] * len(c.texts), c) for c in sets]) == pytest.approx(by_hand)
    for place in (0, -1):
        scores = [np.eye(len(c.texts))[place].tolist() for c in sets]
        found = np.mean([figure("mc1", s, c) for s, c in zip(scores, sets, strict=True)])
        assert found == pytest.approx(by_hand, abs=0.03)


def test_formats(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    bad: list[Any] = [
        {"question": "x"},
        {"question": "x", "mc1_targets": None},
        {"input": "x", "target_scores": {"a": 1}},
        [],
        {"input": "", **HHH} | {"input": ""},
    ]
    bad += [TRUTHFUL | {"mc1_targets": {"a": 1, "b": 1}}, TRUTHFUL | {"mc2_targets": {"choices": ["a"], "labels": []}}]
    lines = [json.dumps(row) for row in (TRUTHFUL, HHH, *bad)] + ["{no"]
    file.write_text("\n".join(lines))
    questions, report = read_questions(file, seed=3)
    assert len(questions) == 2 and report.dropped.total() == 8 and report.remarks["blank choices were left out"] == 1
    assert "1 'target_scores' has not right and wrong choices, 1 and 0" in report.line()
    truthful, hhh = questions
    assert set(truthful.sets["mc1"].texts) == {"so", "thus", "hence"} and truthful.ask == "apart"
    assert [t for t, r in zip(truthful.sets["mc2"].texts, truthful.sets["mc2"].right, strict=True) if r] != []
    assert dict(zip(hhh.sets["choice"].texts, hhh.sets["choice"].right, strict=True)) == {"well": True, "badly": False}
    assert hhh.ask == "listed" and questions == read_questions(file, seed=3)[0]
    file.write_text(json.dumps({"name": "hhh", "examples": [HHH]}))
    assert read_questions(file)[0][0].text == "How?"
    for name in ("truthful", "hhh"):
        assert read_questions(ROOT / f"configs/self-align/multiple_choice_{name}.json")[1].dropped.total() == 0
    # Texts with other ends of lines, in a file as Windows saves it; and half a character.
    odd = [{"input": "How\u2028so\x85?", "target_scores": HHH["target_scores"]}, HHH]
    lines = [json.dumps(row, ensure_ascii=False) for row in odd]
    lines.append(r'{"input": "?", "target_scores": {"a\ud83d": 1, "b": 0}}')
    file.write_text("\r\n".join(lines), encoding="utf-8-sig")
    questions, report = read_questions(file)
    assert [question.text for question in questions] == ["How\u2028so\x85?", "How?"]
    assert dict(report.dropped) == {"'target_scores' has half a character": 1}
    file.write_text("[]")
    for wrong, words in ((file, "has no question with choices"), (tmp_path / "none", "cannot read questions")):
        with pytest.raises(UserError, match=words):
            read_questions(wrong)


def test_choices_in_several_orders() -> None:
    assert rotations(2, 4) == [[0, 1], [1, 0]] and rotations(3, 2) == [[0, 1, 2], [1, 2, 0]]
    assert listed("Why?", ["so", "thus"]).startswith("Why?\n\nA. so\nB. thus\n\n")
    # Choice 1 is liked by 1 nat, the first place by 3: each order alone takes what stands first.
    likes, orders = np.array([0.0, 1.0]), rotations(2, 2)
    logprobs = np.array([[likes[order[0]] + 3, likes[order[1]]] for order in orders])
    scores, same, first = over_orders(logprobs, orders)
    assert scores.tolist() == [1.5, 2.5] and not same and first == 2
    assert figure("choice", scores.tolist(), Choices(("a", "b"), (False, True))) == 1.0
    assert over_orders(np.array([[0.0, 9.0], [9.0, 0.0]]), orders)[1:] == (True, 1)
    # A policy that has no liking for places gives its own probability, in however many orders it is asked.
    sure = np.log([0.25, 0.75])
    seen = np.array([sure[list(order)] for order in orders])
    for few in (1, 2):
        mass = figure("mc2", over_orders(seen[:few], orders[:few])[0].tolist(), Choices(("a", "b"), (False, True)))
        assert mass == pytest.approx(0.75)
    # One that goes by places alone is undecided, and gets chance.
    blind, _, _ = over_orders(np.array([[-0.1, -2.0], [-0.1, -2.0]]), orders)
    question = Question("?", {"choice": Choices(("a", "b"), (True, False))})
    assert figure("choice", blind.tolist(), question.sets["choice"]) == 0.5
