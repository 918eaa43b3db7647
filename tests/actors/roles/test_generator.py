"""Both generators behind one interface: everything comes back once, exactly, and with the right log-probs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.roles import generator as generators
from actors.roles.exchange import FINISHED_SCHEMA, PROMPT_SCHEMA, Exchange, sample_seed
from actors.roles.generator import GeneratorSpec, VllmGenerator
from actors.roles.hf_generator import HFGenerator
from beaver_ray.errors import UserError
from tests.actors.conftest import (
    EOS,
    VOCABULARY,
    disturb,
    forward_logprobs,
    largest_difference,
    make_prompts,
    three_tokens_in,
)
from tests.actors.light_roles import when_opened
from tests.packed_weights import pack

pytestmark = pytest.mark.cluster

TEMPERATURE = 0.7
MODEL_LEN, NEW_TOKENS = 192, 32  # more than the 128 tokens of a block of the KV cache on a CPU

Generator = VllmGenerator | HFGenerator


def make_spec(folder: Path, **changes: Any) -> GeneratorSpec:
    values: dict[str, Any] = {"dtype": "float32", "max_model_len": MODEL_LEN, "max_new_tokens": NEW_TOKENS}
    values |= {
        "max_sequences": 24,
        "temperature": TEMPERATURE,
        "kv_cache_gib": 0.1,
        "seed": 5,
    }
    return GeneratorSpec(str(folder), **(values | changes))


@pytest.fixture(scope="module")
def vllm_generator(tiny_llama: Callable[[bool], Path]) -> Iterator[VllmGenerator]:
    generator = VllmGenerator(make_spec(tiny_llama(True)))
    yield generator
    generator.close()


@pytest.fixture(scope="module")
def hf_generator(tiny_llama: Callable[[bool], Path]) -> HFGenerator:
    return HFGenerator(make_spec(tiny_llama(True)))


@pytest.fixture(params=["vllm", "hf"])
def generator(request: pytest.FixtureRequest) -> Generator:
    return request.getfixturevalue(f"{request.param}_generator")


@pytest.fixture
def model(tiny_llama: Callable[[bool], Path]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama(True), dtype=torch.float32)


def drain(generator: Generator, prompts: pa.RecordBatch) -> dict[int, dict[str, Any]]:
    _, batch = generator.exchange(prompts, Exchange(prompts.num_rows))
    return {row["sample_id"]: row for row in batch.to_pylist()}


def test_ragged_prompts_all_come_back_once(generator: Generator, model: PreTrainedModel) -> None:
    # More than fit at a time, some with room for one token only.
    prompts = make_prompts(60, lengths=(1, MODEL_LEN))
    found: list[dict[str, Any]] = []
    summary, batch = generator.exchange(prompts, Exchange(7))
    while True:
        assert batch.schema == FINISHED_SCHEMA
        assert summary["sample_ids"] == batch.column("sample_id").to_pylist()
        found += batch.to_pylist()
        assert summary["generated_tokens"] == sum(map(len, batch.column("response_tokens").to_pylist()))
        assert largest_difference(model, batch, TEMPERATURE) < 1e-4
        if len(found) == 60:
            break
        assert batch.num_rows >= 7
        summary, batch = generator.exchange(None, Exchange(7))
    sent = {row["sample_id"]: row for row in prompts.to_pylist()}
    assert sorted(row["sample_id"] for row in found) == sorted(sent)
    for row in found:
        assert {name: row[name] for name in PROMPT_SCHEMA.names} == sent[row["sample_id"]]
        response = row["response_tokens"]
        assert len(response) == len(row["rollout_logprobs"]) > 0
        assert row["loss_mask"] == [True] * len(response)
        assert row["weight_version"] == 0
        room = min(NEW_TOKENS, MODEL_LEN - len(row["prompt_tokens"]))
        if row["finish_reason"] == "stop":
            assert response.index(EOS) == len(response) - 1 < room
        else:
            assert row["finish_reason"] == "length" and len(response) == room and EOS not in response
    assert {row["finish_reason"] for row in found} == {"stop", "length"}
    summary, batch = generator.exchange(None)
    assert summary["sample_ids"] == [] and batch.num_rows == 0 and batch.schema == FINISHED_SCHEMA


def test_a_sample_does_not_depend_on_its_batch(generator: Generator) -> None:
    """Fault 8 of the published code."""
    prompts = make_prompts(12, first_id=500, seed=1)
    together = drain(generator, prompts)
    apart = drain(generator, prompts.take(pa.array([7, 3]))) | drain(generator, prompts.take(pa.array([0])))
    for sample_id, row in apart.items():
        assert row["response_tokens"] == together[sample_id]["response_tokens"]
    twin = [{"sample_id": 600 + i, "prompt_id": 0, "prompt_tokens": [5, 6, 7]} for i in range(8)]
    answers = drain(generator, pa.RecordBatch.from_pylist(twin, schema=PROMPT_SCHEMA))
    assert len({tuple(row["response_tokens"]) for row in answers.values()}) > 1


def nucleus(model: PreTrainedModel, row: dict[str, Any], share: float) -> list[float]:
    """Log-probs of a row's response among the fewest likeliest tokens that have this share together."""
    start, found = len(row["prompt_tokens"]), []
    tokens = row["prompt_tokens"] + row["response_tokens"]
    with torch.no_grad():
        probabilities_LV = (model(torch.tensor([tokens])).logits[0] / TEMPERATURE).softmax(-1).tolist()
    for token, probabilities in zip(tokens[start:], probabilities_LV[start - 1 :], strict=False):
        kept: list[float] = []
        for probability in sorted(probabilities, reverse=True):
            if sum(kept) < share:
                kept.append(probability)
        assert len(kept) < VOCABULARY / 2 and probabilities[token] >= kept[-1], "sampled outside"
        found.append(math.log(probabilities[token] / sum(kept)))
    return found


def test_sampling_from_the_likeliest_tokens_and_greedy(
    generator: Generator, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = make_prompts(8, first_id=800, seed=12)
    monkeypatch.setattr(generator, "spec", replace(generator.spec, top_p=0.6))
    for row in drain(generator, prompts).values():
        assert row["rollout_logprobs"] == pytest.approx(nucleus(model, row, 0.6), abs=1e-4)
    monkeypatch.setattr(generator, "spec", replace(generator.spec, top_p=1.0, temperature=0.0))
    for row in drain(generator, prompts).values():
        # Log-probs are those at temperature 1.
        assert row["rollout_logprobs"] == pytest.approx(forward_logprobs(model, row, 1.0).tolist(), abs=1e-4)
        with torch.no_grad():
            best = model(torch.tensor([row["prompt_tokens"] + row["response_tokens"]])).logits[0].argmax(-1)
        assert row["response_tokens"] == best[len(row["prompt_tokens"]) - 1 : -1].tolist()


def test_prompt_tokens_of_the_cache_are_told_apart(generator: Generator) -> None:
    """The same 140 tokens in front of four prompts, one after the other: vLLM's cache has blocks of 128 on a CPU."""
    shared = make_prompts(1, seed=9, lengths=(140, 141)).column("prompt_tokens").to_pylist()[0]
    before = replace(generator.prompt_tokens())
    for number in range(4):
        row = {"sample_id": 700 + number, "prompt_id": 0, "prompt_tokens": [*shared, 5 + number]}
        drain(generator, pa.RecordBatch.from_pylist([row], schema=PROMPT_SCHEMA))
    after = generator.prompt_tokens()
    assert after.read - before.read == 4 * (len(shared) + 1)
    cached = after.cached - before.cached
    assert cached == 0 if isinstance(generator, HFGenerator) else 3 * 128 <= cached <= 3 * len(shared)


def test_a_prompt_that_cannot_be_generated_from_is_refused(generator: Generator) -> None:
    rows = [
        {"sample_id": 1, "prompt_id": 1, "prompt_tokens": [5]},
        {"sample_id": 2, "prompt_id": 2, "prompt_tokens": [5] * MODEL_LEN},
    ]
    with pytest.raises(UserError, match="sample 2: its prompt has 192 tokens, but must have 1 to 191"):
        generator.exchange(pa.RecordBatch.from_pylist(rows, schema=PROMPT_SCHEMA))
    rows[1]["prompt_tokens"] = []
    with pytest.raises(UserError, match="sample 2: its prompt has 0 tokens"):
        generator.exchange(pa.RecordBatch.from_pylist(rows, schema=PROMPT_SCHEMA))
    assert generator.exchange(None)[1].num_rows == 0, "a refused call takes no prompt in"


@pytest.fixture
def new_model(model: PreTrainedModel) -> PreTrainedModel:
    new = AutoModelForCausalLM.from_config(model.config).float()
    new.load_state_dict(model.state_dict())
    disturb(new, seed=1)
    return new


def back_to_version_0(generator: VllmGenerator, model: PreTrainedModel) -> None:
    generator.update_weights(pack(model.state_dict().items(), 0, 2**20))


def test_update_with_sequences_in_flight(
    vllm_generator: VllmGenerator, model: PreTrainedModel, new_model: PreTrainedModel
) -> None:
    """The tokens sampled before an update are the old weights', all later ones the new weights'."""
    early = three_tokens_in(vllm_generator)
    vllm_generator.update_weights(pack(new_model.state_dict().items(), 1, 2**20))
    _, late = vllm_generator.exchange(None, Exchange(99))
    assert len(early) + late.num_rows == 13 and late.num_rows >= 6 and vllm_generator.version == 1
    for row in late.to_pylist():
        assert row["weight_version"] == 0
        assert row["token_versions"] == [0] * 3 + [1] * (len(row["response_tokens"]) - 3)
        sampled = torch.tensor(row["rollout_logprobs"])
        by_old = forward_logprobs(model, row, TEMPERATURE)
        by_new = forward_logprobs(new_model, row, TEMPERATURE)
        torch.testing.assert_close(sampled[:3], by_old[:3], atol=1e-4, rtol=0)
        torch.testing.assert_close(sampled[3:], by_new[3:], atol=1e-4, rtol=0)
        assert not torch.allclose(by_old, by_new, atol=1e-2)
    back_to_version_0(vllm_generator, model)


def test_keeping_the_kv_cache(
    vllm_generator: VllmGenerator,
    model: PreTrainedModel,
    new_model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With in_flight: keep the new weights go on over the old ones' keys and values, which no new prompt sees."""
    monkeypatch.setattr(vllm_generator, "spec", replace(vllm_generator.spec, in_flight="keep"))
    three_tokens_in(vllm_generator)
    shared = pa.RecordBatch.from_pylist([{"sample_id": 90, "prompt_id": 0, "prompt_tokens": [9] * 150}], PROMPT_SCHEMA)
    weights = pack(new_model.state_dict().items(), 1, 2**20)
    _, late = vllm_generator.exchange(shared, Exchange(99, weights))
    rows = {row["sample_id"]: row for row in late.to_pylist()}
    fresh = rows.pop(90)
    by_new = forward_logprobs(new_model, fresh, TEMPERATURE)
    torch.testing.assert_close(torch.tensor(fresh["rollout_logprobs"]), by_new, atol=1e-4, rtol=0)
    assert set(fresh["token_versions"]) == {1} and len(rows) >= 6
    for row in rows.values():
        tokens = torch.tensor([row["prompt_tokens"] + row["response_tokens"]])
        cached = len(row["prompt_tokens"]) + 2  # the third token was sampled, not yet read
        with torch.no_grad():
            cache = model(tokens[:, :cached], use_cache=True).past_key_values
            logits = new_model(tokens[:, cached:-1], past_key_values=cache).logits[0] / TEMPERATURE
        expected = logits.log_softmax(-1)[torch.arange(len(logits)), tokens[0, cached + 1 :]]
        torch.testing.assert_close(torch.tensor(row["rollout_logprobs"][3:]), expected, atol=1e-4, rtol=0)
    back_to_version_0(vllm_generator, model)


def test_a_version_that_comes_again_is_not_the_old_one(
    vllm_generator: VllmGenerator,
    model: PreTrainedModel,
    new_model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that is rolled back trains its steps again: their versions have the numbers of others."""
    monkeypatch.setattr(vllm_generator, "spec", replace(vllm_generator.spec, in_flight="keep"))
    prompt = {"prompt_id": 0, "prompt_tokens": [9] * 150}
    for sample, version_21 in ((90, model), (91, new_model)):
        weights = pack(version_21.state_dict().items(), 21, 2**20)
        rows = pa.RecordBatch.from_pylist([{"sample_id": sample, **prompt}], PROMPT_SCHEMA)
        (row,) = vllm_generator.exchange(rows, Exchange(1, weights))[1].to_pylist()
        expected = forward_logprobs(version_21, row, TEMPERATURE)
        torch.testing.assert_close(torch.tensor(row["rollout_logprobs"]), expected, atol=1e-4, rtol=0)
    back_to_version_0(vllm_generator, model)


def test_finishing_under_the_old_weights(
    vllm_generator: VllmGenerator,
    model: PreTrainedModel,
    new_model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With in_flight: finish new weights, and the prompts that came with them, wait for the sequences under way."""
    monkeypatch.setattr(vllm_generator, "spec", replace(vllm_generator.spec, in_flight="finish"))
    three_tokens_in(vllm_generator)
    new = make_prompts(4, first_id=90, seed=7)
    weights = pack(new_model.state_dict().items(), 1, 2**20)
    late: list[dict[str, Any]] = []
    _, batch = vllm_generator.exchange(new, Exchange(1, weights, slice_s=0.0))
    assert vllm_generator.version == 0
    late = batch.to_pylist() + vllm_generator.exchange(None, Exchange(99))[1].to_pylist()
    assert {row["sample_id"] for row in late} >= {90, 91, 92, 93}
    for row in late:
        version = int(row["sample_id"] >= 90)
        expected = forward_logprobs((model, new_model)[version], row, TEMPERATURE)
        assert set(row["token_versions"]) == {version}
        torch.testing.assert_close(torch.tensor(row["rollout_logprobs"]), expected, atol=1e-4, rtol=0)
    back_to_version_0(vllm_generator, model)


@pytest.fixture
def ray_here() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, log_to_driver=False, logging_level="ERROR")  # type: ignore[arg-type]
    yield
    ray.shutdown()


@pytest.mark.usefixtures("ray_here")
def test_sequences_in_flight_go_on_until_all_buckets_are_here(
    vllm_generator: VllmGenerator, model: PreTrainedModel, new_model: PreTrainedModel, tmp_path: Path
) -> None:
    weights = pack(new_model.state_dict().items(), 1, 2**20)
    assert len(weights.buckets) > 2
    last = ray.remote(when_opened).remote(weights.buckets[-1], str(tmp_path / "gate"))
    announced = replace(weights, buckets=(*weights.buckets[:-1], last))
    three_tokens_in(vllm_generator)
    _, late = vllm_generator.exchange(None, Exchange(99, announced))
    assert late.num_rows >= 6 and vllm_generator.version == 0
    assert all(set(row["token_versions"]) == {0} for row in late.to_pylist())
    (tmp_path / "gate").touch()
    # Nothing is in flight: these wait for the weights.
    summary, fresh = vllm_generator.exchange(make_prompts(4, first_id=90), Exchange(4))
    assert set(fresh.column("weight_version").to_pylist()) == {1} and summary["load_s"] > 0
    assert largest_difference(new_model, fresh, TEMPERATURE) < 1e-4
    back_to_version_0(vllm_generator, model)


def test_weights_come_with_prompts_and_samples_can_be_dropped(
    generator: Generator, model: PreTrainedModel, new_model: PreTrainedModel
) -> None:
    weights = pack(new_model.state_dict().items(), 1, 2**20)
    summary, batch = generator.exchange(make_prompts(30, seed=8), Exchange(1, weights))
    assert generator.version == 1 and set(batch.column("weight_version").to_pylist()) == {1}
    left = sorted(set(range(30)) - set(summary["sample_ids"]))
    summary, _ = generator.exchange(None, Exchange(99, abort=[*left[:3], 1000]))
    assert sorted(summary["aborted"]) == left[:3] and generator.version == 1
    assert sorted(summary["sample_ids"]) == left[3:]
    # What was dropped may come again under its number.
    assert sorted(drain(generator, make_prompts(30, seed=8).take(pa.array(left[:3])))) == left[:3]
    generator.update_weights(pack(model.state_dict().items(), 0, 2**20))


def test_five_updates_at_low_temperature(hf_generator: HFGenerator, model: PreTrainedModel) -> None:
    """vLLM's are in test_transfer_engine.py."""
    for version in range(1, 6):
        disturb(model, seed=version)
        hf_generator.update_weights(pack(model.state_dict().items(), version, 2**20))
        batch = hf_generator.exchange(make_prompts(12, seed=4), Exchange(12))[1]
        assert set(batch.column("weight_version").to_pylist()) == {version}
        assert largest_difference(model, batch, TEMPERATURE) < 1e-4


def test_hf_generator_repeats_bit_for_bit(tiny_llama: Callable[[bool], Path]) -> None:
    for changes in ({}, {"per_sample_seeds": False}):
        spec = make_spec(tiny_llama(False), **changes)
        prompts = make_prompts(30, seed=6)
        one, two = (HFGenerator(spec).exchange(prompts, Exchange(30))[1] for _ in range(2))
        assert one.equals(two)
    other = HFGenerator(make_spec(tiny_llama(False), seed=6)).exchange(prompts, Exchange(30))[1]
    assert other.column("response_tokens") != one.column("response_tokens")


def test_hf_refuses_weights_of_another_model(hf_generator: HFGenerator, model: PreTrainedModel) -> None:
    tensors = dict(model.state_dict())
    tensors.pop("lm_head.weight")
    with pytest.raises(ValueError, match=r"differ in 1 tensors: lm_head\.weight"):
        hf_generator.update_weights(pack(tensors.items(), 9))


def test_hf_changes_nothing_for_a_damaged_bucket(hf_generator: HFGenerator, new_model: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in hf_generator.model.state_dict().items()}
    weights = pack(new_model.state_dict().items(), 9, 2**20)
    weights.buckets[-1].data[5] ^= 1
    with pytest.raises(ValueError, match=r"weights version 9, bucket .*: checksum"):
        hf_generator.update_weights(weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in hf_generator.model.state_dict().items())


def test_a_damaged_bucket_after_others_stops_the_generator(
    vllm_generator: VllmGenerator, new_model: PreTrainedModel
) -> None:
    """The last of this file's with vLLM: it leaves the engine unusable."""
    weights = pack(new_model.state_dict().items(), 9, 2**20)
    weights.buckets[1].data[5] ^= 1
    with pytest.raises(ValueError, match=r"weights version 9, bucket 1 of .*: checksum"):
        vllm_generator.exchange(make_prompts(1), Exchange(1, weights))
    with pytest.raises(RuntimeError, match="cannot go on: its update to weights version 9 failed half-way"):
        vllm_generator.exchange(None)


def test_a_kv_cache_that_is_too_small_is_one_line(
    tiny_llama: Callable[[bool], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In vLLM's own words, as far as they are of use here; other mistakes keep their traceback."""
    says = "To serve at least one request 4 GiB KV cache is needed, the available memory is 1 GiB. Try increasing `x`"
    errors = [ValueError(says), ValueError("Invalid block size")]

    def fail(spec: GeneratorSpec, seeded: bool) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(generators, "start_engine", fail)
    with pytest.raises(UserError, match=r"KV cache: To serve .* is 1 GiB\. raise kv_cache_gib, .*rollout\.gpus"):
        VllmGenerator(make_spec(tiny_llama(True)))
    with pytest.raises(ValueError, match="block size"):
        VllmGenerator(make_spec(tiny_llama(True)))


def test_the_weights_of_a_hub_name_take_their_part_of_a_shared_gpu(
    tiny_llama: Callable[[bool], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_llama(False)
    numbers = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(folder).parameters())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: str(folder / file))
    for model in (str(folder), "nobody/model"):
        spec = replace(make_spec(folder), model=model, gpu_memory_utilization=0.5)
        assert generators.shared_kv_cache_bytes(spec) == 40 * 2**30 - 4 * numbers - 3 * 2**30


def test_sample_seeds_are_stable_and_spread() -> None:
    # blake2b("5:7", 8 bytes) >> 1, worked out once with `b2sum -l 64`.
    assert sample_seed(5, 7) == int("d9afb865f23da7f1", 16) >> 1
    seeds = {sample_seed(seed, i) for seed in range(3) for i in range(1000)}
    assert len(seeds) == 3000 and all(0 <= seed < 2**63 for seed in seeds)
