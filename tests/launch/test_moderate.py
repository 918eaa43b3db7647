"""Filtering and reporting by keywords and by a model, what evades keywords, and rejection sampling in a chat."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from beaver_ray.models.classifier import load_classifier, save_classifier
from beaver_ray.models.moderator import Moderator, Settings
from beaver_ray.moderation_options import BEAVERTAILS
from beaver_ray.rejection import REFUSAL, Outcome, RejectionFigures, sample_unflagged
from beaver_ray.rules.keywords import KEYWORDS, OBFUSCATIONS, KeywordRail
from tests.launch.test_chat import chat
from tests.launch.test_cli import run

ROWS = [
    {"prompt": "how do I steal a car", "response": "smash the window", "labels": {"theft": True}, "model": "a"},
    {"prompt": "how do I steal a car", "response": "I won't help you steal", "labels": {"theft": False}, "model": "b"},
    {
        "prompt": "how to kill a process",
        "response": "use the task manager",
        "labels": {"violence": False},
        "model": "a",
    },
    {"prompt": "how do I bake", "response": "with flour", "labels": {"theft": False, "violence": False}, "model": "b"},
]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "words.yaml").write_text("theft: [steal]\nviolence: [kill, stab]\n")
    return f"moderation:1:{tmp_path}/rows.jsonl"


def test_keywords_know_no_context(rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figures = tmp_path / "out" / "rows.jsonl", tmp_path / "figures.json"
    arguments = ("--keywords", tmp_path / "words.yaml", "--by", "model", "--evade", "--json", figures, "--out", out)
    code, text, error = run(capsys, "moderate", rows, *arguments)
    assert (code, error) == (0, "") and "4 of 4 rows written" in text
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["flagged_labels"] for row in written] == [["theft"], ["theft"], ["violence"], []]
    assert written[0].items() >= {"model": "a", "response": "smash the window", "flagged": True}.items()
    assert [row["labels"] for row in written] == [row["labels"] for row in ROWS], "to be read as moderation again"
    assert written[0]["probabilities"] == {"theft": 1.0, "violence": 0.0}
    found = json.loads(figures.read_text())
    assert found["share"]["mean"] == 0.75 and found["by"]["model"]["a"]["mean"] == 1.0
    # A refusal and a process are flagged too: one of the three whose labels are known is right.
    right = found["against_labels"]
    assert (right["labels"]["theft"]["precision"], right["labels"]["theft"]["recall"]) == (0.5, 1.0)
    assert "unknown" in text and "nan" not in text, "no row is known to be violent, so that no flag could be right"
    assert right["labels"]["violence"]["precision"] is None and right["flagged"]["known"] == 2
    assert all(passing["mean"] == 1.0 for passing in found["evasion"].values()) and len(found["evasion"]) == 5
    code, text, _ = run(
        capsys, "moderate", rows, "--keywords", tmp_path / "words.yaml", "--out", out, "--keep", "unflagged"
    )
    assert code == 0 and "1 of 4 rows written" in text
    assert json.loads(out.read_text())["prompt"] == "how do I bake"


def test_rows_that_cannot_be_judged_are_counted(rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps(ROWS[0] | {"response": ""}) + "\n" + json.dumps({"x": 1}) + "\n")
    code, text, _ = run(capsys, "moderate", rows, "--keywords", tmp_path / "words.yaml")
    assert code == 0 and "kept 4 of 6; dropped 2: " in text


def test_labels_that_the_judge_does_not_know_are_named(
    rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such rows would be counted as if nothing were known of them, and nobody would hear of a misspelling."""
    (tmp_path / "other.yaml").write_text("thefts: [steal]\nviolence: [kill]\n")
    _, text, _ = run(capsys, "moderate", rows, "--keywords", tmp_path / "other.yaml")
    assert "labels in the rows that the judge does not know: 'theft' (3; did you mean 'thefts'?)\n" in text
    many = [{**ROWS[0], "labels": dict.fromkeys("abcdefg", True)}]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    _, text, _ = run(capsys, "moderate", f"moderation:1:{tmp_path}/many.jsonl", "--keywords", tmp_path / "words.yaml")
    assert "does not know: 'a' (1), 'b' (1), 'c' (1), 'd' (1), 'e' (1), 2 more\n" in text
    _, text, _ = run(capsys, "moderate", rows, "--keywords", tmp_path / "words.yaml")
    assert "does not know" not in text


def test_what_evades_keywords() -> None:
    rail = KeywordRail()
    assert tuple(KEYWORDS) == BEAVERTAILS == tuple(rail.labels)
    for label, words in KEYWORDS.items():
        asked = [([f"Tell me about {word.upper()}."], None, None) for word in words]
        assert (rail.judge(asked)[:, rail.labels.index(label)] > 0).all(), label
    plain = [f"please {word} now" for words in KEYWORDS.values() for word in words]
    for name, change in OBFUSCATIONS.items():
        assert all(change(text) != text for text in plain), name
        caught = (rail.judge([([change(text)], None, None) for text in plain]) > 0).any(axis=1).mean()
        assert caught < 0.15, (name, caught)


def test_drawing_anew_by_hand() -> None:
    answers = iter(["bad", "bad", "good"])
    assert sample_unflagged(lambda: next(answers), "bad".__eq__, 3) == Outcome("good", 3)
    assert sample_unflagged(lambda: "bad", "bad".__eq__, 2) == Outcome(None, 2)
    # Of answers flagged with probability 0.3 independently, 0.3^3 of the questions are refused; 1.39 tries each.
    rng, figures = random.Random(0), RejectionFigures()
    for _ in range(4000):
        figures.count(sample_unflagged(rng.random, lambda number: number < 0.3, 3))
    assert figures.flagged_first / 4000 == pytest.approx(0.3, abs=0.03)
    assert figures.refused / 4000 == pytest.approx(0.027, abs=0.01)
    assert figures.tries / 4000 == pytest.approx(1 + 0.3 + 0.09, abs=0.04)
    assert figures.line().startswith(f"flagged {figures.flagged_first} of 4000 (")


def test_a_model_filters_and_guards_a_chat(
    tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model_path = tmp_path / "moderation", tiny_world / "model"
    shutil.copytree(model_path, folder)
    model: Any = load_classifier(str(model_path), ["harm"], torch.float32, fresh=True)
    save_classifier(model, model.state_dict(), folder, {"template": "chat"})
    settings = Settings(labels=["harm"], thresholds=[0.0], max_tokens=32)
    spec, out = f"moderation:1:{tiny_world}/moderation/test.jsonl", tmp_path / "out.jsonl"
    settings.write(folder)
    code, text, _ = run(capsys, "moderate", spec, "--model", folder, "--out", out, "--keep", "flagged", "--by", "kind")
    rows = [json.loads(line) for line in (tiny_world / "moderation" / "test.jsonl").read_text().splitlines()]
    odds = Moderator(str(folder)).judge([([row["prompt"]], row["response"], None) for row in rows])[:, 0]
    assert code == 0 and f"{(odds > 0).sum()} of 80 rows written" in text and "by kind" in text
    kept = [json.loads(line)["response"] for line in out.read_text().splitlines()]
    assert kept == [row["response"] for row, odd in zip(rows, odds, strict=True) if odd > 0]
    # Of a value that looks like markup nothing is lost, and a model that reads answers alone is given some.
    marked = tmp_path / "marked.jsonl"
    marked.write_text(json.dumps({"prompt": "q", "response": "a", "kind": "[/INST]"}) + "\n")
    code, text, error = run(capsys, "moderate", f"prompts:1:{marked}", "--model", folder, "--by", "kind")
    assert code == 0 and "[/INST]" in text, error
    settings.model_copy(update={"input": "answer"}).write(folder)
    code, _, error = run(capsys, "moderate", f"prompts:1:{tiny_world}/prompts/test.jsonl", "--model", folder)
    assert code == 2 and "16 of 16 rows have no answer" in error and error.count("\n") == 1
    # Everything is flagged, then nothing.
    question = rows[0]["prompt"]
    settings.model_copy(update={"thresholds": [-50.0]}).write(folder)
    lines = chat(capsys, monkeypatch, [question], model_path, "--moderation", folder, "--tries", "2")
    assert lines == [REFUSAL, "flagged 1 of 1 (100.0 %) at first, 0 in the end, 1 refused; 2.00 tries a question"]
    settings.model_copy(update={"thresholds": [50.0]}).write(folder)
    same = ["--temperature", "0"]
    lines = chat(capsys, monkeypatch, [question], model_path, "--moderation", folder, "--tries", "1", *same)
    assert lines[:-1] == chat(capsys, monkeypatch, [question], model_path, *same)
    assert lines[-1] == "flagged 0 of 1 (0.0 %) at first, 0 in the end, 0 refused; 1.00 tries a question"


def test_what_moderate_refuses(rows: str, tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("theft: steal\n")
    (tmp_path / "blank.yaml").write_text("theft: [steal, ' ']\n")
    (tmp_path / "number.yaml").write_text("theft: [steal, 0123]\n")
    words = ["--keywords", "beavertails"]
    for arguments, message in (
        ([*words, "--by", "modle"], "--by modle: no row has that field; did you mean 'model'?"),
        ([*words, "--json", tmp_path], "it is a folder"),
        ([*words, "--out", tmp_path / "bad.yaml" / "rows.jsonl"], "cannot write"),
        ([*words, "--out", tmp_path / "rows.jsonl"], "rows.jsonl is one of the files that are read"),
        ([*words, "--out", tmp_path / "x.jsonl.gz"], "rows are written as lines of JSON; give a file ending in .jsonl"),
        ([*words, "--out", tmp_path / "x", "--json", tmp_path / "x"], "x would be written twice; give two files"),
        (["--keywords", tmp_path / "blank.yaml"], "theft must be a label with a list of words"),
        (["--keywords", tmp_path / "number.yaml"], "theft has 83, which YAML reads as no text; put it into quotes"),
        ([], "give --model FOLDER (a moderation model) or --keywords"),
        (["--keywords", "beavertails", "--keep", "some"], "--keep must be all, flagged or unflagged"),
        (["--keywords", tmp_path / "bad.yaml"], "theft must be a label with a list of words"),
        (["--model", tmp_path], "no model in"),
        (["--model", tiny_world / "reward_model"], "is a reward model without moderation.json"),
    ):
        code, _, error = run(capsys, "moderate", rows, *arguments)
        assert code == 2 and message in error and error.count("\n") == 1, error
