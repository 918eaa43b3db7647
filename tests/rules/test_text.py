"""Length, patterns and words of answers."""

from __future__ import annotations

import time

import pytest

from beaver_ray.rules.text import matches, mentions, over_length, word_count


def test_length_over_a_budget() -> None:
    answers = ["", "one two", "one two three", "a " * 8, "x" * 100]
    assert over_length(["p"] * 5, answers, budget=2) == [0.0, 0.0, 0.5, 3.0, 0.0]
    assert over_length(["p"] * 5, answers, budget=2, most=1.0) == [0.0, 0.0, 0.5, 1.0, 0.0]
    assert over_length(["p"] * 5, answers, budget=50, unit="characters") == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert over_length(["p"], ["w " * 100_000], budget=100) == [999.0]
    assert over_length(["p"], ["one two three"], budget=2, most=0) == [0.0]
    for wrong, message in (
        ({"budget": 0}, "budget must be above 0"),
        ({"budget": float("nan")}, "budget must be above 0"),
        ({"budget": 3, "unit": "tokens"}, "unit is words"),
        ({"budget": 3, "most": -1}, "most must be 0 or above, not -1"),
        ({"budget": 3, "most": float("nan")}, "most must be 0 or above, not nan"),
    ):
        with pytest.raises(ValueError, match=message):
            over_length(["p"], ["x"], **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        (" \n\t", 0),
        ("don't stop", 2),
        ("我喜欢茶", 4),
        ("我 like 茶!", 4),
        ("カメラ3台", 5),
        ("안녕 하세요", 2),
        ("ฉันชอบชา", 7),  # one of the eight characters stands above another
        ("ຂ້ອຍ khmer ខ្ញុំ tea", 7),
    ],
)
def test_words_of_scripts_with_and_without_spaces(text: str, count: int) -> None:
    assert word_count(text) == count


def test_patterns() -> None:
    answers = ["call 555-1234", "", "CALL me", "línea\n第二行"]
    assert matches(["p"] * 4, answers, pattern=r"\d{3}-\d{4}") == [1.0, 0.0, 0.0, 0.0]
    assert matches(["p"] * 4, answers, pattern="call", ignore_case=True) == [1.0, 0.0, 1.0, 0.0]
    assert matches(["p"] * 4, answers, pattern="", whole=True) == [0.0, 1.0, 0.0, 0.0]
    assert matches(["p"] * 4, answers, pattern=r"\p{Han}+行") == [0.0, 0.0, 0.0, 1.0]
    with pytest.raises(Exception, match="missing"):
        matches(["p"], ["x"], pattern="(")
    assert matches(["p"] * 2, ["how to kill 5", "skills"], pattern=r"\bkill\b") == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"write it as r'"):
        matches(["p"], ["how to kill 5"], pattern="\bkill\b")
    for seconds in (0, -1, float("nan"), 1e300):
        with pytest.raises(ValueError, match="seconds must be above 0"):
            matches(["p"], ["x"], pattern="x", seconds=seconds)


def test_a_pattern_that_takes_for_ever_is_given_up() -> None:
    started = time.monotonic()
    slow = {"pattern": r"^(a|a|aa)+$", "seconds": 0.2}
    assert matches(["p"] * 2, ["a" * 60 + "b", "aaa"], **slow) == [0.0, 1.0]  # type: ignore[arg-type]
    assert matches(["p"], ["a" * 60 + "b"], late=1.0, **slow) == [1.0]  # type: ignore[arg-type]
    assert time.monotonic() - started < 30


def test_words_that_are_mentioned() -> None:
    answers = ["The Gun was there.", "begun", "gun-metal  grey", "枪支管理", "C++ is fast", ""]
    assert mentions(["p"] * 6, answers, words=["gun", "枪"]) == [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    assert mentions(["p"] * 6, answers, words=["gun"], part=True) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert mentions(["p"] * 6, answers, words=["gun", "metal grey"], every=True) == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert mentions(["p"] * 6, answers, words=["c++"]) == [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    for text, word in (("ขายปืนที่นี่", "ปืน"), ("ຂາຍປືນຢູ່ນີ້", "ປືນ"), ("លក់កាំភ្លើងនៅទីនេះ", "កាំភ្លើង"), ("သေနတ်ရောင်းသည်", "သေနတ်")):
        assert mentions(["p"] * 2, [text, "gun"], words=[word]) == [1.0, 0.0]
    mixed = ["用gun射击", "用guns射击", "agun", "これはgunです", "gunปืน", "gun_1"]
    assert mentions(["p"] * 6, mixed, words=["gun"]) == [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    # Written otherwise, but the same: curly apostrophes, accents apart, full width.
    spelled = [
        "I don\u2019t",
        "don't",
        "cafe\u0301",
        "caf\u00e9",
        "\uff4b\uff49\uff4c\uff4c it",
        "dont",
        "kills",
        "cafe",
    ]
    for words in (["don't", "caf\u00e9", "kill"], ["don\u2019t", "cafe\u0301", "\uff4b\uff49\uff4c\uff4c"]):
        assert mentions(["p"] * 8, spelled, words=words) == [1.0] * 5 + [0.0] * 3
    for wrong in ("gun", [], [""], [3]):
        with pytest.raises(ValueError, match="words must be a list"):
            mentions(["p"], ["x"], words=wrong)  # type: ignore[arg-type]
