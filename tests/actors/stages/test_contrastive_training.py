"""Contrastive losses in training on the tiny world: against padded forwards of plain transformers, and what they leave.

A dropout of 1e-9 drops nothing, so that both views are what the model computes without.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from actors.roles.contrast import dropped
from actors.stages import stages
from beaver_ray.errors import UserError
from beaver_ray.method.contrastive import sinkhorn
from beaver_ray.runs import read_evaluation
from launch.pipeline import run_stage
from tests.actors.stages.test_supervised import DATA, config_of, encoded, rows_of, train_on, trainer_of
from tests.actors.support import LiteralScoreModel, Ranks

NONE = 1e-9
LARGE = {"micro_batch_tokens": 1024}


@pytest.fixture(scope="module")
def few(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """Six pairs, the last two on one prompt."""
    rows = rows_of(tiny_world, "reward_model", "train")[:6]
    rows[5] = {**rows[5], "prompt": rows[4]["prompt"]}
    path = tmp_path_factory.mktemp("few") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"PKU-SafeRLHF:1:{path}", rows


def few_config(world: Path, few: Any, stage: str = "reward_model", **changes: Any) -> Any:
    tree = {"train": [few[0]], "eval": [few[0]], "batch_size": 6, "engine": LARGE}
    return config_of(world, stage, **(tree | changes))


def literal_features(world: Path, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [B, D] at the last tokens of better and worse answers, one sequence at a time."""
    model = LiteralScoreModel(world / "reward_model").eval()
    found: list[list[torch.Tensor]] = [[], []]
    for row in rows:
        for side, number in enumerate((row["better_response_id"], 1 - row["better_response_id"])):
            ids = torch.tensor([encoded(world, row["prompt"], row[f"response_{number}"])[0]])
            with torch.no_grad():
                found[side].append(model.trunk(input_ids=ids).last_hidden_state[0, -1])
    return torch.stack(found[0]), torch.stack(found[1])


@pytest.mark.parametrize("pairing", ["pair", "difference"])
@pytest.mark.parametrize("kind", ["simcse", "swav"])
def test_loss_by_plain_transformers(one_rank: None, tiny_world: Path, few: Any, kind: str, pairing: str) -> None:
    options = {"kind": kind, "pairing": pairing, "weight": 0.7, "temperature": 0.2, "prototypes": 4, "dropout": NONE}
    trainer = trainer_of(few_config(tiny_world, few, contrastive=options))
    plain = trainer_of(few_config(tiny_world, few)).train_step()
    better, worse = literal_features(tiny_world, few[1])
    features = torch.cat([better, worse] if pairing == "pair" else [better - worse, worse - better])
    unit = normalize(features, dim=1)
    if kind == "simcse":
        prompts = [row["prompt"] for row in few[1]] * 2
        logits = unit @ unit.T / 0.2
        for i in range(12):
            for j in range(12):
                if prompts[i] == prompts[j] and i % 6 != j % 6:
                    logits[i, j] = -torch.inf
        assert logits.isinf().sum() == 8  # both answers of one pair and of the other, both ways
        expected = cross_entropy(logits, torch.arange(12))
    else:
        scores = unit @ normalize(trainer.engine.module.prototypes.weight.detach(), dim=1).T
        expected = cross_entropy(scores / 0.2, sinkhorn(scores))
    figures = trainer.train_step()
    assert figures["loss_contrastive"] == pytest.approx(float(expected), rel=1e-3)
    assert figures["loss"] == pytest.approx(plain["loss"] + 0.7 * float(expected), rel=1e-3)
    assert figures["accuracy"] == plain["accuracy"]


def test_dropout_is_of_the_views_alone(one_rank: None, tiny_world: Path, few: Any) -> None:
    """The model's configuration has none; ranking loss and held-out loss are those without a contrastive one."""
    plain = trainer_of(few_config(tiny_world, few))
    held_out, ranking = plain.evaluate()["loss"], plain.train_step()["loss"]
    found = {}
    for dropout in (NONE, 0.3):
        config = few_config(tiny_world, few, contrastive={"weight": 0.5, "dropout": dropout})
        trainer = trainer_of(config)
        assert trainer.evaluate() == pytest.approx({**trainer.evaluate(), "loss": held_out}, rel=1e-6)
        assert "loss_contrastive" not in trainer.evaluate()
        figures = trainer.train_step()
        assert figures["loss"] - 0.5 * figures["loss_contrastive"] == pytest.approx(ranking, rel=1e-4)
        found[dropout] = figures["loss_contrastive"]
        assert not trainer.engine.module.trunk.get_input_embeddings()._forward_hooks
    assert found[0.3] > 1.2 * found[NONE]  # views that differ are harder to tell from others
    assert plain.config.roles()[0].training.passes == 1 and config.roles()[0].training.passes == 3
    with pytest.raises(ValueError, match="greater than 0"):
        few_config(tiny_world, few, contrastive={"dropout": 0.0})
    with pytest.raises(UserError, match="two views are alike"), dropped(torch.nn.Embedding(3, 2), 0.1):
        plain.evaluate()


def test_recomputed_activations_have_the_same_dropout(one_rank: None, tiny_world: Path, few: Any) -> None:
    weights = []
    for recompute in (False, True):
        engine = {**LARGE, "gradient_checkpointing": recompute}
        trainer = trainer_of(few_config(tiny_world, few, engine=engine, contrastive={"weight": 5.0, "dropout": 0.3}))
        trainer.train_step()
        weights.append(trainer.engine.module.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-6, rtol=1e-5, msg=name)


def test_prototypes_are_in_checkpoints_and_not_in_the_model(
    one_rank: None, tiny_world: Path, few: Any, tmp_path: Path
) -> None:
    """Two heads, on an adapter; a resumed run is the uninterrupted one bit for bit."""
    options = {"kind": "swav", "prototypes": 8, "dropout": 0.2}
    config = few_config(tiny_world, few, "score_model", batch_size=3, contrastive=options, lora_rank=2)
    trainer = trainer_of(config)
    start = trainer.engine.module.prototypes.weight.detach().clone()
    assert any("holds about 6 answers of this data, no more than the 8 prototypes" in note for note in trainer.notes)
    for _ in range(2):
        trainer.train_step()
    trainer.save_state(str(tmp_path / "state"))
    figures = [trainer.train_step() for _ in range(2)]
    assert all(np.isfinite(f["loss_contrastive"]) for f in figures)
    now = {name: tensor.clone() for name, tensor in trainer.engine.module.state_dict().items()}
    resumed = trainer_of(config)
    resumed.load_state(str(tmp_path / "state"))  # random numbers of this process, too
    assert [resumed.train_step() for _ in range(2)] == figures
    again = resumed.engine.module.state_dict()
    assert not torch.equal(now["prototypes.weight"], start)
    assert now.keys() == again.keys() and all(torch.equal(now[name], again[name]) for name in now)
    trainer.save(str(tmp_path / "saved"))
    assert not any("prototypes" in name for name in LiteralScoreModel(tmp_path / "saved").state_dict())
    assert "prototypes" not in (tmp_path / "saved" / "config.json").read_text()
    found = json.loads((tmp_path / "saved" / "features.json").read_text())
    assert found["samples"] == 12 and found["prompts"] == 5
    assert {"features/reward/cosine", "features/cost/silhouette"} < found.keys()


def test_two_ranks_under_zero_3_train_as_one(one_rank: None, two_ranks: Ranks, tiny_world: Path) -> None:
    """Four pairs a batch, two in each of two micro-batches, which one rank has or two ranks share."""
    options = {"kind": "swav", "prototypes": 6, "dropout": NONE, "weight": 1.0}
    train = [DATA["reward_model"].format(world=tiny_world, split="train").replace(":1:", ":8/-1:")]
    optimizer = {"learning_rate": 1e-4, "schedule": "constant", "warmup_fraction": 0.0}
    data = trainer_of(config_of(tiny_world, "reward_model", train=train)).train_data
    budget = int(2 * (data.better.lengths + data.worse.lengths).max())
    engine = {"micro_batch_tokens": budget, "zero_stage": 3}
    tree = {"train": train, "batch_size": 4, "engine": engine, "optimizer": optimizer, "contrastive": options}
    config = config_of(tiny_world, "reward_model", **tree)
    alone, together = train_on(0, config, 1), two_ranks.run(train_on, config, 2)
    for result in together:
        for name, weight in alone["weights"].items():
            np.testing.assert_allclose(result["weights"][name], weight, atol=1e-5, rtol=0, err_msg=name)
        for mine, theirs in zip(result["figures"], alone["figures"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3)


def test_a_run_says_how_far_apart_features_are(tiny_world: Path, tmp_path: Path) -> None:
    options = {"kind": "simcse", "pairing": "difference"}
    tree = config_of(tiny_world, "reward_model", contrastive=options, batch_size=40, engine=LARGE).model_dump()
    config = stages()["reward_model"].model_validate(tree | {"workspace": str(tmp_path), "debug": True})
    run_stage(config)
    evaluation = read_evaluation(tmp_path / "reward_model")
    model = LiteralScoreModel(config.folder / "final" / "reward_model").eval()
    cosines = []
    for row in rows_of(tiny_world, "reward_model", "test"):
        ends = []
        for number in (0, 1):
            ids = torch.tensor([encoded(tiny_world, row["prompt"], row[f"response_{number}"])[0]])
            with torch.no_grad():
                ends.append(model.trunk(input_ids=ids).last_hidden_state[0, -1].double())
        cosines.append(float(ends[0] @ ends[1] / ends[0].norm() / ends[1].norm()))
    assert evaluation["features/reward/cosine"]["mean"] == pytest.approx(np.mean(cosines), abs=1e-4)
    report = (config.folder / "report.html").read_text()
    assert "features/reward/silhouette" in report and "Held-out evaluation" in report
