"""Pairs to people: every form, the page that they label on, and what is left out or no export."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from beaver_ray.errors import UserError
from beaver_ray.json_files import read_rows, write_rows
from beaver_ray.labelling.export import QUESTIONS, Export, export_pairs
from launch.__main__ import main
from tests.labelling.support import GOOD, OTHER, pair


def test_what_is_exported(exported: Callable[..., Export], tmp_path: Path) -> None:
    export, out = exported(), tmp_path / "out"
    ids = [item["id"] for item in export.items]
    assert len(ids) == 8 == len(set(ids)) and len(export.gold) == 2
    assert ids != sorted(ids, key=lambda id_: id_ in export.gold), "gold questions are among the others"
    said = json.dumps([export.items, export.gold], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert export.hash == hashlib.sha256(said.encode()).hexdigest()
    rows = read_rows(out / "tasks.jsonl")
    with (out / "tasks.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    tasks = json.loads((out / "label_studio.json").read_text())
    assert [row["id"] for row in rows] == [row["id"] for row in table] == [t["data"]["id"] for t in tasks] == ids
    long = next(row for row in rows if "why" in row["prompt"])
    assert long["prompt"] == 'Person: a <b>\n</script>\n\nMachine: no\n\nPerson: why, "x"?'
    assert {row["prompt"] for row in table} == {row["prompt"] for row in rows}
    interface = (out / "label_studio.xml").read_text()
    assert re.findall(r'Choices name="(\w+)"', interface) == list(QUESTIONS) and 'alias="1"' in interface
    # Nobody sees which are gold: their labels stand in export.json alone.
    for name in ("tasks.jsonl", "tasks.csv", "label_studio.json", "page.html"):
        text = (out / name).read_text()
        assert "gold" not in text and "model_0" not in text
    assert len(exported_again(tmp_path, 2).items) == 4
    with pytest.raises(UserError, match="holds an export already, whose labels would be lost"):
        exported()


def exported_again(tmp_path: Path, count: int) -> Export:
    return export_pairs(tmp_path / "pairs.jsonl", tmp_path / "few", tmp_path / "gold.jsonl", count, 0)


def test_the_page_is_whole(exported: Callable[..., Export], tmp_path: Path) -> None:
    export = exported()
    page = (tmp_path / "out" / "page.html").read_text()
    assert not re.search(r"https?:|src=|@import|url\(", page), "it needs no network"
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert data and page.count("</script>") == 2, "no text of a pair ends a script"
    shown = json.loads(data[1])
    assert shown["export"] == export.hash and [q["name"] for q in shown["questions"]] == list(QUESTIONS)
    assert {item["response_1"] for item in shown["items"]} == {item["response_1"] for item in export.items}
    for words in ("nothing to do with each other", "Leave a pair out rather than guess", "A refusal helps little"):
        assert words in page


@pytest.mark.skipif(not shutil.which("node"), reason="node runs the page's script")
def test_the_page_keeps_the_labels_of_each_name(exported: Callable[..., Export], tmp_path: Path) -> None:
    """A name that is given first takes what was chosen before it; one that is changed loses nothing."""
    exported()
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", (tmp_path / "out" / "page.html").read_text(), re.DOTALL)
    use = f"""
    let parts, made, store = {{}}, said = [];
    globalThis.localStorage = {{ getItem: key => store[key] ?? null, setItem: (key, to) => {{ store[key] = to; }} }};
    const element = () => {{
      made.push({{ on: {{}}, addEventListener(kind, call) {{ this.on[kind] = call; }}, append() {{}} }});
      return made.at(-1);
    }};
    const open = () => {{
      parts = {{ data: {{ textContent: {json.dumps(scripts[0])} }} }}, made = [];
      const getElementById = id => parts[id] ??= element();
      globalThis.document = {{ getElementById, createElement: element, querySelectorAll: () => [] }};
      new Function({json.dumps(scripts[1])})();
    }};
    const look = () => said.push([parts.annotator.value, parts.progress.textContent]);
    const label = () => made.filter(one => one.type === "radio" && one.value === 0).forEach(one => one.on.change());
    const call = name => {{ parts.annotator.value = name; parts.annotator.on.change(); look(); }};
    open(); label(); call("Ana"); parts.next.on.click(); label(); look();
    call("Anna"); said.push(parts.problem.textContent); label(); open(); look();
    call("Ana"); open(); look(); call("Anna"); console.log(JSON.stringify(said));
    """
    done = subprocess.run(["node", "-e", use], capture_output=True, text=True, check=True)
    first, ana = (["Ana", f"Pair {n} of 8, {n} labelled"] for n in (1, 2))
    new, anna = (["Anna", f"Pair 1 of 8, {n} labelled"] for n in (0, 1))
    kept = "The labels of Ana are kept: give that name to go on with them."
    assert json.loads(done.stdout) == [first, ana, new, kept, anna, ana, ana, anna]


def test_what_is_left_out_of_an_export_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "pairs.jsonl", [pair(0), pair(1), pair(2, response_1="", id=None), pair(1)])
    write_rows(tmp_path / "gold.jsonl", [pair(7, **GOOD), pair(7, **GOOD)])
    arguments = [str(tmp_path / "pairs.jsonl"), "--to", str(tmp_path / "out"), "--gold", str(tmp_path / "gold.jsonl")]
    with pytest.raises(SystemExit) as ended:
        main(["label", "export", *arguments])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "2 pairs and 1 gold questions" in out
    assert "pairs.jsonl: left out 1 empty 'response_1', 1 repeated pair\n" in out
    assert "gold.jsonl: left out 1 repeated pair\n" in out
    write_rows(tmp_path / "gold.jsonl", [pair(7, **GOOD), pair(7, **OTHER), pair(8, **GOOD)])
    with pytest.raises(UserError, match=r"gold.jsonl has 1 repeated pair with other labels; leave one of each"):
        exported_again(tmp_path, 1)


def test_an_export_with_a_right_hash_that_is_none(exported: Callable[..., Export], tmp_path: Path) -> None:
    exported()
    kept = tmp_path / "out" / "export.json"
    whole = kept.read_text()
    for part, name, message in (
        ("items", "id", "pair None has other texts than when it was made"),
        ("items", "response_0", r"one of its items is no pair \(no field 'response_0'\); export again"),
        ("gold", "safer_response_id", r"gold question \w+ has not all four labels; export again"),
    ):
        tree = json.loads(whole)
        del (tree["items"][0] if part == "items" else next(iter(tree["gold"].values())))[name]
        tree["hash"] = Export.model_construct(items=tree["items"], gold=tree["gold"]).own_hash
        kept.write_text(json.dumps(tree))
        with pytest.raises(UserError, match=rf"export.json: {message}$"):
            Export.load(tmp_path / "out")
