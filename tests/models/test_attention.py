"""Attention over packed rows equals SDPA with a mask, and leaves everything else to SDPA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from beaver_ray.models.attention import KERNEL, borders, use_packed_attention
from beaver_ray.packing import pack

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def llama(kv_heads: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": kv_heads}
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **heads, attn_implementation="sdpa"))


def loss_and_gradient(model: PreTrainedModel, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(1)
    row = pack([rng.integers(0, 64, n) for n in lengths]).to(model.device)
    model.zero_grad()
    logits = model(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False).logits
    logits.logsumexp(-1).square().sum().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[7], [1, 1, 1], [5, 31, 2, 17, 16, 1, 9, 33], [64, 3]])
def test_equal_to_the_mask(kv_heads: int, lengths: list[int]) -> None:
    model = llama(kv_heads)
    expected, gradient = loss_and_gradient(model, lengths)
    assert use_packed_attention(model) and model.config._attn_implementation == KERNEL
    logits, packed_gradient = loss_and_gradient(model, lengths)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed_gradient, gradient, atol=1e-4, rtol=1e-4)


def test_in_bfloat16_it_is_no_further_from_float32_than_sdpa() -> None:
    lengths = [5, 31, 2, 17, 16, 1, 9, 33]
    rounded = llama().bfloat16()
    exact = loss_and_gradient(llama().bfloat16().float(), lengths)
    plain = loss_and_gradient(rounded, lengths)
    assert use_packed_attention(rounded)
    packed = loss_and_gradient(rounded, lengths)
    for expected, sdpa, ours in zip(exact, plain, packed, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - expected).norm() < 1.1 * (sdpa - expected).norm()


def test_padded_batches_and_generation_go_to_sdpa() -> None:
    plain, packed = llama(), llama()
    assert use_packed_attention(packed)
    ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :2] = 0
    for arguments in ({"attention_mask": mask}, {}):
        torch.testing.assert_close(packed(ids, **arguments).logits, plain(ids, **arguments).logits)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(packed.generate(ids, **options), plain.generate(ids, **options))
    cache = packed(ids, use_cache=True).past_key_values
    more = torch.randint(3, 64, (3, 4), generator=torch.Generator().manual_seed(1))
    together = plain(torch.cat([ids, more], dim=1)).logits[:, 9:]
    torch.testing.assert_close(packed(more, past_key_values=cache).logits, together, atol=1e-5, rtol=1e-5)


def test_models_that_look_through_a_window_stay_as_they_are() -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "sdpa"}
    windowed = MistralForCausalLM(MistralConfig(**SHAPE, **heads, sliding_window=8))
    assert not use_packed_attention(windowed) and windowed.config._attn_implementation == "sdpa"
    assert use_packed_attention(MistralForCausalLM(MistralConfig(**SHAPE, **heads, sliding_window=None)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch's FlashAttention needs a GPU")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_flash_attention_on_a_gpu_is_no_further_from_float32_than_sdpa(kv_heads: int) -> None:
    lengths = [5, 31, 2, 17, 16, 1, 9, 33, 130]
    rounded = llama(kv_heads).bfloat16()
    exact = loss_and_gradient(llama(kv_heads).bfloat16().float().cuda(), lengths)
    plain = loss_and_gradient(rounded.cuda(), lengths)
    assert use_packed_attention(rounded)
    packed = loss_and_gradient(rounded, lengths)
    for expected, sdpa, ours in zip(exact, plain, packed, strict=True):
        assert (ours - expected).norm() < 1.1 * (sdpa - expected).norm()


def test_borders_are_the_sequences() -> None:
    positions = torch.cat([torch.arange(n) for n in (5, 3, 1, 4)])[None]
    starts, longest = borders(positions)
    assert starts.tolist() == [0, 5, 8, 9, 13] and starts.dtype == torch.int32 and longest == 5


def test_capped_attention_is_not_left_uncapped() -> None:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
    config = Gemma2Config(**SHAPE, **heads, attn_logit_softcapping=1.0, initializer_range=0.3)
    model = Gemma2ForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    ids = torch.arange(1, 24)[None]
    expected = model(ids).logits
    model.set_attn_implementation("sdpa")
    assert (model(ids).logits - expected).abs().max() > 0.01, "PyTorch's SDPA has no cap"
    assert not use_packed_attention(model)
    torch.testing.assert_close(model(ids).logits, expected)


def test_a_model_that_masks_without_positions_is_given_a_mask() -> None:
    torch.manual_seed(0)
    shape = {name: SHAPE[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    heads = {"num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}
    model = OPTForCausalLM(OPTConfig(**shape, **heads, init_std=0.3)).eval()
    sequences = [np.arange(4, 13), np.arange(20, 22), np.arange(30, 41)]
    alone = torch.cat([model(torch.from_numpy(s)[None]).logits[0] for s in sequences])
    row = pack(sequences)
    inputs = {"input_ids": row.input_ids, "position_ids": row.position_ids, "use_cache": False}
    assert (model(**inputs).logits[0] - alone).abs().max() > 0.1
    assert not use_packed_attention(model)
    torch.testing.assert_close(model(**inputs).logits[0], alone, atol=1e-4, rtol=1e-4)
    # Padded batches and generation bring a mask or a cache of their own.
    padded = torch.tensor([[0, 0, 5, 6, 7], [4, 5, 6, 7, 8]])
    generated = model.generate(padded, attention_mask=padded.clamp(max=1), max_new_tokens=5, do_sample=False)
    for row_ids, start in ((generated[0], 2), (generated[1], 0)):
        for end in range(5, 10):
            assert row_ids[end] == model(row_ids[None, start:end]).logits[0, -1].argmax()
