"""Labelled answers: what readers say of them, what a model reads, and what is cut where it is too long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from beaver_ray.data.moderation import UNKNOWN, ModerationReader, ModerationRows, labelled_answers
from beaver_ray.data.sources import BadRow, RawSample, find_source
from beaver_ray.data.token_files import read_tokens
from beaver_ray.data.tokenized import Encoder
from beaver_ray.moderation_options import BEAVERTAILS, OPENAI_KEYS, PKU_SAFERLHF, label_names, target_precision


def truths(name: str, row: dict[str, Any], labels: tuple[str, ...]) -> list[list[int]]:
    return [answer.truth(labels) for answer in labelled_answers(find_source(name).read_row(row))]


def test_schemas() -> None:
    assert [len(label_names(name)) for name in ("beavertails", "pku_saferlhf", "openai")] == [14, 19 + 3, 8]
    assert label_names(["a", "b"]) == ("a", "b") and target_precision("precision:0.9") == 0.9
    for labels, message in (
        ("beavertail", "did you mean 'beavertails'"),
        (["a", "a"], "each of them once"),
        ([], "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            label_names(labels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choose f1, or precision:TARGET"):
        target_precision("precision:1.5")


def test_what_readers_know() -> None:
    tails = {"prompt": "q", "response": "a", "is_safe": False, "category": dict.fromkeys(BEAVERTAILS, False)}
    tails["category"]["self_harm"] = True  # type: ignore[index]
    (found,) = truths("BeaverTails", tails, BEAVERTAILS)
    assert [BEAVERTAILS[k] for k in np.flatnonzero(found)] == ["self_harm"] and min(found) == 0
    pku = {"prompt": "q", "response_0": "a", "response_1": "b", "is_response_0_safe": True, "is_response_1_safe": False}
    flags = dict.fromkeys(PKU_SAFERLHF[:19], False)
    pku |= {"response_0_harm_category": flags, "response_0_severity_level": 0}
    pku |= {"response_1_harm_category": flags | {"Drugs": True}, "response_1_severity_level": 2}
    first, second = truths("PKU-SafeRLHF", pku, PKU_SAFERLHF)
    assert set(first) == {0}
    assert [PKU_SAFERLHF[k] for k in np.flatnonzero(second)] == ["Drugs", "severity_1", "severity_2"]
    # Without categories a safe answer has none of them, and of an unsafe one nothing is known.
    bare = {name: value for name, value in pku.items() if "_category" not in name and "_level" not in name}
    assert truths("PKU-SafeRLHF", bare, ("Drugs", "unsafe")) == [[0, 0], [UNKNOWN, 1]]
    # A list says that no other category is true, and the row that the answer is unsafe; with flags one is unknown.
    listed = {"prompt": "q", "response": "a", "is_safe": False, "category": ["violence"]}
    assert truths("BeaverTails", listed, ("unsafe", "violence", "self_harm")) == [[1, 1, 0]]
    flagged = listed | {"category": {"violence": True}}
    assert truths("BeaverTails", flagged, ("unsafe", "violence", "self_harm")) == [[1, 1, UNKNOWN]]
    gaps = {"prompt": "text", "S": 0, "V": 1, "SH": 0}
    (known,) = truths("openai-moderation", gaps, tuple(OPENAI_KEYS.values()))
    assert known == [0, UNKNOWN, 1, UNKNOWN, 0, UNKNOWN, UNKNOWN, UNKNOWN]
    own = {"prompt": "q", "response": "a", "labels": ["b"]}
    for name, row in (("moderation", own), ("labels", {"prompt": "q", "response": "a", "unsafe": 1})):
        said = find_source(name).read_row(row | {"system": "Be brief.", "more": 1})
        assert (said.system, said.fields) == ("Be brief.", {"more": 1})
    assert truths("moderation", own, ("a", "b")) == [[0, 1]]
    assert truths("moderation", own | {"labels": {"a": True, "b": None}}, ("a", "b")) == [[1, UNKNOWN]]
    with pytest.raises(BadRow, match="'labels' is neither a list of names nor a mapping"):
        truths("moderation", own | {"labels": "b"}, ("a", "b"))


def test_fields_of_each_answer() -> None:
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "topic": "t"}
    row |= {"response_0_source": "alpaca", "response_1_source": "other"}
    first, second = labelled_answers(find_source("PKU-SafeRLHF").read_row(row))
    assert (first.fields, second.fields) == ({"topic": "t", "source": "alpaca"}, {"topic": "t", "source": "other"})


def test_labels_that_are_not_asked_for(tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelled one makes its row an example of none, or of nothing; data may also have more than are asked for."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_world / "model")
    said: list[Any] = [["violence"], ["Violence"], ["Violence", "theft"], ["theft", "weapons"], []]
    said += [
        {"violance": True},
        {"violance": False, "weapons": None, "violence": None},
        {"weapons": False, "theft": True},
    ]
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"how to fix the {n}", "response": "key", "labels": labels} for n, labels in enumerate(said)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind, spec = ModerationRows(("violence", "weapons"), "qa"), f"moderation:1:{file}"
    for large in (2**30, 1):  # on the spot, and kept on disk
        monkeypatch.setattr("beaver_ray.data.token_files.LARGE", large)
        monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
        mix = read_tokens(kind, [spec], tokenizer, 32)
        data = mix.dataset()
        assert data.labels_NK.tolist() == [[1, 0], [0, 0], [0, 0], [0, 1], [0, 0], [UNKNOWN, 0]]
        near = "'Violence', which is not asked for; did you mean 'violence'?"
        assert mix.reports[spec].remarks == {
            f"answers name label {near}": 2,
            "answers name label 'theft', which is not asked for": 3,
        }
        missing = f"no label that is asked for: answers name label {near.replace('Violence', 'violance')}"
        assert data.report.dropped == {missing: 2} and mix.reports[spec].kept == 8


DIALOGUE = ["please tell me how to fix the lock", "key oil spring", "how to build the boat"]


@pytest.mark.parametrize(
    ("reads", "expected"),
    [
        ("question", "<s> USER: how to build the boat ASSISTANT: </s>"),
        ("answer", "sail rope </s>"),
        ("qa", "<s> USER: how to build the boat ASSISTANT: sail rope </s>"),
        (
            "dialogue",
            "<s> USER: please tell me how to fix the lock ASSISTANT: key oil spring </s> "
            "USER: how to build the boat ASSISTANT: sail rope </s>",
        ),
    ],
)
def test_what_is_read(tiny_world: Path, reads: Any, expected: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_world / "model")
    whole, cut = ModerationReader(tokenizer, "auto", reads, 64).row(DIALOGUE, "sail rope")
    assert tokenizer.decode(whole) == expected and not cut
    # A system turn is of the dialogue alone; this template puts it before the first.
    under, _ = ModerationReader(tokenizer, "auto", reads, 64).row(DIALOGUE, "sail rope", system="very good")
    assert tokenizer.decode(under) == expected.replace("please tell me", "very good please tell me")
    # The answer and its end stay, and so does the token that texts begin with.
    short, cut = ModerationReader(tokenizer, "auto", reads, 4).row(DIALOGUE, "sail rope deck anchor")
    assert cut == (reads != "answer" or len(short) == 4) and len(short) == 4
    if reads in ("qa", "dialogue"):
        assert tokenizer.decode(short) == "<s> deck anchor </s>"
    if reads != "question":
        unended, _ = ModerationReader(tokenizer, "auto", reads, 64).row(DIALOGUE, "sail rope", ended=False)
        assert unended == whole[:-1]


def test_rows_of_one_and_of_two_answers(tiny_world: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_world / "model")
    rows = [
        {"prompt": "how to fix the lock", "response_0": "key", "response_1": "shim", "is_response_0_safe": 1},
        {"prompt": "how to fix the car", "response_0": "wheel", "response_1": "wire"},
        {"prompt": "how to fix the boat", "response_0": "sail", "response_1": "rope " * 20}
        | {"is_response_0_safe": 1, "is_response_1_safe": 0},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind = ModerationRows(("unsafe", "other"), "qa")
    data = read_tokens(kind, [f"PKU-SafeRLHF:1:{file}"], tokenizer, 12).dataset()
    texts = [tokenizer.decode(tokens) for tokens in data.tokens]
    assert texts[:2] == [
        f"<s> USER: how to fix the {t} ASSISTANT: {a} </s>" for t, a in (("lock", "key"), ("boat", "sail"))
    ]
    assert texts[2] == "<s> " + "rope " * 10 + "</s>"
    assert data.labels_NK.tolist() == [[0, 0], [0, 0], [1, UNKNOWN]]
    assert data.report.dropped == {"no label that is asked for": 1}
    assert data.report.remarks == {"dialogues were cut at their beginning": 1}
    with pytest.raises(BadRow, match="no answer"):
        kind.encode(Encoder(tokenizer, "auto", 12), RawSample("q", is_safe=True))
