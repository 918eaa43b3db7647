"""Stage principle_labels: by a world's truth, by a model's letters, by a judge over HTTP, and what is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.driver.principle_labels import Questions, principle_rubric
from actors.driver.train import train
from actors.roles.judge import HELLO
from actors.stages import stages
from beaver_ray.data.pairs import pair_id
from beaver_ray.data.sources import RawSample
from beaver_ray.errors import UserError
from beaver_ray.json_files import read_rows, write_rows
from beaver_ray.models.letters import LetterReader
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.score_sources import ALLOWED_HOSTS
from beaver_ray.self_align.principles import read_principles
from beaver_ray.small_world.world import SmallWorld
from launch.planning import plan
from tests.actors.judging_service import judging, shown
from tests.tiny_guards import guard_tokenizer, write_guard

FILE = str(Path(__file__).parents[3] / "configs/self-align/principle_small_world.yaml")
RUBRIC = "{{ principle }} {{ turns[-1] }} {{ letters[0] }} {{ answer_a }} {{ letters[1] }} {{ answer_b }}"


def stage(folder: Path, **options: Any) -> Any:
    tree = {"stage": "principle_labels", "workspace": str(folder), "name": "labels", "debug": True, "file": FILE}
    return stages()["principle_labels"].model_validate(tree | options)


def test_labels_by_the_truth(tiny_world: Path, tmp_path: Path) -> None:
    pairs = str(tiny_world / "preferences" / "train.jsonl")
    config = stage(tmp_path, pairs=pairs, world=str(tiny_world / "world.json"), draws=3, eval_fraction=0.3)
    final = train(config) / "final"
    rows = {part: read_rows(final / f"{part}.jsonl") for part in ("train", "test")}
    assert not {r["prompt"] for r in rows["train"]} & {r["prompt"] for r in rows["test"]}
    world = SmallWorld.load(tiny_world / "world.json")
    texts = {one.name: (one.text, one.negated) for one in read_principles(FILE)}

    def difference(row: dict[str, Any], name: str) -> float:
        first, second = (row[f"response_{k}"] for k in (0, 1))
        if name == "brief":
            return len(second.split()) - len(first.split())
        truth = world.reward if name == "helpful" else lambda p, a: -world.cost(p, a)
        return float(truth(row["prompt"], first) - truth(row["prompt"], second))

    every = [*rows["train"], *rows["test"]]
    assert all(row["id"] == pair_id(row) for row in every), "by which label export finds it"
    # One of few principles is often drawn again; a pair that nothing else can be said of counts once.
    notes = (tmp_path / "labels" / "notes.log").read_text()
    ((labels, again),) = re.findall(r"(\d+) labels, (\d+) draws that repeat a label of their pair", notes)
    assert len({row["id"] for row in every}) == len(every) == int(labels) and int(again) > 0
    pairs_of = {(row["prompt"], row["response_0"], row["response_1"]): row for row in every}
    rms = {n: math.sqrt(np.mean([d**2 for r in pairs_of.values() if (d := difference(r, n))])) for n in texts}
    for row in every:
        named = [(name.removeprefix("not "), name.startswith("not ")) for name in row["principles"]]
        lines = [f"- {texts[name][negated]}" for name, negated in named]
        assert row["system"] == "\n".join(["Judge the answer by these principles:", *lines])
        # The label is that of the principle on which the answers differ most, in units of its spread.
        scaled = {name: difference(row, name) / rms[name] for name, _ in named}
        strongest = max(scaled, key=lambda name: abs(scaled[name]))
        assert abs(scaled[row["dominant"]]) == pytest.approx(abs(scaled[strongest]))
        says = scaled[row["dominant"]] * (-1 if dict(named)[row["dominant"]] else 1)
        assert row["better_response_id"] == int(says < 0) and row["principle_score"] == pytest.approx(says)
    figures = json.loads((final / "principles.json").read_text())
    assert figures["helpful"]["agreement"]["mean"] == 1.0 and sum(of["dominant"] for of in figures.values()) == len(
        every
    )
    assert (final / "principles.yaml").read_text() == Path(FILE).read_text()
    manifest = json.loads((final / "manifest.json").read_text())
    assert manifest["files"].keys() == {"train.jsonl", "test.jsonl"} and manifest["parents"].keys() >= {pairs, FILE}


def letters_judge(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "rubrics").mkdir()
    (tmp_path / "rubrics" / "principle.j2").write_text(RUBRIC)
    return {"letters": ["maybe", "also"], "rubrics": str(tmp_path / "rubrics")}


def test_letters_are_those_of_plain_transformers(tiny_world: Path, tmp_path: Path) -> None:
    lines = (tiny_world / "preferences" / "train.jsonl").read_text().splitlines()
    rows = [
        {k: v for k, v in json.loads(line).items() if k in ("prompt", "response_0", "response_1")} for line in lines
    ]
    write_rows(tmp_path / "pairs.jsonl", rows)
    folder = str(tiny_world / "model")
    judge = {"folder": folder, **letters_judge(tmp_path)}
    options = {"pairs": str(tmp_path / "pairs.jsonl"), "judge": judge, "max_drop": 1.0, "max_tokens": 96}
    config = stage(tmp_path, **options, principles=["harmless", "brief"], eval_fraction=0.4)
    assert [role.model for role in plan(config).roles] == [folder]
    run = train(config)
    kept = [row["odds"] for file in sorted((run / "compared").glob("*/*.jsonl")) for row in read_rows(file)]
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in judge["letters"])
    texts = {one.name: one.text for one in read_principles(FILE)}
    agreed = dict.fromkeys(("harmless", "brief"), 0)
    for row, odds in zip(rows[:6], kept, strict=False):
        expected = []
        for name in agreed:
            for first, second in ((0, 1), (1, 0)):
                shown_as = f"maybe {row[f'response_{first}']} also {row[f'response_{second}']}"
                text = f"<s> USER: {texts[name]} {row['prompt']} {shown_as} ASSISTANT:"
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                with torch.no_grad():
                    logits = model(torch.tensor([ids])).logits[0, -1]
                expected.append(float(logits[a] - logits[b]))
        np.testing.assert_allclose(odds, expected, atol=1e-4)
    assert config.cards({"step": np.ones(1), "answers": np.ones(1)}, {}) == []  # a run that has compared alone
    figures = json.loads((run / "final" / "principles.json").read_text())
    for place, name in enumerate(agreed):
        agreed[name] = sum(odds[2 * place] * odds[2 * place + 1] < 0 for odds in kept)
        assert figures[name]["kept"] == agreed[name] and figures[name]["pairs"] == len(kept)


def test_a_judge_over_http_that_likes_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By helpful the longer answer; by harmless whatever stands first; by brief a reply that nobody can read."""
    rows = [{"prompt": f"p{n}", "response_0": "a " * (2 + n % 3), "response_1": "b " * (1 + n % 5)} for n in range(60)]
    rows = [row for row in rows if len(row["response_0"]) != len(row["response_1"])]
    write_rows(tmp_path / "pairs.jsonl", rows)
    canaries = [row | {"principle": "helpful", "better_response_id": 0} for row in rows if n_words(row) > 0]
    write_rows(tmp_path / "canaries.jsonl", canaries)
    texts = {one.text: one.name for one in read_principles(FILE)}

    def says(text: str) -> str:
        if text == HELLO:
            return "ready"
        name, parts = next(name for words, name in texts.items() if f"\n{words}\n" in text), shown(text)
        longer = "A" if len(parts["answer A"].split()) > len(parts["answer B"].split()) else "B"
        return {"helpful": f"VERDICT: {longer}", "harmless": "VERDICT: A", "brief": "no idea"}[name]

    with judging(says) as service:
        monkeypatch.setenv(ALLOWED_HOSTS, service.host)
        options = {"pairs": str(tmp_path / "pairs.jsonl"), "judge": {"address": service.url, "model": "m"}}
        folder = train(stage(tmp_path, **options, eval_fraction=0.3))
        said = capsys.readouterr().out
        assert "harmless: orders agree on 0.0%" in said and "a liking for a place" in said
        assert "brief: none of" in said and "helpful: orders agree on 100.0%" in said
        labels = [row for part in ("train", "test") for row in read_rows(folder / "final" / f"{part}.jsonl")]
        assert len(labels) == len(rows) and all(row["dominant"] == "helpful" for row in labels)
        for row in labels:
            assert row["better_response_id"] == int((n_words(row) > 0) == (row["principles"] == ["not helpful"]))
        only = {"principles": ["helpful"], "canaries": str(tmp_path / "canaries.jsonl"), "eval_fraction": 0.3}
        known = train(stage(tmp_path, **options, **only, name="known")) / "final" / "principles.json"
        assert json.loads(known.read_text())["helpful"]["canaries"]["right"] == len(canaries)
        write_rows(tmp_path / "wrong.jsonl", [row | {"better_response_id": n % 2} for n, row in enumerate(canaries)])
        write_rows(tmp_path / "alike.jsonl", canaries[:1] * 60)
        for more, words in (
            (only | {"canaries": str(tmp_path / "alike.jsonl")}, "alike.jsonl has 1 canaries of the principle"),
            (only | {"canaries": str(tmp_path / "wrong.jsonl")}, "labels by helpful may not be used"),
            ({"principles": ["brief"], "canaries": only["canaries"]}, "has 0 canaries of the principle 'brief'"),
            ({"principles": ["harmless"]}, "by no principle do both orders agree"),
        ):
            with pytest.raises(UserError, match=words):
                train(stage(tmp_path, **options, **more, name=words.split()[-1].strip("'")))
    brief = json.loads((folder / "final" / "principles.json").read_text())["brief"]
    assert brief["agreement"]["mean"] is None and not brief["used"] and "brief is left out" not in said


def n_words(row: dict[str, Any]) -> int:
    """How much longer the first answer is."""
    return len(row["response_0"].split()) - len(row["response_1"].split())


def test_what_a_judge_is_shown(tmp_path: Path) -> None:
    principles = read_principles(FILE)[:1]
    sly = "fine {{ principle }} [end]"
    pair = RawSample(["hello", "yes?", "how {x}"], sly, "never", system="Be Ada.")
    for letters, ending in ((["A", "B"], "Reply with A or B alone."), (None, "VERDICT: TIE")):
        first, second = Questions(principles, principle_rubric(None), letters).of(pair)
        for text, a, b in ((first, sly, "never"), (second, "never", sly)):
            assert shown(text)["answer A"] == a and shown(text)["answer B"] == b and ending in text
            assert text.count(principles[0].text) == 1 and "system: Be Ada." in text and "assistant: yes?" in text
    first, second = Questions(principles, principle_rubric(None), ["X", "Y"]).of(pair)
    assert shown(first)["answer X"] == shown(second)["answer Y"] == sly and "answer A" not in first
    for words, text in (("must show {{ answer_b }}", RUBRIC.replace("answer_b", "x")), ("uses x", RUBRIC + "{{ x }}")):
        (tmp_path / "principle.j2").write_text(text)
        with pytest.raises(UserError, match=words.replace("{", r"\{")):
            principle_rubric(str(tmp_path))


def test_what_is_refused(tiny_world: Path, tmp_path: Path) -> None:
    world = str(tiny_world / "world.json")
    for options, words in (
        ({}, "judge or by world: give one"),
        ({"world": world, "judge": {"folder": "x"}}, "judge or by world: give one"),
        ({"world": world, "canaries": "x"}, "leave canaries out"),
        ({"judge": {"folder": "x", "lettres": ["A", "B"]}}, "did you mean 'letters'"),
        ({"judge": {"folder": "x", "letters": ["", "B"]}}, "letters"),
        ({"judge": {"address": "ftp://x", "model": "m"}}, "a judge's address"),
        ({"judge": {"address": "http://x/v1", "model": "m", "rubric": "score"}}, "rubric is not read here"),
        ({"world": world, "principles": []}, "principles"),
        ({"judge": {"folder": "x"}, "accuracy": 0.9}, "accuracy is what a judge shows on canaries"),
    ):
        with pytest.raises(ValueError, match=words):
            stage(tmp_path, pairs="pairs.jsonl", **options)
    pairs = str(tiny_world / "preferences" / "test.jsonl")
    for number, (options, words) in enumerate(
        (
            ({"pairs": str(tmp_path / "none.jsonl"), "world": world}, "none.jsonl"),
            ({"pairs": pairs, "world": world, "principles": ["helpfull"]}, "did you mean 'helpful'"),
            ({"pairs": pairs, "world": world, "file": None, "principles": ["ethical"]}, "knows no truth"),
            (
                {"pairs": pairs, "judge": {"folder": str(tiny_world / "model")}, "max_tokens": 96},
                "no token for the letter 'A'",
            ),
        )
    ):
        with pytest.raises(UserError, match=words):
            train(stage(tmp_path, name=str(number), **options))
    write_guard(tmp_path / "bpe", "qwen3guard")
    for letters in (["Yes", "Yes"], ["No", "None"]):
        same = (
            guard_tokenizer("qwen3guard").tokenize(letters[1])[0]
            == guard_tokenizer("qwen3guard").tokenize(letters[0])[0]
        )
        if same:
            with pytest.raises(UserError, match="with the same token"):
                LetterReader(str(tmp_path / "bpe"), letters)
