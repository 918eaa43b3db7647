"""Stage dpo: loss and log-probs pair by pair in plain PyTorch, a reference that is computed once, adapters, ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from actors.stages import stages
from beaver_ray.models.loading import load_policy
from beaver_ray.stage import Stage
from tests.actors.stages.test_supervised import DATA, encoded, rows_of, train_on, trainer_of
from tests.actors.support import Ranks, disturb_folder

BETA = 0.5


def config_of(world: Path, workspace: Path, **changes: Any) -> Stage:
    """Twelve pairs at a time; ``other``, the model trained, is far from the reference where one is named."""
    tree = {
        "stage": "dpo",
        "name": "dpo",
        "workspace": str(workspace),
        "model": str(world / "model"),
        "train": [DATA["reward_model"].format(world=world, split="train")],
        "eval": [DATA["reward_model"].format(world=world, split="test")],
        "beta": BETA,
        "batch_size": 12,
        "epochs": 1,
        "max_tokens": 64,
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.0},
        "engine": {"micro_batch_tokens": 160},
    }
    return stages()["dpo"].model_validate(tree | changes)


@pytest.fixture(scope="module")
def other(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that is not the reference."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_world / "model", folder)
    disturb_folder(folder, scale=0.1, seed=9)
    return folder


@torch.no_grad()
def literal_logprob(model: Any, tokens: list[int], cut: int) -> float:
    """Of the tokens from ``cut`` on, each given all before it: the answer and its end, and nothing of the prompt."""
    logprobs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[place - 1, tokens[place]]) for place in range(cut, len(tokens)))


def literal_dpo(world: Path, policy: Path, label: str) -> dict[str, float]:
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (policy, world / "model")]
    margins = []
    for row in rows_of(world, "reward_model", "test"):
        better = row[f"{label}_response_id"]
        pair = [encoded(world, row["prompt"], row[f"response_{i}"]) for i in (better, 1 - better)]
        (one, two), (ref_one, ref_two) = ([literal_logprob(m, *side) for side in pair] for m in models)
        margins.append(BETA * ((one - ref_one) - (two - ref_two)))
    margin = torch.tensor(margins)
    return {
        "loss": float(-logsigmoid(margin).mean()),
        "margin": float(margin.mean()),
        "accuracy": float((margin > 0).float().mean()),
    }


@pytest.mark.parametrize("label", ["better", "safer"])
def test_pair_by_pair(one_rank: None, tiny_world: Path, tmp_path: Path, other: Path, label: str) -> None:
    """Faults 1 and 2 of the published code."""
    config = config_of(tiny_world, tmp_path, label=label, model=str(other), reference=str(tiny_world / "model"))
    assert trainer_of(config).evaluate() == pytest.approx(literal_dpo(tiny_world, other, label), rel=1e-4, abs=1e-5)


def test_safe_dpo_pair_by_pair(one_rank: None, tiny_world: Path, tmp_path: Path, other: Path) -> None:
    changes = {"label": "safe_dpo", "delta": 3.0, "model": str(other), "reference": str(tiny_world / "model")}
    trainer = trainer_of(config_of(tiny_world, tmp_path, **changes))
    models = [
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (other, tiny_world / "model")
    ]
    losses, swapped, dropped = [], 0, 0
    for row in rows_of(tiny_world, "reward_model", "test"):
        winner, unsafe = row["better_response_id"], [not row[f"is_response_{i}_safe"] for i in (0, 1)]
        if all(unsafe):
            dropped += 1
            continue
        if unsafe[winner]:
            swapped, winner = swapped + 1, 1 - winner
        pair = [encoded(tiny_world, row["prompt"], row[f"response_{i}"]) for i in (winner, 1 - winner)]
        (one, two), (ref_one, ref_two) = ([literal_logprob(m, *side) for side in pair] for m in models)
        margin = BETA * ((one - ref_one) - (two - ref_two)) - 3.0 * (unsafe[1 - winner] - unsafe[winner])
        losses.append(float(-logsigmoid(torch.tensor(margin))))
    assert trainer.evaluate()["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    (note,) = [line for line in trainer.describe()[2] if line.startswith("held-out data")]
    assert f"{dropped} both answers unsafe" in note and f"{swapped} pairs were swapped" in note
    assert swapped and dropped
    with pytest.raises(ValueError, match="delta belongs to label safe_dpo, not to better"):
        config_of(tiny_world, tmp_path, delta=3.0)


def test_the_start_is_the_reference(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    """Nothing has moved before the first step, and what has moved after it is measured from the start."""
    trainer = trainer_of(config_of(tiny_world, tmp_path))
    held_out = trainer.evaluate()
    assert held_out["margin"] == pytest.approx(0, abs=1e-5) and held_out["loss"] == pytest.approx(np.log(2), rel=1e-5)
    for _ in range(20):
        trainer.train_step()
    trainer.save(str(tmp_path / "policy"))
    learned = trainer.evaluate()
    assert learned == pytest.approx(literal_dpo(tiny_world, tmp_path / "policy", "better"), rel=1e-4, abs=1e-5)
    assert learned["loss"] < held_out["loss"] and learned["accuracy"] > 0.6


def test_reference_logprobs_are_computed_once(one_rank: None, tiny_world: Path, tmp_path: Path, other: Path) -> None:
    def described(**changes: Any) -> list[str]:
        notes = trainer_of(config_of(tiny_world, tmp_path, **changes)).describe()[2]
        return [note.rpartition(" ")[0].split("pairs ")[1] for note in notes if note.startswith("reference")]

    computed, read = ["computed and kept in"] * 2, ["read from"] * 2
    assert described() == computed
    # Whatever is trained, and however it is called: the weights and the pairs are the same.
    copy = tmp_path / "copy"
    shutil.copytree(tiny_world / "model", copy)
    assert described(seed=7, beta=0.1, batch_size=5) == read
    assert described(model=str(other), reference=str(copy)) == read
    assert described(model=str(other)) == computed
    assert described(label="safer") == computed
    assert described(engine={"micro_batch_tokens": 160, "dtype": "bfloat16"}) == computed
    assert len(list((tmp_path / "reference_logprobs").iterdir())) == 8
    assert not list((tmp_path / "reference_logprobs").glob("*.part"))


def test_an_adapter_alone_is_trained(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    trainer = trainer_of(config_of(tiny_world, tmp_path, lora_rank=4, lora_alpha=8.0))
    for _ in range(10):
        trainer.train_step()
    trainer.save(str(tmp_path / "policy"))
    learned = trainer.evaluate()
    assert learned["margin"] > 0.01
    # The merged folder is the policy that was trained, and the adapter lies beside it.
    assert learned == pytest.approx(literal_dpo(tiny_world, tmp_path / "policy", "better"), rel=1e-3, abs=1e-4)
    adapter = json.loads((tmp_path / "policy" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (4, 8.0)
    start = load_policy(str(tiny_world / "model"), torch.float32).state_dict()
    frozen = {n.replace(".base_layer", "").removeprefix("base_model.model."): t for n, t in trainer.engine.full_state()}
    assert all(torch.equal(frozen[name], tensor) for name, tensor in start.items() if name in frozen)


def test_two_ranks_train_as_one(one_rank: None, two_ranks: Ranks, tiny_world: Path, tmp_path: Path) -> None:
    """Under ZeRO-3, which gathers the reference's layers as well; the second run of the two reads the first's file."""
    engine = {"micro_batch_tokens": 160, "zero_stage": 3}
    together = two_ranks.run(train_on, config_of(tiny_world, tmp_path / "two", engine=engine, batch_size=5), 2)
    alone = train_on(0, config_of(tiny_world, tmp_path / "one", engine=engine, batch_size=5), 1)
    for result in together:
        for name, weight in alone["weights"].items():
            np.testing.assert_allclose(result["weights"][name], weight, atol=2e-5, rtol=0, err_msg=name)
    summed = {name: sum(t["held_out"][name] for t in together) for name in alone["held_out"]}
    assert summed == pytest.approx(alone["held_out"], rel=1e-3, abs=1e-5)
