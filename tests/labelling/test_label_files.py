"""Pairs to people and back: every form, what is refused, and what the votes come to, by hand."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from actors.driver.train import train
from actors.stages.label import Label
from beaver_ray.data.pairs import pair_id
from beaver_ray.data.sources import read_source
from beaver_ray.errors import UserError
from beaver_ray.json_files import read_rows, write_rows
from beaver_ray.labelling.export import QUESTIONS, Export, digest, export_pairs
from beaver_ray.labelling.importing import Agreement, import_labels, read_votes
from launch.__main__ import main
from tests.fuzzing import accepted, mutated

Row = dict[str, Any]
GOOD: Row = {
    "better_response_id": 1,
    "is_response_0_safe": 1,
    "is_response_1_safe": 0,
    "safer_response_id": 0,
}
OTHER: Row = {name: 1 - bit for name, bit in GOOD.items()}


def pair(number: int, **more: Any) -> Row:
    texts = {"prompt": f"question {number}", "response_0": f"answer {number}, mild", "response_1": f"{number}: harsh"}
    return {"id": pair_id(texts), **texts, "model_0": "m", **more}


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Export]:
    """Exports six pairs and two gold questions to ``tmp_path/out``."""
    pairs = [pair(number) for number in range(6)]
    pairs[0] |= {"prompt": ["a <b>\n</script>", "no", 'why, "x"?']}
    pairs[0]["id"] = pair_id(pairs[0])
    write_rows(tmp_path / "pairs.jsonl", pairs)
    safe = {name: bool(bit) if name.startswith("is") else bit for name, bit in GOOD.items()}
    write_rows(tmp_path / "gold.jsonl", [pair(number, **safe) for number in (100, 101)])

    def export(**more: Any) -> Export:
        given: dict[str, Any] = {"gold": tmp_path / "gold.jsonl", "count": None, "seed": 3} | more
        return export_pairs(tmp_path / "pairs.jsonl", tmp_path / "out", **given)

    return export


def fill(tmp_path: Path, annotator: str, labels: Callable[[Row], Row], name: str | None = None) -> Path:
    """A filled-in copy of tasks.jsonl; ``labels`` says which of a row."""
    rows = [row | {"annotator": annotator} | labels(row) for row in read_rows(tmp_path / "out" / "tasks.jsonl")]
    write_rows(tmp_path / (name or f"{annotator}.jsonl"), rows)
    return tmp_path / (name or f"{annotator}.jsonl")


def page_file(tmp_path: Path, export: Export, annotator: str, labels: Row) -> Path:
    """What the page saves where all pairs get these labels."""
    rows = [{"id": item["id"], **labels} for item in export.items]
    lines = [[row["id"], *(row[name] for name in QUESTIONS)] for row in rows]
    content = {"export": export.hash, "annotator": annotator, "labels": rows}
    path = tmp_path / f"{annotator}.json"
    path.write_text(json.dumps(content | {"digest": digest(export.hash, annotator, lines)}))
    return path


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
def test_the_page_saves_what_import_reads(exported: Callable[..., Export], tmp_path: Path) -> None:
    export = exported()
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", (tmp_path / "out" / "page.html").read_text(), re.DOTALL)
    texts = ["", "abc", "ä€😀" * 50, "x" * 55, "x" * 56, "x" * 64]
    ask = f"""
    const data = {scripts[0]};
    const chosen = Object.fromEntries(data.items.map(item => [item.id, {json.dumps(GOOD)}]));
    chosen[data.items[0].id] = {{}};
    const unfit = {{...{json.dumps(GOOD)}, safer_response_id: 1}};
    const problems = [{{}}, {{better_response_id: 1}}, unfit].map(given => problem(given, data.questions));
    console.log(JSON.stringify([{json.dumps(texts)}.map(sha256), labelsFile(data, "Ä B", chosen), problems]));
    """
    done = subprocess.run(["node", "-e", scripts[1] + ask], capture_output=True, text=True, check=True)
    hashes, saved, (nothing, missing, unfit) = json.loads(done.stdout)
    assert hashes == [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    assert nothing == "" and missing.startswith("Still to be answered") and unfit.startswith("The answer that you call")
    (tmp_path / "saved.json").write_text(json.dumps(saved))
    found = import_labels([tmp_path / "saved.json"], tmp_path / "out", tmp_path / "l.jsonl", 0.8)
    assert found.annotators["Ä B"].answered == 7 and found.labelled + found.unlabelled == 6
    assert export.hash == saved["export"]


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


def label_studio(tmp_path: Path, by: Any, labels: Row) -> Path:
    """Label Studio's export of one annotator, as its documentation shows it."""
    tasks = json.loads((tmp_path / "out" / "label_studio.json").read_text())
    result = [
        {"from_name": name, "to_name": "response_0", "type": "choices", "value": {"choices": [str(bit)]}}
        for name, bit in labels.items()
    ]
    for number, task in enumerate(tasks):
        cancelled = {"id": 2, "completed_by": by, "was_cancelled": True, "result": result[:1]}
        own = {"id": 1, "completed_by": by, "was_cancelled": False, "result": result}
        task |= {"id": number, "annotations": [own, cancelled], "predictions": []}
    path = tmp_path / "label_studio_export.json"
    path.write_text(json.dumps(tasks))
    return path


def test_votes_gold_and_adjudication(exported: Callable[..., Export], tmp_path: Path) -> None:
    """Anna and the page's Bert are right on gold; the guesser is wrong and left out; Cora disagrees on one question."""
    export, to = exported(), tmp_path / "labels.jsonl"
    normal = [item["id"] for item in export.items if item["id"] not in export.gold]
    first, second = normal[:2]
    anna = fill(tmp_path, "anna", lambda row: GOOD if row["id"] != second else {})
    bert = page_file(tmp_path, export, "bert", GOOD)
    bert.write_text(bert.read_text(), encoding="utf-8-sig")  # as some editors save it
    guesser = label_studio(tmp_path, {"id": 7, "email": "g@example.org"}, OTHER)

    def doubting(row: Row) -> Row:
        return GOOD | {"better_response_id": 0} if row["id"] in (first, second) else GOOD

    cora = fill(tmp_path, "cora", doubting)
    found = import_labels([anna, bert, guesser, cora], tmp_path / "out", to, 0.8)
    assert {name: one.accepted for name, one in found.annotators.items()} == {
        "anna": True,
        "bert": True,
        "g@example.org": False,
        "cora": True,
    }
    assert found.annotators["g@example.org"].gold_right == 0 and found.annotators["anna"].gold_right == 1
    # On the second pair Bert and Cora are one against one; on the first two say 1 and one says 0.
    assert (found.labelled, found.undecided, found.unlabelled, found.adjudicated) == (5, 1, 0, 0)
    rows = {row["id"]: row for row in read_rows(to)}
    assert set(rows) == {*normal} - {second} and rows[first]["better_response_id"] == 1
    assert rows[first]["is_response_0_safe"] is True and rows[first]["annotators"] == 3
    # Better: items of (1, 1, 0), (1, 0), and six of (1, 1, 1). P = (1/3 + 0 + 6) / 8; p(1) = 21/23.
    agreed, chance = (1 / 3 + 6) / 8, (21 / 23) ** 2 + (2 / 23) ** 2
    assert found.kappa["better_response_id"] == pytest.approx((agreed - chance) / (1 - chance))
    assert found.kappa["is_response_0_safe"] is None, "all say the same"
    # Cora against Anna and Bert: 0 on two of eight where these say 1 on all: no better than chance.
    assert found.annotators["cora"].kappa_others["better_response_id"] == pytest.approx(0)
    # Bert on six pairs with the others and on (1 against 1 and 0), which is no majority, and on (1 against 0).
    assert found.annotators["bert"].kappa_others["better_response_id"] == pytest.approx(0)
    assert any("LEFT OUT, 80% are asked for" in line for line in found.lines())
    assert Agreement.model_validate_json((tmp_path / "labels.agreement.json").read_bytes()) == found

    (doubt,) = read_rows(tmp_path / "labels.adjudication.jsonl")
    assert doubt["id"] == second and doubt["votes"]["better_response_id"] == [1, 1]
    decision = doubt | {"annotator": "dora", "better_response_id": 0}
    write_rows(tmp_path / "decided.jsonl", [decision])
    found = import_labels([anna, bert, guesser, cora], tmp_path / "out", to, 0.8, tmp_path / "decided.jsonl")
    assert (found.labelled, found.undecided, found.adjudicated) == (6, 0, 1)
    decided = next(row for row in read_rows(to) if row["id"] == second)
    assert decided["better_response_id"] == 0 and decided["safer_response_id"] == 0
    assert decided["labelled_by"] == "adjudication"
    # Filled in where it lies, it is neither overwritten nor forgotten.
    filled = tmp_path / "labels.adjudication.jsonl"
    write_rows(filled, [decision])
    with pytest.raises(UserError, match=r"labels.adjudication.jsonl holds labels, which would be lost; give it with"):
        import_labels([anna, bert, guesser, cora], tmp_path / "out", to, 0.8)
    for _ in range(2):
        assert import_labels([anna, bert, guesser, cora], tmp_path / "out", to, 0.8, filled) == found
        assert read_rows(filled) == [decision]

    # Stage label takes them, and our readers what it leaves.
    label = Label.model_validate(
        {"stage": "label", "workspace": str(tmp_path), "name": "label", "pairs": str(tmp_path / "pairs.jsonl")}
        | {"people": str(to), "eval_fraction": 0.5, "debug": True}
    )
    final = train(label) / "final"
    samples = [s for n in ("train", "test") for s in read_source("PKU-SafeRLHF", str(final / f"{n}.jsonl"))[0]]
    assert len(samples) == 6 and all(s.is_safe and not s.is_other_safe and s.safer for s in samples)
    assert sorted(s.better is True for s in samples) == [False] * 5 + [True]
    manifest = json.loads((final / "manifest.json").read_text())
    assert manifest["parents"][str(to)] == hashlib.sha256(to.read_bytes()).hexdigest()
    write_rows(to, [decided | {"better_response_id": 7}])
    with pytest.raises(UserError, match=r"labels.jsonl: pair \w+: better_response_id is 7; it must be 0 or 1"):
        train(label.model_copy(update={"name": "again"}))
    write_rows(to, [decided | {"response_1": "nicer"}])
    with pytest.raises(
        UserError, match=r"labels.jsonl: pair 1 has id '\w+', but its texts have \w+: they were changed"
    ):
        train(label.model_copy(update={"name": "again"}))
    write_rows(to, [pair(50, **GOOD)])
    with pytest.raises(UserError, match="has labels of 1 pairs that are not in"):
        train(label.model_copy(update={"name": "again"}))
    to.unlink()
    with pytest.raises(UserError, match=r"no labels of people in .* yet: beaver-ray label export"):
        train(label.model_copy(update={"name": "again"}))


def test_a_table_with_long_texts_and_whole_numbers_as_fractions(tmp_path: Path) -> None:
    """As pandas writes a column of whole numbers that has blanks, with a text longer than csv takes unasked."""
    csv.field_size_limit(131_072)
    long = pair(0) | {"response_0": "word " * 30_000}
    long["id"] = pair_id(long)
    write_rows(tmp_path / "pairs.jsonl", [long, pair(1)])
    export_pairs(tmp_path / "pairs.jsonl", tmp_path / "out", None, None, 0)
    rows = [row | {"annotator": "anna"} for row in read_rows(tmp_path / "out" / "tasks.jsonl")]
    rows = [row | ({name: f"{bit}.0" for name, bit in GOOD.items()} if row["id"] == long["id"] else {}) for row in rows]
    with (tmp_path / "tasks.csv").open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    found = import_labels([tmp_path / "tasks.csv"], tmp_path / "out", tmp_path / "l.jsonl", 0.8)
    assert (found.labelled, found.unlabelled) == (1, 1)
    (row,) = read_rows(tmp_path / "l.jsonl")
    assert {name: int(row[name]) for name in GOOD} == GOOD


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


def changed(row: int, **more: Any) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [r | more if number == row else r for number, r in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            changed(2, response_1="nicer"),
            r"anna.jsonl row 3: response_1 is not what was exported; the file was changed",
        ),
        (changed(1, id="0123"), r"row 2: no pair of the export has id '0123'"),
        (changed(0, export="f" * 64), r"row 1 is of export ffffffffffff\.\.\., not of"),
        (changed(0, export=None), r"row 1 is of export none, not of"),
        (changed(4, annotator=" "), r"row 5 has labels and names no annotator"),
        (changed(4, safer_response_id=2), r"row 5: safer_response_id is 2; write first or second, or 0 or 1"),
        (changed(4, safer_response_id="second"), r"row 5: the answer that is called safer is unsafe and the other one"),
        (
            lambda rows: [*rows, rows[3] | {"better_response_id": 0}],
            r"row 9: anna has labelled pair \w+ twice, and diff",
        ),
        (lambda rows: [row | dict.fromkeys(QUESTIONS) for row in rows], r"anna.jsonl has no labels; fill them in"),
        (lambda rows: [row | OTHER for row in rows], r"no annotator has 80% of the gold labels right \(anna 0%\)"),
    ],
)
def test_a_file_that_is_refused(
    exported: Callable[..., Export], tmp_path: Path, change: Callable[[list[Row]], list[Row]], message: str
) -> None:
    exported()
    file = fill(tmp_path, "anna", lambda row: GOOD)
    write_rows(file, change(read_rows(file)))
    with pytest.raises(UserError, match=message) as caught:
        import_labels([file], tmp_path / "out", tmp_path / "l.jsonl", 0.8)
    assert "\n" not in str(caught.value) and not (tmp_path / "l.jsonl").exists()


@pytest.mark.parametrize("form", ["tasks.jsonl", "tasks.csv", "export of Label Studio.json"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response_1": "nicer"}, "response_1 is not what was exported; the file was changed"),
        ({"prompt": ""}, "prompt is not what was exported; the file was changed"),
        ({"id": "0123"}, "no pair of the export has id '0123'"),
        ({"export": "f" * 64}, r"is of export ffffffffffff\.\.\., not of"),
        ({"is_response_0_safe": "perhaps"}, "is_response_0_safe is 'perhaps'; write unsafe or safe, or 0 or 1"),
        ({"safer_response_id": 1}, "the answer that is called safer is unsafe and the other one safe"),
    ],
)
def test_tampered_in_every_form(
    exported: Callable[..., Export], tmp_path: Path, form: str, change: Row, message: str
) -> None:
    exported()
    rows = [row | GOOD | {"annotator": "anna"} for row in read_rows(tmp_path / "out" / "tasks.jsonl")]
    rows[2] |= change
    file = tmp_path / form
    if form.endswith(".jsonl"):
        write_rows(file, rows)
    elif form.endswith(".csv"):
        with file.open("w", encoding="utf-8", newline="") as stream:
            table = csv.DictWriter(stream, fieldnames=list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        tasks = json.loads(label_studio(tmp_path, "anna", GOOD).read_text())
        tasks[2]["data"] |= {name: value for name, value in change.items() if name in tasks[2]["data"]}
        for part in tasks[2]["annotations"][0]["result"]:
            part["value"] = {"choices": [rows[2][part["from_name"]]]}
        file.write_text(json.dumps(tasks))
    with pytest.raises(UserError, match=rf"(row|task) 3:? ?.*{message}") as caught:
        import_labels([file], tmp_path / "out", tmp_path / "l.jsonl", 0.8)
    assert "\n" not in str(caught.value) and not (tmp_path / "l.jsonl").exists()


def test_whatever_is_changed_in_label_studios_file(exported: Callable[..., Export], tmp_path: Path) -> None:
    export = exported()
    file = label_studio(tmp_path, {"id": 7, "email": "g@example.org"}, GOOD)
    tasks = json.loads(file.read_text())[:2]

    @settings(max_examples=200)
    @given(mutated(tasks))
    def read(tree: Any) -> None:
        file.write_text(json.dumps(tree))
        accepted(lambda: read_votes([file], export))

    read()
    tasks[1]["annotations"][0]["result"][0]["value"]["choices"] = ["0", "1"]
    file.write_text(json.dumps(tasks))
    with pytest.raises(UserError, match=r"task 2: better_response_id is \['0', '1'\], which is no single choice"):
        read_votes([file], export)


def test_other_tampering(exported: Callable[..., Export], tmp_path: Path) -> None:
    export, to = exported(), tmp_path / "l.jsonl"
    saved = page_file(tmp_path, export, "bert", GOOD)
    content = json.loads(saved.read_text())
    content["labels"][1]["better_response_id"] = 0
    saved.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"bert.json was changed after it was saved \(its digest is another\)"):
        import_labels([saved], tmp_path / "out", to, 0.8)
    for content in ('{"export": 3}', "[3]", "{", "[{}]"):
        saved.write_text(content)
        with pytest.raises(UserError, match=r"bert.json is no file of labels"):
            import_labels([saved], tmp_path / "out", to, 0.8)
    kept = tmp_path / "out" / "export.json"
    tree = json.loads(kept.read_text())
    tree["gold"][next(iter(tree["gold"]))]["better_response_id"] = 0
    kept.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"export.json: its pairs or gold answers were changed since"):
        import_labels([saved], tmp_path / "out", to, 0.8)


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


def test_no_file_that_is_read_is_overwritten(exported: Callable[..., Export], tmp_path: Path) -> None:
    exported()
    anna, tasks = fill(tmp_path, "anna", lambda row: GOOD), tmp_path / "out" / "tasks.jsonl"
    (tmp_path / "link.jsonl").symlink_to(anna)
    for to, decided in ((anna, None), (tmp_path / "link.jsonl", None), (tasks, None), (tmp_path / "d.jsonl", True)):
        before = {file: file.read_bytes() for file in (anna, tasks)}
        with pytest.raises(UserError, match=rf"--to .*{to.name} has labels or pairs of its own.* give another file"):
            import_labels([anna], tmp_path / "out", to, 0.8, tmp_path / "d.jsonl" if decided else None)
        assert before == {file: file.read_bytes() for file in (anna, tasks)}
    assert import_labels([anna], tmp_path / "out", tmp_path / "out" / "l.jsonl", 0.8).labelled == 6


def test_what_label_studio_says_besides(exported: Callable[..., Export], tmp_path: Path) -> None:
    """Who labelled, perhaps nobody; remarks, several choices of another question, a relation, which has no name."""
    export = exported()
    for by, name in (({"id": 0}, "0"), ({"id": 7, "email": "g@h.org"}, "g@h.org"), (3, "3")):
        assert list(read_votes([label_studio(tmp_path, by, GOOD)], export)) == [name]
    with pytest.raises(UserError, match="task 1 has labels and names no annotator"):
        read_votes([label_studio(tmp_path, None, GOOD)], export)
    file = label_studio(tmp_path, "anna", GOOD)
    votes, tasks = read_votes([file], export), json.loads(file.read_text())
    for task in tasks:
        task["annotations"][0]["result"] += [
            {"from_name": "remark", "type": "textarea", "value": {"text": ["hm"]}},
            {"from_name": "topics", "type": "choices", "value": {"choices": ["a", "b"]}},
            {"type": "relation", "from_id": "x", "to_id": "y"},
        ]
    file.write_text(json.dumps(tasks))
    assert read_votes([file], export) == votes and len(votes["anna"]) == 8


def test_a_table_that_was_filled_in_elsewhere(exported: Callable[..., Export], tmp_path: Path) -> None:
    """A table program writes other line ends, and words for the labels."""
    exported()
    words = {"better_response_id": "second", "is_response_0_safe": "Safe", "is_response_1_safe": "FALSE"}
    with (tmp_path / "out" / "tasks.csv").open(encoding="utf-8", newline="") as file:
        rows = [row | words | {"safer_response_id": "0", "annotator": "anna"} for row in csv.DictReader(file)]
    with (tmp_path / "t.csv").open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows({name: text.replace("\n", "\r\n") for name, text in row.items()} for row in rows)
    found = import_labels([tmp_path / "t.csv"], tmp_path / "out", tmp_path / "l.jsonl", 1.0)
    assert found.labelled == 6 and found.annotators["anna"].gold_right == 1
    other = (tmp_path / "t.csv").read_text(encoding="utf-8-sig").replace(",", ";")
    (tmp_path / "t.csv").write_text(other, encoding="utf-8-sig")
    with pytest.raises(UserError, match=r"t\.csv has no column export and id; save it with commas"):
        import_labels([tmp_path / "t.csv"], tmp_path / "out", tmp_path / "other.jsonl", 1.0)


def test_the_commands(exported: Callable[..., Export], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["label", *map(str, arguments)])
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    exported()
    shutil.rmtree(out)
    assert run("export", pairs, "--to", out, "--gold", tmp_path / "gold.jsonl")[0] == 0
    file = fill(tmp_path, "anna", lambda row: GOOD)
    code, text, _ = run("import", file, "--export", out, "--to", tmp_path / "l.jsonl")
    assert code == 0 and "6 pairs labelled (0 by adjudication), 0 to be adjudicated, 0 without labels" in text
    code, _, err = run("import", file, "--export", tmp_path, "--to", tmp_path / "l.jsonl")
    assert code == 2 and err.startswith("error: no export in ") and err.count("\n") == 1
    code, _, err = run("import", file, "--export", out, "--to", tmp_path / "l.csv")
    assert code == 2 and "must end in .jsonl" in err
