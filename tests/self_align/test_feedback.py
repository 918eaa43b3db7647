"""Agreement of both orders, spreads, and the label of the strongest principle, against hand-made cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from beaver_ray.principle_options import ChosenPrinciple
from beaver_ray.self_align.feedback import agree, dominant, draw_label, scaled, spread
from beaver_ray.self_align.writing import drawn, written

NAN = math.nan


def test_only_what_both_orders_say_counts() -> None:
    # A better in both orders; B better in both; A only while it is first; a tie in one order; unread; tied in both.
    one, other = np.array([2.0, -1.0, 3.0, 0.0, NAN, 0.0]), np.array([-1.0, 3.0, 2.0, -1.0, 1.0, 0.0])
    found = agree(one, other)
    np.testing.assert_array_equal(found.score_N, [1.5, -2.0, NAN, NAN, NAN, NAN])
    figures = found.figures()
    assert (figures["pairs"], figures["unread"], figures["ties"], figures["kept"]) == (6, 1, 1, 2)
    # Four pairs could be read and are no tie in both orders; of their seven decisions four are for what stood first.
    assert figures["agreement"]["mean"] == 2 / 4 and figures["chose_what_stood_first"]["n"] == 7
    assert figures["chose_what_stood_first"]["mean"] == pytest.approx(4 / 7)
    assert figures["spread"] == pytest.approx(math.sqrt((1.5**2 + 2.0**2) / 2))


def test_nothing_is_kept_of_a_judge_that_takes_what_stands_first() -> None:
    rng = np.random.default_rng(0)
    found = agree(np.abs(rng.normal(size=500)) + 0.1, np.abs(rng.normal(size=500)) + 0.1)
    figures = found.figures()
    assert found.kept == 0 and figures["spread"] is None
    assert figures["chose_what_stood_first"]["mean"] == 1.0 and figures["chose_what_stood_first"]["low"] > 0.99


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_agreement_is_precise_where_one_order_is_not(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, right, bias = rng.random(20_000) < 0.5, 0.97, 0.25

    def says(first_is_better: np.ndarray) -> np.ndarray:
        honest = np.where(rng.random(len(truth)) < right, first_is_better, ~first_is_better)
        return np.where((rng.random(len(truth)) < bias) | honest, 1.0, -1.0)

    found = agree(says(truth), says(~truth))
    single = np.mean((found.one_order_N > 0) == truth)
    kept = np.isfinite(found.score_N)
    # By hand: b/2 + (1 - b) right on average; both right p(1)p(2) of those on which both are alike.
    first, second = bias + (1 - bias) * right, (1 - bias) * right
    both_right, both_wrong = first * second, (1 - first) * (1 - second)
    assert single == pytest.approx((first + second) / 2, abs=0.01) and single < 0.90
    precision = np.mean((found.score_N > 0)[kept] == truth[kept])
    assert precision == pytest.approx(both_right / (both_right + both_wrong), abs=0.005) and precision > 0.95


def test_no_principle_is_louder_than_another() -> None:
    loud, quiet = np.array([30.0, -40.0, NAN]), np.array([0.3, NAN, 0.4])
    assert spread(np.array([3.0, -4.0])) == pytest.approx(math.sqrt(12.5)) and spread(np.array([NAN])) is None
    found = scaled(np.stack([loud, quiet]))
    assert found[0, 0] == pytest.approx(30 / math.sqrt(1250)) and found[1, 2] == pytest.approx(0.4 / math.sqrt(0.125))
    assert np.isnan(found[0, 2]) and np.isnan(found[1, 1])
    # A file with the answers the other way round has the same spread.
    assert spread(-loud) == spread(loud)


def test_the_strongest_principle_decides() -> None:
    score = np.array([0.5, -2.0, NAN, 1.0])
    assert dominant(score, [0, 1, 3], [False, False, False]).score == -2.0
    negated = dominant(score, [0, 1, 3], [True, True, False])
    assert (negated.score, negated.dominant, negated.called("abcd")) == (2.0, 1, ["not a", "not b", "d"])
    assert dominant(score, [2, 0], [False, True]).score == -0.5
    # Of equal ones the first.
    assert dominant(np.array([1.0, -1.0]), [1, 0], [False, False]).dominant == 1
    with pytest.raises(ValueError, match="none of these"):
        dominant(score, [2], [False])


def test_what_is_drawn() -> None:
    rng = np.random.default_rng(0)
    score = np.array([1.0, NAN, *np.linspace(-2, -1, 10)])
    labels = [draw_label(score, rng) for _ in range(20_000)]
    assert draw_label(np.array([NAN]), rng) is None
    sizes = np.bincount([len(label.principles) for label in labels if label], minlength=9)[1:] / len(labels)
    # P(size = k) = 0.2 * 0.8 ** (k - 1), and all that is more than 8 counts as 8.
    expected = [0.2 * 0.8 ** (k - 1) for k in range(1, 8)]
    np.testing.assert_allclose(sizes, [*expected, 1 - sum(expected)], atol=0.012)
    for label in labels:
        assert label is not None and 1 not in label.principles and len(set(label.principles)) == len(label.principles)
        strongest = max(abs(score[i]) for i in label.principles)
        own = score[label.dominant] * (-1 if label.negated[label.principles.index(label.dominant)] else 1)
        assert abs(label.score) == strongest and label.score == own
    shares = np.mean([n for label in labels if label for n in label.negated])
    assert shares == pytest.approx(0.5, abs=0.01)


def test_principles_drawn_for_a_prompt() -> None:
    choices = [ChosenPrinciple(name="a", weight=8.0), *(ChosenPrinciple(name=n) for n in "bc")]
    found = [drawn(choices, 1, [f"prompt {n}"], None)[0] for n in range(3000)]
    np.testing.assert_allclose(np.bincount(found) / 3000, [0.8, 0.1, 0.1], atol=0.03)
    assert drawn(choices, 2, ["x"], None) == drawn(choices, 2, ["x"], None)
    assert len({tuple(drawn(choices, 2, ["x"], s)) for s in ("a", "b", "c", "d", "e")}) > 1


def test_how_principles_are_written() -> None:
    assert written(["Be kind.", "Be brief."]) == "Judge the answer by these principles:\n- Be kind.\n- Be brief."
    assert written(["Be kind."], "You are Ada.") == "You are Ada.\n\nJudge the answer by these principles:\n- Be kind."
