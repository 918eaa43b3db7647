"""Writes a small world to a folder: data files as from anywhere else, a tokenizer and a random policy.

    world.json                       the settings, written last: a folder with it is complete
    demonstrations/{train,test}.jsonl  {"prompt", "response"}
    preferences/{train,test}.jsonl   PKU-SafeRLHF's columns; where the world knows a second kind of harm, privacy, pairs
                                     that are labelled by it are in preferences_privacy/
    prompts/{train,test,sealed}.jsonl  {"prompt"}, of the harder world {"prompt", "kind"}; the sealed ones are in no
                                     other file, at most 1000
    seeds/{train,test}.jsonl         {"prompt", "category"}, the adversarial prompts of a split with their topics
    moderation/{train,test}.jsonl    {"prompt", "response", "labels", "kind", "topic"}, single answers
    ptx.jsonl                        the train demonstrations again
    model/                           Hugging Face folder: Llama weights (float32 safetensors) and tokenizer

The same world and arguments give the same bytes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from beaver_ray.errors import UserError
from beaver_ray.small_world.pairs import demonstration_rows, moderation_rows, preference_rows
from beaver_ray.small_world.world import SmallWorld, Split

SEALED_PROMPTS = 1000
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
# The published conversation template's words too, so that recipes using it meet no unknown word.
TEMPLATE_WORDS = ("USER:", "ASSISTANT:", "BEGINNING", "OF", "CONVERSATION:")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ ' USER: ' + message.content }}"
    "{% elif message.role == 'assistant' %}{{ ' ASSISTANT: ' + message.content + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('the small world knows the roles user and assistant only') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def build(
    folder: Path,
    world: SmallWorld,
    *,
    pairs: int = 12000,
    test_pairs: int = 1000,
    demonstrations: int = 4000,
    test_demonstrations: int = 400,
    labelled: int = 4000,
    test_labelled: int = 1000,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    tie_word_embeddings: bool = True,
) -> None:
    """Write the world to `folder` (made if missing, files in it replaced); takes about a second.

    Raises UserError if `heads` does not divide `hidden_size` into even parts.
    """
    if hidden_size % heads or (hidden_size // heads) % 2:
        raise UserError(f"hidden_size={hidden_size} cannot be split into {heads} even heads: change either")
    folder = Path(folder)
    marker = folder / "world.json"
    marker.unlink(missing_ok=True)

    sizes: dict[Split, tuple[int, int, int]] = {
        "train": (demonstrations, pairs, labelled),
        "test": (test_demonstrations, test_pairs, test_labelled),
    }
    for split, (demonstration_count, pair_count, labelled_count) in sizes.items():
        rng = random.Random(f"{world.seed}/demonstrations/{split}")
        demonstrated = demonstration_rows(world, demonstration_count, rng, split)
        _write_jsonl(folder / "demonstrations" / f"{split}.jsonl", demonstrated)
        if split == "train":
            _write_jsonl(folder / "ptx.jsonl", demonstrated)
        for harm in world.severities_by_word:
            name = "preferences" if harm == "harm" else f"preferences_{harm}"
            rng = random.Random(f"{world.seed}/{name}/{split}")
            preferences = preference_rows(world, pair_count, split, rng, harm)
            _write_jsonl(folder / name / f"{split}.jsonl", preferences)
        rng = random.Random(f"{world.seed}/moderation/{split}")
        _write_jsonl(folder / "moderation" / f"{split}.jsonl", moderation_rows(world, labelled_count, split, rng))
        prompts = world.prompts(split)
        _write_jsonl(folder / "prompts" / f"{split}.jsonl", map(world.row, prompts))
        seeds = ({"prompt": p.text, "category": p.topic} for p in prompts if p.kind == "adversarial")
        _write_jsonl(folder / "seeds" / f"{split}.jsonl", seeds)
    sealed = world.sealed_prompts(SEALED_PROMPTS)
    _write_jsonl(folder / "prompts" / "sealed.jsonl", map(world.row, sealed))

    tokenizer = build_tokenizer(world)
    tokenizer.save_pretrained(folder / "model")
    model = build_model(
        world,
        tokenizer,
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        tie_word_embeddings=tie_word_embeddings,
    )
    model.save_pretrained(folder / "model")
    world.save(marker)


def build_tokenizer(world: SmallWorld) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that splits at white space; ids fill a multiple of 64 without gaps.

    It adds no special tokens by itself: the chat template writes <s> and </s>.
    """
    words = [*SPECIAL_TOKENS, *TEMPLATE_WORDS, *world.vocabulary()]
    # Spare ids are ordinary words: an answer that uses them shows them, and pays for them as clutter.
    words += [f"spare{i}" for i in range(-len(words) % 64)]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    # The published template puts no space between "ASSISTANT:" and an answer.
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("ASSISTANT:", "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(
    world: SmallWorld,
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    tie_word_embeddings: bool = True,
) -> LlamaForCausalLM:
    """A random float32 Llama, seeded by the world; 0.8M parameters by default."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=8 * ((hidden_size * 8 // 3 + 7) // 8),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.seed)
        return LlamaForCausalLM(config).float()


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
