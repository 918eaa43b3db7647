"""Noise options, the language model's loss and the choice of a model: on the tiny world, against plain transformers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from actors.driver import train_on_data
from actors.machine.handles import Group, LocalHandle
from actors.roles.trainer import Trainer
from actors.stages import stages
from beaver_ray.errors import UserError
from beaver_ray.runs import RunFolder, read_metrics
from tests.actors.stages.test_supervised import config_of, encoded, rows_of, trainer_of
from tests.actors.support import LiteralScoreModel

NOISE = {"flip": 0.2, "smoothing": 0.1, "smooth": "negative", "margin": 0.5}


@pytest.fixture(scope="module")
def strong(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """Ten pairs with strengths; of helpfulness the weakest are the pairs 3 and 7, of safety 0 and 1."""
    rows = rows_of(tiny_world, "reward_model", "train")[:10]
    means = [0.5, 1.0, -0.3, -2.0, 0.1, 0.7, 2.0, -1.0, 0.2, -0.1]
    safety = [-3.0, -2.0, -1.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    rows = [
        {**row, "strength_mean": m, "safety_strength_mean": s} for row, m, s in zip(rows, means, safety, strict=True)
    ]
    path = tmp_path_factory.mktemp("strong") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"PKU-SafeRLHF:1:{path}", rows


def treated(mean: float, weakest: tuple[float, ...]) -> tuple[bool, float, float]:
    """(Flipped, margin, smoothing) of a strength, by NOISE; two of ten pairs are flipped."""
    flipped = mean in weakest
    now = -mean if flipped else mean
    return flipped, 0.5 * now, 0.1 if now < 0 else 0.0


def ranking(difference: torch.Tensor, margin: float, smoothing: float) -> torch.Tensor:
    wanted = difference - margin
    return -(1 - smoothing) * logsigmoid(wanted) - smoothing * logsigmoid(-wanted)


@pytest.mark.parametrize("noise", [NOISE, {"soft": 2.0}], ids=["flip and margin", "soft"])
@pytest.mark.parametrize("stage", ["reward_model", "cost_model"])
def test_noise_pair_by_pair(one_rank: None, tiny_world: Path, strong: Any, stage: str, noise: dict[str, Any]) -> None:
    spec, rows = strong
    model = LiteralScoreModel(tiny_world / stage).eval()
    field, label, weakest = {
        "reward_model": ("strength_mean", "better_response_id", (-2.0, -1.0)),
        "cost_model": ("safety_strength_mean", "safer_response_id", (-3.0, -2.0)),
    }[stage]
    losses, plain, right, doubts = [], [], [], []
    for row in rows:
        order = (row[label], 1 - row[label])
        with torch.no_grad():
            first, second = (
                model([encoded(tiny_world, row["prompt"], row[f"response_{i}"])[0]])[0, -1].double() for i in order
            )
        # The preferred one is to have the higher reward, or the lower cost.
        difference = first - second if stage == "reward_model" else second - first
        more = 0.01 * 0.5 * (first**2 + second**2)
        if stage == "cost_model":
            for place, cost in zip(order, (first, second), strict=True):
                more = more - logsigmoid(-cost if row[f"is_response_{place}_safe"] else cost)
        if "soft" in noise:
            flipped, margin, smoothing = False, 0.0, 1 / (1 + math.exp(2.0 * row[field]))
            doubts.append(smoothing)
        else:
            flipped, margin, smoothing = treated(row[field], weakest)
        losses.append(float(ranking(-difference if flipped else difference, margin, smoothing) + more))
        plain.append(float(-logsigmoid(difference) + more))
        right.append(bool((difference > 0) != flipped))
    config = config_of(tiny_world, stage, train=[spec], eval=[spec.replace(":1:", ":10/-1:")], noise=noise)
    trainer = trainer_of(config)
    figures = trainer.train_step()
    assert figures["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert figures["accuracy"] == pytest.approx(np.mean(right))
    said = f"labels sure to {1 - np.mean(doubts):.3g} on average" if doubts else "2 flipped, "
    assert any(said in note for note in trainer.describe()[2])
    # Held-out figures are of the labels as they are.
    held_out = trainer_of(config).evaluate()
    assert held_out["loss"] == pytest.approx(np.mean(plain), rel=1e-4)


def test_two_heads_are_treated_apart(one_rank: None, tiny_world: Path, strong: Any) -> None:
    """The loss of both is the sum of each one's alone, on a trunk and heads that are the same."""
    spec, _ = strong
    both = config_of(tiny_world, "score_model", train=[spec], eval=[spec], noise=NOISE)
    rewards = config_of(tiny_world, "reward_model", train=[spec], eval=[spec], noise=NOISE, model=both.model)
    costs = config_of(tiny_world, "cost_model", train=[spec], eval=[spec], noise=NOISE, model=both.model)
    whole, reward, cost = (trainer_of(config).train_step() for config in (both, rewards, costs))
    assert whole["loss_reward"] == pytest.approx(reward["loss"], rel=1e-4)
    assert whole["loss_cost"] == pytest.approx(cost["loss"], rel=1e-4)
    assert whole["accuracy_cost"] == pytest.approx(cost["accuracy"])
    assert whole["loss"] == pytest.approx(reward["loss"] + cost["loss"], rel=1e-4)


def test_strengths_that_are_missing_or_in_vain_are_refused(one_rank: None, tiny_world: Path) -> None:
    for noise in ({"margin": 1.0}, {"soft": 1.0}):
        with pytest.raises(UserError, match=r"240 of 240 training pairs have no strength_mean"):
            trainer_of(config_of(tiny_world, "reward_model", noise=noise))
    for noise in ({"smoothing": 0.1}, {"soft": 1.0}):
        with pytest.raises(ValueError, match="of end scores; set loss: sequence"):
            config_of(tiny_world, "reward_model", loss="token", noise=noise)
    for other in ("flip", "margin", "smoothing"):
        with pytest.raises(ValueError, match="soft says how sure labels are, and flip, smoothing and margin"):
            config_of(tiny_world, "reward_model", noise={"soft": 1.0, other: 0.1})
    with pytest.raises(ValueError, match="nothing is smoothed; set smoothing too"):
        config_of(tiny_world, "reward_model", noise={"flip": 0.1, "smooth": "negative"})
    assert stages()["reward_model"].model_fields["noise"].default_factory is not None


def test_language_loss_is_that_of_the_language_model(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    config = config_of(tiny_world, "reward_model", model=str(tiny_world / "model"), lm_loss=2.0, batch_size=240)
    model = AutoModelForCausalLM.from_pretrained(tiny_world / "model", dtype=torch.float32).eval()
    means = []
    for row in rows_of(tiny_world, "reward_model", "test"):
        tokens, cut = encoded(tiny_world, row["prompt"], row[f"response_{row['better_response_id']}"])
        labels = torch.tensor([[-100] * cut + tokens[cut:]])
        with torch.no_grad():
            means.append(float(model(input_ids=torch.tensor([tokens]), labels=labels).loss))
    trainer = trainer_of(config)
    held_out = trainer.evaluate()
    assert held_out["loss_lm"] == pytest.approx(np.mean(means), rel=1e-4)
    plain = trainer_of(config.model_copy(update={"lm_loss": 0.0})).evaluate()
    assert held_out["loss"] == pytest.approx(plain["loss"], rel=1e-4), "of runs with and without, to be compared"
    before = held_out["loss_lm"]
    for _ in range(3):
        trainer.train_step()
    assert trainer.evaluate()["loss_lm"] < before
    trainer.save(str(tmp_path / "saved"))
    scores = LiteralScoreModel(tmp_path / "saved").eval()  # plain transformers reads it: no head of the language model
    sample = encoded(tiny_world, "how are you", "well")[0]
    with torch.no_grad():
        packed = trainer.engine.module.eval()(torch.tensor([sample]), torch.arange(len(sample))[None])
        torch.testing.assert_close(packed[..., 0].float(), scores([sample]).float(), atol=1e-4, rtol=1e-4)


def test_the_best_model_is_kept(
    one_rank: None, tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate that ruins the model after some epochs; what is kept is that of the best epoch."""
    optimizer = {"learning_rate": 3e-3, "schedule": "constant", "warmup_fraction": 0.0}
    config = config_of(
        tiny_world,
        "reward_model",
        workspace=str(tmp_path),
        epochs=4,
        batch_size=60,
        select="accuracy",
        save_every=4,
        optimizer=optimizer,
    )
    trainer = trainer_of(config)
    # Accuracies as in the reports' runs, which decay; the model itself is real.
    fallen = iter([0.6, 0.9, 0.7, 0.65])
    measured = Trainer.evaluate
    states = []

    def evaluate(self: Trainer) -> dict[str, float]:
        states.append({name: tensor.clone() for name, tensor in self.engine.module.state_dict().items()})
        return {**measured(self), "accuracy": next(fallen)}

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    with RunFolder(config) as run:
        train_on_data._train(config, Group("trainer", [LocalHandle("trainer", trainer)], 1.0), run, resume=False)
    folder = tmp_path / "reward_model" / "final.part" / "reward_model"
    saved = LiteralScoreModel(folder)
    assert torch.equal(saved.score_head.weight, states[1]["score_head.weight"])
    assert not torch.equal(states[1]["score_head.weight"], states[3]["score_head.weight"])
    assert json.loads((folder / "selected.json").read_text()) == {"step": 8, "accuracy": 0.9}
    notes = (tmp_path / "reward_model" / "notes.log").read_text()
    assert "the model of step 8 is kept, held-out accuracy 0.900" in notes
    assert config.headlines() == [
        "reward: held-out accuracy fell from 0.900 at step 8 to 0.650 at the end; the model of step 8 is kept"
    ]
    assert all(math.isfinite(row["loss"]) for row in read_metrics(tmp_path / "reward_model"))

    # From a checkpoint before it on, and worse: what came after that checkpoint is not the run's any more.
    for step in (8, 12):
        shutil.rmtree(tmp_path / "reward_model" / "checkpoints" / f"step_{step}")
    fallen = iter([0.55, 0.5, 0.4])
    config = config.model_copy(update={"resume": True})
    group = Group("trainer", [LocalHandle("trainer", trainer_of(config))], 1.0)
    with RunFolder(config) as run:
        train_on_data._train(config, group, run, resume=True)
    assert json.loads((folder / "selected.json").read_text()) == {"step": 4, "accuracy": 0.6}
    assert torch.equal(LiteralScoreModel(folder).score_head.weight, states[0]["score_head.weight"])
