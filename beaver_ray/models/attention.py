"""Attention over packed rows without a mask, by what PyTorch itself brings.

With a mask PyTorch's SDPA computes the whole square of a packed row, T^2 for T tokens in all, and holds the mask
besides. On a CPU forward and backward of 53 sequences of 48 tokens (hidden size 128) take 3.2 times as long that way.
On a GPU in bfloat16 or float16 PyTorch's own FlashAttention takes the row as it is, by where its sequences begin
(`torch.nn.attention.varlen`). Elsewhere sequences of like length are laid side by side, padded within attention alone,
and SDPA runs causally over each group: the rest of the model never sees padding. `use_packed_attention` switches a
loaded model to it.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

KERNEL = "packed_sdpa"
# From PyTorch 2.12 on varlen_attn wants to be told where key and value have fewer heads; 2.11 sees it.
GROUPED_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def use_packed_attention(model: PreTrainedModel) -> bool:
    """Let a model that runs on plain "sdpa" use packed attention where that is the same; says whether it does.

    It is not where layers attend to a window or in chunks, and not where the outputs of a small packed row differ.
    Of models that keep "sdpa", those with capped attention logits (Gemma 2), which it leaves uncapped without a word,
    go to "eager", and those that build their mask without the positions (OPT) are given one.
    """
    config = model.config.get_text_config()
    if config._attn_implementation == "sdpa" and getattr(config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
        return False
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if config._attn_implementation != "sdpa" or kinds != {"full_attention"} or windowed:
        return False
    base: Any = model.base_model
    positions = torch.cat([torch.arange(n) for n in (5, 3, 9, 4)])[None].to(model.device)
    row = {"input_ids": positions + 1, "position_ids": positions, "use_cache": False}
    training = model.training
    model.eval()
    with torch.no_grad():
        expected = base(**row).last_hidden_state.float()
        model.set_attn_implementation(KERNEL)
        difference = (base(**row).last_hidden_state.float() - expected).norm() / expected.norm()
        # In bfloat16 dozens of layers of rounding add up; sequences that see each other differ by about 1.
        same = bool(difference <= (1e-4 if model.dtype == torch.float32 else 0.2))
        if not same:
            model.set_attn_implementation("sdpa")
            alone = base(**{name: value[:, 5:8] if torch.is_tensor(value) else value for name, value in row.items()})
            leak = (alone.last_hidden_state.float() - expected[:, 5:8]).abs().max() / expected.std()
            if leak > 0.1:
                decoder: Any = model.get_decoder()
                decoder.register_forward_pre_hook(_add_mask, with_kwargs=True)
    model.train(training)
    return same


def _add_mask(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give a packed row the mask [1, 1, T, T] that keeps its sequences apart, True where a token may look."""
    positions = kwargs.get("position_ids")
    others = [kwargs.get(name) for name in ("attention_mask", "past_key_values")]
    if positions is None or len(positions) != 1 or kwargs.get("use_cache") or others != [None, None]:
        return args, kwargs
    sequence_T = (positions[0] == 0).cumsum(0)
    mask_TT = (sequence_T[:, None] == sequence_T[None]).tril()
    return args, {**kwargs, "attention_mask": mask_TT[None, None]}


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention [1, T, heads, D] of a packed row, from query [1, heads, T, D], key and value [1, kv_heads, T, D].

    Sequences begin where ``position_ids`` is 0. Anything but a packed row (a mask, a cache, a batch) goes to SDPA.
    """
    if attention_mask is not None or position_ids is None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [T, heads, D]
    if flash_fits(query, value, dropout):
        starts, longest = borders(position_ids)
        causal: Any = {"scale": scaling, "window_size": (-1, 0), **GROUPED_HEADS}
        q, k, v = rows
        attended: Any = varlen_attn(q, k, v, starts, starts, longest, longest, **causal)
        return attended[None], None
    output = query.new_empty(query.shape[2], query.shape[1], value.shape[3])  # values may be of another width
    # PyTorch's backward on a CPU takes three times as long in bfloat16.
    dtype = torch.promote_types(query.dtype, torch.float32) if query.device.type == "cpu" else query.dtype
    for count, longest, from_T, to_T in groups(position_ids):
        padded = []
        for row in rows:
            flat = row.new_zeros(count * longest, *row.shape[1:], dtype=dtype)
            flat = flat.index_copy(0, to_T, row[from_T].to(dtype))
            padded.append(flat.view(count, longest, *row.shape[1:]).transpose(1, 2))
        q, k, v = padded
        # Padding is on the right, where a causal token never looks.
        padded_out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        flat = padded_out.transpose(1, 2).reshape(-1, *output.shape[1:])
        output = output.index_copy(0, from_T, flat[to_T].to(output.dtype))
    return output[None], None


def flash_fits(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether PyTorch's FlashAttention can take this query [1, heads, T, D] and value."""
    half, width = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1]
    return query.is_cuda and half and not dropout and width == value.shape[-1] and width % 8 == 0 and width <= 256


@lru_cache(maxsize=1)
def borders(position_ids: Tensor) -> tuple[Tensor, int]:
    """Where the row's sequences begin and the last one ends [sequences + 1], and the longest one's length.

    Kept as the answer of `groups` is.
    """
    starts = F.pad((position_ids[0] == 0).nonzero().flatten().int(), (0, 1), value=position_ids.shape[1])
    return starts, int(starts.diff().max())


@lru_cache(maxsize=1)
def groups(position_ids: Tensor) -> list[tuple[int, int, Tensor, Tensor]]:
    """The row's sequences by length: (sequences, longest, their places in the row, their places side by side).

    Lengths between two powers of two go together: at most half of a group is padding, and groups are few. Every layer
    is given the same tensor, by which the answer is kept: working it out waits for the device.
    """
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], position_ids.shape[1]], strict=True)]
    found = []
    for size in {length.bit_length() for length in lengths}:
        members = [(s, n) for s, n in zip(starts, lengths, strict=True) if n.bit_length() == size]
        longest = max(n for _, n in members)
        from_T = torch.cat([torch.arange(s, s + n) for s, n in members])
        to_T = torch.cat([torch.arange(i * longest, i * longest + n) for i, (_, n) in enumerate(members)])
        found.append((len(members), longest, from_T.to(position_ids.device), to_T.to(position_ids.device)))
    return found


def packed_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """None for a packed row, which `packed_attention` takes apart itself; SDPA's mask for anything else."""
    packed = not kwargs.get("allow_is_causal_skip", True) and kwargs.get("attention_mask") is None
    if packed and kwargs.get("q_length") == kwargs.get("kv_length"):
        return None
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


AttentionInterface.register(KERNEL, packed_attention)
AttentionMaskInterface.register(KERNEL, packed_mask)
