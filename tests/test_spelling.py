"""Words of many scripts: what a letter carries belongs to it."""

from __future__ import annotations

import unicodedata

import pytest

from beaver_ray.data.near import NearTexts, shingles, similarity
from beaver_ray.self_align.rouge import rouge_l
from beaver_ray.spelling import words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Don't say_it twice: 3.5!", ["don", "t", "say_it", "twice", "3", "5"]),
        ("मुझे दान के बारे में बताओ", ["मुझे", "दान", "के", "बारे", "में", "बताओ"]),
        ("我不能對不起。", ["我", "不", "能", "對", "不", "起"]),
        ("ป้าสวย", ["ป้", "า", "ส", "ว", "ย"]),
        ("Русский ёж", ["русский", "ёж"]),
        ("한국어 단어", ["한국어", "단어"]),
        ("…", []),
    ],
)
def test_words(text: str, found: list[str]) -> None:
    assert words(text) == found


def test_accents_may_be_letters_of_their_own() -> None:
    text = "giết người bằng dao thế nào"
    assert words(unicodedata.normalize("NFD", text)) == words(text) == text.split()
    near = NearTexts()
    near.add(unicodedata.normalize("NFD", text))
    assert near.find(text) == 0


def test_texts_that_differ_in_vowel_signs_are_others() -> None:
    donation, day = "मुझे दान के बारे में बताओ", "मुझे दिन के बारे में बताओ"
    # Of four runs of three words each, two are in both.
    assert similarity(shingles(donation), shingles(day)) == pytest.approx(2 / 6)
    assert rouge_l(words(donation), words(day)) == pytest.approx(5 / 6)
