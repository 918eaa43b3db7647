from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beaver_ray.data.mixing import load_mix
from beaver_ray.data.sources import SOURCES, BadRow, DropReport, RawSample, read_source, reader
from beaver_ray.errors import UserError

PKU = {
    "prompt": "p",
    "response_0": "a",
    "response_1": "b",
    "better_response_id": 1,
    "safer_response_id": 0,
    "is_response_0_safe": True,
    "is_response_1_safe": False,
}
ALPACA = [
    {"instruction": "say", "input": "hi", "output": "hi"},
    {"instruction": "x", "input": "", "output": "y"},
]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_pku_saferlhf(tmp_path: Path) -> None:
    samples, report = read_source("PKU-SafeRLHF", write(tmp_path / "a.jsonl", [PKU]))
    assert samples == [RawSample("p", "a", "b", better=False, safer=True, is_safe=True, is_other_safe=False)]
    assert report.line() == "kept 1 of 1"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": None}, "no field 'prompt'"),
        ({"prompt": "  "}, "empty 'prompt'"),
        ({"prompt": 3}, "'prompt' is not a string"),
        ({"response_0": ["a"]}, "'response_0' is not a string"),
        ({"response_1": "a"}, "identical responses"),
        ({"better_response_id": 2}, "'better_response_id' is neither true / false nor 1 / 0"),
        ({"is_response_0_safe": "maybe"}, "'is_response_0_safe' is neither true / false nor 1 / 0"),
        ({"safer_response_id": 1}, "safer answer is not safer"),
    ],
)
def test_pku_bad_rows_are_counted(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = write(tmp_path / "a.jsonl", [PKU, {**PKU, **change}, {**PKU, **change}])
    samples, report = read_source("PKU-SafeRLHF", path)
    assert len(samples) == 1
    assert report.dropped == {reason: 2}


def test_pku_labels_may_be_missing_and_both_safe_is_consistent(tmp_path: Path) -> None:
    bare = {name: PKU[name] for name in ("prompt", "response_0", "response_1")}
    both = {**PKU, "is_response_1_safe": True, "safer_response_id": 1}
    # A column of 0 and 1 with blanks, as pandas writes it.
    floats = {**bare, "better_response_id": "1.0", "safer_response_id": "", "is_response_0_safe": "0.0"}
    samples, _ = read_source("PKU-SafeRLHF", write(tmp_path / "a.jsonl", [bare, both, floats]))
    assert samples[0] == RawSample("p", "a", "b")
    assert samples[1].safer is False
    assert samples[2] == RawSample("p", "a", "b", better=False, is_safe=False)


@pytest.mark.parametrize("blank", ["", " ", None])
def test_a_blank_system_text_is_none(tmp_path: Path, blank: str | None) -> None:
    path = write(tmp_path / "a.jsonl", [{**PKU, "system": blank}, {**PKU, "system": "be kind"}])
    assert [sample.system for sample in read_source("PKU-SafeRLHF", path)[0]] == [None, "be kind"]
    talk = [{"role": "system", "content": blank}, {"role": "user", "content": "a"}]
    assert read_source("messages", write(tmp_path / "b.jsonl", [{"messages": talk}]))[0] == [RawSample(["a"])]
    entry = {"path": write(tmp_path / "c.jsonl", [{"q": talk, "s": blank}]), "messages": "q", "system": "s"}
    assert load_mix([entry])[0] == [RawSample("a")]


def test_alpaca_joins_instruction_and_input(tmp_path: Path) -> None:
    samples, _ = read_source("alpaca", write(tmp_path / "a.jsonl", ALPACA))
    assert samples == [RawSample("say hi", "hi"), RawSample("x", "y")]


def test_hh_raw_and_processed_rows_agree(tmp_path: Path) -> None:
    start = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
    raw = {"chosen": start + " good", "rejected": start + " bad\n\nwith a second paragraph"}
    processed = {
        "context": [{"role": "human", "text": text} for text in ("one", "two", "three")],
        "chosen": {"role": "assistant", "text": "good"},
        "rejected": {"role": "assistant", "text": "bad\n\nwith a second paragraph"},
    }
    path = write(tmp_path / "a.jsonl", [raw, processed])
    samples, _ = read_source("hh-rlhf", path)
    expected = RawSample(["one", "two", "three"], "good", "bad\n\nwith a second paragraph", better=True)
    assert samples == [expected, expected]
    dialogues, _ = read_source("hh-rlhf-dialogue", path)
    assert dialogues == [RawSample(["one", "two", "three"], "good")] * 2


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: a\n\nHuman: b", "-", "turns do not alternate from human to assistant"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "-", "turns do not alternate from human to assistant"),
        ("no speaker", "-", "turns do not alternate from human to assistant"),
        ("\n\nHuman: a\n\nAssistant: ", "-", "empty turn"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b ", "identical responses"),
        (
            "\n\nHuman: a\n\nAssistant: b",
            "\n\nHuman: x\n\nAssistant: c",
            "dialogues differ before the last answer",
        ),
    ],
)
def test_hh_bad_rows(tmp_path: Path, chosen: str, rejected: str, reason: str) -> None:
    good = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    path = write(tmp_path / "a.jsonl", [good, {"chosen": chosen, "rejected": rejected}])
    _, report = read_source("hh-rlhf", path)
    assert report.dropped == {reason: 1}


def test_prompts_in_many_forms(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a"},
        {"instruction": "b"},
        "c",
        {"prompt": ["d", "e", "f"]},
        {"prompt": ["d", "e"]},
        {"prompt": ["d", 1, "f"]},
        {"prompt": []},
        7,
        {},
    ]
    samples, report = read_source("prompts", write(tmp_path / "a.jsonl", rows))
    assert [sample.input for sample in samples] == ["a", "b", "c", ["d", "e", "f"]]
    assert report.dropped == {
        "'prompt' has an even number of turns": 2,
        "'prompt' is a list of other things than texts": 1,
        "row is not an object": 1,
        "no field 'prompt' or 'instruction'": 1,
    }


def test_prompts_and_answers_as_messages(tmp_path: Path) -> None:
    """As TRL (prompt, chosen, rejected) and verl (prompt) write them, in data sets of our own names too."""

    def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
        return [{"role": role, "content": text} for role, text in turns]

    prompt = said(("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"))
    row: dict[str, Any] = {"prompt": prompt, "data_source": "x"}
    answers = {"chosen": said(("assistant", "d")), "rejected": said(("assistant", "e"))}
    pair = {"prompt": said(("user", "a"))} | answers
    for name, fields, expected in (
        ("prompts", row, RawSample(["a", "b", "c"], system="Be brief.", fields={"data_source": "x"})),
        ("demonstrations", row | {"response": "d"}, RawSample(["a", "b", "c"], "d", system="Be brief.")),
        ("demonstrations", pair | {"response": answers["chosen"], "system": "S"}, RawSample("a", "d", system="S")),
        ("preferences", pair, RawSample("a", "d", "e", better=True)),
        ("preferences", {"prompt": "a"} | answers, RawSample("a", "d", "e", better=True)),
    ):
        samples, _ = read_source(name, write(tmp_path / "a.jsonl", [fields]))
        assert samples == [expected], name
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "d"}]}]
    samples, _ = read_source("demonstrations", write(tmp_path / "a.jsonl", [{"prompt": "a", "response": parts}]))
    assert samples == [RawSample("a", "d")]
    with pytest.raises(UserError, match="1 'response' does not end with the assistant's message"):
        read_source("demonstrations", write(tmp_path / "a.jsonl", [{"prompt": "a", "response": said(("user", "d"))}]))
    with pytest.raises(UserError, match=r"1 'prompt' does not end with a user's turn; .*its first row has prompt\)"):
        read_source("prompts", write(tmp_path / "b.jsonl", [{"prompt": prompt[:3]}]))


def test_fields_that_are_there_are_said(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("question;answer\na;b\n")
    said = r"no field 'prompt'; .*\(its first row has question;answer\), or map its fields: {path: FILE, prompt: FIELD"
    with pytest.raises(UserError, match=said):
        read_source("demonstrations", str(tmp_path / "f.csv"))


def test_every_kind_of_file_gives_the_same_samples(tmp_path: Path) -> None:
    expected = [RawSample("say hi", "hi"), RawSample("x", "y")]
    lines = "\n".join(json.dumps(row) for row in ALPACA)
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "list.json").write_text(json.dumps(ALPACA))
    (tmp_path / "data.json").write_text(json.dumps({"version": 1, "data": ALPACA}))
    (tmp_path / "categories.json").write_text(json.dumps({"a": ALPACA[:1], "b": {"c": ALPACA[1:]}}))
    with gzip.open(tmp_path / "packed.jsonl.gz", "wt") as file:
        file.write(lines)
    with pa.output_stream(str(tmp_path / "packed.json.zst"), compression="zstd") as packed:
        packed.write(b"\xef\xbb\xbf" + json.dumps(ALPACA).encode())
    pq.write_table(pa.Table.from_pylist(ALPACA), tmp_path / "table.parquet")
    with (tmp_path / "sheet.csv").open("w", encoding="utf-8-sig", newline="") as sheet:
        writer = csv.DictWriter(sheet, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows(ALPACA)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 8
    for path in files:
        assert read_source("alpaca", str(path))[0] == expected, path.name
    datasets.Dataset.from_list(ALPACA).save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ALPACA)}).save_to_disk(str(tmp_path / "dict"))
    assert read_source("alpaca", str(tmp_path / "saved"))[0] == expected
    assert read_source("alpaca", str(tmp_path / "dict"))[0] == expected


def test_csv_column_as_prompt(tmp_path: Path) -> None:
    file = tmp_path / "of::goals.csv"  # which fsspec would take for a chain of file systems
    file.write_text("id,goal\n1,first\n2,\n")
    samples, report = read_source("prompts", f"{file}#goal")
    assert [sample.input for sample in samples] == ["first"]
    assert report.dropped == {"empty 'prompt'": 1}
    with pytest.raises(UserError, match="2 no column 'nothing'"):
        read_source("prompts", f"{file}#nothing")


def test_a_text_that_a_comma_cuts_is_no_prompt(tmp_path: Path) -> None:
    (tmp_path / "cut.csv").write_text('prompt,kind\n"Rice, or beans?",food\nRice, beans and corn?,food\n')
    samples, report = read_source("prompts", str(tmp_path / "cut.csv"))
    assert [sample.input for sample in samples] == ["Rice, or beans?"]
    assert report.dropped == {"more cells than the header has; texts with commas need quotes": 1}


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_quote_that_nothing_closes(tmp_path: Path, kind: str) -> None:
    """It would take the rows behind it for its text."""
    comma, path = {"csv": ",", "tsv": "\t"}[kind], tmp_path / f"a.{kind}"
    lines = ["prompt,kind", "first,w", '"Hello she said,x', "second,y", "third,z"]
    path.write_text("\n".join(lines).replace(",", comma) + "\n")
    with pytest.raises(UserError, match=rf"cannot read .*a\.{kind}: unexpected end of data, in the row behind line 2;"):
        read_source("prompts", str(path))
    path.write_text("\n".join([*lines[:3], '"fourth",v']).replace(",", comma))
    with pytest.raises(UserError, match=r"expected after '\"', in the row behind line 2; a text that begins with"):
        read_source("prompts", str(path))
    # Quotes that are closed, doubled or in the middle of a text are as they should be.
    lines = ["prompt,kind", '"a ""b"" c,', 'd",x', 'e "f" g,y', ",z", '"","h"', "i,"]
    path.write_text("\r\n".join(lines).replace(",", comma))
    samples, report = read_source("prompts", str(path))
    said = [(sample.input, sample.fields["kind"]) for sample in samples]
    assert said == [(f'a "b" c{comma}\r\nd', "x"), ('e "f" g', "y"), ("i", "")]
    assert report.dropped == {"empty 'prompt'": 2}


@pytest.mark.parametrize(
    ("content", "inputs"),
    [
        ({"prompt": ["Hi", "Hello", "How are you?"]}, [["Hi", "Hello", "How are you?"]]),
        ({"prompt": "Hi"}, ["Hi"]),
        ({"license": ["use", "as you like"], "items": [{"prompt": "a"}, {"prompt": "b"}]}, ["a", "b"]),
        ({"items": [{"prompt": "a"}], "version": 1}, ["a"]),
        ({"crime": {"theft": ["a", "b"], "fraud": ["c"]}, "none": []}, ["a", "b", "c"]),
        ({"crime": [{"prompt": "a"}, 7], "fraud": [{"prompt": "b"}]}, ["a", "b"]),
        ({"messages": [{"role": "user", "content": "a"}], "id": 7}, None),
        ({"x": 1}, None),
        ({"a": [{"prompt": "a"}], "b": [{"prompt": "b"}], "version": 1}, None),
    ],
)
def test_what_is_a_row_of_one_document(tmp_path: Path, content: Any, inputs: list[Any] | None) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    if inputs is not None:
        assert [sample.input for sample in read_source("prompts", str(tmp_path / "a.json"))[0]] == inputs
    elif "messages" in content:
        assert read_source("messages", str(tmp_path / "a.json"))[0] == [RawSample(["a"])]
    else:
        with pytest.raises(UserError, match=r"a\.json holds no list of rows: write a JSON list .of a single row too"):
            read_source("prompts", str(tmp_path / "a.json"))
    # In a folder such a file is one of rows, or passed over, and not both.
    write(tmp_path / "b.jsonl", [{"prompt": "z"}])
    samples, report = read_source("prompts", str(tmp_path))
    if "messages" in content:
        assert report.dropped == {"no field 'prompt' or 'instruction'": 1}
    assert [sample.input for sample in samples] == [*(inputs or []), "z"]
    passed_over = inputs is None and "messages" not in content
    assert report.remarks == ({"file without rows passed over (a.json)": 1} if passed_over else {})


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("content", [ALPACA, {"data": ALPACA}])
def test_one_document_in_a_file_of_lines(tmp_path: Path, indent: int | None, content: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(content, indent=indent))
    if indent is None and isinstance(content, dict):  # a line with an object, if not one of these
        with pytest.raises(UserError, match="no field 'instruction'"):
            read_source("alpaca", str(path))
        return
    with pytest.raises(UserError, match=r"a\.jsonl holds one JSON (list|object), .*rename it to end in \.json"):
        read_source("alpaca", str(path))
    assert len(read_source("alpaca", str(path.rename(tmp_path / "a.json")))[0]) == 2


def test_folder_and_split(tmp_path: Path) -> None:
    for name, prompt in (("b/test.jsonl", "t"), ("a/train-0.jsonl", "r"), ("a/latest.jsonl", "l")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, [{**PKU, "prompt": prompt}])
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "x.jsonl", [{**PKU, "prompt": "hidden"}])
    (tmp_path / "README.md").write_text("not data")

    def inputs(name: str) -> list[Any]:
        return [sample.input for sample in read_source(name, str(tmp_path))[0]]

    assert inputs("PKU-SafeRLHF") == ["r"]
    assert inputs("PKU-SafeRLHF/train") == ["r"]
    assert inputs("PKU-Alignment/PKU-SafeRLHF-30K/test") == ["t"]


def test_broken_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n\n[1]\n')
    _, report = read_source("prompts", str(path))
    assert report.line() == "kept 1 of 3; dropped 2: 1 line is not JSON, 1 row is not an object"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", b"", "it has no rows"),
        ("a.json", b"3", "no list of rows"),
        ("a.jsonl", b'{"x": 1}\n', "1 no field 'prompt'"),
        ("a.jsonl", b"\xff\xfe\n", "cannot read"),
        ("a.jsonl.gz", b"not gzip", "cannot read"),
        ("a.jsonl.zst", b"not zstd", "cannot read"),
        (
            "a.jsonl.zst",
            pa.compress(b'{"prompt": "p", "response": "r"}\n' * 99, "zstd", asbytes=True)[:-4],
            "cannot read",
        ),
        ("a.parquet", b"not parquet", "cannot read"),
        ("a.txt", b"hello", "use a file ending in"),
    ],
)
def test_unusable_files_are_user_errors(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_source("demonstrations", str(tmp_path / file))
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_places_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file or folder"):
        read_source("alpaca", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="no file in folder"):
        read_source("alpaca", str(tmp_path))
    with pytest.raises(UserError, match="needs a path"):
        read_source("prompts")
    with pytest.raises(UserError, match="unknown dataset 'alpacca'"):
        read_source("alpacca", str(tmp_path))
    with pytest.raises(UserError, match="is a path, and not the name of a dataset; write NAME:1:"):
        read_source(str(tmp_path))
    with pytest.raises(UserError, match=r"gone\.jsonl is a path, and not the name of a dataset"):
        read_source("gone.jsonl")


def test_own_reader(tmp_path: Path) -> None:
    @reader("poems")
    def poems(row: dict[str, Any]) -> RawSample:
        if "verse" not in row:
            raise BadRow("no verse")
        return RawSample(input=row["title"], answer=row["verse"])

    try:
        samples, report = read_source("poems", write(tmp_path / "a.jsonl", [{"title": "t", "verse": "v"}, {}]))
    finally:
        del SOURCES["poems"]
    assert samples == [RawSample("t", "v")]
    assert report.dropped == {"no verse": 1}


def test_line_of_a_report() -> None:
    report = DropReport(kept=7)
    report.drop("y")
    report.drop("x", 3)
    report.remark("long")
    assert report.line() == "kept 7 of 11; dropped 4: 3 x, 1 y; 1 long"
