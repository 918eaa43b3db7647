"""A tiny random model of every family that the README names, as Hugging Face folders with a tokenizer of letters.

Each has two layers and what sets its family apart: tied heads, windows, caps, biases, experts, dropout of its own.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from launch.bench.models import BOS, EOS, PAD, UNKNOWN

VOCABULARY = 128
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}


@dataclass(frozen=True)
class Family:
    """transformers' configuration class without its ending Config, and what it says beside sizes."""

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    shape: dict[str, Any] = field(default_factory=lambda: SHAPE)


FAMILIES = {
    "Llama 2": Family("Llama", {"num_key_value_heads": 2}),
    "Llama 3": Family(
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "tie_word_embeddings": True,
        },
    ),
    "Qwen 2.5": Family("Qwen2", {"tie_word_embeddings": True}),
    "Qwen 3": Family("Qwen3", {"head_dim": 32}),
    "Gemma 2": Family("Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "Gemma 3": Family("Gemma3Text", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "Mistral": Family("Mistral", {"head_dim": 32, "sliding_window": 16}),
    "Phi-3": Family("Phi3"),
    "OPT": Family(
        "OPT",
        {"ffn_dim": 128, "word_embed_proj_dim": 64},
        shape={n: SHAPE[n] for n in SHAPE if n not in ("intermediate_size", "num_key_value_heads")},
    ),
    "GPT-2": Family("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256}, shape={}),
    "GPT-NeoX": Family("GPTNeoX", shape={n: SHAPE[n] for n in SHAPE if n != "num_key_value_heads"}),
    "OLMo 2": Family("Olmo2"),
    "Mixtral": Family("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2-MoE": Family("Qwen2Moe", {"num_experts": 4, "shared_expert_intermediate_size": 64, **EXPERTS}),
    "Qwen3-MoE": Family("Qwen3Moe", {"num_experts": 4, "head_dim": 32, **EXPERTS}),
}


def write_family(folder: Path, name: str) -> Path:
    """A random policy of the family, far enough from uniform that every layer matters."""
    family = FAMILIES[name]
    ids = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    settings = {**family.shape, **ids, "initializer_range": 0.1, **family.settings}
    config = getattr(transformers, f"{family.kind}Config")(**settings)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_letters(folder)
    return folder


def write_letters(folder: Path) -> None:
    """A byte-level tokenizer without merges: a letter is a token, and so is a space.

    transformers reads folders of some families (Qwen 2.5) with a class of their own, whatever the folder says, and that
    class splits at letters, digits and spaces; tokenizers of other kinds give nothing there.
    """
    letters = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN}
    letters |= {letter: len(letters) + i for i, letter in enumerate((*string.ascii_lowercase, "\u0120"))}
    core = Tokenizer(models.BPE(letters, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ ' ' + message.content }}"
        "{% if message.role == 'assistant' %}{{ ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
