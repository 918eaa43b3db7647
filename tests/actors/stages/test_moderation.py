"""Stage moderation: the loss label by label in plain transformers, encoders and decoders, ranks, recipes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from actors.driver import train_on_data
from actors.driver.train import train
from actors.machine.handles import Group, LocalHandle
from actors.stages import stages
from actors.stages.moderation import Moderation
from beaver_ray.errors import UserError
from beaver_ray.fit import check_fit
from beaver_ray.method.multilabel import HIGHEST, best_threshold
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.models.moderator import Moderator, Settings
from beaver_ray.runs import RunFolder, read_metrics
from launch.config_files import load_config
from launch.planning import plan
from launch.resources import Resources
from tests.actors.stages.test_supervised import encoded, trainer_of
from tests.actors.support import LiteralScoreModel, Ranks, write_score_folder
from tests.launch.test_recipes import CONFIGS, EIGHT_GPUS, KEYS, ONE_GPU, SHAPES
from tests.tiny_encoders import write_encoder

LABELS = ["harm", "abetting"]


def config_of(world: Path, workspace: Path, **changes: Any) -> Moderation:
    tree = {
        "stage": "moderation",
        "name": "moderation",
        "workspace": str(workspace),
        "model": str(world / "model"),
        "labels": LABELS,
        "train": [f"moderation:1:{world}/moderation/train.jsonl"],
        "eval": [f"moderation:1:{world}/moderation/test.jsonl"],
        "batch_size": 16,
        "epochs": 1,
        "max_tokens": 40,
        "optimizer": {"learning_rate": 3e-3, "schedule": "constant", "warmup_fraction": 0.0},
        "engine": {"micro_batch_tokens": 128},
    }
    return stages()["moderation"].model_validate(tree | changes)  # type: ignore[return-value]


def rows_of(world: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world / "moderation" / f"{split}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def encoder(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [row[name] for row in rows_of(tiny_world, "train") for name in ("prompt", "response")]
    return write_encoder(tmp_path_factory.mktemp("encoder") / "roberta", "roberta", texts)


@torch.no_grad()
def literal(world: Path, folder: Path, weights: list[float]) -> tuple[dict[str, float], np.ndarray]:
    """Loss and accuracy answer by answer, and the log-odds."""
    heads = [LiteralScoreModel(folder, head).eval() for head in range(2)]
    losses, right, odds = [], [], []
    for row in rows_of(world, "test"):
        tokens, _ = encoded(world, row["prompt"], row["response"])
        odds.append([float(head([tokens])[0, -1]) for head in heads])
        for name, weight, odd in zip(LABELS, weights, odds[-1], strict=True):
            p = 1 / (1 + np.exp(-odd - np.log(weight)))
            true = row["labels"][name]
            losses.append(-weight * np.log(p) if true else -np.log(1 - p))
            right.append((odd > 0) == true)
    return {"loss": float(np.mean(losses)), "label_accuracy": float(np.mean(right))}, np.array(odds)


def test_label_by_label(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    write_score_folder(start, tiny_world / "model", 6, "cost", heads=LABELS)
    truth = np.array([[row["labels"][name] for name in LABELS] for row in rows_of(tiny_world, "train")])
    auto = ((~truth).sum(axis=0) / truth.sum(axis=0)).tolist()
    for pos_weight, weights in (("auto", auto), ("none", [1.0, 1.0]), ({"harm": 3.0}, [3.0, 1.0])):
        trainer = trainer_of(config_of(tiny_world, tmp_path, model=str(start), pos_weight=pos_weight))
        expected, odds = literal(tiny_world, start, weights)
        assert trainer.evaluate() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    settings: Settings = trainer.task.conclude(trainer)
    held_out = np.array([[row["labels"][name] for name in LABELS] for row in rows_of(tiny_world, "test")])
    best = [best_threshold(odds[:, k], held_out[:, k]) for k in range(2)]
    assert settings.thresholds == pytest.approx(best, abs=1e-4) and settings.held_out == 80


def test_what_was_never_learned_is_never_flagged(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    """Rows that speak of one label only: the other one is as good as its head was before."""
    rows = rows_of(tiny_world, "train")
    for row in rows:
        row["labels"].pop("abetting")
    (tmp_path / "harm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = tmp_path / "start"
    write_score_folder(start, tiny_world / "model", 6, "cost", heads=LABELS)
    for model, learned in ((tiny_world / "model", False), (start, True)):
        train = [f"moderation:1:{tmp_path}/harm.jsonl"]
        trainer = trainer_of(config_of(tiny_world, tmp_path, model=str(model), train=train))
        assert "no training row says anything of abetting" in trainer.notes
        settings: Settings = trainer.task.conclude(trainer)
        assert (settings.thresholds[1] < HIGHEST) is learned and settings.thresholds[0] < HIGHEST
        assert (
            "abetting: the model has learned nothing of it, so it is never flagged" in settings.figures["notes"]
        ) is (not learned)


def run_of(config: Moderation, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stage's run in this process, whose only rank has met already; returns the trainer."""
    trainer = trainer_of(config)
    group = Group("trainer", [LocalHandle("trainer", trainer)], 1.0)

    def train(stage: Any, run: RunFolder) -> None:
        train_on_data._train(stage, group, run, resume=False)

    monkeypatch.setattr(train_on_data, "train_on_data", train)
    with RunFolder(config) as run:
        config.run(run)
    return trainer


@pytest.mark.parametrize(("kind", "lora"), [("decoder", 0), ("encoder", 0), ("encoder", 4)])
def test_a_run_learns_and_leaves_its_model(
    one_rank: None,
    tiny_world: Path,
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    lora: int,
) -> None:
    model = encoder if kind == "encoder" else tiny_world / "model"
    test = f"{tiny_world}/moderation/test.jsonl"
    config = config_of(
        tiny_world,
        tmp_path,
        model=str(model),
        lora_rank=lora,
        epochs=6 if kind == "encoder" else 4,
        by=["kind", "topic"],
        look_alikes=[{"name": "moderation", "path": test, "where": {"kind": "harmless", "labels.harm": False}}],
        optimizer={"learning_rate": 1e-2 if lora else 3e-3, "schedule": "cosine", "warmup_fraction": 0.1},
        engine={"micro_batch_tokens": 512},
    )
    check_fit(config)
    if lora:  # of a layer that an encoder has and a decoder has not
        check_fit(config.model_copy(update={"lora_targets": ["query"]}))
        with pytest.raises(UserError, match=r"no linear layer of the model is called 'q_proj'; there are query, key"):
            check_fit(config.model_copy(update={"lora_targets": ["q_proj"]}))
    plan(config, Resources("two cores", memory_gib=8.0, cpus=2.0)).check()
    run_of(config, monkeypatch)
    folder = tmp_path / "moderation" / "final.part" / "moderation"
    settings = Settings.model_validate_json((tmp_path / "moderation" / "moderation.json").read_bytes())
    metrics = read_metrics(tmp_path / "moderation")
    first, last = ([row["loss"] for row in part] for part in (metrics[:5], metrics[-5:]))
    assert np.mean(last) < 0.9 * np.mean(first), (np.mean(first), np.mean(last))
    assert 0 < settings.figures["flagged"]["f1"] < 1 and settings.figures["labels"]["harm"]["known"] == 80
    assert set(settings.figures["by"]["kind"]) == {"harmless", "adversarial"}
    assert settings.figures["over_block"]["n"] > 10
    assert config.headlines()[0].startswith(f"flagged: F1 {settings.figures['flagged']['f1']:.3f}, AUROC ")
    # What is saved is what was trained: its own figures come out again, by transformers where that can load it.
    moderator = Moderator(str(folder), device=torch.device("cpu"))
    assert moderator.settings == settings
    rows = rows_of(tiny_world, "test")
    odds = moderator.judge([([row["prompt"]], row["response"], None) for row in rows])
    truth = np.array([[row["labels"][name] for name in LABELS] for row in rows])
    best = [best_threshold(odds[:, k], truth[:, k]) for k in range(2)]
    assert settings.thresholds == pytest.approx(best, abs=1e-3)
    if kind == "encoder":
        plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        tokenizer = load_tokenizer(str(folder))
        text = f"BEGINNING OF CONVERSATION: USER: {rows[0]['prompt']} ASSISTANT:{rows[0]['response']}"
        with torch.no_grad():
            found = plain(torch.tensor([tokenizer.encode(text)])).logits[0].double().numpy()
        np.testing.assert_allclose(odds[0], found, atol=1e-4)
        assert plain.config.id2label == dict(enumerate(LABELS))
    (tmp_path / "moderation" / "moderation.json").write_text('{"labels"')
    with pytest.raises(UserError, match=r"moderation.json is no moderation model's \(.*\); save the model again"):
        config.headlines()


def train_and_conclude(rank: int, config: Moderation, world: int) -> dict[str, Any]:
    trainer = trainer_of(config, rank, world)
    figures = [trainer.train_step() for _ in range(3)]
    held_out = trainer.evaluate()
    weights = {name: tensor.detach().clone().numpy() for name, tensor in trainer.engine.full_state()}
    return {"weights": weights, "figures": figures, "held_out": held_out, "settings": config.conclude(trainer)}


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_two_ranks_train_as_one(
    one_rank: None, two_ranks: Ranks, tiny_world: Path, encoder: Path, tmp_path: Path, kind: str
) -> None:
    model = encoder if kind == "encoder" else tiny_world / "model"
    # A fresh head is of each process's own random numbers: start from one on disk.
    start = tmp_path / "start"
    torch.manual_seed(0)
    trainer = trainer_of(config_of(tiny_world, tmp_path, model=str(model)))
    trainer.save_model(str(start))
    engine = {"micro_batch_tokens": 96, "zero_stage": 3 if kind == "decoder" else 1}
    train = [f"moderation:5/-1:{tiny_world}/moderation/train.jsonl"]
    optimizer = {"learning_rate": 1e-4, "schedule": "constant", "warmup_fraction": 0.0}
    config = config_of(
        tiny_world,
        tmp_path,
        model=str(start),
        batch_size=3,
        engine=engine,
        train=train,
        dropout=False,
        optimizer=optimizer,
        by=["topic"],
    )
    alone = train_and_conclude(0, config, 1)
    together = two_ranks.run(train_and_conclude, config, 2)
    for result in together:
        for name, weight in alone["weights"].items():
            np.testing.assert_allclose(result["weights"][name], weight, atol=2e-5, rtol=0, err_msg=name)
        assert result["settings"].thresholds == pytest.approx(alone["settings"].thresholds, abs=1e-3)
        assert result["settings"].figures["by"].keys() == {"topic"}
    summed = {name: sum(t["held_out"][name] for t in together) for name in alone["held_out"]}
    assert summed == pytest.approx(alone["held_out"], rel=1e-4)


def test_what_is_refused(tiny_world: Path, tmp_path: Path, encoder: Path) -> None:
    for changes, message in (
        ({"labels": "beaver"}, "no schema of labels is called 'beaver'"),
        ({"threshold": "best"}, "choose f1, or precision:TARGET"),
        ({"pos_weight": {"haarm": 2.0}}, "pos_weight: no label is called 'haarm'; did you mean 'harm'"),
        ({"pos_weight": {"harm": 0.0}}, "pos_weight of harm must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(tiny_world, tmp_path, **changes)
    with pytest.raises(UserError, match=r"max_tokens 100 make sequences of 100 tokens, but .* has 64 positions"):
        check_fit(config_of(tiny_world, tmp_path, model=str(encoder), max_tokens=100))
    # What is read after the training is missed before it.
    with pytest.raises(UserError, match=r"none\.jsonl"):
        train(config_of(tiny_world, tmp_path, look_alikes=[f"moderation:1:{tmp_path}/none.jsonl"], debug=True))
    with pytest.raises(UserError, match="by: no held-out row has field 'topc'; did you mean 'topic'"):
        train(config_of(tiny_world, tmp_path, by=["topc"], debug=True))


@pytest.mark.parametrize(("name", "machine"), [("encoder-125m", ONE_GPU), ("decoder-7b", EIGHT_GPUS)])
def test_recipes_fit_their_machines(
    name: str, machine: Resources, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    shape: dict[str, Any] = dict(zip(KEYS, SHAPES["7B"], strict=True)) | {"model_type": "llama"}
    if name == "encoder-125m":  # roberta-base
        shape = {"model_type": "roberta", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
        shape |= {"intermediate_size": 3072, "vocab_size": 50_265, "max_position_embeddings": 514, "pad_token_id": 1}
    folder = write_model(tmp_path / name, **shape)
    config = load_config(CONFIGS / "moderation" / f"{name}.yaml", [f"model={folder}"])
    made = plan(config, machine)
    made.check()
    (trainer,) = made.roles
    assert trainer.parameters and trainer.gpu_gib > trainer.parameters * 2 / 2**30 / (8 if "7b" in name else 1)
