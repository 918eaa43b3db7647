"""A survey's figures by hand, and near duplicates against brute force."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from beaver_ray.data.near import ALIKE, SHINGLE, NearTexts
from beaver_ray.data.survey import survey
from beaver_ray.report.data import lines, write_page
from launch.__main__ import main

PAIR = {"prompt": "how do I bake rye bread in a small oven at home", "response_0": "Mix it.", "response_1": "No idea."}
ROWS = [
    {**PAIR, "better_response_id": 0, "is_response_0_safe": True, "is_response_1_safe": False},
    {**PAIR, "better_response_id": 0, "is_response_0_safe": True, "is_response_1_safe": False},  # again
    # The same two the other way round, and then the other one is better, and unsafe is safe.
    {"prompt": " " + PAIR["prompt"], "response_0": "No idea.", "response_1": "Mix it.", "better_response_id": 0}
    | {"is_response_0_safe": True, "is_response_1_safe": True},
    # Nearly the same question, all of whose runs of three words are the same.
    {**PAIR, "prompt": PAIR["prompt"] + "?", "better_response_id": 1},
    {"prompt": "hello", "response_0": "Hi there you.", "response_1": "Hi."},
    {"prompt": "hello", "response_0": "Hi.", "response_1": "Hi."},  # dropped
]
HELD_OUT = [{"prompt": p} for p in ("hello ", "How do I bake rye bread in a small oven, at home", "something else")]


def write(folder: Path) -> tuple[str, str]:
    for name, rows in (("pairs", ROWS), ("held", HELD_OUT)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"PKU-SafeRLHF:1:{folder}/pairs.jsonl", f"prompts:1:{folder}/held.jsonl"


def test_by_hand(tmp_path: Path) -> None:
    pairs, held_out = write(tmp_path)
    figures = survey([pairs], [held_out]).figures()
    assert figures["data"] == [{"data": pairs, "kept": 5, "dropped": {"identical responses": 1}, "remarks": {}}]
    assert (figures["rows"], figures["prompts"], figures["repeated_prompts"]) == (5, 3, 2)
    assert figures["most_rows_of_a_prompt"] == 3 and figures["duplicate_rows"] == 1
    assert figures["near_duplicate_prompts"] == 1
    # Prompts of 12, 12 and 1 words; answers of 2 words each, but "Hi there you." and "Hi.".
    assert figures["lengths"]["prompt"] | {"mean": 0} == {
        **{"texts": 3, "mean": 0, "min": 1, "median": 12, "90 %": 12, "99 %": 12, "max": 12}
    }
    assert np.isclose(figures["lengths"]["prompt"]["mean"], 25 / 3)
    assert figures["lengths"]["answer"]["mean"] == (8 * 2 + 3 + 1) / 10
    # The first is better in rows 1 to 3, the second in row 4.
    assert figures["first_preferred"] == {"better": {"labelled": 4, "share": 0.75}}
    assert figures["safety"] == {"labelled": 6, "unsafe": 2}
    # One pair is labelled both ways, and of the answers "No idea." alone.
    assert figures["contradictions"] == {"better": 1, "safer": 0, "is_safe": 1}
    assert figures["held_out"] == {"prompts": 3, "trained_on": 1, "nearly_trained_on": 1}


def test_rows_that_differ_in_their_labels_by_name_are_no_duplicates(tmp_path: Path) -> None:
    labels = ({"theft": True}, {"theft": False}, {"theft": True})
    rows = [{"prompt": "a", "response": "b", "labels": some} for some in labels]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert survey([f"moderation:1:{tmp_path}/rows.jsonl"]).duplicates == 1


def test_held_out_prompts_are_compared_without_system_texts(tmp_path: Path) -> None:
    """As notes.log of a stage says them: figures on a question that is trained on flatter whoever asks."""
    bake = PAIR["prompt"]
    train = [{"prompt": "hello", "response": "r", "system": "be kind"}]
    train += [{"prompt": prompt, "response": "r", "system": text} for prompt in (bake, "other") for text in ("s", "")]
    held = [{"prompt": p} for p in ("hello", bake + "?", "new")]
    for name, rows in (("train", train), ("held", held)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = survey([f"demonstrations:1:{tmp_path}/train.jsonl"], [f"prompts:1:{tmp_path}/held.jsonl"])
    assert found.prompts == 5 and found.held_out == {"prompts": 3, "trained_on": 1, "nearly_trained_on": 1}


def test_categories(tmp_path: Path) -> None:
    rows = [("a", True), ("a", False), (["b", "c"], True), ({"b": True, "c": False}, False), (None, True)]
    told = [{"prompt": str(i), "response": "r", "unsafe": u, "category": c} for i, (c, u) in enumerate(rows)]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    found = survey([f"labels:1:{tmp_path}/l.jsonl"])
    assert {n: (c.rows, c.labelled, c.unsafe) for n, c in found.categories.items()} == {
        "a": (2, 2, 1),
        "b": (2, 2, 1),
        "c": (1, 1, 1),
    }
    assert ("unsafe", "3 of 5 (60.0%) labelled answers") in lines(found)
    write_page(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2 and "http" not in page and '<meter value="0.5">' in page


def test_near_duplicates_against_brute_force() -> None:
    """Texts are runs of words of which some are changed; every pair is compared by sets of its runs of three."""
    rng = random.Random(0)
    texts: list[str] = []
    for _ in range(40):
        base = [rng.choice("abcdefghijklmnop") * rng.randint(1, 3) for _ in range(30)]
        for changes in (0, 1, 2, 5):
            other = list(base)
            for place in rng.sample(range(30), changes):
                other[place] = "changed"
            texts.append(" ".join(other) if changes != 0 else " ".join(other) + "!")
    rng.shuffle(texts)
    sets = [{tuple(w[i : i + SHINGLE]) for i in range(len(w) - 2)} for t in texts for w in [t.strip("!").split()]]
    alike = [[len(a & b) / len(a | b) >= ALIKE for a in sets] for b in sets]
    near = NearTexts()
    found = [near.add(text) is not None for text in texts]
    assert found == [any(alike[i][:i]) for i in range(len(texts))]
    assert 20 < sum(found) < 80
    assert all(near.find(text) is not None for text in texts)
    # Of scripts without spaces characters count.
    assert near.add("我今天想学习怎么做面包和蛋糕") is None and near.find("我今天想学习怎么做面包和蛋糕!") == len(texts)
    # Nor is a text alike another for it that both have no words.
    assert [near.add(text) for text in ("???", "???", "👍🎉👍", "? ! ?")] == [None, len(texts) + 1, None, None]
    assert all(near.find(a + b) is None for a, b in itertools.product("xyz", repeat=2))


def ended_with(words: list[str]) -> object:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code


def test_command(tmp_path: Path) -> None:
    pairs, held_out = write(tmp_path)
    config = f"stage: reward_model\nname: rm\nmodel: m\ntrain: ['{pairs}']\neval: ['{held_out}']\n"
    (tmp_path / "rm.yaml").write_text(config)
    out = tmp_path / "out"
    words = ["data", str(tmp_path / "rm.yaml"), "--json", str(out / "d.json"), "--page", str(out / "d.html")]
    assert ended_with(words) == 0
    assert json.loads((out / "d.json").read_text()) == survey([pairs], [held_out]).figures()
    assert "<svg" in (out / "d.html").read_text()
    changed = ["data", str(tmp_path / "rm.yaml"), f"train=['{held_out}']", "eval=[]", "--json", str(out / "e.json")]
    assert ended_with(changed) == 0
    assert json.loads((out / "e.json").read_text()) == survey([held_out], []).figures()
    assert ended_with(["data", "nonsense:1:x"]) == 2
    assert ended_with(["data", held_out, "eval=[]"]) == 2, "no stage's file"
