"""Stages self_instruct and self_align in one process, by a service that is told what to say and by a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.driver.self_align import Sift
from actors.driver.train import train
from actors.driver.writer import Block, Said
from actors.roles.hf_generator import likeliest
from actors.stages.generate import Generate
from actors.stages.self_align import SelfAlign
from actors.stages.self_instruct import SelfInstruct
from beaver_ray.data.mixing import load_mix
from beaver_ray.data.sources import RawSample
from beaver_ray.errors import UserError
from beaver_ray.json_files import read_rows, write_rows
from beaver_ray.report.page import write_report
from beaver_ray.score_sources import ALLOWED_HOSTS
from beaver_ray.self_align.answering import Sieve
from beaver_ray.self_align.options import AnswerFilters
from beaver_ray.self_align.principles import read_principles
from tests.actors.judging_service import judging

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def spelled(number: int) -> str:
    """A number by its digits: words of which two numbers share few."""
    return " ".join(NUMBERS[int(digit)] for digit in str(number))


def self_instruct(tmp_path: Path, **options: Any) -> SelfInstruct:
    common = {"stage": "self_instruct", "workspace": str(tmp_path), "name": "instruct", "debug": True}
    return SelfInstruct.model_validate(common | options)


def self_align(tmp_path: Path, **options: Any) -> SelfAlign:
    common = {"stage": "self_align", "workspace": str(tmp_path), "name": "align", "debug": True}
    return SelfAlign.model_validate(common | options)


def test_instructions_by_a_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sorts of requests; each reply has a known fault or two, which the counts show."""
    asked = 0

    def says(text: str) -> str:
        nonlocal asked
        asked += 1
        if text.startswith("Answer with the one word"):
            return "ready"
        if "topics for such questions" in text:
            first = int(re.findall(r"^(\d+)\.", text, re.MULTILINE)[-1])
            return f" Alpha {asked}\n{first + 1}. beta\n{first + 2}. Gamma {asked}\n{first + 3}. A b c d\nThat is all"
        if "Open topics" in text:
            first = int(re.findall(r"^### Question (\d+)", text, re.MULTILINE)[-1])
            return (
                f" Who {spelled(asked * 7919)} now?\n### Question {first + 1}\nQuestion: Hm?\n### Question {first + 9}"
            )
        first = int(re.findall(r"^### Task (\d+)", text, re.MULTILINE)[-1])
        return (
            f" Say {spelled(asked * 104729)} aloud\nInput: None\n\n### Task {first + 1}\nInstruction: Draw my old cat"
        )

    types = [{"name": n, "about": "Hard.", "topic": n.title(), "question": f"{n}, really so?"} for n in ("law", "art")]
    (tmp_path / "types.yaml").write_text(yaml.safe_dump({"types": types}))
    with judging(says) as service:
        monkeypatch.setenv(ALLOWED_HOSTS, service.host)
        model = {"address": service.url, "model": "m", "concurrency": 1, "temperature": 1.0}
        options = {"vanilla": 6, "by_topic": 4, "topics": 3, "requests": 4, "most_rounds": 3, "hints": 2}
        run = self_instruct(tmp_path, model=model, form="chat", types=str(tmp_path / "types.yaml"), **options)
        final = train(run) / "final"
        rows, at_first = read_rows(final / "instructions.jsonl"), asked
        final.rename(run.folder / "not final")
        # A start that has lost blocks asks for the same, with the same seeds: the service has nothing to do.
        for file in [*(run.folder / "replies").glob("topic*")]:
            file.unlink()
        train(run.model_copy(update={"resume": True}))
    assert read_rows(final / "instructions.jsonl") == rows and asked == at_first
    assert [row["pool"] for row in rows] == ["vanilla"] * 6 + ["topic"] * 4
    counts = json.loads((run.folder / "self_align.json").read_text())["counts"]
    # Two rounds of four requests: after six are kept nothing more is taken.
    assert counts["vanilla"] == {"written": 11, "kept": 6, "a word of the blacklist": 5}
    # Both kinds have one topic and need two, which a reply brings; of each, the second request is the same text, which
    # has a reply of its own, with two topics more.
    left = {"no capital letter at its beginning": 4, "more than 3 words": 4, "beyond topics of its kind": 4}
    assert counts["topics"] == {"written": 16, "kept": 4, **left}
    # One round: each of its four requests brought a question, though some may be the same text.
    assert counts["topic"] == {"written": 11, "kept": 4, "fewer than 4 words": 3, "beyond the hints of a request": 4}
    topics = read_rows(final / "topics.jsonl")
    assert len(topics) == 6 and {row["category"] for row in topics} == {"law", "art"}
    assert {(row["category"], row["topic"]) for row in rows[6:]} <= {(t["category"], t["topic"]) for t in topics}
    assert [sample.fields["pool"] for sample in load_mix([f"prompts:1:{final}/instructions.jsonl"])[0]][6:] == [
        "topic"
    ] * 4
    page = write_report(run, run.folder).read_text()
    assert "177 lines" in page and "Kept: vanilla" in page
    manifest = json.loads((final / "manifest.json").read_text())
    assert manifest["files"]["instructions.jsonl"]["rows"] == 10 and str(tmp_path / "types.yaml") in manifest["parents"]


def test_a_start_that_goes_on_comes_to_the_same_pool(tiny_world: Path, tmp_path: Path) -> None:
    """The tiny model writes words at random; of its rounds one is lost, and is the same again."""
    options: dict[str, Any] = {"model": str(tiny_world / "model"), "vanilla": 30, "by_topic": 6, "topics": 2}
    options |= {"requests": 16, "most_rounds": 2, "tasks_asked": 3, "max_prompt_tokens": 440, "form": "chat"}
    options |= {"rollout": {"max_new_tokens": 40, "max_sequences": 32, "top_p": 0.95}}
    options |= {"filters": {"any_script": True}}
    run = self_instruct(tmp_path, **options)
    whole = train(run).joinpath("final", "instructions.jsonl").read_bytes()
    files = {file.name: file.read_bytes() for file in (run.folder / "replies").iterdir()}
    assert len(files) >= 4 and whole.count(b"\n") >= 8
    # Started with fewer rounds, broken off, and gone on with: nothing that is there is asked again.
    other = run.model_copy(update={"name": "other", "most_rounds": 1})
    train(other)
    (other.folder / "final").rename(other.folder / "not final")
    written = {file: file.stat().st_mtime_ns for file in (other.folder / "replies").glob("vanilla*")}
    again = run.model_copy(update={"name": "other", "resume": True})
    assert train(again).joinpath("final", "instructions.jsonl").read_bytes() == whole
    assert all(file.stat().st_mtime_ns == at for file, at in written.items()) and len(written) == 1
    assert {file.name for file in (other.folder / "replies").iterdir()} >= set(files)


def test_answers_by_principles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight questions of two pools, one answered as each filter has it; the shared text stands before every one."""
    good = "Water boils sooner on a mountain because the air presses less on it there, so that its molecules leave the "
    good += "surface at a lower temperature than they would at the level of the sea."
    opening = "I think before I answer, as a helpful and honest assistant does."
    answers = {
        "q0": f"{opening} Facts (rule 8).\n### Assistant says\n{good}\n\n### User\nq9",
        "q1": f"{opening} Steps (rules 8 and 13).\n### Assistant says\n{good}",
        "q2": "As you like.",
        "q3": f"{opening} (rule 1)\n### Assistant says\nNo.",
        "q4": f"{opening} (rule 1)\n### Assistant says\nI'm sorry, {good}",
        "q5": f"{opening} (rule 1)\n### Assistant says\n{good} {good}",
        "q6": f"{opening} Not known (rule 9).\n### Assistant says\n{good}",
    }

    def says(text: str) -> str:
        return "ready" if text.startswith("Answer with") else answers[text.splitlines()[-2]]

    rows = [{"prompt": q, "pool": "topic" if q == "q6" else "vanilla", "category": "x"} for q in answers]
    rows[1]["system"] = "Speak to a child."
    write_rows(tmp_path / "asked.jsonl", [*rows, {"prompt": ["a", "b", "c"]}])
    (tmp_path / "texts.yaml").write_text("texts: [Speak plainly.]")
    with judging(says) as service:
        service.cached = 30
        monkeypatch.setenv(ALLOWED_HOSTS, service.host)
        model = {"address": service.url, "model": "m"}
        given = {"prompts": [f"prompts:1:{tmp_path}/asked.jsonl"], "form": "chat"}
        named = {"identity": {"rows": 3, "maker": "us"}, "assistant": "Ada"}
        named["system_texts"] = {"share": 1, "file": str(tmp_path / "texts.yaml")}
        run = self_align(tmp_path, model=model, **named, **given)
        final = train(run) / "final"
    pairs = read_rows(final / "pairs.jsonl")
    assert [row["prompt"] for row in pairs[:3]] == ["q0", "q1", "q6"] and len(pairs) == 6
    plain = "Speak plainly."
    assert pairs[0] == {"prompt": "q0", "system": plain, "response": good, "pool": "vanilla", "category": "x"}
    # A row's system text stands before its question, and goes along; that of system_texts stands in the pair alone.
    assert [row["system"] for row in pairs] == [plain, "Speak to a child.", plain, plain, plain, plain]
    messages = [body["messages"][0]["content"] for body in service.requests]
    assert [text.count("### User\nSpeak to a child.\n\nq1\n") for text in messages if "q1" in text] == [1]
    assert all(row["pool"] == "identity" and "Ada" in row["response"] for row in pairs[3:])
    assert [row["rules"] for row in read_rows(final / "thoughts.jsonl")] == [[8], [8, 13], [9]]
    figures = json.loads((run.folder / "self_align.json").read_text())
    assert figures["counts"]["answers"] == {
        **{"written": 7, "kept": 3, "of several turns": 1, "thoughts begin otherwise": 1, "a clause twice": 1},
        **{"fewer than 160 characters": 1, "begins as a bare apology": 1},
    }
    assert figures["rules"]["vanilla"]["knowledge recitation"] == 1 and figures["rules"]["topic"]["static"] == 1
    cached = figures["prompt_tokens"] - figures["computed_prompt_tokens"]
    assert cached == pytest.approx(30), "as the service says of each"
    assert figures["pools_apart"] == pytest.approx(1) and figures["annotation"]["all"] == 32
    assert read_rows(run.folder / "left_out.jsonl")[0]["reason"] == "thoughts begin otherwise"
    demonstrations, _ = load_mix([f"demonstrations:1:{final}/pairs.jsonl"])
    assert [sample.answer for sample in demonstrations][:3] == [good] * 3
    assert [sample.system for sample in demonstrations][:2] == [plain, "Speak to a child."]
    assert "3 kept of 7 replies" in capsys.readouterr().out
    assert "Rules chosen: topic" in write_report(run, run.folder).read_text()


def test_a_field_called_pool_need_not_name_one(tmp_path: Path) -> None:
    stage = self_align(tmp_path, model=str(tmp_path), prompts=["prompts"])
    filters = {"opening": None, "min_chars": 0}
    sift = Sift(stage, Sieve(AnswerFilters.model_validate(filters), stage.tags, [], 2))
    pools: list[Any] = [["a", "b"], 7, "own", None]
    samples = [RawSample(input="q", fields={"pool": pool}) for pool in pools]
    said = [Said(f"By rule {n}.\n{stage.tags.answer}\nIt is.", False, 5) for n in (1, 2, 2, 1)]
    sift.take(samples, Block(said, 8, 0))
    assert [row.get("pool") for row in sift.rows] == [None, None, "own", None]
    assert sift.figures(["x", "y"])["rules"] == {
        "all": {"x": pytest.approx(2 / 3), "y": pytest.approx(1 / 3)},
        "own": {"x": 0.0, "y": 1.0},
    }


def test_what_a_service_did_not_take_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = "I think before I answer, as a helpful and honest assistant does. (rule 8)\n### Assistant says\n"
    good += "Salt lowers the temperature at which water freezes, and so an icy road thaws although the air is below "
    good += "the point at which pure water would stay as it is, down to some twenty degrees of frost."

    def says(text: str) -> str:
        if text.startswith("Answer with"):
            return "ready"
        if text.splitlines()[-2] == "q1":
            service.instead.append((400, {}, b'{"error": {"message": "too long"}}'))  # to the next one, q2
        return good

    write_rows(tmp_path / "asked.jsonl", [{"prompt": f"q{n}"} for n in range(4)])
    with judging(says) as service:
        monkeypatch.setenv(ALLOWED_HOSTS, service.host)
        model = {"address": service.url, "model": "m", "concurrency": 1}
        run = self_align(tmp_path, model=model, prompts=[f"prompts:1:{tmp_path}/asked.jsonl"], form="chat")
        final = train(run) / "final"
        assert [row["prompt"] for row in read_rows(final / "pairs.jsonl")][:3] == ["q0", "q1", "q3"]
        final.rename(run.folder / "not final")
        before = len(service.requests)
        train(run.model_copy(update={"resume": True}))
    assert [row["prompt"] for row in read_rows(final / "pairs.jsonl")][:4] == ["q0", "q1", "q2", "q3"]
    asked = [body["messages"][0]["content"] for body in service.requests[before:]]
    assert [text.splitlines()[-2] for text in asked if not text.startswith("Answer with")] == ["q2"]


def test_answers_of_a_tiny_model(tiny_world: Path, tmp_path: Path) -> None:
    """No filter; then others, with the same replies. A prompt is rules and question, pruned it is the question. One
    that is too long is not asked.
    """
    six = read_rows(tiny_world / "prompts" / "test.jsonl")[:6]
    write_rows(tmp_path / "asked.jsonl", [*six, {"prompt": "how to fix the lock " * 20}])
    (tmp_path / "context.j2").write_text(
        "{% for one in principles %}{{ one.name }} {% endfor %}{% if exemplars %}{% endif %}"
    )
    off = {"opening": None, "needs_answer": False, "min_chars": 0, "repeats": False, "allow_cut": True}
    options: dict[str, Any] = {"model": str(tiny_world / "model"), "prompts": [f"prompts:1:{tmp_path}/asked.jsonl"]}
    options |= {"context": str(tmp_path / "context.j2"), "max_prompt_tokens": 60, "filters": off}
    run = self_align(tmp_path, rollout={"max_new_tokens": 8, "max_sequences": 4}, **options)
    final = train(run) / "final"
    figures = json.loads((run.folder / "self_align.json").read_text())
    assert figures["counts"]["answers"]["kept"] + figures["counts"]["answers"].get("an empty answer", 0) == 6
    assert figures["counts"]["answers"]["longer than max_prompt_tokens"] == 1
    # The principles' names, both tags and the question; pruned <s> USER: question ASSISTANT:.
    sizes = [len(row["prompt"].split()) for row in six]
    tags = len(["###", "User", "###", "Assistant", "thinks"])
    names = len(" ".join(one.name for one in read_principles()).split())
    assert figures["prompt_tokens"] == figures["computed_prompt_tokens"] == pytest.approx(names + tags + sum(sizes) / 6)
    assert figures["pruned_prompt_tokens"] == pytest.approx(3 + sum(sizes) / 6)
    replies = {file: file.stat().st_mtime_ns for file in (run.folder / "replies").iterdir()}
    final.rename(run.folder / "not final")
    strict = run.model_copy(update={"resume": True, "filters": run.filters.model_copy(update={"min_chars": 10**6})})
    with pytest.raises(UserError, match=r"of 7 replies none is kept .*change filters and go on with resume=true"):
        train(strict)
    assert {file: file.stat().st_mtime_ns for file in (run.folder / "replies").iterdir()} == replies
    long = {"max_prompt_tokens": 20, "name": "long"}
    with pytest.raises(UserError, match=r"7 replies none is kept .*'longer than max_prompt_tokens': 7"):
        train(run.model_copy(update=long))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": {"address": "http://localhost:1/v1", "model": "m"}}, "set form: chat"),
        ({"vanilla": 0, "by_topic": 0}, "nothing is wanted"),
        ({"filters": {"rouge_max": 1.0}}, "less than 1"),
        ({"rollout": {"top_p": 0.0}}, "greater than 0"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        self_instruct(tmp_path, **({"model": "m"} | options))


def test_bad_input_gets_one_line(tiny_world: Path, tmp_path: Path) -> None:
    (tmp_path / "types.yaml").write_text("types: [{name: a}]")
    model = str(tiny_world / "model")
    with pytest.raises(UserError, match=r"types.yaml: types.0.about"):
        train(self_instruct(tmp_path, model=model, types=str(tmp_path / "types.yaml")))
    with pytest.raises(UserError, match="no model in 'nowhere'"):
        train(self_instruct(tmp_path, model="nowhere", name="nowhere"))


def test_one_answer_each_without_pairs(tiny_world: Path, tmp_path: Path) -> None:
    """As verbose cloning needs them: one answer to a prompt under a system text that the rows do not keep."""
    write_rows(tmp_path / "asked.jsonl", read_rows(tiny_world / "prompts" / "test.jsonl")[:4])
    options = {
        "stage": "generate",
        "workspace": str(tmp_path),
        "name": "verbose",
        "debug": True,
        "answers": 1,
        "pairs": 0,
    }
    options |= {"policies": [str(tiny_world / "model")], "prompts": [f"prompts:1:{tmp_path}/asked.jsonl"]}
    options |= {"rollout": {"max_new_tokens": 6, "temperature": 0.3, "top_p": 0.7}, "max_prompt_tokens": 40}
    stage = Generate.model_validate(options | {"template": {"system": "show the car"}})
    final = train(stage) / "final"
    answers = read_rows(final / "answers.jsonl")
    assert len(answers) == 4 and "system" not in answers[0] and not (final / "pairs.jsonl").exists()
    assert [line.startswith("answers: ") for line in stage.headlines()] == [True]


def test_the_likeliest_tokens() -> None:
    import torch

    probabilities = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.97, 0.01, 0.01, 0.01]])
    found = likeliest(probabilities.log(), 0.6).exp()
    # 0.4 is less than the share, 0.4 + 0.3 is not: two tokens; in the second row one.
    torch.testing.assert_close(found, torch.tensor([[0, 4 / 7, 3 / 7, 0], [1.0, 0, 0, 0]]))
