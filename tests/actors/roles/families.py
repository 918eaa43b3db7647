"""A tiny random model of every family that README names takes new weights into vLLM, whole ones and adapters: generator
and trainer agree to 1e-4 in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from actors.roles.exchange import Exchange
from actors.roles.generator import GeneratorSpec, VllmGenerator
from beaver_ray.errors import UserError
from beaver_ray.models.checkpoint_names import CheckpointNames, checkpoint_names
from beaver_ray.models.loading import load_policy
from beaver_ray.models.lora import adapter_name, add_adapter, is_adapter
from beaver_ray.weights import AdapterInfo
from launch.bench.family_models import FAMILIES, VOCABULARY, write_family
from tests.actors.conftest import disturb, largest_difference, make_prompts
from tests.packed_weights import pack

RANK, ALPHA = 4, 16.0


@dataclass
class Case:
    name: str
    folder: Path
    model: Any
    """transformers' own, with its plainest attention."""
    names: CheckpointNames
    generator: VllmGenerator


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = write_family(tmp_path_factory.mktemp("family"), request.param)
    # Before the engine, which changes some of transformers' classes.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    names = checkpoint_names(str(folder))
    load_policy(str(folder), torch.float32)
    lengths = {"max_model_len": 64, "max_new_tokens": 12, "max_sequences": 16, "kv_cache_gib": 0.05}
    generator = VllmGenerator(GeneratorSpec(str(folder), dtype="float32", **lengths))  # type: ignore[arg-type]
    yield Case(request.param, folder, model, names, generator)
    generator.close()


def difference(generator: VllmGenerator, model: torch.nn.Module) -> float:
    prompts = make_prompts(8, vocabulary=VOCABULARY)
    return largest_difference(model, generator.exchange(prompts, Exchange(8))[1])


def test_whole_weights_arrive(case: Case) -> None:
    generator, model = case.generator, copy.deepcopy(case.model)
    assert difference(generator, model) < 1e-4
    for version in (1, 2):
        disturb(model, seed=version)
        assert difference(generator, model) > 1e-2, "the update must matter"
        # Small buckets: a layer's tensors lie in several of them.
        generator.update_weights(pack(model.state_dict().items(), version, bucket_bytes=2**14))
        assert difference(generator, model) < 1e-4


def test_adapters_arrive(case: Case) -> None:
    generator, model = case.generator, copy.deepcopy(case.model)
    if case.name == "GPT-2":
        with pytest.raises(UserError, match="no LoRA for a model of type gpt2"):
            add_adapter(model, RANK, ALPHA, seed=0)
        return
    wrapped = add_adapter(model, RANK, ALPHA, seed=0)
    trained = [(n, p) for n, p in wrapped.named_parameters() if p.requires_grad]
    assert trained and all(is_adapter(n) and p.ndim == 2 for n, p in trained)
    info = AdapterInfo(RANK, ALPHA, str(case.folder))
    for version in (3, 4):
        torch.manual_seed(version)
        with torch.no_grad():
            for _, parameter in trained:
                parameter.add_(0.1 * torch.randn_like(parameter))
        assert difference(generator, wrapped) > 1e-2
        adapter = ((adapter_name(n), p) for n, p in wrapped.state_dict().items() if is_adapter(n))
        generator.update_weights(pack(adapter, version, bucket_bytes=2**14, adapter=info))
        assert difference(generator, wrapped) < 1e-4


def test_names_are_those_of_the_files(case: Case) -> None:
    """transformers' own saving is what is compared with."""
    state = case.model.state_dict().items()
    found = case.names.in_files((n, t) for n, t in state if n not in case.names.tied)
    with safe_open(case.folder / "model.safetensors", framework="pt") as file:
        assert set(found) == set(file.keys())
        for name, tensor in found.items():
            assert torch.equal(tensor, file.get_tensor(name)), name
