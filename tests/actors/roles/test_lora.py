"""LoRA: only the adapter is trained and published, and with it off the policy is the model that it started from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, IBertConfig, IBertModel

from actors.driver.policy_stage import PolicyStage
from actors.roles.policy import PolicyTrainer
from actors.roles.scorer import Reference
from beaver_ray import experience
from beaver_ray.errors import UserError
from beaver_ray.models.lora import add_adapter, add_trunk_adapter
from beaver_ray.weights import PublishedWeights, unpack
from tests.actors.support import (
    Ranks,
    gradients_of,
    ppo_config,
    published_by,
    random_sequences,
    set_up,
    state_of,
    with_columns,
)

RANK, ALPHA = 4, 16.0


def lora_config(world: Path, **sections: Any) -> PolicyStage:
    models = {"lora_rank": RANK, "lora_alpha": ALPHA, **sections.pop("models", {})}
    return ppo_config(world, models=models, **sections)


def trainer_of(config: PolicyStage, rank: int = 0, world: int = 1) -> PolicyTrainer:
    return set_up(PolicyTrainer(config, rank, world))


def with_advantages(batch: pa.RecordBatch, seed: int = 0) -> pa.RecordBatch:
    """Old log-probs are the generator's, advantages noise."""
    old = batch.column("rollout_logprobs")
    return with_columns(batch, seed, logprobs=old, advantages=1.0)


def tensors_of(published: PublishedWeights | None) -> dict[str, Tensor]:
    assert published is not None
    parts = [dict(unpack(published.layout, bucket)) for bucket in published.buckets]
    return {name: tensor.clone() for part in parts for name, tensor in part.items()}


def test_adapter_off_is_the_original_model_bit_for_bit(one_rank: None, tiny_world: Path) -> None:
    batch = random_sequences(13, seed=1)
    trainer = trainer_of(lora_config(tiny_world))
    whole = trainer_of(ppo_config(tiny_world))
    original = whole.logprobs(batch)
    assert original.schema.names == ["sample_id", "logprobs"]
    fresh = trainer.logprobs(batch)
    assert fresh.schema.names == ["sample_id", "logprobs", "reference_logprobs"]
    assert fresh.column("logprobs").equals(original.column("logprobs")), "B starts at zero"
    for step in (1, 2, 3):
        trainer.update(with_advantages(batch), step)
    moved = trainer.logprobs(batch)
    assert moved.column("reference_logprobs").equals(original.column("logprobs"))
    difference = experience.flat(moved, "logprobs") - experience.flat(original, "logprobs")
    assert np.abs(difference).max() > 1e-2

    model = str(tiny_world / "model")
    role = Reference(model, "float32", trainer.config.engine.micro_batch_tokens, 1.0, 1).logprobs(batch)
    joined = experience.join(batch, role)
    itself = experience.join(batch, moved)
    apart = experience.flat(joined, "reference_logprobs") - experience.flat(itself, "reference_logprobs")
    assert np.abs(apart).max() < 1e-6


def test_columns_follow_from_what_is_needed(one_rank: None, tiny_world: Path) -> None:
    batch = random_sequences(5)
    generators = trainer_of(lora_config(tiny_world, ppo={"old_logprobs": "generator"}))
    assert generators.logprobs(batch).schema.names == ["sample_id", "reference_logprobs"]
    other = trainer_of(lora_config(tiny_world, models={"reference": str(tiny_world / "model")}))
    assert other.logprobs(batch).schema.names == ["sample_id", "logprobs"]


def test_training_changes_the_adapter_alone(one_rank: None, tiny_world: Path) -> None:
    trainer = trainer_of(lora_config(tiny_world, policy={"weight_decay": 0.5}))
    before = state_of(trainer)
    held = {id(p) for group in trainer.engine.optimizer.param_groups for p in group["params"]}
    trained = {n for n, p in trainer.engine.module.named_parameters() if id(p) in held}
    # Seven matrices in each of two layers, A and B.
    assert len(trained) == 28 and all(".lora_" in name for name in trained)
    figures = trainer.update(with_advantages(random_sequences(8)), 1)
    assert figures["policy/grad_norm"] > 0
    after = state_of(trainer)
    # A's gradient is zero while B is: the first step moves B, and decay moves A.
    assert {n for n in after if not torch.equal(after[n], before[n])} == trained


def test_gradient_checkpointing_changes_no_gradient(one_rank: None, tiny_world: Path) -> None:
    """Checkpoints whose inputs are all frozen could lose them."""
    batch = with_advantages(random_sequences(8))
    found = []
    for checkpointing in (False, True):
        trainer = trainer_of(lora_config(tiny_world, engine={"gradient_checkpointing": checkpointing}))
        trainer.update(batch, 1)
        found.append(gradients_of(trainer.engine.module, lambda t=trainer: t.update(batch, 2))[1])
    plain, checkpointed = found
    assert len(plain) == 28 and plain.keys() == checkpointed.keys()
    assert all(float(gradient.abs().max()) > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_published_and_saved(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    trainer = trainer_of(lora_config(tiny_world))
    batch = with_advantages(random_sequences(8))
    for step in (1, 2, 3):
        trainer.update(batch, step)
    published = published_by(trainer, 3)
    tensors = tensors_of(published)
    assert published is not None and published.layout.adapter is not None
    assert published.layout.adapter.base == str(tiny_world / "model")
    base = AutoModelForCausalLM.from_pretrained(tiny_world / "model", dtype=torch.float32)
    linear = [m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    numbers = sum(RANK * (m.in_features + m.out_features) for m in linear)
    assert sum(t.numel() for t in tensors.values()) == numbers
    assert published.layout.total_bytes <= 4 * numbers + 64 * len(tensors)

    folder = tmp_path / "policy"
    trainer.save(str(folder))
    assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
    wrapped = PeftModel.from_pretrained(base, folder / "adapter")
    assert {n: t.tolist() for n, t in tensors.items()} == {
        n.replace(".default", ""): t.tolist() for n, t in wrapped.state_dict().items() if ".lora_" in n
    }
    expected = wrapped.merge_and_unload().state_dict()
    start = AutoModelForCausalLM.from_pretrained(tiny_world / "model", dtype=torch.float32).state_dict()
    saved = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[name], tensor, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert sum(not torch.equal(saved[name], start[name]) for name in start) == 14


def adapter_after_updates(rank: int, config: PolicyStage, world: int, batch: pa.RecordBatch) -> dict[str, Any]:
    trainer = trainer_of(config, rank, world)
    figures = [trainer.update(batch, step) for step in (1, 2, 3)]
    published = published_by(trainer, 3)
    adapter = {} if published is None else {name: t.numpy() for name, t in tensors_of(published).items()}
    return {"adapter": adapter, "figures": figures, "logprobs": trainer.logprobs(batch)}


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_two_ranks_train_the_adapter_of_one(
    one_rank: None, two_ranks: Ranks, tiny_world: Path, zero_stage: int
) -> None:
    config = lora_config(
        tiny_world, policy={"learning_rate": 1e-4}, engine={"zero_stage": zero_stage, "micro_batch_tokens": 36}
    )
    batch = with_advantages(random_sequences(9, seed=3))
    alone = adapter_after_updates(0, lora_config(tiny_world, policy={"learning_rate": 1e-4}), 1, batch)
    first, second = two_ranks.run(adapter_after_updates, config, 2, batch)
    assert len(first["adapter"]) == 28 and second["adapter"] == {}
    for name, tensor in alone["adapter"].items():
        np.testing.assert_allclose(first["adapter"][name], tensor, atol=1e-5, rtol=0, err_msg=name)
    merged = experience.concat([first["logprobs"], second["logprobs"]])
    for column in ("logprobs", "reference_logprobs"):
        expected = experience.flat(experience.concat([alone["logprobs"]]), column)
        np.testing.assert_allclose(experience.flat(merged, column), expected, atol=1e-5)
    for mine, theirs in zip(first["figures"], alone["figures"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_bfloat16(one_rank: None, tiny_world: Path, zero_stage: int, tmp_path: Path) -> None:
    trainer = trainer_of(lora_config(tiny_world, engine={"dtype": "bfloat16", "zero_stage": zero_stage}))
    trainer.update(with_advantages(random_sequences(8)), 1)
    assert {t.dtype for t in tensors_of(published_by(trainer, 1)).values()} == {torch.bfloat16}
    trainer.save(str(tmp_path / "policy"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "policy").dtype == torch.bfloat16


def test_a_model_of_transposed_matrices_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(UserError, match="no LoRA for a model of type gpt2; set"):
        add_adapter(model, 2, 4.0, 0)


def test_a_model_without_linear_layers_is_refused() -> None:
    config = IBertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(UserError, match="no LoRA for a model of type ibert, which has no linear layer to adapt; set"):
        add_trunk_adapter(IBertModel(config, add_pooling_layer=False), 2, 4.0, 0)
