"""Weights that reach a real vLLM engine through packed buckets are the trainer's, after any number of
updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.roles.exchange import Exchange
from actors.roles.generator import GeneratorSpec, VllmGenerator
from actors.weights.transfer_engine import SAMPLE, PackedWeightTransferEngine, sample_names
from beaver_ray.weights import PublishedWeights
from tests.actors.conftest import disturb, largest_difference, make_prompts
from tests.packed_weights import pack

# About 13 buckets for the tiny model, so that layers lie across bucket boundaries.
BUCKET_BYTES = 2**18

Pair = tuple[VllmGenerator, PreTrainedModel]


def published(model: torch.nn.Module, version: int, leave_out: str = "") -> PublishedWeights:
    tensors = [(name, tensor) for name, tensor in model.state_dict().items() if name != leave_out]
    return pack(tensors, version, BUCKET_BYTES)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pair(request: pytest.FixtureRequest, tiny_llama: Callable[[bool], Path]) -> Iterator[Pair]:
    folder = tiny_llama(request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    spec = GeneratorSpec(
        str(folder), dtype="float32", max_model_len=128, max_new_tokens=24, max_sequences=64, kv_cache_gib=0.1
    )
    generator = VllmGenerator(spec)
    yield generator, model
    generator.close()


def test_logprobs_agree_after_every_update(pair: Pair) -> None:
    generator, model = pair
    _, before = generator.exchange(make_prompts(16), Exchange(16))
    assert largest_difference(model, before) < 1e-4
    for version in range(1, 6):
        disturb(model, seed=version)
        assert largest_difference(model, before) > 0.05, "the update must matter"
        result = generator.update_weights(published(model, version))
        assert result["version"] == generator.version == version
        assert result["bytes"] > 3_000_000
        # The same prompts once more: a prefix cache that outlived the update would show here.
        _, before = generator.exchange(make_prompts(16), Exchange(16))
        assert before.column("weight_version").to_pylist() == [version] * 16
        assert largest_difference(model, before) < 1e-4


def test_a_damaged_first_bucket_changes_nothing(pair: Pair) -> None:
    generator, model = pair
    version = generator.version
    changed = AutoModelForCausalLM.from_config(model.config).float()
    weights = published(changed, 99)
    weights.buckets[0].data[5] ^= 1
    with pytest.raises(ValueError, match=r"weights version 99, bucket 0 of .*: checksum"):
        generator.update_weights(weights)
    assert generator.version == version
    _, batch = generator.exchange(make_prompts(8), Exchange(8))
    assert largest_difference(model, batch) < 1e-4


def test_the_sample_changes_and_is_large_enough(pair: Pair) -> None:
    comparable = set(published(pair[1], 7).layout.names[:20])
    seen = set()
    for version in range(1, 30):
        names = sample_names(comparable, version)
        assert len(names) == SAMPLE and names <= comparable
        seen |= names
    assert seen == comparable
    assert sample_names({"a", "b"}, 1) == {"a", "b"}


def test_a_square_matrix_that_vllm_turned_over_is_not_compared() -> None:
    """A GPU holds GPT-2's Conv1D so; what is neither that nor what was published is an error as ever."""
    published = {"square": torch.arange(16.0).view(4, 4), "norm": torch.ones(4)}
    engine = object.__new__(PackedWeightTransferEngine)
    engine.comparable, engine.sampled, engine.model = None, {}, torch.nn.Module()
    assert dict(engine._sampling(published.items())).keys() == published.keys()
    for name, tensor in published.items():
        engine.model.register_parameter(
            name, torch.nn.Parameter(tensor.t().contiguous() if name == "square" else tensor)
        )
    engine._compare_sample()
    assert engine.comparable == {"norm"}
    engine.model.get_parameter("square").data[1, 2] += 1
    with pytest.raises(RuntimeError, match="the generator's square is not what was published"):
        engine._compare_sample()


@pytest.mark.usefixtures("norm_arrives_altered")
def test_a_failed_update_stops_the_generator(pair: Pair) -> None:
    """Last in this file: it leaves the engine unusable. Weights left out of a tied model (its lm_head.weight is the
    silent case), and a tensor of an untied one that is not what was sent.
    """
    generator, model = pair
    if model.config.tie_word_embeddings:
        with pytest.raises(RuntimeError, match="left 1 parameters"):
            generator.update_weights(published(model, 100, "lm_head.weight"))
    else:
        with pytest.raises(RuntimeError, match=r"generator's model\.norm\.weight is not what was published"):
            generator.update_weights(published(model, 100))
    with pytest.raises(RuntimeError, match="update to weights version 100 failed"):
        generator.exchange(make_prompts(1))
