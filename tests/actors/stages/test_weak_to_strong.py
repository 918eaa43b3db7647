"""Stage weak_to_strong in one process: who learns from whom, what is written, a resumed run, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.driver.arms import SoftArm
from actors.driver.train import train
from actors.roles.soft_training import all_logits
from actors.stages.weak_to_strong import WeakToStrong
from beaver_ray.errors import UserError
from beaver_ray.json_files import read_rows, write_rows
from beaver_ray.models.loading import load_policy
from beaver_ray.models.moderator import Moderator
from beaver_ray.models.score import load_score_model
from beaver_ray.report.page import write_report
from beaver_ray.report.sweep import run_figures
from beaver_ray.rules.bag_of_words import score
from beaver_ray.runs import read_metrics
from beaver_ray.yaml_files import save_config
from launch.config_files import load_run
from tests.actors.stages.test_supervised import encoded, trainer_of
from tests.actors.support import LiteralScoreModel, ppo_config
from tests.tiny_encoders import write_encoder


def stage_of(world: Path, workspace: Path, **changes: Any) -> WeakToStrong:
    tree = {
        "stage": "weak_to_strong",
        "name": "w2s",
        "workspace": str(workspace),
        "task": "cost",
        "model": str(world / "model"),
        "train": [f"PKU-SafeRLHF:1:{world}/preferences/train.jsonl"],
        "eval": [f"PKU-SafeRLHF:1:{world}/preferences/test.jsonl"],
        "epochs": 1,
        "batch_size": 24,
        "max_tokens": 64,
        "debug": True,
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.0},
        "engine": {"micro_batch_tokens": 1024},
    }
    return WeakToStrong.model_validate(tree | changes)


def kept(folder: Path, name: str) -> np.ndarray:
    """What a model says of the held-out rows, as it is kept."""
    return np.array(json.loads((folder / "ensemble" / f"{name}.json").read_text())["scores"])


def truth_of(row: dict[str, Any], labelled: dict[str, dict[str, Any]]) -> list[bool]:
    """Whether the first answer is safer, whether the first is unsafe, whether the second is, by the world's row."""
    known = labelled[json.dumps([row["prompt"], *sorted([row["response_0"], row["response_1"]])])]
    side = 0 if known["response_0"] == row["response_0"] else 1
    unsafe = [not known[f"is_response_{number}_safe"] for number in (side, 1 - side)]
    return [known["safer_response_id"] == side, *unsafe]


def test_a_cost_model_learns_from_a_bag_of_words(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    rows = [row | {"half": "ab"[n % 2]} for n, row in enumerate(read_rows(tiny_world / "preferences" / "train.jsonl"))]
    tests = [row | {"half": "ab"[n % 2]} for n, row in enumerate(read_rows(tiny_world / "preferences" / "test.jsonl"))]
    for name, some in (("train", rows), ("test", tests)):
        write_rows(tmp_path / f"{name}.jsonl", some)
    data = {"train": [f"PKU-SafeRLHF:1:{tmp_path}/train.jsonl"], "eval": [f"PKU-SafeRLHF:1:{tmp_path}/test.jsonl"]}
    stage = stage_of(tiny_world, tmp_path, by=["half"], weak={"unknown": ["shim", "pick", "rake"]}, **data)
    folder = train(stage)
    # No prompt is on both sides, and what strong models read says nothing of the truth.
    weak, strong, held = (read_rows(folder / "ensemble" / f"{n}.jsonl") for n in ("weak_train", "train", "held_out"))
    assert not {row["prompt"] for row in weak} & {row["prompt"] for row in strong}
    assert len(weak) + len(strong) == len(rows) and len(held) == len(strong) + len(tests)
    assert all(set(r) == {"prompt", "response_0", "response_1", "better_response_id"} for r in [*weak, *held])
    assert {row["better_response_id"] for row in [*weak, *held]} == {0}
    # The labels are what the bag of words says of rows that it never saw, by the file that it leaves.
    bag = json.loads((folder / "final" / "weak" / "bag_of_words.json").read_text())
    assert not {"shim", "pick", "rake"} & bag["answer"].keys()

    def said(row: dict[str, Any], answer: str) -> float:
        texts = ((bag["question"], row["prompt"]), (bag["answer"], row[answer]))
        return bag["bias"] + sum(words.get(word, 0.0) for words, text in texts for word in text.split())

    both = np.array([[said(row, f"response_{n}") for n in (0, 1)] for row in held])
    weak_logits = np.stack([both[:, 1] - both[:, 0], both[:, 0], both[:, 1]], axis=1)
    labels = np.load(folder / "ensemble" / "labels_weak.npy")
    assert np.allclose(labels, 1 / (1 + np.exp(-weak_logits[: len(strong)])), atol=1e-5)
    scored = score([r["prompt"] for r in held], [r["response_1"] for r in held], model=str(folder / "final" / "weak"))
    assert np.allclose(scored, both[:, 1])
    by_weak = [
        *read_rows(folder / "final" / "labelled_by_weak.jsonl"),
        *read_rows(folder / "final" / "tests_by_weak.jsonl"),
    ]
    assert [row["safer_response_id"] for row in by_weak] == (weak_logits[:, 0] <= 0).astype(int).tolist()
    safe = [[row["is_response_0_safe"], row["is_response_1_safe"]] for row in by_weak]
    assert (np.array(safe) == (both <= 0)).all() and "better_response_id" not in by_weak[0]
    # Ceiling and truth by the world's own rows.
    labelled = {json.dumps([r["prompt"], *sorted([r["response_0"], r["response_1"]])]): r for r in [*rows, *tests]}
    truth = np.array([truth_of(row, labelled) for row in held])
    assert (np.load(folder / "ensemble" / "truth.npy") == truth[: len(strong)]).all()
    figures = json.loads((folder / "weak_to_strong.json").read_text())
    logits = {"weak": weak_logits} | {n: kept(folder, n) for n in ("student_xent", "student_confidence", "ceiling")}
    right = {n: ((z[len(strong) :] > 0) == truth[len(strong) :]) for n, z in logits.items()}
    for name, of_model in right.items():
        assert figures["questions"]["sign"][name]["mean"] == pytest.approx(of_model[:, 1:].mean())
        assert figures["questions"]["order"][name]["mean"] == pytest.approx(of_model[:, 0].mean())
        for number, value in enumerate("ab"):
            assert figures["by"]["half"][value][name]["mean"] == pytest.approx(of_model[number::2, 1:].mean())
    wrong = ~right["weak"][:, 1:]
    found = figures["questions"]["sign"]["student_xent"]
    assert found["copied"] == pytest.approx((~right["student_xent"][:, 1:])[wrong].mean())
    assert not figures["valid"] and found["valid"] is False, "a ceiling of five steps is below the bag of words"
    # The kept scores are those of the saved model, which is an ordinary cost model.
    assert np.allclose(
        by_saved_model(folder / "final" / "student_xent", tiny_world, held), logits["student_xent"], atol=1e-4
    )
    assert not np.allclose(logits["student_xent"], logits["student_confidence"], atol=1e-3)
    write_report(stage, folder)
    assert "not valid" in (folder / "weak_to_strong.html").read_text() and stage.headlines()
    last = read_metrics(folder)[-1]
    assert last["eval/student_xent"] == figures["questions"]["sign"]["student_xent"]["mean"]
    assert last["eval/student_xent/pgr"] is None and figures["questions"]["sign"]["student_xent"]["pgr"] is not None
    # Safe PPO takes the student as it is.
    run = train(
        ppo_config(
            tiny_world,
            steps=1,
            workspace=str(tmp_path),
            constraints=[
                {
                    "name": "harm",
                    "model": str(folder / "final" / "student_xent"),
                    "violation_rate": 0.3,
                    "calibration": [f"PKU-SafeRLHF:1:{folder}/final/tests_by_weak.jsonl"],
                }
            ],
        )
    )
    assert "cost/harm/mean" in read_metrics(run)[0]


@torch.no_grad()
def by_saved_model(folder: Path, world: Path, rows: list[dict[str, Any]]) -> np.ndarray:
    """Logits [N, 3] by the literal padded forward of the files in a folder."""
    model = LiteralScoreModel(folder).eval()
    ends = []
    for side in (0, 1):
        texts = [encoded(world, row["prompt"], row[f"response_{side}"])[0] for row in rows]
        scores = model(texts)
        ends.append(np.array([float(scores[n, len(text) - 1]) for n, text in enumerate(texts)]))
    return np.stack([ends[1] - ends[0], ends[0], ends[1]], axis=1)


def test_a_reward_model_learns_through_a_chain(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    students = [
        {"name": "stopped", "loss": "confidence", "stop": "loss", "epochs": 2, "schedule": "published"},
        {"name": "product", "loss": "product", "alpha": 1.0},
        {"name": "chained", "chain": True},
    ]
    model = str(tiny_world / "model")
    stage = stage_of(
        tiny_world,
        tmp_path,
        task="preference",
        train=[f"PKU-SafeRLHF:140/-1:{tiny_world}/preferences/train.jsonl"],
        weak={"model": model, "rows": 40},
        students=students,
        chain=[model],
        generative=1,
        soft_labels=False,
        looks=2,
        patience=1,
    )
    folder = train(stage)
    names = {file.stem for file in (folder / "ensemble").glob("*.json")}
    assert names == {"base", "weak", "ceiling", "chain_1_0", "chain_1_1", *stage.student_names}
    assert {part.name for part in (folder / "final").iterdir() if part.is_dir()} == {
        "weak",
        "ceiling",
        *stage.student_names,
    }
    strong = read_rows(folder / "ensemble" / "train.jsonl")
    weak = kept(folder, "weak")
    labels = np.load(folder / "ensemble" / "labels_weak.npy")
    assert (labels == (weak[: len(strong)] > 0)).all(), "hard labels"
    # Each model of the link has learnt one half, and labels the other one.
    halves = [read_rows(folder / "ensemble" / f"train_{fold}.jsonl") for fold in (0, 1)]
    assert len(halves[0]) + len(halves[1]) == len(strong)
    assert not {row["prompt"] for row in halves[0]} & {row["prompt"] for row in halves[1]}
    chained = np.load(folder / "ensemble" / "labels_chain.npy")
    link = [kept(folder, f"chain_1_{fold}") for fold in (0, 1)]
    for number, row in enumerate(strong):
        fold = 0 if row in halves[0] else 1
        assert chained[number] == (link[1 - fold][number] > 0)
    # What stops looks at held-out weak labels: the kept look is the one of least loss by them.
    figures = json.loads((folder / "weak_to_strong.json").read_text())
    curve = figures["curves"]["student_stopped"]
    assert min(curve, key=lambda seen: seen["loss"])["kept"] and sum(seen["kept"] for seen in curve) == 1
    told = json.loads((folder / "ensemble" / "student_stopped.json").read_text())["told"]
    held, tested = kept(folder, "student_stopped"), len(strong) + figures["rows"]["watched"]
    watched = np.load(folder / "ensemble" / "watched_weak.npy")
    assert ((held[len(strong) : tested] > 0) == watched).mean() == pytest.approx(
        told["seen"][told["best"]]["agreement"]
    )
    # Generative fine-tuning has taught the base the texts: its loss on them is below that of the model it began as.
    assert figures["language_loss"] < 5 and figures["rows"]["weak"] == 40
    assert load_score_model(str(folder / "final" / "student_chained"), "reward", torch.float32).heads == ("reward",)
    # Safe PPO is rewarded by a student as by any reward model.
    rewarded = ppo_config(tiny_world, steps=1, workspace=str(tmp_path))
    rewarded.models.reward = str(folder / "final" / "student_chained")
    assert read_metrics(train(rewarded))[0]["reward/mean"] is not None
    # A resumed run has everything but what is missing.
    times = {file: file.stat().st_mtime_ns for file in (folder / "ensemble").glob("*.json")}
    (folder / "final").rename(folder / "final.part")
    (folder / "ensemble" / "student_chained.json").unlink()
    before = (folder / "weak_to_strong.json").read_bytes()
    train(stage.model_copy(update={"resume": True}))
    assert (folder / "weak_to_strong.json").read_bytes() == before, "the same model again"
    again = {file for file, was in times.items() if file.stat().st_mtime_ns != was}
    assert {file.stem for file in again} == {"student_chained"}
    chained_before = kept(folder, "student_chained").tolist()
    # Resumed with fewer students and another weak model, it leaves what this configuration names, and nothing else.
    (folder / "final").rename(folder / "final.part")
    bag = {"weak": {"rows": 40}, "students": students[2:], "patience": 0, "resume": True}
    train(WeakToStrong.model_validate(stage.model_dump() | bag))
    assert {part.name for part in (folder / "final").iterdir() if part.is_dir()} == {
        "weak",
        "ceiling",
        "student_chained",
    }
    assert [part.name for part in (folder / "final" / "weak").iterdir()] == ["bag_of_words.json"]
    assert "student_stopped was trained before this run was resumed" in (folder / "notes.log").read_text()
    assert kept(folder, "student_chained").tolist() != chained_before


def test_single_texts(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    files = {"train": [f"moderation:100/-1:{tiny_world}/moderation/train.jsonl"], "eval_fraction": 0.3, "eval": []}
    students = [{"name": "confidence", "loss": "confidence", "warmup": 0.0}]
    more = {"students": students, "by": ["kind"], "lora_rank": 2}
    folder = train(stage_of(tiny_world, tmp_path, task="moderation", label="harm", **more, **files))
    trunk = load_policy(str(tiny_world / "model"), torch.float32).model
    linear = [part for part in trunk.modules() if isinstance(part, torch.nn.Linear)]
    head = trunk.config.hidden_size + 1  # with its bias
    trained = sum(2 * (part.in_features + part.out_features) for part in linear) + head
    assert read_metrics(folder)[-1]["model/trained_parameters"] == trained
    judged = Moderator(str(folder / "final" / "student_confidence"))
    held = read_rows(folder / "ensemble" / "held_out.jsonl")
    odds = judged.judge([((row["prompt"],), row["response"], None) for row in held])
    assert np.allclose(odds, kept(folder, "student_confidence"), atol=1e-4)
    assert set(json.loads((folder / "weak_to_strong.json").read_text())["by"]["kind"]) == {"harmless", "adversarial"}
    texts = [row["prompt"] for row in read_rows(tiny_world / "moderation" / "train.jsonl")]
    encoder = str(write_encoder(tmp_path / "encoder", "bert", texts))  # another family, as the strong one
    asked = stage_of(
        tiny_world, tmp_path, name="asked", task="classification", label="abetting", model=encoder, **files
    )
    train(asked)
    rows = read_rows(asked.folder / "ensemble" / "held_out.jsonl")
    assert "response" not in rows[0]
    judged = Moderator(str(asked.folder / "final" / "ceiling"))
    assert np.allclose(
        judged.judge([((row["prompt"],), None, None) for row in rows]), kept(asked.folder, "ceiling"), atol=1e-4
    )
    assert run_figures(asked.folder)["eval/student_xent"] > 0, "a sweep finds figures"
    with pytest.raises(UserError, match="is no language model"):
        train(asked.model_copy(update={"name": "generative", "generative": 1.0}))


def test_adapters_and_zero(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    """Students and the generatively tuned base are adapters, which lie in final/ with their weights added."""
    changes: dict[str, Any] = {"train": [f"PKU-SafeRLHF:60/-1:{tiny_world}/preferences/train.jsonl"]}
    changes |= {
        "lora_rank": 2,
        "generative": 1,
        "students": [{"name": "xent"}],
        "engine": {"micro_batch_tokens": 1024, "zero_stage": 2},
    }
    folder = train(stage_of(tiny_world, tmp_path, **changes))
    held = read_rows(folder / "ensemble" / "held_out.jsonl")
    for name in ("student_xent", "ceiling"):
        said = by_saved_model(folder / "final" / name, tiny_world, held)
        assert np.allclose(said, kept(folder, name), atol=1e-4)
    before, after = (
        load_policy(str(path), torch.float32).state_dict() for path in (tiny_world / "model", folder / "ensemble/base")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("norm" not in name and "embed" not in name for name in moved), "linear layers alone"
    trunk = load_policy(str(tiny_world / "model"), torch.float32).model
    linear = [part for part in trunk.modules() if isinstance(part, torch.nn.Linear)]
    trained = sum(2 * (part.in_features + part.out_features) for part in linear) + trunk.config.hidden_size + 1
    assert read_metrics(folder)[-1]["model/trained_parameters"] == trained


def test_a_threshold_is_that_of_the_whole_batch(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    """However the batch is cut into micro-batches; and the step is a gradient step on that target."""
    rows = read_rows(tiny_world / "preferences" / "train.jsonl")[:30]
    write_rows(tmp_path / "rows.jsonl", rows)
    labels = np.random.default_rng(0).random((30, 3)).astype(np.float32)
    np.save(tmp_path / "labels.npy", labels)
    entry = {"name": "PKU-SafeRLHF", "path": str(tmp_path / "rows.jsonl")}
    found = []
    for tokens in (64, 4096):
        arm = SoftArm.model_validate(
            {
                **{"task": "cost", "name": "arm", "model": str(tiny_world / "cost_model"), "batch_size": 30},
                **{"train": [entry], "eval": [entry], "labels": str(tmp_path / "labels.npy"), "max_tokens": 64},
                **{"loss": "confidence", "alpha": 0.5, "warmup": 0.0, "engine": {"micro_batch_tokens": tokens}},
                "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.0},
            }
        )
        trainer = trainer_of(arm)
        logits = all_logits(arm, trainer, trainer.train_data, np.arange(30))
        trainer.train_step()
        targets = trainer.prepared.targets_NK.numpy()
        for columns in ([0], [1, 2]):
            some, weak = logits[:, columns].ravel(), labels[:, columns].ravel()
            decided = np.zeros(len(some))
            decided[np.argsort(-some)[: int(weak.sum() + 0.5)]] = 1
            assert np.allclose(targets[:, columns].ravel(), 0.5 * weak + 0.5 * decided, atol=1e-6)
        found.append(trainer.engine.full_state_on_rank_0()["score_head.weight"])
    assert torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"students": []}, "at least 1"),
        ({"students": [{"name": "a"}, {"name": "a"}]}, "'a' is there twice"),
        ({"students": [{"name": "a", "chain": True}]}, "needs the folders of models under chain"),
        ({"students": [{"name": "a", "stop": "loss"}], "looks": 0}, "set looks above 0"),
        ({"students": [{"name": "a/b"}]}, "should match pattern"),
        ({"students": [{"name": "a", "loss": "product", "alpha": 0}]}, "set alpha above 0"),
        ({"chain": ["m"]}, "no student learns from it"),
        ({"input": "qa"}, "input is of single texts"),
        ({"task": "moderation", "input": "dialogue"}, "a bag of words reads the last turn"),
        ({"weak": {"model": "m", "known": ["a"]}}, "known is of a bag of words; leave it out, or set model to null"),
        ({"weak": {"model": "m", "ridge": 2.0}}, "ridge is of a bag of words"),
        ({"weak": {"epochs": 2}}, "epochs is of a model; leave it out, or give its folder as model"),
        ({"students": [{"name": "a", "alpha": 0.7}]}, "alpha is of loss confidence and product; leave it out for xent"),
        ({"students": [{"name": "a", "loss": "product", "schedule": "published"}]}, "schedule is of loss confidence"),
        ({"label": "harm"}, "label is of single texts; leave it out for task cost"),
        ({"task": "moderation", "regularization": 0.1}, "regularization is of pairs"),
        ({"patience": 2}, "patience is of students that stop"),
        ({"weak": {"known": ["a"], "unknown": ["b"]}}, "exclude each other"),
        ({"engine": {"zero_stage": 3}}, "zero_stage to 2"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage_of(tmp_path, tmp_path, **changes)


@pytest.mark.parametrize("weak", [{"known": ["lock"]}, {"model": "m", "epochs": 2}])
def test_a_run_is_read_again(tmp_path: Path, weak: dict[str, Any]) -> None:
    """Its config.yaml has all options, those too that nothing reads; runs before `ridge` was checked had it as 1."""
    stage = stage_of(tmp_path, tmp_path, weak=weak)
    save_config(stage, tmp_path / "config.yaml")
    assert "ridge: 1.0" in (tmp_path / "config.yaml").read_text() and load_run(tmp_path) == stage


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"by": ["topic"]}, "by: no row has a field 'topic'"),
        ({"task": "moderation", "label": "nothing"}, "label 'nothing' is false"),
        ({"train": ["demonstrations:1:{world}/demonstrations/train.jsonl"]}, "no row has what task cost needs"),
        ({"weak": {"known": ["zebra"]}}, "knows no word of the data"),
        ({"weak": {"model": "nowhere/at/all"}}, "nowhere/at/all"),
    ],
)
def test_bad_data_are_named(tiny_world: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    named = json.loads(json.dumps(changes).replace("{world}", str(tiny_world)))
    with pytest.raises(UserError, match=message):
        train(stage_of(tiny_world, tmp_path, **named))


def test_a_folder_without_a_bag_of_words_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no bag of words"):
        score(["a"], ["b"], model=str(tmp_path))
