"""Policies and tokenizers from Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available, logging

from beaver_ray.errors import UserError, first_line
from beaver_ray.models.attention import use_packed_attention
from beaver_ray.models.folders import find_model, is_pickled, positions_of, read_config, read_shapes
from beaver_ray.models.logprobs import install_logprob_head
from beaver_ray.models.tensors import check_loaded
from beaver_ray.packing import check_packing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENIZERS = ("token*", "*.model", "vocab*", "*.tiktoken")
"""Files of which a tokenizer has one at least."""

# A score model's trunk is loaded without its head on purpose; transformers would print a page about that each time.
logging.set_verbosity_error()
logging.disable_progress_bar()


PROBE = 20  # tokens whose text is tried out


def check_model_folder(path: str, role: str) -> None:
    """Raises UserError where ``path`` is neither a folder with a readable config.json nor the name of a hub."""
    try:
        folder = find_model(path)
        if folder is not None:
            read_config(folder)
    except UserError as error:
        raise UserError(f"{role}: {error}") from None


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a model's or an adapter's; UserError where there is none or where it has no EOS."""
    folder = Path(path)
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        check_model_folder(path, "tokenizer")
    if folder.is_dir() and not any(file for pattern in TOKENIZERS for file in folder.glob(pattern)):
        raise UserError(f"{path} has no tokenizer; copy there those files of the model that it was made from")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        _name_ends(tokenizer)
        tokenizer.encode("a")
        loses = _loses_text(tokenizer, folder / "tokenizer.json")
    except Exception as error:  # of broken files transformers raises nearly anything
        raise UserError(f"no usable tokenizer in {path}: {first_line(error)}") from None
    if loses:
        raise UserError(
            f"the tokenizer in {path} is read as {type(tokenizer).__name__}, as transformers does for the model's type "
            f"whatever the folder says, and loses words of its own tokenizer.json so; give it one of the type's kind"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {path} has no EOS token; add one, answers must be able to end")
    return tokenizer


def _name_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let an encoder's tokenizer (BERT's) call what its texts begin and end with BOS and EOS, as others do."""
    if tokenizer.eos_token is None and tokenizer.sep_token is not None:
        tokenizer.eos_token = tokenizer.sep_token
        if tokenizer.bos_token is None and tokenizer.cls_token is not None:
            tokenizer.bos_token = tokenizer.cls_token


def _loses_text(tokenizer: PreTrainedTokenizerBase, file: Path) -> bool:
    """Whether words that tokenizer.json knows do not come back from this tokenizer, which was loaded beside it."""
    if not file.is_file():
        return False
    words = _known_words(str(file), file.stat().st_mtime_ns, tuple(tokenizer.all_special_ids))
    if words is None:
        return False
    ids = tokenizer.encode(words, add_special_tokens=False)
    found = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    return "".join(found.split()) != "".join(words.split())


@lru_cache(maxsize=16)  # one process loads a tokenizer many times, and with 100,000 words this takes as long again
def _known_words(file: str, changed_ns: int, special_ids: tuple[int, ...]) -> str | None:
    """Some words of a tokenizer.json; None where not even it gives them back as they are."""
    core = Tokenizer.from_file(file)
    special = {*special_ids, *core.get_added_tokens_decoder()}
    words = core.decode([token for token in range(core.get_vocab_size()) if token not in special][-PROBE:]).strip()
    return words if core.decode(core.encode(words, add_special_tokens=False).ids).strip() == words else None


def load_policy(
    path: str, dtype: torch.dtype, trust_remote_code: bool = False, device: torch.device | None = None
) -> PreTrainedModel:
    """A causal language model in ``dtype`` on ``device``, with an attention kernel that keeps packed sequences apart.

    Where its logits are plain products, its head can give log-probs without all of them at once. Without a device it
    is on its way into a training engine, and `check_packing` is left to whoever puts it there.
    """
    check_model_folder(path, "policy")
    model: PreTrainedModel = load_safely(AutoModelForCausalLM, path, dtype, trust_remote_code)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    use_packed_attention(model)
    with without_flash(model):
        install_logprob_head(model)
    if device is not None:
        check_packing(model)
    return model


def load_safely(
    kind: Any,
    path: str,
    dtype: torch.dtype,
    trust_remote_code: bool,
    heads: Collection[str] = (),
    check: Callable[..., None] = check_loaded,
    **settings: Any,
) -> Any:
    """A model of one of transformers' Auto classes, all of whose tensors have a place in it.

    Weights are read as tensors and nothing else, from safetensors or, where there are none, ``pytorch_model*.bin``.
    heads: tensors of a score model's head, which are left for `score.load_score_model`. check: says what may be missing
    or left over. settings: more, or others, of ``from_pretrained``'s. UserError where it cannot be loaded.
    """
    folder = find_model(path)
    pickled = folder is not None and is_pickled(folder)
    if folder is not None and pickled:
        read_shapes(folder)  # which says in one line what stands against it
    try:
        model, info = kind.from_pretrained(
            str(folder) if pickled else path,  # of a name of the hub transformers would ask there for safetensors
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=not pickled,
            weights_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **{"attn_implementation": attention_kernel(dtype), **settings},
        )
    except Exception as error:  # of broken files transformers raises nearly anything
        raise UserError(f"cannot load the model in {path}: {first_line(error)}") from None
    check(path, model, info, heads)
    return model


def context_length(path: str, trust_remote_code: bool = False) -> int | None:
    """Most tokens that the model's positions allow; None where its configuration does not say."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # of broken files transformers raises nearly anything
        raise UserError(f"cannot read the configuration of the model in {path}: {first_line(error)}") from None
    return positions_of(config.get_text_config().to_dict(), Path(path))


@lru_cache
def attention_kernel(dtype: torch.dtype) -> str:
    """FlashAttention where its package and a GPU are there and it has the dtype, otherwise PyTorch's SDPA.

    That it is there and cannot be used is said once a process.
    """
    if not torch.cuda.is_available() or not is_flash_attn_2_available():
        return "sdpa"
    if dtype == torch.float32:
        print("FlashAttention has no float32: attention runs on SDPA; engine.dtype bfloat16 would use it", flush=True)
        return "sdpa"
    return "flash_attention_2"


@contextmanager
def without_flash(model: PreTrainedModel) -> Iterator[None]:
    """Let a model that is still on the CPU run there: FlashAttention, which waits for its GPU, is off meanwhile."""
    kernel = model.config._attn_implementation
    waits = kernel == "flash_attention_2" and model.device.type == "cpu"
    if waits:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if waits:
            model.set_attn_implementation(kernel)


def default_device() -> torch.device:
    """The first visible GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def end_generation(model: Any, end: int) -> None:
    """Let whoever generates with a saved model stop where its answers were taught to end."""
    config = getattr(model, "generation_config", None)
    if config is not None:
        known = config.eos_token_id
        ends = known if isinstance(known, list) else [] if known is None else [known]
        config.eos_token_id = known if end in ends else [*ends, end] if ends else end
