"""Random Llama models of known shape, with a tokenizer of plain words, prompts and demonstrations over it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from beaver_ray.errors import UserError
from beaver_ray.models.folders import count_parameters
from beaver_ray.models.score import ScoreModel, ScoreType, save_score_model
from launch.bench.options import Options

PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3
FIRST_WORD = 4


@dataclass(frozen=True)
class Shape:
    """Of a Llama; `inner` is the width of its MLP."""

    name: str
    hidden: int
    layers: int
    heads: int
    inner: int
    vocabulary: int
    key_value_heads: int | None = None
    """As many as heads where None."""
    head_size: int | None = None
    """hidden / heads where None."""
    tied: bool = True
    dtype: str = "float32"


TINY = Shape("tiny", 64, 2, 2, 128, 128)
SMALLER = Shape("1M", 128, 4, 4, 352, 1024)
LARGER = Shape("10M", 320, 8, 10, 864, 1024)
# For GPUs; the numbers are those of Qwen2 0.5B, Qwen2.5 1.5B, Qwen3 0.6B and 4B, and Llama 2 7B.
HALF_B = Shape("0.5B", 896, 24, 14, 4864, 151_936, key_value_heads=2, dtype="bfloat16")
SEVEN_B = Shape("7B", 4096, 32, 32, 11_008, 32_000, tied=False, dtype="bfloat16")
QWEN = {"vocabulary": 151_936, "key_value_heads": 8, "head_size": 128, "dtype": "bfloat16"}
SIX_TENTHS_B = Shape("0.6B", 1024, 28, 16, 3072, **QWEN)  # type: ignore[arg-type]
ONE_AND_A_HALF_B = Shape("1.5B", 1536, 28, 12, 8960, 151_936, key_value_heads=2, dtype="bfloat16")
FOUR_B = Shape("4B", 2560, 36, 32, 9728, **QWEN)  # type: ignore[arg-type]
SHAPES = {shape.name: shape for shape in (SMALLER, LARGER, HALF_B, SIX_TENTHS_B, ONE_AND_A_HALF_B, FOUR_B, SEVEN_B)}


def choose_shape(options: Options, usual: Shape) -> Shape:
    """The shape that was asked for, else the tiny one where small, else the benchmark's ``usual`` one."""
    return SHAPES[options.shape] if options.shape else TINY if options.small else usual


def write_policy(folder: Path, shape: Shape, positions: int = 512) -> Path:
    """A policy with random weights, its tokenizer and a chat template, as a Hugging Face folder."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads or shape.heads,
        head_dim=shape.head_size or shape.hidden // shape.heads,
        max_position_embeddings=positions,
        tie_word_embeddings=shape.tied,
        dtype=shape.dtype,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    torch.manual_seed(0)
    # Billions of random numbers take minutes on a CPU.
    on_gpu = torch.cuda.is_available() and shape.dtype == "bfloat16"
    with torch.device("cuda" if on_gpu else "cpu"):
        model = LlamaForCausalLM(config)
    model.to(getattr(torch, shape.dtype)).save_pretrained(folder)
    if on_gpu:
        del model
        torch.cuda.empty_cache()
    write_tokenizer(folder, shape.vocabulary)
    return folder


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Words w4, w5, ... between spaces, one token each; the chat template adds <s> before a prompt."""
    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN}
    words |= {f"w{i}": i for i in range(FIRST_WORD, vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ ' ' + message.content }}"
        "{% if message.role == 'assistant' %}{{ ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)


def write_score_model(
    folder: Path, policy: Path, score_type: ScoreType, seed: int, heads: tuple[str, ...] = ()
) -> Path:
    """A score model on the policy's own trunk with random heads (one, without names)."""
    torch.manual_seed(seed)
    model = ScoreModel(AutoModel.from_pretrained(policy, dtype="auto", use_safetensors=True), score_type, heads)
    save_score_model(model, model.state_dict(), folder)
    write_tokenizer(folder, model.trunk.config.vocab_size)
    return folder


def random_prompts(count: int, shape: Shape, lengths: tuple[int, int] = (12, 20), seed: int = 0) -> list[list[int]]:
    """Prompts of random words after <s>; `lengths` are the fewest and the most tokens, <s> included."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(lengths[0], lengths[1] + 1, count)
    return [[BOS, *rng.integers(FIRST_WORD, shape.vocabulary, size - 1).tolist()] for size in sizes]


def write_workspace(folder: Path, shape: Shape, prompts: int, answer_tokens: int) -> Path:
    """policy/, reward/, cost/, score/ (both heads on one trunk), prompts.jsonl, ptx.jsonl.

    Score models are of the policy's shape, but of 0.5B parameters beside one of 7B: three of that size and their
    training would not find room on one GPU.
    """
    positions = max(512, 32 + answer_tokens)
    trunk = write_policy(folder / "policy", shape, positions)
    if shape is SEVEN_B:
        trunk = write_policy(folder / "trunk", replace(HALF_B, vocabulary=shape.vocabulary), positions)
    write_score_model(folder / "reward", trunk, "reward", seed=1)
    write_score_model(folder / "cost", trunk, "cost", seed=2)
    write_score_model(folder / "score", trunk, "reward", seed=3, heads=("reward", "cost"))
    texts = [_words(tokens) for tokens in random_prompts(prompts, shape)]
    answers = random_prompts(prompts, shape, (answer_tokens, answer_tokens), seed=1)
    rows = [{"prompt": p, "response": _words(a)} for p, a in zip(texts, answers, strict=True)]
    _write_lines(folder / "prompts.jsonl", [{"prompt": text} for text in texts])
    _write_lines(folder / "ptx.jsonl", rows)
    return folder


def matmul_parameters(folder: Path, head: bool = True) -> float:
    """Parameters that every token is multiplied with; UserError where the folder is not on this machine."""
    total = count_parameters(folder)
    if not total:
        raise UserError(f"{folder}: no weights there to count parameters in; give models as local folders")
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    embedding = shape["vocab_size"] * shape["hidden_size"]
    # A tied table is the head too; a score model has a table and no head over words.
    return float(total if head and shape.get("tie_word_embeddings") else total - embedding)


def read_prompts(folder: Path) -> list[list[int]]:
    """The tokens of a workspace's prompts, as the chat template makes them."""
    return [[BOS, *_tokens(row["prompt"])] for row in _read_lines(folder / "prompts.jsonl")]


def read_demonstrations(folder: Path) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of a workspace's demonstrations, as the chat template makes them."""
    rows = _read_lines(folder / "ptx.jsonl")
    return [([BOS, *_tokens(row["prompt"])], [*_tokens(row["response"]), EOS]) for row in rows]


def _tokens(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _words(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens if token >= FIRST_WORD)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
