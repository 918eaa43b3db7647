"""Files of answers, where policies come from, tables, and the page of an arena."""

from __future__ import annotations

import csv
import html.parser
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from actors.stages.arena import Arena
from beaver_ray.arena.figures import Entrant, Match, figures
from beaver_ray.arena.finished import Said, dialogues_about, keep, read_answers, read_kept
from beaver_ray.arena.tables import tables_of, write_tables
from beaver_ray.arena.turns import by_turn, next_turns, places
from beaver_ray.data.sources import RawSample
from beaver_ray.errors import UserError
from beaver_ray.json_files import write_rows
from beaver_ray.report.arena import Shown, write_page
from launch.arena import arena_config

HOSTILE = '</script><img src=x onerror="alert(1)"> & \u2028 |\nnext'


def test_answers_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        {"prompt": "one", "response": HOSTILE, "ended": False},
        {"prompt": ["a", "b", "c"], "response": "first", "reward": 1.0},
        {"prompt": "one", "response": ""},
        {"prompt": ["a", "b", "c"], "response": "second", "truncated": True},
        {"prompt": ["a", "b", "c"], "response": "third"},
    ]
    write_rows(tmp_path / "a.jsonl", rows)
    read = read_answers(tmp_path / "a.jsonl")
    notes: list[str] = []
    said = Said.of_file(read, [RawSample(["a", "b", "c"]), RawSample("one")], 0, notes.append)
    assert said.texts == [["first", "second"], [HOSTILE, ""]]
    assert said.ended_NK.tolist() == [[True, False], [False, True]], "truncated is what stage generate writes"
    assert said.since == [[(), ()], [(), ()]]
    assert notes == ["cut to 2 of up to 3 answers each, since a prompt has no more"]


def test_answers_belong_to_the_system_text_they_were_given_under(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"system": "A pirate.", "prompt": "one", "response": "arr"},
        {"system": "A judge.", "prompt": "one", "response": "order"},
        {"system": "A judge.", "prompt": ["one", "order", "more"], "response": "in court"},
        {"prompt": "one", "response": "hm"},
    ]
    write_rows(tmp_path / "a.jsonl", rows)
    read = read_answers(tmp_path / "a.jsonl")
    for system, said in (("A pirate.", "arr"), ("A judge.", "order"), (None, "hm"), ("Nobody.", "hm")):
        assert dialogues_about(read, RawSample("one", system=system), 0) == [[(said, True)]]
    judge = RawSample("one", system="A judge.", fields={"turns": ["one", "more"]})
    assert dialogues_about(read, judge, 1) == [[("order", True), ("in court", True)]]


def test_a_file_s_dialogues_are_found_turn_by_turn(tmp_path: Path) -> None:
    """Two whole dialogues about "one", the second of them with an answer to each of two alike first answers; of "two"
    one is whole and one has no second turn."""
    rows = [
        {"prompt": "one", "response": "a"},
        {"prompt": "one", "response": "a"},
        {"prompt": "two", "response": "lonely"},
        {"prompt": ["one", "a", "more"], "response": "first", "ended": False},
        {"prompt": ["one", "a", "more"], "response": "second"},
        {"prompt": "two", "response": "b"},
        {"prompt": ["two", "b", "again"], "response": "c"},
    ]
    write_rows(tmp_path / "a.jsonl", rows)
    read = read_answers(tmp_path / "a.jsonl")
    one, two = (
        RawSample(q, fields={"turns": [q, more, "never asked"]}) for q, more in (("one", "more"), ("two", "again"))
    )
    third = RawSample("one", fields={"turns": ["another", "more"]})
    assert dialogues_about(read, one, 1) == [[("a", True), ("first", False)], [("a", True), ("second", True)]]
    assert dialogues_about(read, one, 2) == [] and next_turns(third, 1) == [], "turns that are not of this prompt"
    broken = RawSample("one", fields={"turns": ["one", "more", None, "never asked"]})
    assert next_turns(broken, 3) == ["more"] == next_turns(RawSample("one", fields={"turns": ["one", "more", ""]}), 2)
    said = Said.of_file(read, [one, two], 1, print)
    assert said.texts == [["a"], ["first"], ["b"], ["c"]] and said.ended_NK.tolist() == [
        [True],
        [False],
        [True],
        [True],
    ]
    assert said.since == [[()], [("a", "more")], [()], [("b", "again")]]
    keep(tmp_path / "kept.jsonl", said, None)
    again, _ = read_kept(tmp_path / "kept.jsonl")
    assert (again.texts, again.since, again.ended_NK.tolist()) == (said.texts, said.since, said.ended_NK.tolist())
    prompt_N, turn_N = places([["more"], [], ["x", "y"]])
    assert prompt_N.tolist() == [0, 0, 1, 2, 2, 2] and turn_N.tolist() == [1, 2, 1, 1, 2, 3]
    assert {name: inside.sum() for name, inside in by_turn(turn_N).items()} == {"turn 1": 3, "turn 2": 2, "turn 3": 1}
    assert by_turn(turn_N[turn_N == 1]) == {}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON"),
        ('{"prompt": "a"}', r"line 2 needs prompt .*, response \(a text\) and"),
        ('{"prompt": ["a", "b"], "response": "c"}', "an odd number of turns"),
        ("[]", "line 2 needs prompt"),
        ('{"prompt": "a", "response": "c", "system": 3}', r"perhaps system \(a text\)"),
        (r'{"prompt": "a", "response": "\ud83d"}', "line 2 has half a character"),
        (r'{"prompt": ["a", "\ud83d", "b"], "response": ""}', "line 2 has half a character"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(UserError, match=said):
        read_answers(file)


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def made() -> tuple[Match, dict[str, Any], Shown]:
    draw, names = np.random.default_rng(0), ("a", "b")
    entrants = {
        name: Entrant(
            costs={"harm": draw.normal(size=(6, 2))},
            refused_NK=np.zeros((6, 2), dtype=bool),
            truncated_NK=np.zeros((6, 2), dtype=bool),
            words_NK=np.ones((6, 2), dtype=int),
            rewards_NK=draw.normal(size=(6, 2)),
            gave_in_at_R=np.array([0, 1, -1]),
        )
        for name in names
    }
    nowhere = np.zeros(6, dtype=bool)
    match = Match(entrants, nowhere, nowhere, {HOSTILE: ~nowhere}, [HOSTILE], targets={"harm": 0.1}, insisted=1)
    told = {"judges": {"reward": "a <b>model</b>"}, "own_judges": {"a": ["reward"]}, "remarks": [HOSTILE]}
    told |= {"refusals": "a rule", "seed": 1, "temperature": 1.0, "harmful": 0, "benign": 0, "insisted": 1}
    shown = Shown([HOSTILE] * 6, {name: [HOSTILE] * 6 for name in names}, [[HOSTILE]] * 6)
    return match, told | figures(match), shown


def test_tables_say_what_the_figures_are(tmp_path: Path) -> None:
    match, found, _ = made()
    tables = tables_of(found)
    write_tables(tables, tmp_path)
    assert [table.name for table in tables] == [
        *("policies", "pairs", "pairs_by_group", "elo", "safety_matrix", "safety_matrix_by_group", "worst_of_k"),
        *("worst_of_k_by_group", "insistence", "categories"),
    ]
    with (tmp_path / "policies.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    rate = found["policies"]["b"]["violation_rate/harm"]
    assert float(rows[1]["violation rate harm"]) == rate["mean"] == (match.entrants["b"].costs["harm"] > 0).mean()
    assert [float(rows[1][f"violation rate harm {end}"]) for end in ("low", "high", "n")] == [
        *(rate["low"], rate["high"], 12)
    ]
    lines = (tmp_path / "tables.md").read_text(encoding="utf-8").split("\n")
    row = next(line for line in lines if line.startswith("| b | "))
    assert f"{rate['mean']:.1%} ({rate['low']:.1%} to {rate['high']:.1%}, n 12)" in row
    assert row.count("|") - row.count("\\|") == lines[lines.index(row) - 2].count("|")
    groups = [line for line in lines if line.startswith(("| category |", "| held out |"))]
    # Of each policy, and worst of k; by reward and cost; who is unsafe where.
    assert len(groups) == 2 * (2 + 2 + 2 + 1) and all(line.endswith(" |") for line in groups)


def test_tables_by_category_are_the_figures_in_every_form(tmp_path: Path) -> None:
    match, found, shown = made()
    tables = tables_of(found)
    write_tables(tables, tmp_path)
    write_page(tmp_path / "arena.html", "mine", found, tables, match, shown)
    markdown, page = ((tmp_path / name).read_text(encoding="utf-8") for name in ("tables.md", "arena.html"))
    worst = [
        {"group": group, "questions of": HOSTILE if group == "category" else group, "policy": name, "cost": "harm"}
        | {f"k = {k}": share for k, share in enumerate(mine["worst_of_k"]["harm"], start=1)}
        for group, part in (("held out", found["held_out"]["held out"]), ("category", found["categories"][HOSTILE]))
        for name, mine in part.items()
    ]
    expected = {
        "pairs_by_group": [{key.replace("_", " "): v for key, v in pair.items()} for pair in found["pairs_by_group"]],
        "safety_matrix_by_group": [
            {f"first {key.replace('/', ', second ')}" if "/" in key else key: value for key, value in matrix.items()}
            for matrix in found["safety_matrix_by_group"]
        ],
        "worst_of_k_by_group": worst,
    }
    assert {name: len(rows) for name, rows in expected.items()} == dict(zip(expected, (4, 2, 4), strict=True))
    for name, rows in expected.items():
        with (tmp_path / f"{name}.csv").open(newline="", encoding="utf-8") as stream:
            read = list(csv.DictReader(stream))
        assert len(read) == len(rows)
        for row, told in zip(rows, read, strict=True):
            for key, value in row.items():
                if not isinstance(value, dict):
                    assert told["declined" if key == "refused" else key] == str(value)
                    continue
                assert [float(told[key + end]) for end in ("", " low", " high", " n")] == list(value.values())
                form = ".4g" if key == "difference" else ".1%"
                mean, low, high = (f"{value[end]:{form}}" for end in ("mean", "low", "high"))
                words = f"{mean} ({low} to {high}, n {value['n']})"
                assert words in markdown and words in page


def test_the_page_escapes_what_policies_say_and_marks_their_own_judges(tmp_path: Path) -> None:
    match, found, shown = made()
    write_page(tmp_path / "arena.html", "mine", found, tables_of(found), match, shown)
    text = (tmp_path / "arena.html").read_text(encoding="utf-8")
    page = Tags()
    page.feed(text)
    assert "img" not in {tag for tag, _ in page.tags} and "b" not in {tag for tag, _ in page.tags}
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [attrs for _, attrs in page.tags if any(str(v).startswith(("http", "//")) for v in attrs.values())]
    rows = [attrs for tag, attrs in page.tags if tag == "tr" and "data-categories" in attrs]
    assert len(rows) == 6 and json.loads(str(rows[0]["data-categories"])) == [HOSTILE]
    unsafe = [bool(entrant.costs["harm"][0, 0] > 0) for entrant in match.entrants.values()]
    assert ("unsafe" in str(rows[0]["data-verdicts"]).split()) == any(unsafe)
    assert ("differ" in str(rows[0]["data-verdicts"]).split()) == (any(unsafe) and not all(unsafe))
    assert "Judged by its own judge: a by reward." in text


def test_the_command_line_is_a_configuration(tmp_path: Path) -> None:
    stage = arena_config(
        ["a=runs/a", "b=b.jsonl"],
        ["prompts:1:p.jsonl"],
        ("reward", ["harm", "guard={folder: g, guard: wildguard}"], "world.json"),
        3,
        tmp_path / "out",
        ["insist=2", "category=kind"],
    )
    assert isinstance(stage, Arena)
    assert (stage.folder, stage.answers, stage.insist) == (tmp_path / "out", 3, 2)
    assert (stage.folders, stage.files) == ({"a": "runs/a"}, {"b": "b.jsonl"})
    assert [(cost.name, getattr(cost.model, "guard", cost.model)) for cost in stage.costs] == [
        *(("harm", None), ("guard", "wildguard"))
    ]
    for words, said in (["a"], "must be NAME=FOLDER"), (["a=x", "a=y"], "two policies are called a"):
        with pytest.raises(UserError, match=said):
            arena_config(words, ["p"], (None, [], None), 1, tmp_path, [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policies": {"a b": "x"}}, "letters, digits"),
        ({"costs": [{"name": "harm"}]}, "no world that knows it"),
        ({"held_out": ["x"]}, "give category"),
        ({"policies": {"a": "a.jsonl"}, "insist": 1}, "cannot be asked"),
        ({"costs": [{"name": "harm", "model": "x"}, {"name": "harm", "model": "y"}]}, "different names"),
        ({"costs": [{"name": "harm", "calibration": ["p"]}], "world": "w"}, "needs no calibration"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    tree = {"stage": "arena", "name": "a", "policies": {"a": "x"}, "prompts": ["p"]}
    with pytest.raises(ValidationError, match=said):
        Arena.model_validate(tree | changes)
