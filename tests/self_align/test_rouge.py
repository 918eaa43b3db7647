"""ROUGE-L against brute force, and the index against comparing with the whole pool."""

from __future__ import annotations

import random
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beaver_ray.self_align.rouge import RougePool, longest_common, rouge_l
from beaver_ray.spelling import words

TEXTS = st.lists(st.sampled_from("abcdefg"), max_size=14)


def brute_force(first: list[str], second: list[str]) -> int:
    """By the definition: either both begin with the same word, or one of the first words is left out."""

    @cache
    def longest(i: int, j: int) -> int:
        if i == len(first) or j == len(second):
            return 0
        if first[i] == second[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return longest(0, 0)


@given(TEXTS, TEXTS)
def test_the_longest_common_subsequence(first: list[str], second: list[str]) -> None:
    assert longest_common(first, second) == brute_force(first, second)


def test_by_hand() -> None:
    # "police the gunman" of "police kill the gunman": l = 3, m = 4, n = 3.
    assert rouge_l(words("Police kill the gunman."), words("police; the gunman")) == 6 / 7
    assert words("L'été à 50 %: 北京") == ["l", "été", "à", "50", "北", "京"]
    assert rouge_l([], ["a"]) == 0 == rouge_l([], [])


@given(
    st.lists(st.lists(st.sampled_from("abcdefghijkl"), max_size=9), max_size=90), st.sampled_from([0, 0.5, 0.7, 0.9])
)
def test_the_index_finds_what_comparing_with_all_does(texts: list[list[str]], most: float) -> None:
    """Texts of few different words, so that many are alike; a pool of 64 has made its order anew."""
    pool = RougePool(most)
    for own in texts:
        alike = [n for n, other in enumerate(texts[: len(pool)]) if rouge_l(own, other) > most]
        found = pool.find(" ".join(own))
        assert (found in alike) if alike else found is None
        pool.add(" ".join(own))


def test_the_index_is_exact_after_it_has_doubled_often() -> None:
    """Rows of numbers, each sharing a part with those before; 700 texts, order made anew four times."""
    pool = RougePool(0.7)
    texts: list[list[str]] = []
    for number in range(700):
        own = [str(number * k % 41) for k in range(1, 4 + number % 9)]
        alike = any(rouge_l(own, other) > 0.7 for other in texts)
        assert (pool.find(" ".join(own)) is not None) == alike
        pool.add(" ".join(own))
        texts.append(own)
    assert pool.compared < 700 * 700 / 8


def test_the_index_is_exact_where_words_share_bits() -> None:
    """Texts of up to 300 words out of 3000, more than the index has bits, a half of them another one with some words
    changed: as many as bring F to about 0.7."""
    rng = random.Random(0)
    pool, texts, found = RougePool(0.7), list[list[str]](), 0
    for _ in range(150):
        own = [f"v{int(3000 * rng.random() ** 3)}" for _ in range(rng.choice([5, 12, 40, 300]))]
        if texts and rng.random() < 0.5:
            own = [word if rng.random() < 0.75 else f"v{rng.randrange(3000)}" for word in rng.choice(texts)]
        alike = [number for number, other in enumerate(texts) if rouge_l(own, other) > 0.7]
        number = pool.find(" ".join(own))
        assert (number in alike) if alike else number is None
        found += bool(alike)
        pool.add(" ".join(own))
        texts.append(own)
    assert 20 < found < 75


def test_a_bound_that_is_none() -> None:
    with pytest.raises(ValueError, match="from 0 to below 1"):
        RougePool(1.0)
