"""Refusals against sentences written and labelled by hand, and where in an answer they are looked for."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from beaver_ray.rules.refusals import SHORT, START, is_refusal
from beaver_ray.rules.text import refuses

ROWS = [json.loads(line) for line in Path(__file__).with_name("refusals.jsonl").read_text("utf-8").splitlines()]
FILLER = "Here is a long and willing explanation of every step that it takes. " * 10


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["answer"][:40])
def test_sentences_labelled_by_hand(row: dict[str, object]) -> None:
    assert is_refusal(str(row["answer"])) == row["refusal"]


def test_long_answers_are_read_at_their_start() -> None:
    refusal = "I cannot help with that."
    assert is_refusal(refusal + " " + FILLER)
    assert len(FILLER) > SHORT and not is_refusal(FILLER + refusal)
    short = "Well. " * 20
    assert START < len(short + "x" * 100 + ". " + refusal) <= SHORT and is_refusal(short + "x" * 100 + ". " + refusal)


def test_nothing_and_very_much() -> None:
    assert refuses(["p"] * 4, ["", " \n", "!?*", "\u200b"]) == [0.0] * 4
    started = time.monotonic()
    for piece in ("i am not ", "'a ", "“", "我", ", ", "sorry ", "it is not right or ", "\n"):
        is_refusal(piece * 1_000_000)
    assert time.monotonic() - started < 20
