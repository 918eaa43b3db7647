"""Tiny random guards on disk: a language model, and a tokenizer that carries a chat template of the guard's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.models.families import tiny_model

SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
WORDS = [
    *("Safety: Safe", "Safety: Unsafe", "Categories: None Violent", "Refusal: Yes", "Refusal: No"),
    *("Harmful request: yes no", "Response refusal: yes", "Harmful response: no"),
    *("safe\n", "unsafe\nS1", "Yes", "No", "user assistant Agent User"),
]

QWEN3GUARD = (
    "{% if messages[-1].role == 'assistant' %}{% set what = 'response' %}{% else %}{% set what = 'query' %}{% endif %}"
    "<|im_start|>user\nIs the last {{ what }} safe?\n<BEGIN CONVERSATION>\n"
    "{% for m in messages %}{{ m.role|upper }}: {{ m.content }}\n{% endfor %}<END CONVERSATION><|im_end|>\n"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
)
# Newer ones take a message's text as a list of parts.
LLAMA_GUARD = (
    "<s>user\n\nIs there unsafe content in 'Agent' messages?\n\n<BEGIN CONVERSATION>"
    "{% for m in messages %}{{ '\n\nUser: ' if loop.index0 % 2 == 0 else '\n\nAgent: ' }}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    "{{ '\n\n<END CONVERSATION><|eot_id|>assistant<|eot_id|>' }}"
)
SHIELD_GEMMA = (
    "<s>You are a policy expert.\n\nHuman Question: {{ messages[0].content|trim }}\n\n"
    "Chatbot Response: {{ messages[1].content|trim }}\n\nOur safety principle:\n\n* {{ guideline|trim }}\n\n"
    "{{ 'Your answer must start with Yes or No.\n\n' }}"
)
TEMPLATES = {"qwen3guard": QWEN3GUARD, "llama_guard": LLAMA_GUARD, "shield_gemma": SHIELD_GEMMA}
FAMILIES = {"qwen3guard": "qwen3", "llama_guard": "llama", "shield_gemma": "gemma2", "wildguard": "mistral"}


def guard_tokenizer(guard: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE; for wildguard, as for Llama and Mistral, one that writes the space before the first word."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    spaces = guard == "wildguard"
    core.pre_tokenizer = (
        pre_tokenizers.Metaspace(prepend_scheme="first") if spaces else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    core.decoder = decoders.Metaspace(prepend_scheme="first") if spaces else decoders.ByteLevel()
    alphabet = [chr(code) for code in range(32, 127)] + ["\n"] if spaces else pre_tokenizers.ByteLevel.alphabet()
    if guard is None:  # it starts texts with BOS, as Llama's does
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(WORDS * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[3:],
    )
    tokenizer.chat_template = TEMPLATES.get(str(guard))
    return tokenizer


def write_guard(folder: Path, guard: str | None, seed: int = 0, **changes: Any) -> str:
    """A guard's folder; with ``guard`` None it has no chat template."""
    tokenizer = guard_tokenizer(guard)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "initializer_range": 0.5}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    tiny_model(FAMILIES.get(str(guard), "llama"), seed, **{**sizes, **ids, **changes}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
