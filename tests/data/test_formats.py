"""Each data set of the field in its own layout, with invented texts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from beaver_ray.data.mixing import load_mix
from beaver_ray.data.pair_datasets import PreferenceDataset
from beaver_ray.data.sources import RawSample, read_source
from beaver_ray.data.tokenized import Encoder
from beaver_ray.errors import UserError


def write(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


HARMS = ["Animal Abuse", "Cybercrime", "Violence"]  # of the 19
PKU_1 = {
    "prompt": "how are dams built",
    "prompt_source": "BeaverTails",
    "response_0": "with wood",
    "response_1": "with stolen wood",
    "response_0_source": "Alpaca-7B",
    "response_1_source": "Alpaca-7B",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "response_0_harm_category": dict.fromkeys(HARMS, False),
    "response_1_harm_category": {**dict.fromkeys(HARMS, False), "Violence": True, "Cybercrime": True},
    "response_0_severity_level": 0,
    "response_1_severity_level": 2,
    "better_response_id": 1,
    "safer_response_id": 0,
    "response_0_sha256": "00",
    "response_1_sha256": "11",
}
PKU_2 = {
    **PKU_1,
    "prompt": "and canals",
    "is_response_1_safe": True,
    "response_1_harm_category": dict.fromkeys(HARMS, False),
    "response_1_severity_level": 0,
}
UF = {
    "prompt": "name a tree",
    "prompt_id": "a1",
    "chosen": [said("user", "name a tree"), said("assistant", "birch")],
    "rejected": [said("user", "name a tree"), said("assistant", "stone")],
    "messages": [said("user", "name a tree"), said("assistant", "birch")],
    "score_chosen": 8.5,
    "score_rejected": 3.0,
}
HS2 = {
    "split": "train",
    "prompt": "hello\n<extra_id_1>Assistant\nhello you\n<extra_id_1>User\nand now?",
    "response_1": "now we dig",
    "response_2": "dig",
    "preference_strength": -2,
    "preference_statement": "the first",
    "preference_elaboration": "it is longer",
    "three_most_similar_preferences": [],
    "all_preferences_unprocessed": [],
}
HS3 = {
    "domain": "general",
    "language": "english",
    "context": [said("user", "dig"), said("assistant", "where"), said("user", "here")],
    "response1": "no",
    "response2": "done",
    "overall_preference": 3,
    "individual_preference": [],
}
TAILS = {
    "prompt": "p",
    "response": "r",
    "category": {"animal_abuse": False, "violence,aiding_and_abetting,incitement": True},
    "is_safe": False,
}
GUARD = {
    "prompt": "p",
    "adversarial": True,
    "response": "r",
    "prompt_harm_label": "harmful",
    "response_refusal_label": "compliance",
    "response_harm_label": "harmful",
    "subcategory": "others",
}
AEGIS = {
    "id": "i",
    "reconstruction_id_if_redacted": None,
    "prompt": "p",
    "response": "r",
    "prompt_label": "unsafe",
    "response_label": "safe",
    "violated_categories": "Violence, Needs Caution",
    "prompt_label_source": "human",
    "response_label_source": "llm_jury",
}
JAIL = {"vanilla": "v", "adversarial": "a", "completion": "c", "data_type": "adversarial_benign"}
MOSS_2 = {
    "id": 1,
    "prefix": "x",
    "num_turns": 2,
    "plain_text": "[Human]: a<eoh> [MOSS]: b<eoa> [Human]: c<eoh> [MOSS]: d<eoa>",
}
MOSS_3 = {
    "conversation_id": 1,
    "meta_instruction": "m",
    "num_turns": 2,
    "chat": {
        f"turn_{n}": {
            "Human": f"<|Human|>: ask {n}<eoh>\n",
            "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
            "Commands": "<|Commands|>: None<eoc>\n",
            "Tool Responses": "<|Results|>: None<eor>\n",
            "MOSS": f"<|MOSS|>: say {n}<eom>\n",
        }
        for n in (2, 1)
    },
}
STRONG = {
    "chosen": ["Human: hi", "Assistant: Human: and yes"],
    "rejected": ["Human: hi", "Assistant: no"],
    "mean preference difference": 0.5,
    "std preference difference": 0.25,
    "GPT4 label": 1,
}
BEHAVIOUR = {"Behavior": "b", "FunctionalCategory": "contextual", "SemanticCategory": "illegal", "Tags": "context"}
TALK = [
    said("system", "be brief"),
    said("user", "a"),
    said("assistant", "b"),
    said("user", "c"),
    said("assistant", "d"),
]
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]

CASES: list[tuple[str, dict[str, Any], RawSample, dict[str, Any]]] = [
    (
        "PKU-SafeRLHF",
        PKU_1,
        RawSample("how are dams built", "with wood", "with stolen wood", False, True, True, False),
        {
            "harm": ["Cybercrime", "Violence"],
            "severity": 2,
            "response_1_severity_level": 2,
            "prompt_source": "BeaverTails",
        },
    ),
    (
        "UltraFeedback",
        UF,
        RawSample(["name a tree"], "birch", "stone", better=True),
        {"score_chosen": 8.5, "strength_mean": 5.5},
    ),
    (
        "UltraFeedback",
        UF | {"score_chosen": 10**400},
        RawSample(["name a tree"], "birch", "stone", better=True),
        {"score_rejected": 3.0},
    ),
    (
        "UltraFeedback",
        UF | {"score_chosen": "8.5", "score_rejected": "9"},  # of a table, and against the label
        RawSample(["name a tree"], "birch", "stone", better=True),
        {"strength_mean": -0.5},
    ),
    (
        "HelpSteer2",
        HS2,
        RawSample(["hello", "hello you", "and now?"], "now we dig", "dig", better=True),
        {"split": "train", "strength_mean": 2},
    ),
    (
        "HelpSteer2-scores",
        {
            "prompt": "p",
            "response": "r",
            "helpfulness": 4,
            "correctness": 3,
            "coherence": 4,
            "complexity": 1,
            "verbosity": 1,
        },
        RawSample(["p"], "r"),
        {"helpfulness": 4},
    ),
    (
        "HelpSteer3",
        HS3,
        RawSample(["dig", "where", "here"], "no", "done", better=False),
        {"domain": "general", "strength_mean": 3},
    ),
    ("preferences", {"prompt": "p", "chosen": "a", "rejected": "b"}, RawSample("p", "a", "b", better=True), {}),
    (
        "preferences",
        {"prompt": "p", "chosen": "a", "rejected": "b", "system": "be kind"},
        RawSample("p", "a", "b", better=True, system="be kind"),
        {},
    ),
    (
        "preferences",
        {**UF, "system": "be kind"},
        RawSample(["name a tree"], "birch", "stone", True, system="be kind"),
        {},
    ),
    (
        "hh-rlhf-strength",
        STRONG,
        RawSample("hi", "Human: and yes", "no", better=True),
        {"strength_mean": 0.5, "strength_std": 0.25, "judge_agrees": True},
    ),
    ("BeaverTails", TAILS, RawSample("p", "r", is_safe=False), {"harm": ["violence,aiding_and_abetting,incitement"]}),
    (
        "WildGuardMix",
        GUARD,
        RawSample("p", "r", is_safe=False),
        {"response_refusal_label": "compliance", "adversarial": True},
    ),
    (
        "WildGuardMix",
        {**GUARD, "response": None, "response_harm_label": None},
        RawSample("p"),
        {"subcategory": "others"},
    ),
    (
        "Aegis-2.0",
        AEGIS,
        RawSample("p", "r", is_safe=True),
        {"harm": ["Violence", "Needs Caution"], "prompt_label": "unsafe"},
    ),
    ("WildJailbreak", JAIL, RawSample("a", "c"), {"data_type": "adversarial_benign", "vanilla": "v"}),
    ("WildJailbreak", {**JAIL, "adversarial": ""}, RawSample("v", "c"), {}),
    (
        "WildJailbreak/eval",
        {"adversarial": "a", "label": 1, "data_type": "adversarial_harmful"},
        RawSample("a"),
        {"label": 1},
    ),
    (
        "CoCoNot",
        {"id": "1", "category": "Humanizing requests", "subcategory": "s", "prompt": "p", "response": "r"},
        RawSample("p", "r"),
        {"category": "Humanizing requests"},
    ),
    (
        "CoCoNot-preference",
        {"id": "1", "prompt": "p", "chosen": "a", "chosen_model": "m", "rejected": "b", "rejected_model": ""},
        RawSample("p", "a", "b", better=True),
        {"id": "1"},
    ),
    (
        "XSTest",
        {"id": 1, "prompt": "p", "type": "homonyms", "label": "safe", "focus": "f", "note": ""},
        RawSample("p"),
        {"type": "homonyms", "label": "safe"},
    ),
    ("XSTest", {"id": "v2-1", "prompt": "p", "type": "contrast_homonyms"}, RawSample("p"), {"label": "unsafe"}),
    ("HarmBench", {**BEHAVIOUR, "ContextString": "", "BehaviorID": "i"}, RawSample("b"), {"category": "illegal"}),
    (
        "HarmBench",
        {**BEHAVIOUR, "ContextString": "c", "BehaviorID": "i"},
        RawSample("c\n\n---\n\nb"),
        {"BehaviorID": "i"},
    ),
    ("moss-002-sft", MOSS_2, RawSample(["a", "b", "c"], "d"), {}),
    ("moss-003-sft", MOSS_3, RawSample(["ask 1", "say 1", "ask 2"], "say 2"), {}),
    # As a table has it, of which other rows have more turns.
    (
        "moss-003-sft",
        {"chat": {"turn_1": MOSS_3["chat"]["turn_1"], "turn_2": None}},
        RawSample(["ask 1"], "say 1"),
        {},
    ),
    ("messages", {"messages": TALK, "id": 7}, RawSample(["a", "b", "c"], "d", system="be brief"), {"id": 7}),
    ("messages", {"messages": TALK[:2], "kind": "k"}, RawSample(["a"], system="be brief"), {"kind": "k"}),
    ("conversations", {"conversations": SHARED, "system": "s"}, RawSample(["a"], "b", system="s"), {}),
]


@pytest.mark.parametrize(("name", "row", "expected", "fields"), CASES, ids=[f"{n}-{c[0]}" for n, c in enumerate(CASES)])
def test_formats(tmp_path: Path, name: str, row: dict[str, Any], expected: RawSample, fields: dict[str, Any]) -> None:
    samples, report = read_source(name, write(tmp_path / "a.jsonl", [row, 7]))
    assert samples == [expected]
    assert report.dropped == {"row is not an object": 1}
    assert fields.items() <= samples[0].fields.items()
    assert not {"prompt", "response", "chosen", "system"} & samples[0].fields.keys()


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("UltraFeedback", {**UF, "score_rejected": 8.5}, "no answer is better"),
        ("UltraFeedback", {**UF, "rejected": UF["chosen"]}, "identical responses"),
        ("HelpSteer2", {**HS2, "preference_strength": 0}, "no answer is better"),
        ("HelpSteer2", {**HS2, "split": "val"}, "row of another split"),
        ("HelpSteer3", {**HS3, "overall_preference": 0}, "no answer is better"),
        ("HelpSteer3", {**HS3, "overall_preference": math.nan}, "no field 'overall_preference'"),
        ("HelpSteer3", {**HS3, "overall_preference": True}, "'overall_preference' is not a number"),
        ("Aegis-2.0", {**AEGIS, "prompt": "REDACTED"}, "prompt is redacted"),
        (
            "moss-003-sft",
            {"chat": {"turn_1": {"Human": "a", "MOSS": "b", "Commands": "<|Commands|>: Search(x)<eoc>"}}},
            "a tool was used",
        ),
        ("messages", {"messages": [*TALK[:2], said("tool", "x")]}, "role 'tool' is none of system, user, assistant"),
        ("messages", {"messages": [*TALK, TALK[0]]}, "a system turn in mid-dialogue"),
        ("messages", {"messages": TALK[2:]}, "turns do not alternate from user to assistant"),
        ("moss-003-sft", {"chat": {"turn_1": None}}, "'chat' holds no turns"),
        ("hh-rlhf-strength", {**STRONG, "chosen": ["Human: hi", "Assistant:"]}, "empty turn"),
        (
            "hh-rlhf-strength",
            {**STRONG, "chosen": ["Assistant: hi", "Human: yo"], "rejected": ["Assistant: hi", "Human: no"]},
            "turns do not alternate from human to assistant",
        ),
    ],
)
def test_rows_that_are_no_use(tmp_path: Path, name: str, row: dict[str, Any], reason: str) -> None:
    good = next(case[1] for case in CASES if case[0] == name)
    assert read_source(name, write(tmp_path / "a.jsonl", [good, row]))[1].dropped == {reason: 1}


def test_tables_of_benchmarks(tmp_path: Path) -> None:
    (tmp_path / "behaviors.csv").write_text(f"{','.join(BEHAVIOUR)}\nb,standard,illegal,\n")
    assert read_source("HarmBench", str(tmp_path / "behaviors.csv"))[0] == [RawSample("b")]
    (tmp_path / "train.tsv").write_text('vanilla\tadversarial\tcompletion\tdata_type\nv\t\t"c, c"\tvanilla_benign\n')
    assert read_source("WildJailbreak", str(tmp_path / "train.tsv"))[0] == [RawSample("v", "c, c")]


def test_clones_with_several_subsets(tmp_path: Path) -> None:
    card = ["---", "configs:", "- config_name: original", "  data_files:", "  - {split: train, path: original/a.jsonl}"]
    card += ["- config_name: pref", "  data_files:", "  - {split: train, path: pref/a.jsonl}", "---", ""]
    (tmp_path / "README.md").write_text("\n".join(card))
    write(tmp_path / "original" / "a.jsonl", [{"prompt": "p", "response": "r"}])
    write(tmp_path / "pref" / "a.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert read_source("CoCoNot", str(tmp_path))[0] == [RawSample("p", "r")]
    assert read_source("CoCoNot-preference", str(tmp_path))[0] == [RawSample("p", "a", "b", better=True)]
    with pytest.raises(UserError, match="has no subset 'contrast', only original, pref"):
        read_source("CoCoNot-contrast", str(tmp_path))


def test_rows_are_left_out_and_weighted_by_harm_and_severity(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [PKU_1, PKU_2])
    for where in ({"severity": [2, 3]}, {"harm": "Violence"}, {"response_1_harm_category.Violence": True}):
        samples, reports = load_mix([{"name": "PKU-SafeRLHF", "path": path, "where": where}])
        assert [sample.input for sample in samples] == ["how are dams built"]
        assert [report.line() for report in reports.values()] == ["kept 1 of 2; dropped 1: 1 left out by where"]
    entries = [{"name": "PKU-SafeRLHF", "path": path, "where": {"severity": 2}, "proportion": 3}]
    entries += [{"name": "PKU-SafeRLHF", "path": path, "where": {"severity": [0, 1]}}]
    assert [sample.input for sample in load_mix(entries)[0]] == ["how are dams built"] * 3 + ["and canals"]


MAPPED: list[tuple[dict[str, Any], dict[str, Any], RawSample]] = [
    (
        {"prompt": "question", "chosen": "good", "rejected": "bad"},
        {"question": "q", "good": "a", "bad": "b"},
        RawSample("q", "a", "b", True),
    ),
    (
        {"prompt": "q", "answer": "a", "other_answer": "b", "safer": "s", "is_safe": "x", "is_other_safe": "y"},
        {"q": "q", "a": "1", "b": "2", "s": True, "x": "unharmful", "y": "unsafe"},
        RawSample("q", "1", "2", safer=True, is_safe=True, is_other_safe=False),
    ),
    (
        {"prompt": "p", "chosen": "c", "rejected": "r", "strength": "by"},
        {"p": "q", "c": "1", "r": "2", "by": 2.5},
        RawSample("q", "1", "2", better=True, fields={"strength_mean": 2.5}),
    ),
    (
        {"prompt": "p", "chosen": "c", "rejected": "r", "safer": "chosen", "strength": "by.much"},
        {"p": "q", "c": "1", "r": "2", "by": {"much": "1"}},
        RawSample("q", "1", "2", safer=True, fields={"safety_strength_mean": 1}),
    ),
    (
        {"prompt": "p", "answer": "c", "other_answer": "r", "better": "b", "safer": "s", "strength": "by"},
        {"p": "q", "c": "1", "r": "2", "b": None, "s": 1, "by": 1},
        RawSample("q", "1", "2", safer=True, fields={"strength_mean": 1}),
    ),
    (
        {"prompt": "p", "chosen": "c", "rejected": "r", "safer": "s"},
        {"p": "q", "c": "1", "r": "2", "s": False},
        RawSample("q", "1", "2", better=True, safer=False),
    ),
    (
        {"chosen": "c", "rejected": "r", "safer": "chosen"},
        {"c": UF["chosen"], "r": UF["rejected"]},
        RawSample("name a tree", "birch", "stone", safer=True),
    ),
    ({"messages": "talk.turns"}, {"talk": {"turns": TALK}}, RawSample(["a", "b", "c"], "d", system="be brief")),
    (
        {"prompt": "q", "system": "s"},
        {"q": ["a", "b", "c"], "s": "be kind"},
        RawSample(["a", "b", "c"], system="be kind"),
    ),
    (
        {"prompt": "q", "chosen": "c", "rejected": "r"},
        {"q": TALK[:2], "c": [TALK[2]], "r": [said("assistant", "x")]},
        RawSample("a", "b", "x", True, system="be brief"),
    ),
    ({"messages": "t", "answer": "a"}, {"t": TALK[:2], "a": "b"}, RawSample("a", "b", system="be brief")),
    (
        {"messages": "t", "other_answer": "a", "better": "l"},
        {"t": TALK[:3], "a": "x", "l": 0},
        RawSample("a", "b", "x", False, system="be brief"),
    ),
]


@pytest.mark.parametrize(("entry", "row", "expected"), MAPPED)
def test_fields_mapped_in_the_configuration(
    tmp_path: Path, entry: dict[str, Any], row: dict[str, Any], expected: RawSample
) -> None:
    path = write(tmp_path / "a.jsonl", [{**row, "kind": "k", "tests": ["t"]}])
    samples, _ = load_mix([{"path": path, **entry}])
    assert samples == [expected]
    assert samples[0].fields.items() >= ({"kind": "k", "tests": ["t"]} | expected.fields).items()
    assert load_mix([{"path": path, **entry, "keep": ["kind"]}])[0][0].fields == {"kind": "k"} | expected.fields
    renamed = load_mix([{"path": path, **entry, "keep": {"checks": "tests"}}])[0][0].fields
    assert renamed == {"checks": ["t"]} | expected.fields
    assert load_mix([{"path": path, **entry, "keep": {"checks": "no such field"}}])[0][0].fields == expected.fields


def test_how_strong_a_label_is_stays_whatever_else_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{**HS2, "preference_strength": -2, "kind": "k"}])
    samples, _ = load_mix([{"name": "HelpSteer2", "path": path, "keep": ["kind"]}])
    assert samples[0].better and samples[0].fields == {"kind": "k", "strength_mean": 2}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "f", "promt": "q"}, "unknown key promt; did you mean 'prompt'"),
        ({"path": "f"}, "give name .a known data set., or the fields"),
        (" {path: f, prompt: q, proportion: 1O}", "bad proportion '1O'"),
        ({"prompt": "q"}, "path is missing"),
        ({"path": "f", "prompt": "q", "chosen": "c"}, "chosen and rejected go together"),
        ({"name": "alpaca", "prompt": "q"}, "name alpaca knows its fields; leave prompt out"),
        ({"name": "alpacca"}, "unknown dataset 'alpacca'; did you mean 'alpaca'"),
        ({"path": "f", "prompt": "q", "better": "b"}, "better compares two answers"),
        ({"path": "f", "prompt": "q", "where": {"a": []}}, "where.a has no value"),
        ({"path": "f", "prompt": "q", "proportion": "1/0"}, "bad proportion '1/0'"),
    ],
)
def test_entries_that_mean_nothing_are_one_line(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_mix([entry])
    assert "\n" not in str(caught.value)


def test_broken_dialogues_are_counted_and_mappings_may_be_texts(tmp_path: Path) -> None:
    rows = [{"q": "q", "a": [said("assistant", "x"), "y"]}, {"q": "q", "a": [said("assistant", "x")]}]
    entry = f"{{path: {write(tmp_path / 'a.jsonl', rows)}, prompt: q, answer: a}}"
    samples, reports = load_mix([entry])
    assert samples == [RawSample("q", "x")]
    assert [report.dropped for report in reports.values()] == [{"'a' is not a list of messages": 1}]
    with pytest.raises(UserError, match="is no mapping: "):
        load_mix(["{path: a.jsonl, prompt"])
    three: dict[str, Any] = {"q": [said("user", "q"), said("assistant", "x")], "a": "b", "b": "c", "label": 0}
    whole = {"messages": "q", "answer": "a", "other_answer": "b", "better": "label"}
    path = write(tmp_path / "b.jsonl", [three])
    with pytest.raises(UserError, match="'q' ends with an answer, and two more are named"):
        load_mix([{"path": path, **whole}])
    with pytest.raises(UserError, match="'q' ends with an answer, and another is named"):
        load_mix([{"path": path, "messages": "q", "answer": "a"}])
    asked = write(tmp_path / "c.jsonl", [{**three, "q": three["q"][:1]}])
    with pytest.raises(UserError, match="'q' does not end with an answer, and other_answer is a second one"):
        load_mix([{"path": asked, "messages": "q", "other_answer": "a"}])


def test_system_prompts_reach_the_tokens(tmp_path: Path, byte_tokenizer: Any) -> None:
    from tests.data.conftest import CHATML, with_template

    tokenizer = with_template(byte_tokenizer, CHATML)
    (sample,), _ = load_mix([f"messages:1:{write(tmp_path / 'a.jsonl', [{'messages': TALK[:2]}])}"])
    text = "<s>system\nbe brief</s>\n<s>user\na</s>\n<s>assistant\n"
    assert tokenizer.decode(Encoder(tokenizer, "chat", 64).prompt(sample)) == text


def test_fault_16_bad_pairs_are_counted_and_end_no_run(tmp_path: Path, byte_tokenizer: Any) -> None:
    rows = [PKU_1, {**PKU_1, "response_1": "with wood"}, {**PKU_1, "safer_response_id": 1}, {**PKU_1, "response_0": ""}]
    samples, reports = load_mix([f"PKU-SafeRLHF:1:{write(tmp_path / 'a.jsonl', rows)}"])
    assert len(PreferenceDataset.build(samples, byte_tokenizer, 200)) == 1
    assert next(iter(reports.values())).dropped == {
        "identical responses": 1,
        "safer answer is not safer": 1,
        "empty 'response_0'": 1,
    }
