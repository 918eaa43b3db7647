"""Stage strength in one process: M models, pairs scored by those that have not seen them, and what is written."""

from __future__ import annotations

import json
from collections import deque
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from actors.driver import ensemble
from actors.driver.ensemble import gather
from actors.driver.train import train
from actors.machine.handles import Group
from actors.machine.waits import WorkerDiedError
from actors.roles.ensemble import Scored
from actors.stages.strength import Strength
from beaver_ray.data.sources import find_source
from beaver_ray.data.strength import folds, published_row, strength_row
from beaver_ray.errors import UserError
from beaver_ray.json_files import read_rows, write_rows
from beaver_ray.manifest import file_hash
from beaver_ray.report.page import write_report
from tests.actors.stages.test_supervised import config_of, rows_of, trainer_of


def strength(world: Path, workspace: Path, **changes: Any) -> Strength:
    tree = {
        "stage": "strength",
        "name": "strength",
        "workspace": str(workspace),
        "model": str(world / "model"),
        "train": [f"PKU-SafeRLHF:1:{world}/preferences/train.jsonl"],
        "members": 2,
        "epochs": 2,
        "batch_size": 24,
        "max_tokens": 64,
        "debug": True,
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.0},
        "engine": {"micro_batch_tokens": 1024},
    }
    return Strength.model_validate(tree | changes)


def test_two_models_measure_every_pair(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    rows = rows_of(tiny_world, "reward_model", "train")[:160]
    flipped = np.random.default_rng(0).random(len(rows)) < 0.2
    for row, wrong in zip(rows, flipped.tolist(), strict=True):
        row |= {"safer_flipped": wrong, "topic": "t"}
    rows[7]["response_1"] = "well " * 80
    write_rows(tmp_path / "pairs.jsonl", rows)
    train_on = [f"PKU-SafeRLHF:1:{tmp_path / 'pairs.jsonl'}"]
    stage = strength(tiny_world, tmp_path, train=train_on, label="safer", publish=True)
    folder = train(stage)
    written = read_rows(folder / "final" / "pairs.jsonl")
    assert len(written) == 159
    kept = [row for number, row in enumerate(rows) if number != 7]
    # What was known is there as it was, labels and further fields; and the strength of the label in question alone.
    for old, new in zip(kept, written, strict=True):
        assert old.items() <= new.items()
        assert new.keys() - old.keys() == {"safety_strength_mean", "safety_strength_std"}
    # mu and sigma by the models' own scores, which are kept; every pair by the models that were not trained on it.
    models = {file.stem: json.loads(file.read_text()) for file in (folder / "ensemble").glob("?_?.json")}
    assert sorted(models) == ["0_0", "0_1", "1_0", "1_1"]
    mine = {json.dumps([row["prompt"], row["response_0"], row["response_1"]]): row for row in written}
    for fold in (0, 1):
        scored = read_rows(folder / "ensemble" / f"score_{fold}.jsonl")
        trained = read_rows(folder / "ensemble" / f"train_{fold}.jsonl")
        assert not {row["prompt"] for row in scored} & {row["prompt"] for row in trained}
        assert len(scored) + len(trained) == 159
        for number, row in enumerate(scored):
            both = [models[f"{member}_{fold}"]["scores"][number] for member in (0, 1)]
            order = (row["response_0"], row["response_1"])
            found = mine.get(json.dumps([row["prompt"], *order])) or mine[json.dumps([row["prompt"], *order[::-1]])]
            assert found["safety_strength_mean"] == pytest.approx(sum(both) / 2)
            assert found["safety_strength_std"] == pytest.approx(abs(both[0] - both[1]) / 2)
            assert order[0] == found[f"response_{found['safer_response_id']}"]
    apart = [np.array(models[f"{member}_0"]["scores"]) for member in (0, 1)]
    assert not np.allclose(*apart) and spearmanr(*apart).statistic > 0.2, "two models, which learn the same"
    manifest = json.loads((folder / "final" / "manifest.json").read_text())
    assert manifest["parents"][str(tmp_path / "pairs.jsonl")] == file_hash(tmp_path / "pairs.jsonl")
    assert str(tiny_world / "model") in manifest["parents"]
    assert manifest["files"]["pairs.jsonl"] == {"sha256": file_hash(folder / "final" / "pairs.jsonl"), "rows": 159}
    figures = json.loads((folder / "strength.json").read_text())
    means = np.array([row["safety_strength_mean"] for row in written])
    assert figures["below_zero"] == pytest.approx((means < 0).mean()) and 0 < figures["detection"] < 1
    page = (folder / "strength.html").read_text()
    weakest = written[int(means.argmin())]
    assert "Weakest" in page and weakest["response_0"] in page and "Wrong labels found" in page
    assert "Strength below 0" in write_report(stage, folder).read_text()
    assert "1 longer than 64 tokens" in (folder / "notes.log").read_text()
    # The published fields are read back as the same pairs.
    read = find_source("hh-rlhf-strength").read_row
    for old, row in zip(written, read_rows(folder / "final" / "published.jsonl"), strict=True):
        sample = read(row)
        assert sample.answer == old[f"response_{old['safer_response_id']}"] and sample.input == old["prompt"]
        assert sample.fields["strength_mean"] == old["safety_strength_mean"]
    # The data set is what the losses take.
    trained = config_of(
        tiny_world,
        "cost_model",
        train=[f"PKU-SafeRLHF:1:{folder}/final/pairs.jsonl"],
        noise={"flip": 0.1, "margin": 1.0},
    )
    trainer = trainer_of(trained)
    assert trainer.prepared["safer"].flipped_N.sum() == 16
    trainer.train_step()
    # Once more: nothing is trained again, and the same is written.
    kept_files = {file: file.stat().st_mtime_ns for file in (folder / "ensemble").glob("?_?.json")}
    (folder / "final").rename(folder / "before")
    train(stage.model_copy(update={"resume": True}))
    assert (folder / "final" / "pairs.jsonl").read_bytes() == (folder / "before" / "pairs.jsonl").read_bytes()
    assert {file: file.stat().st_mtime_ns for file in kept_files} == kept_files


def test_folds_keep_prompts_together_and_are_alike() -> None:
    read = find_source("PKU-SafeRLHF").read_row
    samples = [read({"prompt": f"p{n % 7}", "response_0": f"a{n}", "response_1": "b"}) for n in range(40)]
    fold_N = folds(samples, 3, seed=1)
    of_prompt = {sample.input: set() for sample in samples}
    for sample, fold in zip(samples, fold_N.tolist(), strict=True):
        of_prompt[sample.input].add(fold)
    assert all(len(found) == 1 for found in of_prompt.values()) and set(fold_N.tolist()) == {0, 1, 2}
    assert (fold_N != folds(samples, 3, seed=2)).any() and (fold_N == folds(samples, 3, seed=1)).all()
    with pytest.raises(UserError, match="8 folds of 7 prompts"):
        folds(samples, 8, seed=0)


def test_scores_are_put_where_they_belong() -> None:
    found = {"0_0": Scored(np.array([1.0, 2.0]), 0), "0_1": Scored(np.array([3.0]), 0)}
    rows = {"0_0": np.array([0, 2]), "0_1": np.array([1])}
    assert gather(found, rows, 1, 3).tolist() == [[1.0, 3.0, 2.0]]
    with pytest.raises(RuntimeError, match="gives 1 scores of 2 pairs"):
        gather({"0_0": Scored(np.array([1.0]), 0)}, {"0_0": np.array([0, 1])}, 1, 2)
    with pytest.raises(UserError, match="not finite"):
        gather({"0_0": Scored(np.array([np.inf]), 0)}, {"0_0": np.array([0])}, 1, 1)


def test_rows_of_dialogues() -> None:
    row = {
        "chosen": ["Human: hi", "Assistant: hello", "Human: how", "Assistant: fine"],
        "rejected": ["Human: hi", "Assistant: hello", "Human: how", "Assistant: bad"],
        "mean preference difference": -0.5,
        "std preference difference": 0.25,
        "GPT4 label": 0,
    }
    sample = find_source("hh-rlhf-strength").read_row(row)
    assert (sample.input, sample.answer, sample.other_answer) == (["hi", "hello", "how"], "fine", "bad")
    assert sample.fields == {"strength_mean": -0.5, "strength_std": 0.25, "judge_agrees": False}
    assert (
        find_source("hh-rlhf-strength").read_row({**row, "GPT4 label": -1}).fields.keys().isdisjoint({"judge_agrees"})
    )
    assert published_row(sample, True, -0.5, 0.25) == {key: row[key] for key in row if key != "GPT4 label"}
    again = find_source("PKU-SafeRLHF").read_row(strength_row(sample, "better", 1.0, 0.5))
    assert (again.input, again.answer, again.better, again.fields["strength_mean"]) == (sample.input, "fine", True, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folds": 1}, "folds: 1 leaves nothing to train on"),
        ({"eval": ["PKU-SafeRLHF"]}, "eval: stage strength holds out by folds"),
        ({"eval_fraction": 0.1}, "eval_fraction: stage strength holds out by folds"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strength(tmp_path, tmp_path, **changes)


class Doomed:
    """A worker whose calls come to what stands in ``outcomes``, one after another, also after its restarts."""

    name = "trainer-0"

    def __init__(self, outcomes: list[Any]) -> None:
        self.outcomes, self.called = outcomes, []  # type: ignore[var-annotated]

    def call(self, method: Any, *args: Any) -> Any:
        self.called.append(method.__name__)
        return self.outcomes.pop(0)


@pytest.mark.parametrize("starts", [1, 2])
def test_a_worker_that_dies_of_its_start_is_started_again(starts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies at work, and of as many starts as two more deaths leave; the third death ends the stage."""
    scored = Scored(np.zeros(1), 0.5)
    deaths = [WorkerDiedError(f"death {n}") for n in range(1 + starts)]
    worker = Doomed([*deaths, None, 0.5, scored])
    told: dict[str, Any] = {"began": [], "notes": [], "finished": {}}
    group = Group("trainer", [worker], 1.0)
    cluster: Any = SimpleNamespace(
        wait_started=lambda groups: None, restart=lambda group, workers: None, close=lambda: None
    )
    queue: Any = SimpleNamespace(pending=deque([SimpleNamespace(name="0_0")]), begin=lambda m: told["began"].append(m))
    queue.finish = told["finished"].__setitem__
    progress: Any = SimpleNamespace(advance=lambda **figures: None)
    run: Any = SimpleNamespace(note=told["notes"].append, progress=lambda *_: nullcontext(progress))
    stage: Any = SimpleNamespace(roles=lambda: [None], cluster=SimpleNamespace(step_timeout=1.0))

    def fetch(answer: Any, what: str, timeout_s: float) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ensemble, "open_cluster", lambda *_: cluster)
    monkeypatch.setattr(ensemble, "start_role", lambda *_: group)
    monkeypatch.setattr(ensemble, "fetch", fetch)
    if starts == 2:
        with pytest.raises(RuntimeError, match="3 deaths with no member finished in between: death 2"):
            ensemble._work(stage, queue, run, 1)
        return
    ensemble._work(stage, queue, run, 1)
    assert worker.called == ["work", "started", "started", "work", "work"]
    assert told["finished"] == {"0_0": scored} and len(told["notes"]) == 2 and len(told["began"]) == 3
