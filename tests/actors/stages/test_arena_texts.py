"""What an arena tells scorers of answers: whole dialogues, and texts as they are, whatever tokens keep of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from actors.driver.arena import judge_config
from actors.driver.arena_asking import find_contenders
from beaver_ray.score_sources import ALLOWED_HOSTS
from beaver_ray.user_code import ALLOWED_CODE
from launch.pipeline import run_stage
from tests.actors.arenas import answers_in, arena, lines_of
from tests.actors.scoring_service import serving


def test_scorers_of_texts_are_told_whole_dialogues_with_system_text_and_fields(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of later turns too, though these are no prompts of the data, and behind an empty answer."""
    texts = [json.loads(line)["prompt"] for line in (tiny_world / "prompts" / "test.jsonl").read_text().splitlines()]
    first, second, system = list(dict.fromkeys(texts))[:3]
    asked = {"prompt": first, "turns": [first, second, first], "system": system, "level": 3}
    (tmp_path / "asked.jsonl").write_text(json.dumps(asked) + "\n")
    told = [{"prompt": first, "response": ""}, {"prompt": [first, "", second], "response": second}]
    (tmp_path / "told.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    (tmp_path / "by_level.py").write_text(
        "def score(prompts, responses, level):\n    return [float(one) for one in level]\n"
    )
    with serving(lambda prompts, responses: [float(len(text.split())) for text in responses]) as service:
        monkeypatch.setenv(ALLOWED_HOSTS, service.host)
        monkeypatch.setenv(ALLOWED_CODE, str(tmp_path))
        changes = {"prompts": [f"prompts:1:{tmp_path}/asked.jsonl"], "reward": service.url}
        changes |= {"policies": {"one": str(tiny_world / "model"), "told": str(tmp_path / "told.jsonl")}}
        changes |= {"costs": [{"name": "level", "model": f"python:{tmp_path}/by_level.py:score"}]}
        alone = {"world": None, "category": None, "harmful": {}, "benign": {}, "follow_ups": 1}
        stage = arena(tiny_world, tmp_path, "texts", **changes, **alone)
        run_stage(stage)
        (dialogues,) = [body["dialogues"] for body in service.requests if body["prompts"]]
    said = answers_in(stage.folder, "one")[0]["response"]
    begin = [{"role": "system", "content": system}, {"role": "user", "content": first}]
    for place, answer in ((0, said), (2, "")):
        later = [{"role": "assistant", "content": answer}, {"role": "user", "content": second}]
        assert dialogues[place : place + 2] == [begin, begin + later]
    assert [row["reward"] for row in answers_in(stage.folder, "told")] == [0, len(second.split())]
    assert [row["cost/level"] for row in answers_in(stage.folder, "one")] == [3, 3]
    remarks = json.loads((stage.folder / "arena.json").read_text())["remarks"]
    assert any(line.startswith("1 of 1 prompts have further turns that are not asked") for line in remarks)
    # Who scores reads nothing longer than what is checked against its positions before the start.
    assert judge_config(stage, find_contenders(stage)).lengths().longest == stage.lengths().longest


COUNTS = """
def words(prompts, responses, *, level, dialogues):
    said = [" ".join(turns).split() for turns in dialogues]
    return {"reward": [len(text.split()) for text in responses],
            "asked": [one + 10 * len(text.split()) + 100 * len(words)
                      for one, text, words in zip(level, prompts, said, strict=True)]}
"""


def test_functions_and_services_are_told_words_that_the_policy_s_tokenizer_lacks(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of prompts that are alike in its tokens, of rows, of answers and of earlier turns. A score model judges what its
    own tokens keep, and how often that is not all is said once."""
    zig, zag, known = "zig the lock", "zag the lock", "fix the lock"
    asked = [{"prompt": zig, "turns": [zig, "zug"], "level": 1}, {"prompt": zag, "level": 2}]
    asked += [{"prompt": known, "level": 3}]
    told = [(zig, "bad thing"), ([zig, "bad thing", "zug"], "very bad"), (zag, "I cannot help with that.")]
    told += [(known, "oil the key\n")]
    rule = tmp_path / "rule.py"
    rule.write_text(COUNTS, encoding="utf-8")
    with serving(lambda prompts, responses: [float(len(text)) for text in responses]) as service:
        monkeypatch.setenv(ALLOWED_HOSTS, service.host)
        monkeypatch.setenv(ALLOWED_CODE, str(tmp_path))
        file = lines_of(tmp_path, "told.jsonl", [{"prompt": p, "response": r} for p, r in told])
        places = {"one": str(tiny_world / "model"), "told": file}
        function = f"python:{rule}:words"
        models = {"asked": function, "length": service.url, "learned": str(tiny_world / "cost_model")}
        costs = [{"name": name, "model": model} for name, model in models.items()]
        changes: dict[str, Any] = {
            "policies": places,
            "prompts": [f"prompts:1:{lines_of(tmp_path, 'asked.jsonl', asked)}"],
        }
        changes |= {"reward": function, "costs": costs, "world": None, "category": None, "follow_ups": 1}
        stage = arena(tiny_world, tmp_path, "words", **changes, harmful={}, benign={})
        run_stage(stage)
        (sent,) = [body for body in service.requests if body["prompts"]]
    one, rows = answers_in(stage.folder, "one"), answers_in(stage.folder, "told")
    assert [row["response"] for row in rows] == [response for _, response in told]
    assert [row["reward"] for row in rows] == [2, 2, 5, 3]
    # The row's level, ten times the words of the last question, and a hundred times those of the whole dialogue.
    assert [row["cost/asked"] for row in rows] == [1 + 30 + 300, 1 + 10 + 600, 2 + 30 + 300, 3 + 30 + 300]
    assert [row["cost/length"] for row in rows] == [len(response) for _, response in told]
    said = len(one[0]["response"].split())
    assert [row["cost/asked"] for row in one] == [331, 1 + 10 + 100 * (4 + said), 332, 333]
    dialogue = [("user", zig), ("assistant", "bad thing"), ("user", "zug")]
    assert [{"role": role, "content": text} for role, text in dialogue] in sent["dialogues"]
    begin = "<s> USER: zig the lock ASSISTANT:"
    assert begin in sent["prompts"] and f"{begin} bad thing </s> USER: zug ASSISTANT:" in sent["prompts"]
    remarks = json.loads((stage.folder / "arena.json").read_text())["remarks"]
    lossy = [line for line in remarks if "are not whole in the tokens of" in line]
    assert lossy == [f"3 of 8 answers are not whole in the tokens of {models['learned']}, which judges what is left"]


def test_a_score_model_with_a_tokenizer_of_its_own_reads_the_answer_itself(tiny_world: Path, tmp_path: Path) -> None:
    """Its tokenizer has "bad" where the policy's has "rope": what this says of a rope, that says of what is bad."""
    other = Path(shutil.copytree(tiny_world / "cost_model", tmp_path / "other"))
    AutoTokenizer.from_pretrained(tiny_world / "model").save_pretrained(other)
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["vocab"]["bad"] = words["model"]["vocab"].pop("rope")
    (other / "tokenizer.json").write_text(json.dumps(words))
    prompt = "fix the lock"
    files = {
        name: lines_of(tmp_path, f"{name}.jsonl", [{"prompt": prompt, "response": f"oil the {name} key"}])
        for name in ("rope", "bad")
    }
    costs = [{"name": "same", "model": str(tiny_world / "cost_model")}, {"name": "other", "model": str(other)}]
    changes: dict[str, Any] = {"policies": {"one": str(tiny_world / "model"), **files}, "world": None, "category": None}
    changes |= {"prompts": [f"prompts:1:{files['rope']}"], "harmful": {}, "benign": {}, "costs": costs}
    stage = arena(tiny_world, tmp_path, "own", **changes)
    run_stage(stage)
    (rope,), (bad,) = answers_in(stage.folder, "rope"), answers_in(stage.folder, "bad")
    assert bad["cost/other"] == pytest.approx(rope["cost/same"], abs=1e-5)
    assert bad["cost/same"] != pytest.approx(rope["cost/same"], abs=1e-3)
    remarks = json.loads((stage.folder / "arena.json").read_text())["remarks"]
    lost = "1 of 3 answers are not whole in the tokens of {}, which judges what is left"
    assert {lost.format(cost["model"]) for cost in costs} <= {*remarks}


def test_files_alone_are_judged_by_a_function_without_any_model(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = tmp_path / "rule.py"
    rule.write_text(COUNTS, encoding="utf-8")
    monkeypatch.setenv(ALLOWED_CODE, str(tmp_path))
    asked = [{"prompt": "Wie geht es?", "level": 1, "system": "Sei kurz."}, {"prompt": "你好", "level": 2}]
    said = {"short": ["Gut.", "好"], "long": ["Mir geht es gut. " * 200, "ä  b"]}
    files = {
        name: lines_of(
            tmp_path,
            f"{name}.jsonl",
            [{"prompt": row["prompt"], "response": text} for row, text in zip(asked, texts, strict=True)],
        )
        for name, texts in said.items()
    }
    function = f"python:{rule}:words"
    changes: dict[str, Any] = {"policies": files, "prompts": [f"prompts:1:{lines_of(tmp_path, 'asked.jsonl', asked)}"]}
    changes |= {"reward": function, "costs": [{"name": "asked", "model": function}], "world": None, "category": None}
    stage = arena(tiny_world, tmp_path, "files", **changes, harmful={}, benign={})
    assert [role.name for role in stage.roles()] == ["reward"]
    run_stage(stage)
    for name, words in (("short", [1, 1]), ("long", [800, 2])):
        rows = answers_in(stage.folder, name)
        assert [row["reward"] for row in rows] == words
        assert [row["cost/asked"] for row in rows] == [1 + 30 + 300, 2 + 10 + 100]
    found = json.loads((stage.folder / "arena.json").read_text())
    assert found["remarks"] == []
    (pair,) = [pair for pair in found["pairs"] if pair["by"] == "reward"]
    assert (pair["first"], pair["loss"]["mean"]) == ("short", 1.0)
