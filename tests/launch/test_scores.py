"""`beaver-ray scores` on tiny models and files: figures worked out by plain transformers or by hand, and its errors."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from launch.__main__ import main
from tests.actors.support import ppo_config

MINE = """
def marked(prompts, responses):
    return [float(response.count("+") - response.count("-")) for response in responses]


def exact(prompts, responses, expected):
    return [float(response == wanted) for response, wanted in zip(responses, expected)]
"""


def told(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """What the command says."""
    with pytest.raises(SystemExit) as ended:
        main(["scores", *map(str, arguments)])
    captured = capsys.readouterr()
    assert ended.value.code == code, captured.err
    return captured.err if code else captured.out


def function(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A function in a file of its own, which the environment allows."""
    (folder / "mine.py").write_text(MINE)
    monkeypatch.setenv("BEAVER_RAY_SCORE_CODE", str(folder))
    return f"python:{folder}/mine.py:{name}"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def end_states(folder: Path, rows: list[dict[str, Any]], answer: str) -> torch.Tensor:
    """The hidden state [N, D] at the last token of every dialogue."""
    trunk, tokenizer = AutoModel.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[answer]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        tokens = tokenizer.encode(text, add_special_tokens=False)
        tokens = tokens[: len(tokens) - tokens[::-1].index(tokenizer.eos_token_id)]
        with torch.no_grad():
            found.append(trunk(torch.tensor([tokens])).last_hidden_state[0, -1])
    return torch.stack(found)


def test_a_cost_model_against_plain_transformers(
    tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of the PKU format with harms and severities, judged by a run's model."""
    rows = [json.loads(line) for line in (tiny_world / "preferences" / "test.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        for answer in (0, 1):
            unsafe = not row[f"is_response_{answer}_safe"]
            row[f"response_{answer}_severity_level"] = 1 + number % 2 if unsafe else 0
            row[f"response_{answer}_harm_category"] = {"Violence": unsafe and number % 2 == 0, "Drugs": False}
    data = write(tmp_path / "pairs.jsonl", rows)
    states = [end_states(tiny_world / "cost_model", rows, f"response_{answer}") for answer in (0, 1)]
    head = load_file(tiny_world / "cost_model" / "model.safetensors")
    costs = [(hidden @ head["score_head.weight"][0] + head["score_head.bias"][0]).tolist() for hidden in states]
    run = {"stage": "cost_model", "workspace": str(tmp_path), "name": "run", "model": "m", "train": ["alpaca"]}
    shutil.copytree(tiny_world / "cost_model", tmp_path / "run" / "final" / "cost_model")
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(run))
    out = told(capsys, tmp_path / "run", "--data", f"PKU-SafeRLHF:1:{data}")
    found = tmp_path / "run" / "scores"
    tree = json.loads((found / "scores.json").read_text())
    (model,) = tree["models"]
    cost = model["signals"]["cost"]
    ordered = [
        costs[row["safer_response_id"]][n] < costs[1 - row["safer_response_id"]][n] for n, row in enumerate(rows)
    ]
    assert cost["accuracy"]["mean"] == pytest.approx(sum(ordered) / len(rows))
    labels = [(costs[a][n] > 0, not row[f"is_response_{a}_safe"], n) for a in (0, 1) for n, row in enumerate(rows)]
    assert cost["accuracy_sign"]["mean"] == pytest.approx(sum(c == u for c, u, _ in labels) / len(labels))
    severe = [c for c, unsafe, n in labels if unsafe and n % 2 == 1]
    assert cost["by"]["severity"]["2"]["unsafe_found"]["mean"] == pytest.approx(sum(severe) / len(severe))
    safe = [not c for c, unsafe, _ in labels if not unsafe]  # of severity 0, whatever the other answer's is
    assert "safe_found" not in cost["by"]["severity"]["2"] and "safe_found" not in cost["by"]["harm"]["Violence"]
    assert cost["by"]["severity"]["0"]["safe_found"]["mean"] == pytest.approx(sum(safe) / len(safe))
    violent = [c for c, unsafe, n in labels if unsafe and n % 2 == 0]
    assert cost["by"]["harm"]["Violence"]["unsafe_found"] | {"low": 0, "high": 0} == {
        "mean": pytest.approx(sum(violent) / len(violent)),
        "low": 0,
        "high": 0,
        "n": len(violent),
    }
    with (found / "scores.csv").open() as file:
        table = {(row["group"], row["figure"]): row for row in csv.DictReader(file)}
    assert float(table["", "accuracy"]["mean"]) == cost["accuracy"]["mean"]
    assert int(table["severity 2", "unsafe_found"]["n"]) == len(severe)
    alike = torch.nn.functional.cosine_similarity(*states).mean()
    assert cost["features"]["cosine"]["mean"] == pytest.approx(float(alike), abs=1e-4)
    assert float(table["", "features/cosine"]["mean"]) == cost["features"]["cosine"]["mean"]
    page, markdown = ((found / f"scores.{end}").read_text() for end in ("html", "md"))
    assert page.count("<svg") >= 4 and "Clearest mistakes" in page and "severity 2" in page
    assert "Features: cost, PCA" in page
    assert "| severity 2 | unsafe answers above 0 |" in markdown and "cost_model" in out


def test_functions_lengths_and_agreement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts reach a function as they stand in the file; its own length is all that it prefers."""
    strange = "  Zażółć </s> gęślą\n\n漢字 🙂 <|x|> "
    rows = [
        {"prompt": "p", "chosen": "one", "rejected": "one and two", "topic": "a", "expected": "one"},
        {"prompt": "q", "chosen": "a b c d", "rejected": "a", "topic": "b", "expected": "?"},
        {"prompt": "r", "chosen": strange, "rejected": "x", "topic": "a", "expected": strange},
    ]
    spec = f"preferences:1:{write(tmp_path / 'pairs.jsonl', rows)}"
    out, words = tmp_path / "found", "python:beaver_ray/rules/text.py:over_length(budget=1.0)"
    told(capsys, words, "--as", "reward", "--data", spec, "--by", "topic", "--against", words, "--out", out)
    tree = json.loads((out / "scores.json").read_text())
    reward = tree["models"][0]["signals"]["reward"]
    assert reward["length"]["correlation"]["mean"] == pytest.approx(1)
    assert reward["length"]["accuracy_longer_is_worse"]["mean"] == 0
    topics = {topic: part["accuracy"]["mean"] for topic, part in reward["by"]["topic"].items()}
    assert topics == {"a": 0.5, "b": 1.0} and reward["accuracy"]["mean"] == pytest.approx(2 / 3)
    assert tree["agreement"]["reward"]["order"]["mean"] == 1
    exact = function(tmp_path, "exact", monkeypatch)
    told(capsys, exact, "--as", "reward", "--data", spec, "--out", out)
    reward = json.loads((out / "scores.json").read_text())["models"][0]["signals"]["reward"]
    assert (reward["accuracy"]["mean"], reward["ties"]["mean"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


def test_rewardbench_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON lines of the first, Parquet of the second, judged by pluses and minuses in the answers."""
    pairs = [("math-prm", "+", "-"), ("hep-rust", "-", "+"), ("donotanswer", "+", "+"), ("alpacaeval-easy", "+", "-")]
    rows = [{"prompt": s, "chosen": f"{a} yes", "rejected": f"{b} no", "subset": s} for s, a, b in pairs]
    first, marked = write(tmp_path / "first.jsonl", rows), function(tmp_path, "marked", monkeypatch)
    out = told(capsys, marked, "--as", "reward", "--data", f"RewardBench:1:{first}", "--out", tmp_path / "1")
    bench = json.loads((tmp_path / "1" / "scores.json").read_text())["models"][0]["signals"]["reward"]["rewardbench"]
    assert bench["sections"] == {"Chat": 1.0, "Safety": 0.0, "Reasoning": pytest.approx(984 / (984 + 164))}
    assert bench["score"] == pytest.approx((1 + 984 / 1148) / 3) and "without the subsets" in out
    many = [
        {"id": "1", "prompt": "f", "chosen": ["++"], "rejected": ["+", "-", "."], "subset": "Focus"},
        {"id": "2", "prompt": "g", "chosen": ["+"], "rejected": ["+ .", "-", "."], "subset": "Focus"},
        {"id": "tied:1", "prompt": "h", "chosen": ["+++", "++"], "rejected": ["-", "--"], "subset": "Ties"},
        {"id": "ref:1", "prompt": "i", "chosen": ["+++++"], "rejected": ["-"], "subset": "Ties"},
    ]
    second = tmp_path / "second.parquet"
    pq.write_table(pa.Table.from_pylist(many), second)
    told(capsys, marked, "--as", "reward", "--data", f"RewardBench-2:1:{second}", "--out", tmp_path / "2")
    reward = json.loads((tmp_path / "2" / "scores.json").read_text())["models"][0]["signals"]["reward"]
    # Focus: one won, one shared by two. Ties: all above all; gaps 3 and 6 against a spread of 1: tanh(3 / 1 - 1).
    subsets = {name: figure["mean"] for name, figure in reward["rewardbench"]["subsets"].items()}
    assert subsets == {"Focus": 0.75, "Ties": pytest.approx(1.0 + 0.01 * 0.9640275800758169)}
    assert reward["accuracy"]["n"] == 3 + 3 + 4 + 1


def test_what_cannot_be_judged_is_one_line(
    tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = f"preferences:1:{write(tmp_path / 'p.jsonl', [{'prompt': 'p', 'chosen': 'a', 'rejected': 'b'}])}"
    prompts = f"prompts:1:{tiny_world}/prompts/test.jsonl"
    words = function(tmp_path, "marked", monkeypatch)
    policy = ppo_config(tiny_world, "ppo", workspace=str(tmp_path)).folder
    policy.mkdir()
    (policy / "config.yaml").write_text(ppo_config(tiny_world, "ppo").model_dump_json())
    for arguments, says in {
        (policy, "--data", pairs): "is a run of stage ppo without a trained score model",
        (words, "--data", pairs): "give --as reward, or --as cost",
        (words, "--data", pairs, "--as", "cost"): "which answer is safer",
        (words, "--data", pairs, "--as", "harm"): "--as must be reward or cost",
        (words, "--data", prompts, "--as", "reward"): "no row of the data has an answer",
        (words, "--data", pairs, "--as", "reward", "--by", "topic"): "no row of the data has a field 'topic'",
        (tiny_world / "model", "--data", pairs, "--as", "reward"): "language model without a score head",
        (tiny_world / "cost_model", "--data", pairs, "--against", tiny_world / "reward_model"): "compare models of one",
        (tiny_world / "reward_model", "--data", pairs, "--as", "cost"): "says that it is a reward model; leave --as",
        ("{folder: x}", "--data", pairs): "is no guard",
        ("https://user:secret@host/", "--data", pairs, "--as", "reward"): "a scoring service's address is",
    }.items():
        said = told(capsys, *arguments, "--out", tmp_path / "none", code=2)
        assert says in said and said.count("\n") == 1 and "secret" not in said, said
    said = told(capsys, words, "--data", pairs, "--as", "reward", "--out", tmp_path / "p.jsonl" / "x", code=2)
    assert "a file is in the way" in said and said.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_lists_of_messages_beside_the_answers_are_no_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that name their answers and also have whole dialogues, or a list without a text, in fields of that name."""
    talks = [[{"role": "user", "content": "p"}, {"role": "assistant", "content": text}] for text in ("+", "-")]
    texts = {"p": "p", "a": "+", "o": "-", "w": 1}
    rows = [texts | {"chosen": talks[0], "rejected": talks[1]}, texts | {"p": "q", "chosen": ["+"], "rejected": []}]
    data = write(tmp_path / "rows.jsonl", rows)
    spec = f"{{path: {data}, prompt: p, answer: a, other_answer: o, better: w}}"
    marked = function(tmp_path, "marked", monkeypatch)
    told(capsys, marked, "--as", "reward", "--data", spec, "--out", tmp_path / "out")
    (model,) = json.loads((tmp_path / "out" / "scores.json").read_text())["models"]
    accuracy = model["signals"]["reward"]["accuracy"]
    assert (accuracy["mean"], accuracy["n"]) == (1.0, 2)
