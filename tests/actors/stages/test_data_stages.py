"""Stages that make data, in one process: answers of two models mixed, and labels by score models and functions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.driver.train import train
from actors.stages.generate import Generate
from actors.stages.label import Label
from beaver_ray.errors import UserError
from beaver_ray.json_files import read_rows, write_rows
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.report.page import write_report
from tests.actors.support import LiteralScoreModel, disturb_folder, spoilt


def generate(tmp_path: Path, **options: Any) -> Generate:
    common = {"stage": "generate", "workspace": str(tmp_path), "name": "generate", "debug": True}
    common |= {"max_prompt_tokens": 40, "answers": 3, "rollout": {"max_new_tokens": 150, "max_sequences": 64}}
    return Generate.model_validate(common | options)


def label(tmp_path: Path, pairs: Path, **options: Any) -> Label:
    common = {"stage": "label", "workspace": str(tmp_path), "name": "label", "debug": True, "pairs": str(pairs)}
    return Label.model_validate(common | {"eval_fraction": 0.4} | options)


def test_two_models_mixed(tiny_world: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_world / "model", tmp_path / "other"))
    disturb_folder(other, seed=5)
    prompts = [json.loads(line)["prompt"] for line in (tiny_world / "prompts" / "test.jsonl").open()][:6]
    rows: list[dict[str, Any]] = [{"prompt": prompt, "kind": f"k{n}", "else": 1} for n, prompt in enumerate(prompts)]
    rows[0]["system"] = "be brief"
    write_rows(tmp_path / "p.jsonl", [*rows, rows[2]])
    models = [str(tiny_world / "model"), str(other)]
    mapping = {"path": str(tmp_path / "p.jsonl"), "prompt": "prompt", "system": "system"}
    stage = generate(tmp_path, policies=models, prompts=[mapping], pairs=100)
    final = train(stage) / "final"
    answers = read_rows(final / "answers.jsonl")
    assert [row["model"] for row in answers] == [models[0]] * 18 + [models[1]] * 18
    assert [row["prompt"] for row in answers[::3]] == prompts * 2, "a repeated prompt is answered once"
    assert {row["prompt"]: row.get("kind") for row in answers} == {p: f"k{n}" for n, p in enumerate(prompts)}
    assert all(row.get("system") == ("be brief" if row["prompt"] == prompts[0] else None) for row in answers)
    texts = [[row["response"] for row in answers[start : start + 3]] for start in range(0, 36, 3)]
    assert len({tuple(three) for three in texts}) == 12, "no two prompts, and no two models, share random numbers"
    # Every pair of different whole answers to a prompt, by a plain count.
    whole = [row for row in answers if not row["truncated"] and row["response"].strip()]
    said = {prompt: {row["response"].strip() for row in whole if row["prompt"] == prompt} for prompt in prompts}
    pairs = read_rows(final / "pairs.jsonl")
    assert len(pairs) == sum(len(some) * (len(some) - 1) // 2 for some in said.values()) > 6
    assert any(row["model_0"] != row["model_1"] for row in pairs)
    report = write_report(stage, stage.folder).read_text()
    assert "of 2 models" in report and "Of no use" in report
    short = {"rollout": {"max_new_tokens": 1}, "name": "short"}
    with pytest.raises(UserError, match=r"no prompt has two different whole answers \(.*raise rollout.max_new_tokens"):
        train(generate(tmp_path, policies=models, prompts=[mapping], **short))
    with pytest.raises(ValueError, match="one answer to a prompt is no pair"):
        generate(tmp_path, policies=[models[0]] * 2, prompts=["p"], answers=1)


def test_what_an_earlier_start_has_left_is_not_published(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that ended as its manifest was written, then one whose options make fewer files."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    rows = read_rows(tiny_world / "preferences" / "test.jsonl")[:20]
    write_rows(tmp_path / "pairs.jsonl", rows)
    prompts = [f"prompts:0.1:{tiny_world}/prompts/test.jsonl"]
    answers = generate(tmp_path, policies=[str(tiny_world / "model")], prompts=prompts, pairs=2)
    labels = label(tmp_path, tmp_path / "pairs.jsonl", world=str(tiny_world / "world.json"))
    for stage, again, more, wanted in (
        (answers, {"pairs": 0}, "pairs.jsonl", {"answers.jsonl"}),
        (labels, {}, "audit.jsonl", {"train.jsonl", "test.jsonl"}),
    ):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("beaver_ray.manifest.write_stage_manifest", killed)
            train(stage)
        if stage is labels:  # as a judge's start leaves it
            write_rows(stage.folder / "final.part" / more, rows)
        assert (stage.folder / "final.part" / more).is_file()
        final = train(stage.model_copy(update={"resume": True, **again})) / "final"
        assert {path.name for path in final.iterdir()} == wanted | {"manifest.json"}
        assert json.loads((final / "manifest.json").read_text())["files"].keys() == wanted


def test_labels_of_score_models(tiny_world: Path, tmp_path: Path) -> None:
    """As transformers' own forward passes over the chat template's tokens say."""
    rows = read_rows(tiny_world / "preferences" / "test.jsonl")[:20]
    write_rows(tmp_path / "pairs.jsonl", rows)
    models = {"reward": str(tiny_world / "reward_model"), "cost": str(tiny_world / "cost_model")}
    stage = label(tmp_path, tmp_path / "pairs.jsonl", policy=str(tiny_world / "model"), **models)
    final = train(stage) / "final"
    labelled = [row for name in ("train", "test") for row in read_rows(final / f"{name}.jsonl")]
    assert len(labelled) == len({row["id"] for row in labelled}) == 20
    tokenizer = load_tokenizer(str(tiny_world / "model"))
    literal = {name: LiteralScoreModel(Path(folder)) for name, folder in models.items()}
    for row in labelled:
        scores: dict[str, list[float]] = {}
        for name, model in literal.items():
            for k in (0, 1):
                turns = [("user", row["prompt"]), ("assistant", row[f"response_{k}"])]
                messages = [{"role": role, "content": text} for role, text in turns]
                tokens = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
                with torch.no_grad():
                    scores.setdefault(name, []).append(float(model([tokens])[0, -1]))
            assert [row[f"{name}_0"], row[f"{name}_1"]] == pytest.approx(scores[name], abs=1e-4)
        assert row["better_response_id"] == int(scores["reward"][1] > scores["reward"][0])
        assert row["safer_response_id"] == int(scores["cost"][1] < scores["cost"][0])
        assert [row[f"is_response_{k}_safe"] for k in (0, 1)] == [cost <= 0 for cost in scores["cost"]]
    prompts = [{row["prompt"] for row in read_rows(final / f"{name}.jsonl")} for name in ("train", "test")]
    assert not prompts[0] & prompts[1]
    manifest = json.loads((final / "manifest.json").read_text())
    assert {*models.values(), str(tmp_path / "pairs.jsonl")} == set(manifest["parents"])
    # A pair without a finite score is left out.
    bad = {"cost": str(spoilt(tiny_world, tmp_path / "spoilt", "cost_model", "lock"))}
    folder = train(stage.model_copy(update={"name": "bad", **bad}))
    counts = json.loads((folder / "final" / "manifest.json").read_text())["counts"]
    lock = sum("lock" in f"{row['prompt']} {row['response_0']} {row['response_1']}".split() for row in rows)
    assert 0 < counts["a score that is not finite"] == lock == 20 - counts["pairs"]


def test_what_is_said_of_labels_goes_with_them(tiny_world: Path, tmp_path: Path) -> None:
    """Strengths of a label that others turn round would have it turned back."""
    rows = read_rows(tiny_world / "preferences" / "test.jsonl")[:20]
    wrong = [
        row | {"better_response_id": 1 - row["better_response_id"], "strength_mean": -2.0, "better_flipped": True}
        for row in rows
    ]
    write_rows(tmp_path / "pairs.jsonl", [row | {"category": "a"} for row in wrong])
    folder = train(label(tmp_path, tmp_path / "pairs.jsonl", world=str(tiny_world / "world.json")))
    labelled = [row for name in ("train", "test") for row in read_rows(folder / "final" / f"{name}.jsonl")]
    assert len(labelled) == 20 and {row["category"] for row in labelled} == {"a"}
    assert not any({"strength_mean", "better_flipped"} & row.keys() for row in labelled)
    assert "better_flipped, strength_mean: left out" in (folder / "notes.log").read_text()


def test_labels_of_functions(tiny_world: Path, tmp_path: Path) -> None:
    """Words beyond one are a reward, and one word makes an answer unsafe; ties are decided by a coin."""
    texts = [("key oil spring", "key oil"), ("key oil", "pick key oil hinge"), ("key oil well", "well oil key")] * 4
    prompts = [json.loads(line)["prompt"] for line in (tiny_world / "prompts" / "test.jsonl").open()]
    rows = [
        {"prompt": prompt, "response_0": first, "response_1": second}
        for prompt, (first, second) in zip(prompts, texts, strict=False)
    ]
    write_rows(tmp_path / "pairs.jsonl", rows)
    functions = {
        "reward": "python:score.py:fewer",
        "cost": "python:score.py:says_bad",
        "policy": str(tiny_world / "model"),
    }
    with pytest.raises(UserError, match=r"reward: cannot read score.py"):
        train(label(tmp_path, tmp_path / "pairs.jsonl", **functions))
    code = "beaver_ray/rules/text.py"
    functions |= {"reward": f"python:{code}:over_length(budget=1)", "cost": f"python:{code}:mentions(words=['pick'])"}
    final = train(label(tmp_path, tmp_path / "pairs.jsonl", **functions)) / "final"
    labelled = [row for name in ("train", "test") for row in read_rows(final / f"{name}.jsonl")]
    for row in labelled:
        assert row["is_response_0_safe"] and row["is_response_1_safe"] == ("pick" not in row["response_1"])
        words = [len(row[f"response_{k}"].split()) for k in (0, 1)]
        assert words[0] == words[1] or row["better_response_id"] == int(words[1] > words[0])
        assert "pick" not in row["response_1"] or row["safer_response_id"] == 0
    counts = json.loads((final / "manifest.json").read_text())["counts"]
    assert counts["unsafe answers"] == 4 and counts["equal scores, safer_response_id by a coin"] == 8
    assert counts["equal scores, better_response_id by a coin"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "labels come from reward, cost and policy, or from world, people or judge: give one"),
        ({"world": "w", "people": "p"}, "give one"),
        ({"reward": "r", "cost": "c"}, "reward, cost and policy go together: give all three"),
        ({"reward": "r", "cost": "http://u:p@h", "policy": "p"}, "a scoring service's address is"),
    ],
)
def test_where_labels_come_from(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label(tmp_path, tmp_path / "pairs.jsonl", **options)
