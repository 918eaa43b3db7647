"""Kappas against numbers worked by hand or published."""

from __future__ import annotations

import pytest

from beaver_ray.labelling.agreement import cohen_kappa, fleiss_kappa


def test_cohen_by_hand() -> None:
    # Both yes 20, first alone 5, second alone 10, both no 15: agreed 0.7; by chance 0.5 x 0.6 + 0.5 x 0.4 = 0.5.
    first = [1] * 25 + [0] * 25
    second = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4) == cohen_kappa(second, first)
    assert cohen_kappa([0, 1, 0], [0, 1, 0]) == 1 and cohen_kappa([0, 1], [1, 0]) == pytest.approx(-1)
    assert cohen_kappa([1, 1], [1, 1]) is None and cohen_kappa([], []) is None


def test_fleiss_published() -> None:
    """14 raters, 10 items, 5 categories: a widely printed example, 0.210."""
    table = ["0 0 0 0 14", "0 2 6 4 2", "0 0 3 5 6", "0 3 9 2 0", "2 2 8 1 1"]
    table += ["7 7 0 0 0", "3 2 6 3 0", "2 5 3 2 2", "6 5 2 1 0", "0 2 2 3 7"]
    ratings = [[c for c, n in enumerate(map(int, row.split())) for _ in range(n)] for row in table]
    assert fleiss_kappa(ratings) == pytest.approx(0.2099, abs=5e-5)


def test_fleiss_with_different_numbers_of_ratings() -> None:
    # Agreed: 1 and 2 / (3 x 2), in the mean 2/3. By chance (3/5)^2 + (2/5)^2 = 0.52; the single rating says nothing.
    assert fleiss_kappa([[1, 1], [1, 0, 0], [1], []]) == pytest.approx((2 / 3 - 0.52) / 0.48)
    assert fleiss_kappa([[1, 1], [1, 1]]) is None and fleiss_kappa([[1], [0]]) is None
