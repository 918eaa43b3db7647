from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from beaver_ray.data.pair_datasets import PreferenceDataset, SafeDpoDataset, SafetyPreferenceDataset
from beaver_ray.data.sources import RawSample
from beaver_ray.data.templates import answer_form, answer_tokens, prompt_tokens
from beaver_ray.data.tokenized import (
    BatchSampler,
    PromptDataset,
    Ragged,
    SupervisedDataset,
    check_tokenizer,
    same_tokenizer,
)
from beaver_ray.errors import UserError
from tests.data.conftest import GEMMA, with_template


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=8), max_size=12))
def test_ragged_round_trip(rows: list[list[int]]) -> None:
    ragged = Ragged(rows)
    assert len(ragged) == len(rows)
    assert [row.tolist() for row in ragged] == rows
    assert ragged.lengths.tolist() == [len(row) for row in rows]
    with pytest.raises(IndexError):
        ragged[len(rows)]


def test_supervised_rows_end_with_eos_even_when_pad_is_eos(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """Fault 4 of the published code."""
    samples = [RawSample("a", "b"), RawSample(["a", "b", "c"], "d"), RawSample("no answer")]
    data = SupervisedDataset.build(samples, byte_tokenizer, max_length=200)
    assert len(data) == 2
    for number in range(2):
        prompt = prompt_tokens(byte_tokenizer, samples[number].input, "auto")
        answer = answer_tokens(byte_tokenizer, samples[number].answer or "")
        assert data.prompt_length[number] == len(prompt)
        assert data.tokens[number].tolist() == prompt + answer
        assert data.tokens[number][-1] == byte_tokenizer.pad_token_id
    assert data.report.line() == "kept 2 of 3; dropped 1: 1 no answer"


def test_prompts_are_distinct_and_never_cut(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    """Fault 6 of the published code."""
    samples = [RawSample("a"), RawSample("b"), RawSample(["a"]), RawSample("c " * 50)]
    limit = len(prompt_tokens(llama_tokenizer, "a", "beaver"))
    data = PromptDataset.build(samples, llama_tokenizer, limit, "beaver")
    assert [row.tolist() for row in data.prompts] == [
        prompt_tokens(llama_tokenizer, text, "beaver") for text in ("a", "b")
    ]
    assert data.report.dropped == {"repeated prompt": 1, f"prompt longer than {limit} tokens": 1}
    rows = [RawSample("a", fields={"target": target}) for target in (1, 1, 2)]
    assert PromptDataset.build(rows, llama_tokenizer, limit, "beaver").report.dropped == {
        "repeated prompt": 1,
        "repeated prompt, its row's other fields passed over": 1,
    }
    with pytest.raises(UserError, match="no prompt is left"):
        PromptDataset.build(samples, llama_tokenizer, limit - 1, "beaver")


def texts(tokenizer: PreTrainedTokenizerFast, rows: Ragged, prompt_length: np.ndarray) -> list[str]:
    return [tokenizer.decode(row[start:]) for row, start in zip(rows, prompt_length, strict=True)]


def test_preference_pairs(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    samples = [
        RawSample("q", "good", "bad", better=True),
        RawSample("q", "bad", "good", better=False),
        RawSample("q", "good", "bad"),
        RawSample("q", "good"),
        RawSample("q", "good", "bad " * 100, better=True),
        RawSample("q", "same", "same", better=True),
    ]
    data = PreferenceDataset.build(samples, byte_tokenizer, max_length=100)
    assert texts(byte_tokenizer, data.better, data.prompt_length) == ["good<|end|>"] * 2
    assert texts(byte_tokenizer, data.worse, data.prompt_length) == ["bad<|end|>"] * 2
    assert data.report.dropped == {
        "no label which answer is better": 1,
        "not two answers": 1,
        "longer than 100 tokens": 1,
        "identical responses": 1,
    }
    with pytest.raises(UserError, match="no preference pair is left"):
        PreferenceDataset.build(samples[2:], byte_tokenizer, max_length=100)


def test_safety_pairs(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    samples = [
        RawSample("q", "kind", "mean", safer=True, is_safe=True, is_other_safe=False),
        RawSample("q", "mean", "kind", safer=False, is_safe=False, is_other_safe=True),
        RawSample("q", "kind", "kinder", safer=False, is_safe=True, is_other_safe=True),
        RawSample("q", "mean", "meaner", safer=True, is_safe=False, is_other_safe=False),
        RawSample("q", "mean", "kind", safer=True, is_safe=False, is_other_safe=True),
        RawSample("q", "mean", "kind", safer=True, is_safe=False),
    ]
    data = SafetyPreferenceDataset.build(samples, byte_tokenizer, max_length=100)
    safer = texts(byte_tokenizer, data.safer, data.prompt_length)
    unsafer = texts(byte_tokenizer, data.unsafer, data.prompt_length)
    assert safer == [f"{word}<|end|>" for word in ("kind", "kind", "kinder", "mean")]
    assert unsafer == [f"{word}<|end|>" for word in ("mean", "mean", "kind", "meaner")]
    assert data.sign_safer.tolist() == [-1, -1, -1, 1]
    assert data.sign_unsafer.tolist() == [1, 1, -1, 1]
    assert data.report.dropped == {"safer answer is not safer": 1, "no safety labels": 1}


def test_safe_dpo_pairs(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """Of the more helpful answer A and the other one B: swapped where A alone is unsafe, dropped where both are."""
    samples = [
        RawSample("q", "A", "B", better=True, is_safe=True, is_other_safe=True),
        RawSample("q", "A", "B", better=True, is_safe=True, is_other_safe=False),
        RawSample("q", "A", "B", better=True, is_safe=False, is_other_safe=True),
        RawSample("q", "B", "A", better=False, is_safe=True, is_other_safe=False),
        RawSample("q", "B", "A", better=False, is_safe=False, is_other_safe=True),
        RawSample("q", "A", "B", better=True, is_safe=False, is_other_safe=False),
        RawSample("q", "A", "B", better=True, is_safe=True),
        RawSample("q", "A", "B", is_safe=True, is_other_safe=True),
    ]
    data = SafeDpoDataset.build(samples, byte_tokenizer, max_length=100)
    assert texts(byte_tokenizer, data.better, data.prompt_length) == [f"{x}<|end|>" for x in "AABBA"]
    assert texts(byte_tokenizer, data.worse, data.prompt_length) == [f"{x}<|end|>" for x in "BBAAB"]
    assert data.worse_is_unsafe.tolist() == [False, True, True, True, True]
    assert data.report.dropped == {
        "both answers unsafe": 1,
        "no safety labels": 1,
        "no label which answer is better": 1,
    }
    assert "2 pairs were swapped, as only the more helpful answer was unsafe" in data.report.line()
    with pytest.raises(UserError, match=r"no preference pair is left .* 1 no safety labels") as error:
        SafeDpoDataset.build(samples[6:7], byte_tokenizer, max_length=100)
    assert "\n" not in str(error.value)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 9))
def test_an_epoch_has_every_row_once(size: int, batch: int, seed: int) -> None:
    sampler = BatchSampler(size, batch, seed)
    for _ in range(2):
        batches = [sampler.next_batch() for _ in range(sampler.batches_per_epoch)]
        assert [rows.size for rows in batches[:-1]] == [batch] * (len(batches) - 1)
        assert sorted(np.concatenate(batches).tolist()) == list(range(size))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 20))
def test_sampler_resumes(size: int, batch: int, steps: int) -> None:
    whole, first = BatchSampler(size, batch, 3), BatchSampler(size, batch, 3)
    for _ in range(steps):
        assert whole.next_batch().tolist() == first.next_batch().tolist()
    resumed = BatchSampler(size, batch, 3)
    resumed.load_state_dict(first.state_dict())
    for _ in range(5):
        assert whole.next_batch().tolist() == resumed.next_batch().tolist()


def test_epochs_and_seeds_differ() -> None:
    """Fault 11 of the published code."""
    sampler = BatchSampler(50, 50, 1)
    first, second = sampler.next_batch().tolist(), sampler.next_batch().tolist()
    assert first != second != BatchSampler(50, 50, 2).next_batch().tolist() != first
    assert (sampler.epoch, sampler.index) == (2, 0)


def test_sampler_refuses_another_run() -> None:
    state = BatchSampler(50, 10, 1).state_dict()
    with pytest.raises(UserError, match="size 50 but this run has 51"):
        BatchSampler(51, 10, 1).load_state_dict(state)


def test_tokenizer_checks(byte_tokenizer: PreTrainedTokenizerFast, llama_tokenizer: PreTrainedTokenizerFast) -> None:
    assert "pad token is the EOS token" in check_tokenizer(byte_tokenizer)[0]
    assert "has no pad token" in check_tokenizer(llama_tokenizer)[0]
    plain = PreTrainedTokenizerFast(
        tokenizer_object=llama_tokenizer.backend_tokenizer, eos_token="</s>", pad_token="<unk>"
    )
    assert check_tokenizer(plain) == []
    none = PreTrainedTokenizerFast(tokenizer_object=llama_tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no EOS"):
        check_tokenizer(none)
    with pytest.raises(UserError, match="no EOS"):
        SupervisedDataset.build([RawSample("a", "b")], none, 100)


def test_ends_in_the_data_are_counted(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(byte_tokenizer, GEMMA)
    end = answer_form(tokenizer).end
    samples = [
        RawSample("a", "b", "c", better=True),
        RawSample("a", "b<end_of_turn>\n", "c<|endoftext|>", better=True),
        RawSample("a", "b<|endoftext|>d", "c<end_of_turn>d<end_of_turn>", better=True),
        RawSample("a", "b<end_of_turn>", "b", better=True),
        RawSample("a", "<end_of_turn>", "b", better=True),
    ]
    data = PreferenceDataset.build(samples, tokenizer, 200)
    assert [row[start:].tolist().count(end) for row, start in zip(data.worse, data.prompt_length, strict=True)] == [
        1,
        1,
        1,
    ]
    assert all(row[-1] == end for row in [*data.better, *data.worse])
    assert data.better[0].tolist() == data.better[1].tolist() and data.worse[0].tolist() == data.worse[1].tolist()
    assert data.report.line() == (
        "kept 3 of 5; dropped 2: 1 identical responses, 1 answer that is nothing but its end; "
        "3 answers had their end token already, which they do not get twice; "
        "2 answers spell a token in their middle that would end a rollout; it stays text"
    )
    supervised = SupervisedDataset.build(samples, tokenizer, 200)
    assert supervised.report.remarks.total() == 3  # of the first answers alone


def test_unknown_words_are_remarked_on_where_there_are_any(
    byte_tokenizer: PreTrainedTokenizerFast, llama_tokenizer: PreTrainedTokenizerFast
) -> None:
    bytes_only, words = copy.deepcopy(byte_tokenizer), copy.deepcopy(llama_tokenizer)
    bytes_only.unk_token, words.eos_token = bytes_only.eos_token, words.unk_token
    assert not any("unknown" in note for note in check_tokenizer(bytes_only))
    assert any("unknown" in note for note in check_tokenizer(words))


def test_same_tokenizer(byte_tokenizer: PreTrainedTokenizerFast, llama_tokenizer: PreTrainedTokenizerFast) -> None:
    class Other(PreTrainedTokenizerFast):
        pass

    other = Other(
        tokenizer_object=llama_tokenizer.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )
    assert same_tokenizer(llama_tokenizer, other)
    assert not same_tokenizer(llama_tokenizer, byte_tokenizer)
    grown = copy.deepcopy(llama_tokenizer)
    grown.add_tokens(["new"])
    assert not same_tokenizer(llama_tokenizer, grown)
    ends_elsewhere = copy.deepcopy(llama_tokenizer)
    ends_elsewhere.eos_token = "<unk>"
    assert not same_tokenizer(llama_tokenizer, ends_elsewhere)
