"""A LoRA adapter on its way from two trainer ranks into generators: they agree after any number of updates.

The trainer lives in processes of its own, since vLLM makes a process group in this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.driver.policy_stage import PolicyStage
from actors.roles.exchange import Exchange
from actors.roles.generator import GeneratorSpec, VllmGenerator
from actors.roles.hf_generator import HFGenerator
from actors.roles.policy import PolicyTrainer
from beaver_ray import experience
from beaver_ray.weights import PublishedWeights
from tests.actors.conftest import largest_difference, make_prompts, three_tokens_in
from tests.actors.roles.test_lora import RANK, lora_config, trainer_of, with_advantages
from tests.actors.support import Ranks, published_by, random_sequences

Generator = VllmGenerator | HFGenerator
TRAINERS: dict[str, PolicyTrainer] = {}
"""What each rank's process keeps from one call to the next."""


def start_trainer(rank: int, config: PolicyStage) -> None:
    TRAINERS["policy"] = trainer_of(config, rank, 2)


def columns_of(rank: int, batch: pa.RecordBatch) -> pa.RecordBatch:
    return TRAINERS["policy"].logprobs(batch)


def updated(rank: int, batch: pa.RecordBatch, step: int) -> PublishedWeights | None:
    TRAINERS["policy"].update(batch, step)
    return published_by(TRAINERS["policy"], step)


@pytest.fixture(scope="module", params=["vllm-tied", "vllm-untied", "hf-tied"])
def generator(request: pytest.FixtureRequest, tiny_llama: Callable[[bool], Path]) -> Iterator[Generator]:
    kind, head = request.param.split("-")
    folder = str(tiny_llama(head == "tied"))
    lengths = {"max_model_len": 128, "max_new_tokens": 24}
    spec = GeneratorSpec(folder, dtype="float32", max_sequences=64, kv_cache_gib=0.1, **lengths)
    made: Generator = VllmGenerator(spec) if kind == "vllm" else HFGenerator(spec)
    yield made
    made.close()


def test_generator_and_trainer_agree_after_five_updates(
    generator: Generator, two_ranks: Ranks, tiny_world: Path
) -> None:
    config = lora_config(
        tiny_world,
        models={"policy": generator.spec.model},
        policy={"learning_rate": 1e-2},
        engine={"zero_stage": 3, "micro_batch_tokens": 512},
    )
    two_ranks.run(start_trainer, config)
    original = AutoModelForCausalLM.from_pretrained(generator.spec.model, dtype=torch.float32)
    for version in range(1, 7):
        _, batch = generator.exchange(make_prompts(16), Exchange(16))
        batch = experience.concat([batch])
        assert set(batch.column("weight_version").to_pylist()) == {version - 1}
        columns = experience.concat(two_ranks.run(columns_of, batch))
        rollout, trainer, reference = (
            experience.flat(experience.join(batch, columns), name)
            for name in ("rollout_logprobs", "logprobs", "reference_logprobs")
        )
        assert np.abs(rollout - trainer).max() < 1e-4
        # What an update that went missing would leave.
        assert (
            (largest_difference(original, batch) > 0.05) == (np.abs(rollout - reference).max() > 0.05) == (version > 1)
        )
        if version < 6:
            published, _ = two_ranks.run(updated, with_advantages(batch, version), version)
            result = generator.update_weights(published)
            # 4 layers: q and o 128 x 128, k and v 128 x 64, three of the MLP 128 x 352; 4 bytes each.
            numbers = 4 * RANK * (2 * 256 + 2 * 192 + 3 * 480)
            assert result["version"] == version
            assert 4 * numbers <= result["bytes"] == published.layout.total_bytes < 4 * numbers + 64 * 56


def test_an_adapter_of_another_model_changes_nothing(generator: Generator, two_ranks: Ranks, tiny_world: Path) -> None:
    two_ranks.run(start_trainer, lora_config(tiny_world))
    published, _ = two_ranks.run(updated, with_advantages(random_sequences(8)), 1)
    version = generator.version
    with pytest.raises(ValueError, match=r"weights version 1 is an adapter of .*model, not of "):
        generator.update_weights(published)
    assert generator.version == version
    assert generator.exchange(make_prompts(2), Exchange(2))[1].num_rows == 2


@pytest.mark.parametrize("generator", ["vllm-tied", "vllm-untied"], indirect=True)
def test_sequences_in_flight_go_on_under_the_new_adapter(
    generator: VllmGenerator, two_ranks: Ranks, tiny_world: Path
) -> None:
    config = lora_config(
        tiny_world,
        models={"policy": generator.spec.model},
        policy={"learning_rate": 3e-2},
        engine={"micro_batch_tokens": 512},
    )
    two_ranks.run(start_trainer, config)
    batch = experience.concat([generator.exchange(make_prompts(16), Exchange(16))[1]])
    first, _ = two_ranks.run(updated, with_advantages(batch), 1)
    generator.update_weights(first)
    three_tokens_in(generator, first_id=900)
    second, _ = two_ranks.run(updated, with_advantages(batch, 1), 2)
    generator.update_weights(second)
    late = experience.concat([generator.exchange(None, Exchange(99))[1]])
    assert late.num_rows >= 6 and set(late.column("weight_version").to_pylist()) == {1}
    # The trainer, two updates on, agrees with all tokens after the second, and not with those before it.
    after = experience.concat(two_ranks.run(columns_of, late))
    sampled, trained = experience.rows(late, "rollout_logprobs"), experience.rows(after, "logprobs")
    for mine, theirs in zip(sampled, trained, strict=True):
        np.testing.assert_allclose(mine[3:], theirs[3:], atol=1e-4)
    assert max(np.abs(mine[:3] - theirs[:3]).max() for mine, theirs in zip(sampled, trained, strict=True)) > 1e-2


@pytest.mark.parametrize("generator", ["vllm-tied", "vllm-untied"], indirect=True)
@pytest.mark.usefixtures("norm_arrives_altered")
def test_a_merged_weight_that_is_not_what_it_should_be_stops_the_generator(
    generator: VllmGenerator, two_ranks: Ranks, tiny_world: Path
) -> None:
    """Last in this file: it leaves the engine unusable."""
    two_ranks.run(start_trainer, lora_config(tiny_world, models={"policy": generator.spec.model}))
    batch = experience.concat([generator.exchange(make_prompts(8), Exchange(8))[1]])
    weights, _ = two_ranks.run(updated, with_advantages(batch), 1)
    with pytest.raises(RuntimeError, match=r"generator's model\.norm\.weight is not what was published"):
        generator.update_weights(weights)
    with pytest.raises(RuntimeError, match="update to weights version 1 failed"):
        generator.exchange(make_prompts(1))
