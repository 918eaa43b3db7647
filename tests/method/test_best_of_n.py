"""Best-of-n under a gate, against every draw there is."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest

from beaver_ray.method.best_of_n import all_among, chances, chosen, refusal_chances, sizes


def test_the_best_that_keeps_the_gate() -> None:
    rewards = np.array([[1.0, 5.0, 3.0], [2.0, 1.0, 2.0], [9.0, 9.0, 9.0], [np.nan, -4.0, -5.0]])
    kept = np.array([[True, False, True], [True, True, True], [False, False, False], [False, True, True]])
    assert chosen(rewards, kept).tolist() == [2, 0, -1, 1]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_chances_are_those_of_all_draws(n: int) -> None:
    draw = np.random.default_rng(n)
    rewards, kept = draw.normal(size=(20, 5)).round(1), draw.random((20, 5)) < 0.5
    found = chances(rewards, kept, n)
    for row in range(20):
        order = np.argsort(-rewards[row], kind="stable")
        given = np.zeros(5)
        draws = list(combinations(range(5), n))
        for members in draws:
            winner = next((int(i) for i in order if i in members and kept[row, i]), None)
            if winner is not None:
                given[winner] += 1 / len(draws)
        np.testing.assert_allclose(found[row], given, atol=1e-12)


def test_chances_of_more_answers_than_a_float_has_draws_of() -> None:
    """Of 1,100 answers, every second of which is kept; the exact numbers are Python's own."""
    answers, n = 1100, 550
    rewards, kept = -np.arange(answers, dtype=float)[None], (np.arange(answers) % 2 == 1)[None]
    found = chances(rewards, kept, n)[0]
    ranks = {1 + 2 * rank: rank for rank in range(550)}
    draws = {k: Fraction(comb(answers - 1 - rank, n - 1), comb(answers, n)) for k, rank in ranks.items()}
    exact = [float(draws.get(k, 0)) for k in range(answers)]
    np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-300)
    # What is lacking to 1 is a refusal's, and exactly nothing where too few answers are not kept.
    assert refusal_chances(kept, n)[0] == pytest.approx(1 - sum(map(Fraction, exact)), rel=1e-9)
    assert refusal_chances(np.ones((1, 64), dtype=bool), 2).tolist() == [0.0]
    assert refusal_chances(np.arange(10)[None] < 3, 8).tolist() == [0.0]
    assert all_among(np.array([0, 1, 7, 9, 10]), 8, 10).tolist() == pytest.approx([0, 0, 0, 9 / 45, 1])


def test_all_answers_at_once_is_the_choice() -> None:
    draw = np.random.default_rng(0)
    rewards, kept = draw.normal(size=(50, 16)), draw.random((50, 16)) < 0.1
    best = chosen(rewards, kept)
    expected = np.zeros((50, 16))
    expected[np.flatnonzero(best >= 0), best[best >= 0]] = 1
    np.testing.assert_allclose(chances(rewards, kept, 16), expected, atol=1e-12)
    assert 0 < (best < 0).sum() < 50
    with pytest.raises(ValueError, match="from 1 to the 16"):
        chances(rewards, kept, 17)


def test_points_of_the_curve() -> None:
    assert [sizes(n) for n in (1, 2, 5, 16)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8, 16]]
