from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from beaver_ray.errors import UserError
from beaver_ray.packing import check_packing, pack, plan_micro_batches, response_positions

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny(name: str, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    more = {"intermediate_size": 64, "max_position_embeddings": 64, "attn_implementation": attention}
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, **more, num_key_value_heads=2)).eval()
    if name == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, **more, num_key_value_heads=2)).eval()
    if name == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **more)).eval()
    if name == "opt":
        return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32)).eval()
    return MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2)).eval()


@given(
    st.lists(st.integers(1, 30), max_size=40),
    st.integers(30, 120),
    st.integers(1, 5),
)
def test_plan(lengths: list[int], budget: int, ranks: int) -> None:
    plan = plan_micro_batches(lengths, budget, ranks)
    assert plan == plan_micro_batches(lengths, budget, ranks)
    assert len(plan) == ranks
    count = len(plan[0])
    assert all(len(share) == count for share in plan)
    groups = [group for share in plan for group in share]
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in group) <= budget for group in groups)
    assert all(groups) or len(lengths) < len(groups)


def fewest_bins(lengths: list[int], budget: int) -> int:
    """Brute force over subsets: the least (bins, tokens in the last bin) that holds each of them."""
    best = {0: (1, 0)}
    for chosen in range(1, 1 << len(lengths)):
        options = []
        for index, length in enumerate(lengths):
            if chosen >> index & 1:
                bins, load = best[chosen ^ (1 << index)]
                options.append((bins, load + length) if load + length <= budget else (bins + 1, length))
        best[chosen] = min(options)
    return best[(1 << len(lengths)) - 1][0]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(30, 60), st.integers(1, 3))
def test_plan_is_near_the_fewest_micro_batches(lengths: list[int], budget: int, ranks: int) -> None:
    bins = fewest_bins(lengths, budget)
    count = len(plan_micro_batches(lengths, budget, ranks)[0])
    # Best fit decreasing needs at most 11/9 of the fewest bins and 6/9 of one more.
    assert -(-bins // ranks) <= count <= -(-((11 * bins + 6) // 9) // ranks)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 5))
def test_one_micro_batch_shares_tokens_evenly(lengths: list[int], ranks: int) -> None:
    plan = plan_micro_batches(lengths, sum(lengths), ranks)
    assert all(len(share) == 1 for share in plan)
    tokens = [sum(lengths[index] for index in share[0]) for share in plan]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_plan_fits_where_only_the_tight_packing_does() -> None:
    # Evenly: 6 + 3, 4 + 4, and the last 3 fits nowhere. Tightly: 6 + 4, 4 + 3 + 3.
    assert plan_micro_batches([6, 4, 4, 3, 3], 10, 1) == [[[0, 1], [2, 3, 4]]]


def test_plan_leaves_no_rank_idle_when_the_tight_packing_needs_fewer_bins() -> None:
    # Best fit decreasing fills 11 bins of 30 tokens exactly; the twelfth rank must not stay empty.
    lengths = [25, 18, 18, 16, 16, 15, 14, 14, 13, 13, 13, 13, 12, 12, 12, 11, 11, 10, 9, 8, 8, 8, 8]
    lengths += [7, 6, 5, 4, 4, 2, 2, 1, 1, 1]
    plan = plan_micro_batches(lengths, 30, 12)
    assert all(len(share) == 1 and share[0] for share in plan)


def test_plan_is_near_the_best_on_real_sizes() -> None:
    lengths = np.random.default_rng(0).integers(20, 900, 1000).tolist()
    plan = plan_micro_batches(lengths, 4096, 8)
    assert len(plan[0]) == -(-sum(lengths) // (4096 * 8))
    tokens = [sum(lengths[index] for group in share for index in group) for share in plan]
    assert max(tokens) / np.mean(tokens) < 1.01


def test_plan_with_fewer_sequences_than_ranks() -> None:
    assert plan_micro_batches([5, 7], 10, 3) == [[[1]], [[0]], [[]]]
    assert plan_micro_batches([], 10, 2) == [[], []]


def test_plan_errors() -> None:
    with pytest.raises(UserError, match="row 1 has 11 tokens"):
        plan_micro_batches([3, 11], 10, 1)
    with pytest.raises(ValueError, match="sequence 0 has 0 tokens"):
        plan_micro_batches([0], 10, 1)


def test_pack_by_hand() -> None:
    batch = pack([[7, 8, 9], [5], [6, 7]])
    assert batch.input_ids.tolist() == [[7, 8, 9, 5, 6, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.sequence_index.tolist() == [0, 0, 0, 1, 2, 2]
    assert pack([]).input_ids.shape == (1, 0)
    with pytest.raises(ValueError, match="at least one token"):
        pack([[1], []])


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), max_size=9))
def test_pack_round_trip(sequences: list[list[int]]) -> None:
    batch = pack(sequences)
    ends = batch.cu_seqlens.tolist()
    rows = [batch.input_ids[0, start:end].tolist() for start, end in itertools.pairwise(ends)]
    assert rows == sequences
    assert batch.position_ids[0].tolist() == [place for row in sequences for place in range(len(row))]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=9))
def test_response_positions(pairs: list[tuple[int, int]]) -> None:
    start, expected = 0, []
    for prompt, response in pairs:
        expected += range(start + prompt - 1, start + prompt + response - 1)
        start += prompt + response
    positions = response_positions([prompt for prompt, _ in pairs], [response for _, response in pairs])
    assert positions.dtype == torch.int64
    assert positions.tolist() == expected


def test_response_positions_errors() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        response_positions([0], [3])
    with pytest.raises(ValueError, match="of one length"):
        response_positions([1, 2], [3])


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(["llama", "qwen2", "gpt_neox"]),
    attention=st.sampled_from(["sdpa", "eager"]),
    pairs=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_packed_equals_alone(name: str, attention: str, pairs: list[tuple[int, int]], seed: int) -> None:
    model = tiny(name, attention)
    generator = np.random.default_rng(seed)
    sequences = [generator.integers(0, 40, prompt + response) for prompt, response in pairs]
    batch = pack(sequences)
    with torch.no_grad():
        packed = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
        alone = [model(input_ids=torch.from_numpy(row)[None], use_cache=False).logits[0] for row in sequences]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)
    positions = response_positions([prompt for prompt, _ in pairs], [response for _, response in pairs])
    logprobs_T = packed.log_softmax(-1)[positions, batch.input_ids[0, positions + 1]]
    expected_T = torch.cat(
        [
            logits.log_softmax(-1)[range(prompt - 1, row.size - 1), torch.from_numpy(row[prompt:])]
            for (prompt, _), row, logits in zip(pairs, sequences, alone, strict=True)
        ]
    )
    torch.testing.assert_close(logprobs_T, expected_T, atol=1e-5, rtol=1e-5)


def test_packed_gradients_equal_padded() -> None:
    """The sum of log-probs over right-padded rows with an attention mask has the packed row's gradient."""
    model = tiny("llama")
    sequences = [np.arange(1, 8), np.arange(4, 7), np.arange(20, 31)]
    batch = pack(sequences)
    positions = response_positions([2, 1, 4], [5, 2, 7])
    output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    output.logits[0].log_softmax(-1)[positions, batch.input_ids[0, positions + 1]].sum().backward()
    packed = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    ids = torch.zeros(3, 11, dtype=torch.int64)
    mask = torch.zeros(3, 11, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : sequence.size] = torch.from_numpy(sequence)
        mask[row, : sequence.size] = 1
    logprobs = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    total = torch.zeros(())
    for row, (prompt, sequence) in enumerate(zip((2, 1, 4), sequences, strict=True)):
        for place in range(prompt, sequence.size):
            total = total + logprobs[row, place - 1, ids[row, place]]
    total.backward()  # type: ignore[no-untyped-call]
    padded = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for one, other in zip(packed, padded, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox"])
def test_check_packing_lets_plain_attention_pass(name: str, dtype: torch.dtype) -> None:
    model = tiny(name).to(dtype).train()
    check_packing(model)
    assert model.training


@pytest.mark.parametrize("name", ["opt", "mamba"])
def test_check_packing_refuses_models_that_mix_sequences(name: str) -> None:
    with pytest.raises(UserError, match="cannot train on packed rows"):
        check_packing(tiny(name))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_packing_says_what_is_broken(value: float) -> None:
    model = tiny("llama")
    model.config.name_or_path = "some/folder"
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 0] = value
    with pytest.raises(UserError, match=r"LlamaForCausalLM from some/folder gives (nan|-?inf) on ordinary tokens"):
        check_packing(model)
