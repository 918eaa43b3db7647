"""Tiny random models of the families that are trained on."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from transformers import PreTrainedModel

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OLD: dict[str, Any] = {"vocab_size": 96, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
_GEMMA: dict[str, Any] = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (tf.LlamaForCausalLM, _SIZES),
    "mistral": (tf.MistralForCausalLM, _SIZES),
    "qwen2": (tf.Qwen2ForCausalLM, {**_SIZES, "tie_word_embeddings": True}),
    "qwen3": (tf.Qwen3ForCausalLM, {**_SIZES, "head_dim": 8}),
    "gemma": (tf.GemmaForCausalLM, {**_SIZES, "head_dim": 8}),
    "gemma2": (tf.Gemma2ForCausalLM, {**_SIZES, **_GEMMA}),
    "gemma3_text": (tf.Gemma3ForCausalLM, {**_SIZES, **_GEMMA}),
    "phi3": (tf.Phi3ForCausalLM, _SIZES),
    "gpt2": (tf.GPT2LMHeadModel, _OLD),
    "gpt_neox": (tf.GPTNeoXForCausalLM, {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}),
    "mixtral": (tf.MixtralForCausalLM, {**_SIZES, "num_local_experts": 4}),
    "qwen2_moe": (tf.Qwen2MoeForCausalLM, {**_SIZES, **_EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": (tf.Qwen3MoeForCausalLM, {**_SIZES, **_EXPERTS, "head_dim": 8}),
    "gemma3": (tf.Gemma3ForConditionalGeneration, {}),
}


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model; the same for the same seed."""
    architecture, sizes = FAMILIES[family]
    torch.manual_seed(seed)
    if family == "gemma3":
        vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = tf.Gemma3Config(
            text_config={**_SIZES, **_GEMMA, **changes},
            vision_config={**vision, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
            image_token_index=93,
            boi_token_index=94,
            eoi_token_index=95,
        )
    else:
        config = architecture.config_class(**{**sizes, **changes})
    model: PreTrainedModel = architecture(config)
    return model
