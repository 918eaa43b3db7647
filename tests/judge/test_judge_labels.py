"""AI feedback by judges whose mistakes are known, against labels counted by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from scipy.stats import binomtest

from beaver_ray.data.pairs import pair_id
from beaver_ray.data.sources import RawSample, read_source
from beaver_ray.errors import UserError
from beaver_ray.judge.labels import LABELS, check_canaries, label_pairs, load_rubrics, refuse_untrusted
from beaver_ray.judge.replies import Reply
from tests.actors.judging_service import Says, shown

RUBRICS = load_rubrics(list(LABELS), None)


def ask_of(says: Says) -> object:
    return lambda texts: [Reply(says(text)) for text in texts]


def honest(text: str) -> str:
    """More pluses help more, more minuses harm more, and a minus is unsafe."""
    parts = shown(text)
    if "answer" in parts:
        return f"VERDICT: {'UNSAFE' if '-' in parts['answer'] else 'SAFE'}"
    a, b = parts["answer A"], parts["answer B"]
    a_less_b = a.count("+") - b.count("+") if "helps" in text else b.count("-") - a.count("-")
    return f"VERDICT: {'A' if a_less_b > 0 else 'B' if a_less_b else 'TIE'}"


def biased(text: str) -> str:
    """Takes what stands first where both answers have a plus, and is honest elsewhere."""
    parts = shown(text)
    return "VERDICT: A" if all("+" in parts.get(f"answer {x}", "") for x in "AB") else honest(text)


def pair(first: str, second: str, prompt: str = "Well?", **labels: object) -> RawSample:
    return RawSample(prompt, first, second, **labels)  # type: ignore[arg-type]


def test_only_what_both_orders_say_is_a_label(tmp_path: Path) -> None:
    samples = [
        pair("+ one", "two -"),  # first better, first safer
        pair("one +", "++ two"),  # the orders disagree about both comparisons
        pair("one", "+ two"),  # second better, equally harmless
        pair("one", "two"),  # ties, both safe
        pair("+ one", "two", prompt="My doctor said so?"),
        pair("+ one", "two", system="You are a doctor."),
        pair("one", "two", prompt="My doctorate?"),
    ]
    asked: list[str] = []

    def says(text: str) -> str:
        asked.append(text)
        return biased(text)

    found = label_pairs(samples, RUBRICS, ask_of(says), ["doctor", "kind=odd"])  # type: ignore[arg-type]
    both_safe = {"is_response_0_safe": True, "is_response_1_safe": True}
    labels = [
        {k: v for k, v in row.items() if k not in ("id", "prompt", "response_0", "response_1")} for row in found.rows
    ]
    assert labels == [
        {
            "better_response_id": 0,
            "safer_response_id": 0,
            "is_response_0_safe": True,
            "is_response_1_safe": False,
        },
        {"better_response_id": 1, **both_safe},
        both_safe,
        both_safe,
    ]
    doubts = ["helpfulness: the orders disagree", "harmlessness: the orders disagree"]
    assert [(row["response_0"], row["audit"]) for row in found.audit] == [
        ("one +", doubts),
        ("+ one", ["sensitive: doctor"]),
        ("+ one", ["sensitive: doctor"]),
    ]
    assert found.audit[0]["judge"]["helpfulness"] == ("first", "second") and found.audit[1]["judge"] == {}
    assert len(asked) == 5 * 6 and not any("doctor said" in text or "a doctor" in text for text in asked)
    assert found.counts == {
        "pairs": 7,
        "labelled": 4,
        "for people": 3,
        "sensitive: doctor": 2,
        **dict.fromkeys(doubts, 1),
        "label better_response_id": 2,
        "label safer_response_id": 1,
        "label is_response_0_safe": 4,
        "label is_response_1_safe": 4,
    }
    assert found.pairs["helpfulness"].position_disagreement == 1 and found.words == {"SAFE": 9, "UNSAFE": 1}
    # Our own reader takes them for what they are.
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in found.rows))
    read, report = read_source("PKU-SafeRLHF", str(file))
    assert report.kept == 4
    assert [(s.better, s.safer, s.is_safe, s.is_other_safe) for s in read] == [
        (True, True, True, False),
        (False, None, True, True),
        (None, None, True, True),
        (None, None, True, True),
    ]


def test_what_cannot_be_read_or_contradicts_itself_goes_to_people() -> None:
    def says(text: str) -> str:
        if "second?" in text:
            return "Hm."
        if "third?" in text:
            return "VERDICT: NONE" if "answer" in shown(text) else honest(text)
        return "VERDICT: SAFE" if "- two" in shown(text).get("answer", "") else honest(text)

    samples = [pair("- one", "- two", "first?"), pair("+ one", "two", "second?"), pair("+ one", "two", "third?")]
    found = label_pairs(samples, RUBRICS, ask_of(says))  # type: ignore[arg-type]
    assert found.rows == []
    assert [row["audit"] for row in found.audit] == [
        ["safety contradicts harmlessness"],  # a tie of harm, but only one of them safe
        ["helpfulness: unparsed", "harmlessness: unparsed", "safety: unparsed"],
        ["safety: refused"],
    ]


def test_labels_that_rows_came_with_are_not_kept() -> None:
    """An id of somebody else's, by which `label export` could not find the pair again, has another name."""
    theirs = {"id": 23, "better_response_id": 1, "is_response_0_safe": 0, "source": "x"}
    sample = RawSample("Well?", "+", "", fields=theirs)
    rubrics = {"helpfulness": RUBRICS["helpfulness"]}
    found = label_pairs([sample], rubrics, ask_of(honest))  # type: ignore[arg-type]
    (row,) = found.rows
    assert row.pop("id") == pair_id(row)
    own = {"source_id": 23, "source": "x"}
    assert row == own | {"prompt": "Well?", "response_0": "+", "response_1": "", "better_response_id": 0}


def canaries(count: int, first: str = "+ one") -> list[RawSample]:
    labels = {"better": True, "safer": True, "is_safe": True, "is_other_safe": False}
    return [pair(first, f"- two {number}", **labels) for number in range(count)]


def test_canaries_decide() -> None:
    """Bounds by scipy's own exact test; a position-biased judge gives no labels that could be trusted."""
    known = canaries(30)

    def often(text: str) -> str:
        wrong = [f"- two {number}" for number in (3, 5)]
        parts = shown(text)
        if parts.get("answer A") in wrong:
            return "VERDICT: A"
        return "VERDICT: B" if parts.get("answer B") in wrong else honest(text)

    found = check_canaries(known, RUBRICS, ask_of(often), 0.7, 0.95)  # type: ignore[arg-type]
    # 28 are right; two are labelled wrongly, and contradict their safety labels, so that they would not be used.
    assert [(c.known, c.kept, c.right) for c in found] == [(30, 28, 28)] * 3
    helpful = {"helpfulness": RUBRICS["helpfulness"]}
    (alone,) = check_canaries(known, helpful, ask_of(often), 0.7, 0.95)  # type: ignore[arg-type]
    assert (alone.kept, alone.right, alone.trusted) == (30, 28, True)
    exact = binomtest(28, 30, alternative="greater").proportion_ci(0.95, "exact").low
    assert alone.at_least == pytest.approx(exact, abs=1e-9)
    refuse_untrusted([alone], "m")
    (strict,) = check_canaries(known, helpful, ask_of(often), 0.81, 0.95)  # type: ignore[arg-type]
    assert not strict.trusted and alone.at_least < 0.81
    with pytest.raises(UserError, match=r"labels of m may not be used: helpfulness: 28 of 30 right .* at least 0\.805"):
        refuse_untrusted([strict], "m")
    (none,) = check_canaries(canaries(30), helpful, ask_of(lambda text: "VERDICT: A"), 0.5, 0.95)  # type: ignore[arg-type]
    assert (none.kept, none.at_least, none.trusted) == (0, 0.0, False)
    with pytest.raises(UserError, match="helpfulness: none of the labels it gave to 30 canaries"):
        refuse_untrusted([none], "m")


def test_too_few_canaries_are_said_before_anybody_is_asked() -> None:
    def nobody(texts: Sequence[str]) -> list[Reply]:
        raise AssertionError

    # 0.8 ** 13 = 0.055 and 0.8 ** 14 = 0.044: 14 right ones are the fewest that show 0.8 at 0.95.
    with pytest.raises(UserError, match=r"13 canaries have the label helpfulness .* fewer than 14 no judge"):
        check_canaries(canaries(13), RUBRICS, nobody, 0.8, 0.95)
    assert check_canaries(canaries(14), RUBRICS, ask_of(honest), 0.8, 0.95)[0].trusted  # type: ignore[arg-type]
    with pytest.raises(UserError, match="0 canaries have the label safety"):
        check_canaries([pair("a", "b", better=True)] * 20, {"safety": RUBRICS["safety"]}, nobody, 0.8, 0.95)
    with pytest.raises(UserError, match="a judge labels helpfulness, harmlessness, safety, not 'help'"):
        load_rubrics(["help"], None)
