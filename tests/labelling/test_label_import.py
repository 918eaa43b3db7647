"""Labels of people back: every form, what is refused, and what the votes come to, by hand."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings

from actors.driver.train import train
from actors.stages.label import Label
from beaver_ray.data.pairs import pair_id
from beaver_ray.data.sources import read_source
from beaver_ray.errors import UserError
from beaver_ray.json_files import read_rows, write_rows
from beaver_ray.labelling.export import QUESTIONS, Export, export_pairs
from beaver_ray.labelling.importing import Agreement, import_labels, read_votes
from launch.__main__ import main
from tests.fuzzing import accepted, mutated
from tests.labelling.support import GOOD, OTHER, Row, fill, label_studio, page_file, pair, write_table


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


class Voted(NamedTuple):
    """Files of labels, all pairs that are not gold, and of them one of three votes and one that is undecided."""

    files: list[Path]
    normal: list[str]
    first: str
    second: str


@pytest.fixture
def voted(exported: Callable[..., Export], tmp_path: Path) -> Voted:
    """Anna and the page's Bert are right on gold; the guesser is wrong and left out; Cora disagrees on one question."""
    export = exported()
    normal = [item["id"] for item in export.items if item["id"] not in export.gold]
    first, second = normal[:2]
    anna = fill(tmp_path, "anna", lambda row: GOOD if row["id"] != second else {})
    bert = page_file(tmp_path, export, "bert", GOOD)
    bert.write_text(bert.read_text(), encoding="utf-8-sig")  # as some editors save it
    guesser = label_studio(tmp_path, {"id": 7, "email": "g@example.org"}, OTHER)

    def doubting(row: Row) -> Row:
        return GOOD | {"better_response_id": 0} if row["id"] in (first, second) else GOOD

    cora = fill(tmp_path, "cora", doubting)
    return Voted([anna, bert, guesser, cora], normal, first, second)


def test_votes_and_gold(voted: Voted, tmp_path: Path) -> None:
    to, (files, normal, first, second) = tmp_path / "labels.jsonl", voted
    found = import_labels(files, tmp_path / "out", to, 0.8)
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


def decision(voted: Voted, tmp_path: Path) -> Row:
    """Dora's, on the one pair that the votes leave undecided."""
    import_labels(voted.files, tmp_path / "out", tmp_path / "labels.jsonl", 0.8)
    (doubt,) = read_rows(tmp_path / "labels.adjudication.jsonl")
    assert doubt["id"] == voted.second and doubt["votes"]["better_response_id"] == [1, 1]
    return doubt | {"annotator": "dora", "better_response_id": 0}


def test_adjudication(voted: Voted, tmp_path: Path) -> None:
    to, dora = tmp_path / "labels.jsonl", decision(voted, tmp_path)
    write_rows(tmp_path / "decided.jsonl", [dora])
    found = import_labels(voted.files, tmp_path / "out", to, 0.8, tmp_path / "decided.jsonl")
    assert (found.labelled, found.undecided, found.adjudicated) == (6, 0, 1)
    decided = next(row for row in read_rows(to) if row["id"] == voted.second)
    assert decided["better_response_id"] == 0 and decided["safer_response_id"] == 0
    assert decided["labelled_by"] == "adjudication"
    # Filled in where it lies, it is neither overwritten nor forgotten.
    filled = tmp_path / "labels.adjudication.jsonl"
    write_rows(filled, [dora])
    with pytest.raises(UserError, match=r"labels.adjudication.jsonl holds labels, which would be lost; give it with"):
        import_labels(voted.files, tmp_path / "out", to, 0.8)
    for _ in range(2):
        assert import_labels(voted.files, tmp_path / "out", to, 0.8, filled) == found
        assert read_rows(filled) == [dora]


def test_stage_label_takes_them(voted: Voted, tmp_path: Path) -> None:
    """And our readers take what it leaves."""
    to = tmp_path / "labels.jsonl"
    write_rows(tmp_path / "decided.jsonl", [decision(voted, tmp_path)])
    import_labels(voted.files, tmp_path / "out", to, 0.8, tmp_path / "decided.jsonl")
    decided = next(row for row in read_rows(to) if row["id"] == voted.second)
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
    write_table(tmp_path / "tasks.csv", rows)
    found = import_labels([tmp_path / "tasks.csv"], tmp_path / "out", tmp_path / "l.jsonl", 0.8)
    assert (found.labelled, found.unlabelled) == (1, 1)
    (row,) = read_rows(tmp_path / "l.jsonl")
    assert {name: int(row[name]) for name in GOOD} == GOOD


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
        write_table(file, rows)
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
    rows = [{name: text.replace("\n", "\r\n") for name, text in row.items()} for row in rows]
    write_table(tmp_path / "t.csv", rows, encoding="utf-8-sig")
    found = import_labels([tmp_path / "t.csv"], tmp_path / "out", tmp_path / "l.jsonl", 1.0)
    assert found.labelled == 6 and found.annotators["anna"].gold_right == 1
    other = (tmp_path / "t.csv").read_text(encoding="utf-8-sig").replace(",", ";")
    (tmp_path / "t.csv").write_text(other, encoding="utf-8-sig")
    with pytest.raises(UserError, match=r"t\.csv has no column export and id; save it with commas"):
        import_labels([tmp_path / "t.csv"], tmp_path / "out", tmp_path / "other.jsonl", 1.0)
    write_table(tmp_path / "t.csv", [row | {"annotator": "Žofie"} for row in rows], encoding="cp1252")
    with pytest.raises(UserError, match=r"t\.csv is no file of labels .*; save it as UTF-8"):
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
