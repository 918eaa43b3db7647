"""Policies and tokenizers from Hugging Face folders."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from beaver_ray.errors import UserError, first_line
from beaver_ray.models.attention import use_packed_attention
from beaver_ray.models.folders import find_model, read_config
from beaver_ray.models.logprobs import install_logprob_head
from beaver_ray.packing import check_packing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# A score model's trunk is loaded without its head on purpose; transformers would print a page about that each time.
logging.set_verbosity_error()
logging.disable_progress_bar()


def check_model_folder(path: str, role: str) -> None:
    """Raises UserError where ``path`` is neither a folder with a readable config.json nor the name of a hub."""
    try:
        folder = find_model(path)
        if folder is not None:
            read_config(folder)
    except UserError as error:
        raise UserError(f"{role}: {error}") from None


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; UserError where there is none or where it has no EOS."""
    check_model_folder(path, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer.encode("a")
    except Exception as error:  # of broken files transformers raises nearly anything
        raise UserError(f"no usable tokenizer in {path}: {first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {path} has no EOS token; add one, answers must be able to end")
    return tokenizer


def load_policy(path: str, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model in ``dtype`` with an attention kernel that keeps packed sequences apart.

    Where its logits are plain products, its head can give log-probs without all of them at once.
    """
    check_model_folder(path, "policy")
    model: Any = load_safely(AutoModelForCausalLM, path, dtype, trust_remote_code)
    model.to(default_device())
    use_packed_attention(model)
    check_packing(model)
    install_logprob_head(model)
    loaded: PreTrainedModel = model
    return loaded


def load_safely(kind: Any, path: str, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """A model of one of transformers' Auto classes, from safetensors alone; UserError where it cannot be loaded."""
    try:
        return kind.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention_kernel(),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    except Exception as error:  # of broken files transformers raises nearly anything
        raise UserError(f"cannot load the model in {path}: {first_line(error)}") from None


def context_length(path: str, trust_remote_code: bool = False) -> int | None:
    """Most tokens that the model's positions allow; None where its configuration does not say."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # of broken files transformers raises nearly anything
        raise UserError(f"cannot read the configuration of the model in {path}: {first_line(error)}") from None
    return getattr(config, "max_position_embeddings", None)


def attention_kernel() -> str:
    """FlashAttention where its package and a GPU are there, otherwise PyTorch's SDPA."""
    if torch.cuda.is_available():
        try:
            import flash_attn  # noqa: F401

            return "flash_attention_2"
        except ImportError:
            return "sdpa"
    return "sdpa"


def default_device() -> torch.device:
    """The first visible GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
