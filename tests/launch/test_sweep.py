"""Sweeps: what is run under which name, what is skipped, and what is made of the figures."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from actors.driver.sweep import rooms
from beaver_ray.data.mixing import MixSpec, parse_spec, take
from beaver_ray.errors import UserError
from beaver_ray.report.page import svg
from beaver_ray.report.sweep import ROWS, SweepReport, SweptRun, run_figures
from beaver_ray.runs import read_metrics
from launch.__main__ import main
from launch.config_files import load_config
from launch.sweep import _run, plan_runs, read_axis, sweep

Write = Callable[..., Path]


@pytest.fixture
def cost_file(tmp_path: Path, tiny_world: Path) -> Path:
    """A cost model on the tiny world in one process, of some seconds."""
    tree = {
        "stage": "cost_model",
        "workspace": str(tmp_path / "runs"),
        "name": "cost",
        "debug": True,
        "model": str(tiny_world / "model"),
        "train": [f"PKU-SafeRLHF:1:{tiny_world}/preferences/train.jsonl"],
        "eval": [f"PKU-SafeRLHF:1:{tiny_world}/preferences/test.jsonl"],
        "epochs": 1,
        "batch_size": 24,
        "max_tokens": 64,
        "engine": {"micro_batch_tokens": 2048},
    }
    path = tmp_path / "cost.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("lora_rank=0,8", ("lora_rank", [0, 8])),
        ("a.b=0.1, 1.0e-3", ("a.b", [0.1, 0.001])),
        ("train.0.proportion=150/-1,1/3", ("train.0.proportion", ["150/-1", "1/3"])),
        ("loss=token", ("loss", ["token"])),
        ("lora_targets=[q_proj, v_proj],[q_proj]", ("lora_targets", [["q_proj", "v_proj"], ["q_proj"]])),
        ("m='python:f.py:g(a=1, b=2)',n", ("m", ["python:f.py:g(a=1, b=2)", "n"])),
    ],
)
def test_values_of_a_key(text: str, axis: tuple[str, list[Any]]) -> None:
    assert read_axis(text) == axis


@pytest.mark.parametrize("text", ["lora_rank", "lora_rank=", "=1,2", "a=[1", "a=]"])
def test_no_values(text: str) -> None:
    with pytest.raises(UserError, match="must look like KEY=VALUE,VALUE"):
        read_axis(text)


def test_runs_and_their_names(cost_file: Path, tmp_path: Path) -> None:
    axes = {"lora_rank": [0, 4], "train.0.proportion": ["12/-1", 0.5]}
    folder, runs = plan_runs(cost_file, ["epochs=2"], axes, [3, 5])
    assert folder == tmp_path / "runs" / "cost-by-lora_rank-train.0.proportion" and len(runs) == 8
    first, last = runs[0], runs[-1]
    assert first.stage.folder == folder / "lora_rank-0_train.0.proportion-12_-1_seed-3"
    assert (last.values, last.seed) == ({"lora_rank": 4, "train.0.proportion": 0.5}, 5)
    # What is swept, the seed and the name; a data set that is written as text is one like any other.
    own = last.stage.model_dump()
    (data,) = own["train"]
    assert (own["lora_rank"], own["seed"], own["epochs"], data["proportion"]) == (4, 5, 2, 0.5)
    plain = load_config(cost_file, ["epochs=2", "lora_rank=4", "seed=5"]).model_dump()
    assert {key for key in own if own[key] != plain[key]} == {"train", "name"}
    spec = parse_spec(plain["train"][0])
    assert (spec.name, spec.path) == (data["name"], data["path"]), "and so the same rows are drawn of it"


def test_keys_that_end_alike_share_nothing(cost_file: Path) -> None:
    """Neither in one sweep after another, nor in one."""
    keys = ["train.0.proportion", "eval.0.proportion"]
    sweeps = [plan_runs(cost_file, [], {key: [0.5]}, [0]) for key in keys]
    assert len({folder for folder, _ in sweeps}) == 2 and len({runs[0].stage.folder for _, runs in sweeps}) == 2
    _, runs = plan_runs(cost_file, [], {key: [0.5, 1.0] for key in keys}, [0])
    assert len({run.stage.folder for run in runs}) == 4
    folder, _ = plan_runs(cost_file, [], {"train.PKU-SafeRLHF.where.a/b": ["c"]}, [0])
    assert folder.name == "cost-by-train.PKU-SafeRLHF.where.a_b"


def test_smaller_data_are_part_of_larger_ones() -> None:
    drawn = [set(take("d", MixSpec("PKU-SafeRLHF", share), 1000).tolist()) for share in (0.05, 0.2, 0.5, 1.0)]
    assert [len(rows) for rows in drawn] == [50, 200, 500, 1000]
    assert all(small < large for small, large in itertools.pairwise(drawn))


@pytest.mark.parametrize(
    ("changes", "axes", "seeds", "message"),
    [
        ([], {"lora_rnak": [1]}, [0], "unknown key lora_rnak; did you mean 'lora_rank'"),
        ([], {"lora_rank": [-1]}, [0], "lora_rank: Input should be greater than or equal to 0, not -1"),
        ([], {"lora_rank": [1, 1]}, [0], "two runs of the sweep would be called cost-by-lora_rank/lora_rank-1_seed-0"),
        ([], {"lora_rank": [1]}, [0, 0], "give each value and each seed once"),
        ([], {"model": ["m" * 300]}, [0], "has 313 bytes, of which 240 fit: give shorter values"),
        (["eval=[]"], {"train.0.proportion": [0.5]}, [0], "held-out data would be split off other training data"),
    ],
)
def test_one_line_for_a_wrong_sweep(
    cost_file: Path, changes: list[str], axes: dict[str, list[Any]], seeds: list[int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan_runs(cost_file, changes, axes, seeds)


def test_policies_without_held_out_prompts_are_refused_before_they_are_trained() -> None:
    file, limits = Path("configs/local/safe_ppo.yaml"), {"constraints.harm.violation_rate": [0.05, 0.1]}
    assert len(plan_runs(file, [], limits, [0])[1]) == 2
    with pytest.raises(UserError, match="no held-out figures to compare; set evaluation"):
        plan_runs(file, ["evaluation.prompts=[]", "evaluation.every=0"], limits, [0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --over KEY=VALUE,VALUE"),
        (["--over", "lora_rank=0,2", "--seeds", "0,x"], "--seeds 0,x must be whole numbers"),
        (["--over", "lora_rank=0", "--over", "lora_rank=2"], "--over has the same key twice"),
        (["--over", "seed=0,1"], "--over seed: the sweep says that of each run itself; seeds are given as --seeds 0,1"),
        (["--over", "model=/nowhere"], "no model in '/nowhere'"),
    ],
)
def test_wrong_words(cost_file: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(cost_file), *words])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1
    assert not (cost_file.parent / "runs").exists()


def test_a_learning_curve(cost_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sizes, two seeds; again, with one more value that fails: the others stay, and are told of."""
    over = ["train.0.proportion=48/-1,120/-1"]
    page = sweep(cost_file, [], over, [0, 1])
    folder, told = page.parent, json.loads((page.parent / "sweep.json").read_text())
    assert [(run["values"], run["seed"]) for run in told["runs"]] == [
        ({"train.0.proportion": size}, seed) for size in ("48/-1", "120/-1") for seed in (0, 1)
    ]
    by_hand = {run["name"]: read_metrics(folder / run["name"])[-1] for run in told["runs"]}
    for run in told["runs"]:
        figures, last = run["figures"], by_hand[run["name"]]
        assert figures["eval/accuracy"] == last["eval/accuracy"] and figures["time/elapsed"] == last["time/elapsed"]
    assert [len(read_metrics(folder / run["name"])) for run in told["runs"]] == [2, 2, 5, 5], "batches of 24"
    large = [by_hand[f"train.0.proportion-120_-1_seed-{seed}"]["eval/loss"] for seed in (0, 1)]
    (_, row) = told["rows"]
    assert (row["seeds"], row["mean"][ROWS]) == (2, 120)
    assert row["mean"]["eval/loss"] == pytest.approx(sum(large) / 2)
    assert row["deviation"]["eval/loss"] == pytest.approx(abs(large[0] - large[1]) / 2**0.5)
    assert told["power_laws"] == {}, "two sizes are too few"
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [row["train.0.proportion"] for row in rows] == ["48/-1", "48/-1", "120/-1", "120/-1"]
    assert float(rows[3]["eval/loss"]) == large[1]
    text = page.read_text()
    assert text.count("<svg") == 3 and "training rows" in text and "seed 1" in text and "<pre>beaver-ray sweep" in text
    out = capsys.readouterr().out
    assert "[4/4] cost-by-train.0.proportion/train.0.proportion-120_-1_seed-1" in out and "120" in out

    missing = ["train.0.path=GOOD,/nowhere/pairs.jsonl".replace("GOOD", load_config(cost_file).train[0].split(":")[2])]  # type: ignore[attr-defined]
    with pytest.raises(
        UserError, match=r"1 of 2 runs failed; cost-by-train.0.path/train.0.path-_nowhere_pairs.jsonl_seed-0: .*nowhere"
    ):
        sweep(cost_file, ["epochs=0.1"], missing, [0])
    assert len(json.loads((tmp_path / "runs" / "cost-by-train.0.path" / "sweep.json").read_text())["runs"]) == 1

    with pytest.raises(UserError, match="bad proportion '12O/-1'"):
        sweep(cost_file, ["name=typo"], ["train.0.proportion=48/-1,12O/-1"], [0])
    assert not list((tmp_path / "runs").glob("typo*")), "nothing was trained before that"

    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/metrics.jsonl")}
    capsys.readouterr()
    sweep(cost_file, [], over, [0, 1])
    assert "4 of 4 runs are complete, skipped" in capsys.readouterr().out
    assert kept == {path: path.stat().st_mtime_ns for path in folder.glob("*/metrics.jsonl")}
    with pytest.raises(UserError, match="finished run of another configuration"):
        sweep(cost_file, ["epochs=2"], over, [0])


def test_runs_without_held_out_figures_have_failed(tiny_world: Path, tmp_path: Path) -> None:
    """Each for itself, after all have run."""
    tree = {
        "stage": "generate",
        "workspace": str(tmp_path),
        "name": "ask",
        "debug": True,
        "policies": [str(tiny_world / "model")],
        "prompts": [f"prompts:4/-1:{tiny_world}/prompts/train.jsonl"],
        "max_prompt_tokens": 32,
        "rollout": {"max_new_tokens": 16},
        "answers": 8,
    }
    (tmp_path / "ask.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"2 of 2 runs failed; ask-by-pairs/.* has no held-out figures to compare"):
        sweep(tmp_path / "ask.yaml", [], ["pairs=1,2"], [0])
    assert len(list((tmp_path / "ask-by-pairs").glob("*/final"))) == 2


def test_a_bug_in_one_run_does_not_end_the_others(
    cost_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, runs = plan_runs(cost_file, [], {"lora_rank": [0, 2]}, [0])
    began: list[str] = []

    def fails_first(stage: Any) -> None:
        began.append(stage.name)
        if len(began) == 1:
            raise ZeroDivisionError("by zero")

    monkeypatch.setattr("launch.sweep.run_stage", fails_first)
    failed = _run([run.stage for run in runs])
    assert began == [run.stage.name for run in runs]
    assert {name: str(error) for name, error in failed.items()} == {began[0]: "ZeroDivisionError: by zero"}
    assert "Traceback" in capsys.readouterr().err


def test_figures_of_lora_by_hand(cost_file: Path, tmp_path: Path) -> None:
    """Rank 2 on the tiny policy: 2 (in + out) for each linear layer, and the cost's head."""
    sweep(cost_file, ["epochs=0.1", "lora_targets=[q_proj, v_proj]"], ["lora_rank=0,2"], [0])
    told = json.loads((tmp_path / "runs" / "cost-by-lora_rank" / "sweep.json").read_text())
    full, adapter = (run["figures"]["model/trained_parameters"] for run in told["runs"])
    config = load_config(cost_file)
    shape = json.loads((Path(config.model) / "config.json").read_text())  # type: ignore[attr-defined]
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    keys = shape["num_key_value_heads"] * hidden // heads
    assert adapter == shape["num_hidden_layers"] * 2 * (hidden + hidden + hidden + keys) + hidden + 1
    assert full > 10 * adapter
    memory = [run["figures"]["memory/planned_gib"] for run in told["runs"]]
    assert memory[1] < memory[0]


def runs_of(
    figures: dict[Any, list[float]], rows: dict[Any, int] | None = None, key: str = "train.0.proportion"
) -> SweepReport:
    """A report over made-up runs: accuracies by value and seed."""
    runs = [
        SweptRun(f"{value}-{seed}", {key: value}, seed, {"eval/accuracy": y} | ({ROWS: rows[value]} if rows else {}))
        for value, by_seed in figures.items()
        for seed, y in enumerate(by_seed)
    ]
    return SweepReport("t", "c", [key], runs)


def test_what_is_a_curve() -> None:
    sizes = {0.1: 100, 0.2: 200, 0.4: 400, 0.8: 800}
    exact = {share: [0.95 - rows**-0.5] * 2 for share, rows in sizes.items()}
    curve = runs_of(exact, sizes)
    assert curve.is_curve and curve.laws["eval/accuracy"].exponent.value == pytest.approx(0.5, rel=0.005)
    (line,) = curve.lines()
    assert line.startswith("eval/accuracy: exponent 0.5") and list(curve.laws) == ["eval/accuracy"]
    assert not runs_of(exact, sizes, "max_tokens").is_curve, "not only the number of rows differs"
    same = runs_of(exact, dict.fromkeys(sizes, 800))
    assert not same.is_curve and same.names == ["eval/accuracy"], "rows are no column where they are all alike"
    (chart,) = runs_of({"token": [0.5], "sequence": [0.6]}, key="k")._charts()
    assert chart.xlabel == "k: 0 token, 1 sequence" and not chart.log
    assert np.array_equal(chart.panels[0].series[0].y, [0.5, 0.6])
    table = runs_of({"python:f.py:g(x=[q])": [0.5]}).table()
    (console := Console(file=StringIO(), width=80)).print(table)
    assert "g(x=[q])" in console.file.getvalue(), "what stands in brackets is no colour"  # type: ignore[attr-defined]
    (chart,) = runs_of({"${workspace}/a_b_c": [0.5], "${workspace}/<d>": [0.6]}, key="k")._charts()
    assert "k: 0 ${workspace}/a_b_c, 1 ${workspace}/&lt;d&gt;" in svg(chart), "no formula, and no tag"


def test_a_figure_that_some_runs_lack() -> None:
    """Of what is not valid in a run the others still have a mean, which says of how many it is."""
    report = runs_of({1: [0.5, 0.7], 2: [0.6, 0.8], 3: [0.1, 0.2]}, key="k")
    for run in report.runs[1:4]:
        run.figures["eval/pgr"] = 10 * run.figures["eval/accuracy"]
    assert report.names == ["eval/accuracy", "eval/pgr"]
    cells = [report._cells(row)[-1] for row in report.rows]
    assert cells == ["7 (1 of 2)", "7 ± 1.4", "-"]
    _, pgr = report._charts()
    lines = {series.label: series.y.tolist() for series in pgr.panels[0].series}
    seed_0, seed_1 = lines["seed 0"], lines["seed 1"]
    assert np.isnan([seed_0[0], seed_0[2], seed_1[2]]).all() and [seed_0[1], *seed_1[:2]] == [6.0, 7.0, 8.0]


def test_which_figures_of_a_run(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "eval/accuracy": 0.7, "eval/pairs": 10, "time/elapsed": 1.0, ROWS: 5},
        {"step": 2, "eval/accuracy": 0.6, "eval/pairs": 10, "time/elapsed": 2.0, ROWS: 5},
        {"step": 3, "loss": 0.1, "time/elapsed": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_figures(tmp_path) == {"eval/accuracy": 0.6, ROWS: 5.0, "time/elapsed": 3.0}
    (tmp_path / "final" / "m").mkdir(parents=True)
    (tmp_path / "final" / "m" / "selected.json").write_text('{"step": 1, "accuracy": 0.7}')
    assert run_figures(tmp_path)["eval/accuracy"] == 0.7, "of the model that was kept"
    figure = {"mean": 2.0, "low": 1.0, "high": 3.0, "n": 4}
    evaluation = {"prompts": 4, "samples": 4, "reward": figure, "violation_rate/harm": {**figure, "mean": 0.1}}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    assert run_figures(tmp_path) == {"reward": 2.0, "violation_rate/harm": 0.1, "time/elapsed": 3.0}
    features = {"prompts": 4, "samples": 8, "features/cost/probe": {**figure, "mean": 0.6}}
    (tmp_path / "evaluation.json").write_text(json.dumps(features))
    assert run_figures(tmp_path) == {"eval/accuracy": 0.7, ROWS: 5.0, "features/cost/probe": 0.6, "time/elapsed": 3.0}
    (tmp_path / "evaluation.json").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(UserError, match="has no held-out figures to compare"):
        run_figures(tmp_path)


def test_rooms_by_hand() -> None:
    run = [{"CPU": 1.0, "GPU": 0.5}, {"CPU": 0.5}]
    assert rooms(run, {"CPU": 16.0, "GPU": 2.0}) == 4
    assert rooms(run, {"CPU": 4.6, "GPU": 8.0}) == 3
    assert rooms(run, {"CPU": 1.0}) == 1
    assert rooms([{"CPU": 0.1}] * 3, {"CPU": 0.9}) == 3
