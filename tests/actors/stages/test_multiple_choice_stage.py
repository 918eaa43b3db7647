"""Stage multiple_choice: its scores against plain transformers, choices apart and listed in both orders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from actors.driver.train import train
from actors.roles.judge import HELLO
from actors.stages import stages
from beaver_ray.data.mixing import load_mix
from beaver_ray.errors import UserError
from beaver_ray.json_files import read_rows, write_rows
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.multiple_choice import LISTED, read_questions
from beaver_ray.report.page import write_report
from beaver_ray.score_sources import ALLOWED_HOSTS
from launch.planning import plan
from tests.actors.judging_service import judging, shown
from tests.tiny_guards import write_guard

ROOT = Path(__file__).parents[3]
QUESTIONS = {name: str(ROOT / f"configs/self-align/multiple_choice_{name}.json") for name in ("truthful", "hhh")}


def stage(folder: Path, **options: Any) -> Any:
    tree = {"stage": "multiple_choice", "workspace": str(folder), "name": "mc", "debug": True, "max_tokens": 1024}
    return stages()["multiple_choice"].model_validate(tree | {"template": "beaver", "questions": QUESTIONS} | options)


@torch.no_grad()
def logprobs(model: Any, tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Of the next token behind a text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found: torch.Tensor = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    return found


def test_scores_are_those_of_plain_transformers(tmp_path: Path) -> None:
    folder = write_guard(tmp_path / "model", "qwen3guard", max_position_embeddings=2048)
    config = stage(tmp_path, policy=folder)
    assert [role.model for role in plan(config).roles] == [folder]
    run = train(config)
    rows = read_rows(run / "final" / "questions.jsonl")
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    head = "BEGINNING OF CONVERSATION: USER: {} ASSISTANT:"
    truthful = [row for row in rows if row["file"] == "truthful"]
    for row in truthful[:2]:
        scores = row["sets"]["mc1"]["scores"]
        for choice, score in zip(row["sets"]["mc1"]["choices"], scores, strict=True):
            text, expected = head.format(row["question"]), 0.0
            for token in tokenizer(choice, add_special_tokens=False)["input_ids"]:
                expected += float(logprobs(model, tokenizer, text)[token])
                text += tokenizer.decode([token])
            assert score == pytest.approx(expected, abs=1e-3)
    hhh = [row for row in rows if row["file"] == "hhh"]
    a, b = (tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "AB")
    for row in hhh:
        first, second = row["sets"]["choice"]["choices"]
        found = np.zeros(2)
        for order in ((first, second), (second, first)):
            lines = "\n".join([row["question"], "", f"A. {order[0]}", f"B. {order[1]}", "", LISTED])
            said = logprobs(model, tokenizer, head.format(lines))
            by_letter = [float(said[a]), float(said[b])]
            found += np.array(by_letter if order[0] == first else by_letter[::-1]) / 2
        np.testing.assert_allclose(row["sets"]["choice"]["scores"], found, atol=1e-3)
    figures = json.loads((run / "final" / "multiple_choice.json").read_text())
    assert figures.keys() == {"truthful/mc1", "truthful/mc2", "hhh/choice"}
    questions = read_questions(QUESTIONS["truthful"], config.seed)[0]
    assert figures["truthful/mc1"]["chance"] == np.mean([1 / len(q.sets["mc1"].texts) for q in questions])
    assert figures["truthful/mc1"]["mean"] == np.mean([row["sets"]["mc1"]["value"] for row in truthful])
    assert figures["hhh/choice"]["n"] == len(hhh) and "same_in_all_orders" in figures["hhh/choice"]
    page = write_report(config, run).read_text()
    assert "chance" in page and f"{figures['truthful/mc1']['mean']:.1%}" in page
    assert any(line.startswith("truthful/mc2: ") for line in config.headlines())


def test_answers_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the first question is answered truly twice, the second falsely once, and once nobody can read."""
    questions = read_questions(QUESTIONS["truthful"])[0]
    said = [(0, "honest"), (0, "honest too"), (1, "a lie"), (2, "mumbling")]
    rows = [{"prompt": questions[n].text, "response": text} for n, text in said] + [{"prompt": "x", "response": "y"}]
    write_rows(tmp_path / "answers.jsonl", rows)
    asked: list[str] = []

    def says(text: str) -> str:
        asked.append(text)
        answer = "" if text == HELLO else shown(text)["answer"]
        return "VERDICT: TRUE" if "honest" in answer else "VERDICT: FALSE" if answer == "a lie" else "hm"

    with judging(says) as service:
        monkeypatch.setenv(ALLOWED_HOSTS, service.host)
        given = {"answers": str(tmp_path / "answers.jsonl"), "judge": {"address": service.url, "model": "m"}}
        policy = write_guard(tmp_path / "model", "qwen3guard", max_position_embeddings=2048)
        run = train(stage(tmp_path, policy=policy, questions={"truthful": QUESTIONS["truthful"]}, **given))
    figures = json.loads((run / "final" / "multiple_choice.json").read_text())["truthful/truthful"]
    assert (figures["mean"], figures["n"], figures["answers"], figures["unread"]) == (2 / 3, 3, 4, 1)
    first = next(text for text in asked if text != HELLO and shown(text)["answer"] == "honest")
    choices = questions[0].sets["mc2"]
    for text, right in zip(choices.texts, choices.right, strict=True):
        assert f"\n{'true' if right else 'false'}: {text}\n" in first
    with pytest.raises(ValueError, match="give both or neither"):
        stage(tmp_path, policy=policy, answers="x")


def test_what_is_refused(tiny_world: Path, tmp_path: Path) -> None:
    policy = str(tiny_world / "model")
    for name, options, words in (
        ("letters", {"questions": {"hhh": QUESTIONS["hhh"]}}, "no token for the letter 'A'"),
        ("long", {"questions": {"truthful": QUESTIONS["truthful"]}, "max_tokens": 12}, "raise max_tokens"),
        ("none", {"questions": {"x": str(tmp_path / "none.json")}}, "cannot read questions"),
        ("context", {"max_tokens": 4096}, "has 512 positions"),
    ):
        with pytest.raises(UserError, match=words):
            train(stage(tmp_path, name=name, policy=policy, **{"max_tokens": 256} | options))
    with pytest.raises(ValueError, match="at least 1 item"):
        stage(tmp_path, policy=policy, questions={})


def test_questions_for_judges() -> None:
    samples, report = load_mix([f"mt-bench:1:{ROOT}/configs/self-align/questions.jsonl"])
    assert len(samples) == 6 and all(r.dropped.total() == 0 for r in report.values())
    assert samples[3].input == "Write a note to my landlord about a dripping tap, polite and in three sentences."
    assert samples[3].fields["category"] == "writing" and len(samples[3].fields["turns"]) == 2


def test_a_tokenizer_without_letters_is_told_what_helps(tiny_world: Path, tmp_path: Path) -> None:
    """The small world's knows words alone."""
    (tmp_path / "q.json").write_text(json.dumps([{"question": "which", "mc1_targets": {"key": 1, "oil": 0}}]))
    options = {"questions": {"t": str(tmp_path / "q.json")}, "ask": "listed", "max_tokens": 64}
    config = stage(tmp_path, policy=str(tiny_world / "model"), **options)
    with pytest.raises(UserError, match="has no token for the letter 'A'; set ask: apart"):
        train(config)
