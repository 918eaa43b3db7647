"""A tiny Llama with random weights and a word-level tokenizer, and what the generators' tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actors.roles.exchange import PROMPT_SCHEMA
from actors.roles.generator import VllmGenerator

VOCABULARY = 256
PAD, BOS, EOS = 0, 1, 2


def build_tiny_llama(folder: Path, tied: bool, seed: int = 0) -> Path:
    """About 0.8 million parameters: hidden size 128, 4 layers, 256 tokens."""
    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.1,  # large enough for distributions that are far from uniform
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def norm_arrives_altered(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is given other numbers for one tensor than those that came, and all that can be compared is."""
    from actors.weights import transfer_engine as weight_transfer

    load = weight_transfer.PackedWeightTransferEngine._load

    def load_altered(engine: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        load(engine, ((name, t * 1.001 if name == "model.norm.weight" else t) for name, t in weights))

    monkeypatch.setattr(weight_transfer.PackedWeightTransferEngine, "_load", load_altered)
    monkeypatch.setattr(weight_transfer, "SAMPLE", 1000)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """tiny_llama(tied) -> folder; built once a session."""
    built: dict[bool, Path] = {}

    def folder(tied: bool) -> Path:
        if tied not in built:
            built[tied] = build_tiny_llama(tmp_path_factory.mktemp(f"llama-tied-{tied}"), tied)
        return built[tied]

    return folder


def make_prompts(
    count: int, first_id: int = 0, seed: int = 0, lengths: tuple[int, int] = (1, 40), vocabulary: int = VOCABULARY
) -> pa.RecordBatch:
    """Ragged random prompts; sample_id counts from `first_id`, prompt_id is sample_id + 10,000."""
    rng = np.random.default_rng(seed)
    rows = [
        {
            "sample_id": first_id + i,
            "prompt_id": first_id + i + 10_000,
            "prompt_tokens": rng.integers(3, vocabulary, rng.integers(*lengths)).tolist(),
        }
        for i in range(count)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=PROMPT_SCHEMA)


def three_tokens_in(generator: VllmGenerator, first_id: int = 0) -> list[dict[str, Any]]:
    """Starts 13 sequences and returns those that are finished when each of the others has three tokens."""
    # The first prompt leaves room for exactly three tokens.
    prompt = [9] * (generator.spec.max_model_len - 3)
    first = {"sample_id": first_id, "prompt_id": 0, "prompt_tokens": prompt}
    rows = [first, *make_prompts(12, first_id=first_id + 1, seed=3).to_pylist()]
    early: list[dict[str, Any]] = generator.exchange(pa.RecordBatch.from_pylist(rows, PROMPT_SCHEMA))[1].to_pylist()
    while first_id not in [row["sample_id"] for row in early]:
        early += generator.exchange(None)[1].to_pylist()
    return early


def forward_logprobs(model: torch.nn.Module, row: dict[str, Any], temperature: float) -> torch.Tensor:
    """Log-probs of a finished row's response from one unpadded forward pass, under softmax(logits / T)."""
    tokens = torch.tensor([row["prompt_tokens"] + row["response_tokens"]])
    with torch.no_grad():
        logits = model(tokens).logits[0, len(row["prompt_tokens"]) - 1 : -1] / temperature
    return logits.log_softmax(-1)[torch.arange(len(logits)), torch.tensor(row["response_tokens"])]


def largest_difference(model: torch.nn.Module, batch: pa.RecordBatch, temperature: float = 1.0) -> float:
    """Between a batch's rollout log-probs and those of the forward pass."""
    differences = [
        forward_logprobs(model, row, temperature) - torch.tensor(row["rollout_logprobs"]) for row in batch.to_pylist()
    ]
    return float(torch.cat(differences).abs().max())


def disturb(model: torch.nn.Module, seed: int) -> None:
    """Add noise to every parameter, enough to change log-probs by far more than any tolerance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
