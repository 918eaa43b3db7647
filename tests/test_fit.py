"""Models that do not fit their stage, or one another, are refused before anything starts, in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.driver.policy_stage import PolicyStage
from actors.driver.trainer_stage import TrainerStage
from actors.stages import stages
from beaver_ray.errors import UserError
from beaver_ray.fit import check_fit
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.models.provenance import trained_with


def ppo(world: Path, **models: Any) -> PolicyStage:
    """Safe PPO on the tiny world, with other models for some of its parts."""
    cost = models.pop("cost", world / "cost_model")
    parts = {"policy": world / "model", "reward": world / "reward_model", **models}
    tree: dict[str, Any] = {
        "stage": "safe_ppo",
        "name": "ppo",
        "workspace": str(world / "runs"),
        "steps": 1,
        "models": {name: str(folder) if isinstance(folder, Path) else folder for name, folder in parts.items()},
        "constraints": [{"name": "harm", "model": str(cost), "limit": 0.0}],
        "data": {"prompts": ["p"], "max_prompt_tokens": 16},
        "rollout": {"prompts_per_step": 8, "max_new_tokens": 8},
    }
    return stages()[tree["stage"]].model_validate(tree)


def supervised(stage: str, model: Path, **changes: Any) -> TrainerStage:
    return stages()[stage].model_validate({"stage": stage, "name": "x", "model": str(model), "train": ["d"], **changes})


def refused(config: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_fit(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def copy(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any] | None = None) -> Path:
    shutil.copytree(source, folder)
    if change:
        state = load_file(folder / "model.safetensors")
        save_file(change(state), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_models_that_fit(tiny_world: Path) -> None:
    assert check_fit(ppo(tiny_world)) == []
    assert check_fit(ppo(tiny_world, shared_critic=True)) == []
    assert check_fit(ppo(tiny_world, lora_rank=4, reward_critic=tiny_world / "model")) == []
    for stage in ("sft", "reward_model", "cost_model", "score_model"):
        assert check_fit(supervised(stage, tiny_world / "model")) == []
    assert check_fit(supervised("reward_model", tiny_world / "reward_model")) == []
    assert check_fit(supervised("sft", Path("some-org/not-here-yet"))) == []  # which loading will see


def test_every_part_accounts_for_its_tensors(tiny_world: Path, tmp_path: Path) -> None:
    wrapped = copy(tiny_world / "model", tmp_path / "p", lambda s: {f"module.{n}": t for n, t in s.items()})
    judge = copy(tiny_world / "reward_model", tmp_path / "r", lambda s: {n: t for n, t in s.items() if "s.1." not in n})
    for config, part in (
        (ppo(tiny_world, policy=wrapped), "policy"),
        (ppo(tiny_world, reference=wrapped), "reference"),
        (ppo(tiny_world, reward_critic=wrapped), "critic-reward"),
        (ppo(tiny_world, reward=judge), "reward"),
        (supervised("sft", wrapped), "model"),
        (supervised("cost_model", wrapped), "model"),
    ):
        folder = judge if part == "reward" else wrapped
        assert refused(config).startswith(f"{part}: {folder}: the weights do not fit config.json (Llama")


def test_heads_are_what_their_roles_need(tiny_world: Path) -> None:
    reward, cost, language = (tiny_world / name for name in ("reward_model", "cost_model", "model"))
    assert "reward: " in refused(ppo(tiny_world, reward=language))
    assert "is a language model without a score head" in refused(ppo(tiny_world, reward=language))
    assert "cost-harm: " in refused(ppo(tiny_world, cost=language))
    assert "is a cost model; give the folder of a reward model" in refused(ppo(tiny_world, reward=cost))
    assert "is a reward model; give the folder of a cost model" in refused(ppo(tiny_world, cost=reward))
    assert refused(ppo(tiny_world, reward_critic=cost)).startswith("critic-reward: ")
    assert "is a reward model, not one of cost" in refused(supervised("cost_model", reward))
    assert "is a cost model, not one of reward" in refused(supervised("reward_model", cost))
    assert check_fit(supervised("score_model", cost)) == []


def test_tokens_without_an_embedding(tiny_world: Path, tmp_path: Path) -> None:
    folder = copy(tiny_world / "model", tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = model.config.vocab_size
    tokenizer.add_tokens([f"<more-{n}>" for n in range(rows + 2 - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    line = refused(supervised("sft", folder))
    assert (
        f"goes up to number {rows + 1} (" in line
        and f"has {rows} rows; call resize_token_embeddings({rows + 2})" in line
    )
    assert refused(ppo(tiny_world, reward=folder)).startswith("reward: ")
    # As the line says; and more rows than tokens are as good.
    for count in (rows + 2, rows + 64):
        model.resize_token_embeddings(count)
        model.save_pretrained(folder)
        assert check_fit(supervised("sft", folder)) == []


def test_a_reference_has_a_row_for_whatever_is_sampled(tiny_world: Path, tmp_path: Path) -> None:
    padded = copy(tiny_world / "model", tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(padded)
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 64)
    model.save_pretrained(padded)
    assert check_fit(ppo(tiny_world, policy=padded)) == []  # scorers and critics may have fewer
    line = refused(ppo(tiny_world, policy=padded, reference=tiny_world / "model"))
    assert line.startswith(f"reference: its embedding has {rows} rows, the policy's {rows + 64}")


def test_a_scorer_that_is_read_otherwise_is_said(tiny_world: Path, tmp_path: Path) -> None:
    folder = copy(tiny_world / "reward_model", tmp_path / "r")
    tokenizer = load_tokenizer(str(folder))
    then = trained_with(tokenizer, "auto")
    config = json.loads((folder / "config.json").read_text())
    for said, words in ((then, []), ({**then, "template": "other"}, ["reward: ", "trained with the other template"])):
        (folder / "config.json").write_text(json.dumps({**config, "score_trained_with": said}))
        notes = check_fit(ppo(tiny_world, reward=folder))
        assert len(notes) == bool(words) and all(word in notes[0] for word in words)


def test_lengths(tiny_world: Path) -> None:
    model = tiny_world / "model"  # of 512 positions
    assert "max_tokens 513 make sequences of 513 tokens" in refused(supervised("sft", model, max_tokens=513))
    assert check_fit(supervised("sft", model, engine={"micro_batch_tokens": 512})) == []
    # Both sides of a pair are read in one forward pass.
    for stage in ("reward_model", "cost_model", "score_model"):
        assert check_fit(supervised(stage, model, engine={"micro_batch_tokens": 1024})) == []
        line = refused(supervised(stage, model, engine={"micro_batch_tokens": 1023}))
        assert "engine.micro_batch_tokens 1023 is less than a pair of two sequences of 512 tokens" in line
        assert "raise it to 1024 at least" in line
