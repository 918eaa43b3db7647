from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from beaver_ray.data.templates import (
    answer_form,
    answer_tokens,
    prompt_text,
    prompt_tokens,
    read_end_tokens,
    resolve_template,
)
from beaver_ray.errors import UserError
from tests.data import conftest
from tests.data.conftest import CHATML, SPECIAL, with_template


def with_chat(tokenizer: PreTrainedTokenizerFast, template: str = CHATML) -> PreTrainedTokenizerFast:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def test_beaver_text(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    assert prompt_text(llama_tokenizer, "hi", "beaver") == "BEGINNING OF CONVERSATION: USER: hi ASSISTANT:"
    assert prompt_text(llama_tokenizer, ["a", "b", "c"], "auto") == (
        "BEGINNING OF CONVERSATION: USER: a ASSISTANT:b</s>USER: c ASSISTANT:"
    )


def test_beaver_tokens_have_one_bos_and_eos_between_turns(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    """Fault 6 of the published code."""
    tokens = prompt_tokens(llama_tokenizer, ["a", "b", "c"], "beaver")
    assert tokens.count(llama_tokenizer.bos_token_id) == 1 and tokens[0] == llama_tokenizer.bos_token_id
    assert tokens.count(llama_tokenizer.eos_token_id) == 1


def test_no_bos_where_the_tokenizer_adds_none(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = prompt_tokens(byte_tokenizer, "hi", "beaver")
    assert byte_tokenizer.decode(tokens) == "BEGINNING OF CONVERSATION: USER: hi ASSISTANT:"


def test_prompt_and_answer_are_the_published_sequence(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    """The published code encodes prompt + answer + EOS as one text; both parts together must be the same."""
    answer = "Mix flour and water."
    text = prompt_text(llama_tokenizer, "how do I bake bread?", "beaver") + answer + "</s>"
    joined = prompt_tokens(llama_tokenizer, "how do I bake bread?", "beaver") + answer_tokens(llama_tokenizer, answer)
    assert joined == llama_tokenizer(text).input_ids


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=40).filter(lambda text: "<|end|>" not in text))
def test_byte_answers_round_trip(byte_tokenizer: PreTrainedTokenizerFast, answer: str) -> None:
    *tokens, eos = answer_tokens(byte_tokenizer, answer)
    assert eos == byte_tokenizer.eos_token_id
    assert byte_tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == answer


@pytest.mark.parametrize("answer", ["", " a", ":a", ": a", "a:b", "::", "\na"])
def test_awkward_answers(llama_tokenizer: PreTrainedTokenizerFast, answer: str) -> None:
    tokens = answer_tokens(llama_tokenizer, answer)
    assert tokens[-1] == llama_tokenizer.eos_token_id
    assert llama_tokenizer.bos_token_id not in tokens


def test_chat_template(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_chat(llama_tokenizer)
    assert resolve_template(tokenizer, "auto") == "chat"
    assert resolve_template(tokenizer, "beaver") == "beaver"
    text = "<s>user\na</s>\n<s>assistant\nb</s>\n<s>user\nc</s>\n<s>assistant\n"
    assert prompt_text(tokenizer, ["a", "b", "c"], "auto") == text
    tokens = prompt_tokens(tokenizer, ["a", "b", "c"], "auto")
    assert tokens.count(tokenizer.bos_token_id) == 4  # those that the template writes, none added
    messages = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    own = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokens == own


def test_template_errors(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="has no chat template"):
        prompt_tokens(llama_tokenizer, "a", "chat")
    with pytest.raises(UserError, match="unknown template"):
        prompt_tokens(llama_tokenizer, "a", "llama")  # type: ignore[arg-type]
    failing = with_chat(llama_tokenizer, "{{ raise_exception('only one turn') }}")
    with pytest.raises(UserError, match="only one turn"):
        prompt_tokens(failing, "a", "chat")
    with pytest.raises(ValueError, match="odd number"):
        prompt_tokens(llama_tokenizer, ["a", "b"], "beaver")


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("LLAMA_3", "<|eot_id|>"),
        ("GEMMA", "<end_of_turn>"),
        ("PHI_3", "<|end|>"),
        ("QWEN", "<|im_end|>"),
        ("ZEPHYR", "<|endoftext|>"),
        ("LLAMA_2", "<|endoftext|>"),
        ("ALWAYS_ASKS", "<|im_end|>"),
    ],
)
@pytest.mark.parametrize("turns", [["q"], ["q", "a", "r"]])
def test_a_row_is_what_the_template_writes_up_to_the_end_of_the_turn(
    byte_tokenizer: PreTrainedTokenizerFast, name: str, end: str, turns: list[str]
) -> None:
    """The other implementation is the template itself, asked for the whole dialogue."""
    tokenizer = with_template(byte_tokenizer, getattr(conftest, name))
    roles = ("user", "assistant")
    dialogue = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate([*turns, "Mix flour."])]
    whole = tokenizer.apply_chat_template(dialogue, tokenize=False)
    cut = whole.index(end, whole.index("Mix flour.")) + len(end)
    row = prompt_tokens(tokenizer, turns, "auto") + answer_tokens(tokenizer, "Mix flour.", "auto")
    assert tokenizer.decode(row) == whole[:cut]
    assert row[-1] == tokenizer.convert_tokens_to_ids(end)
    # Rollouts end with it too, and with the tokenizer's EOS.
    assert set(answer_form(tokenizer).stops) == {row[-1], tokenizer.eos_token_id}


@pytest.mark.parametrize("name", ["ALPACA", "GLM", "ALWAYS_ASKS"])
def test_without_a_token_of_its_own_an_answer_ends_with_eos(byte_tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    # Where <|im_end|> is no token, nothing can stop there.
    special = [token for token in SPECIAL if "im_" not in token]
    tokenizer = with_template(byte_tokenizer, getattr(conftest, name), special)
    assert answer_form(tokenizer).end == tokenizer.eos_token_id
    assert answer_form(tokenizer, "beaver").end == tokenizer.eos_token_id


def test_an_end_that_shows_once_another_turn_follows(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(byte_tokenizer, conftest.OPEN_END)
    assert answer_form(tokenizer).end == tokenizer.convert_tokens_to_ids("<|end|>")


def write_folder(tokenizer: PreTrainedTokenizerFast, folder: Path, eos: object) -> str:
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 5}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return str(folder)


def test_the_generation_config_has_a_say(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    # The next turn's opening ends an answer where, as GLM has it, the generation config says so.
    tokenizer = with_template(byte_tokenizer, conftest.GLM)
    user, eos = tokenizer.convert_tokens_to_ids("<|user|>"), tokenizer.eos_token_id
    folder = write_folder(tokenizer, tmp_path / "glm", [eos, user])
    assert answer_form(AutoTokenizer.from_pretrained(folder)).end == user
    assert read_end_tokens(folder) == tuple(sorted({user, eos}))
    # A template may end a turn with a token that the generation config forgets (Llama-3 base with a chat template).
    tokenizer = with_template(byte_tokenizer, conftest.LLAMA_3)
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    folder = write_folder(tokenizer, tmp_path / "llama", eos)
    assert read_end_tokens(folder) == tuple(sorted({eot, eos}))
    assert read_end_tokens(folder, "beaver") == (eos,)
    # What no file says is nothing: the class of this model has a default, which here is some word.
    (tmp_path / "llama" / "generation_config.json").unlink()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    assert read_end_tokens(folder) == tuple(sorted({eot, eos}))
    with pytest.raises(UserError, match="eos_token_id must be a token's number"):
        read_end_tokens(write_folder(tokenizer, tmp_path / "broken", ["x"]))


@pytest.mark.parametrize("name", ["GEMMA", "LLAMA_2", "QWEN"])
@pytest.mark.parametrize("written", ["{end}", "{end}\n", " {end}", "{eos}", "{end}{eos}"])
def test_an_end_in_the_text_is_not_doubled(byte_tokenizer: PreTrainedTokenizerFast, name: str, written: str) -> None:
    tokenizer = with_template(byte_tokenizer, getattr(conftest, name))
    end = tokenizer.convert_ids_to_tokens(answer_form(tokenizer).end)
    written = written.format(end=end, eos=tokenizer.eos_token)
    expected = "Mix flour. " if name == "QWEN" and written.startswith(" ") else "Mix flour."
    assert answer_tokens(tokenizer, f"Mix flour.{written}") == answer_tokens(tokenizer, expected)
    # Nor in an earlier answer.
    told = prompt_tokens(tokenizer, ["q", f"a{written.strip()}", "r"], "auto")
    assert told == prompt_tokens(tokenizer, ["q", "a", "r"], "auto")
    told = prompt_tokens(tokenizer, ["q", f"a{tokenizer.eos_token}", "r"], "beaver")
    assert told == prompt_tokens(tokenizer, ["q", "a", "r"], "beaver")


@pytest.mark.parametrize("ended", [True, False])
def test_an_added_token_that_is_not_special_stays_one_in_texts(
    byte_tokenizer: PreTrainedTokenizerFast, ended: bool
) -> None:
    tokenizer = with_template(byte_tokenizer, conftest.QWEN)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    think, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "<|im_end|>"))
    # Beside one that is, which stays text.
    texts = ["a<think>b", "a<think>b<|im_end|>c"]
    plain = prompt_tokens(tokenizer, "a", "auto")
    for text in texts:
        told = prompt_tokens(tokenizer, text, "auto")
        assert told.count(think) == 1 and told.count(end) == plain.count(end)
        assert prompt_tokens(tokenizer, "a", "auto", system=text).count(think) == 1
        answer = answer_tokens(tokenizer, text, ended=ended)
        assert answer.count(think) == 1 and answer.count(end) == ended


def test_a_cut_answer_has_no_end(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """Fault 6 of the published code."""
    tokenizer = with_template(byte_tokenizer, conftest.GEMMA)
    assert answer_tokens(tokenizer, "Mix", ended=False) == answer_tokens(tokenizer, "Mix")[:-1]


@pytest.mark.parametrize("turns", [["q"], ["q", " a", "r"]])
def test_an_answer_without_an_end_of_its_own_is_written_as_in_the_history(
    byte_tokenizer: PreTrainedTokenizerFast, turns: list[str]
) -> None:
    write = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
    ask = "{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer = with_template(byte_tokenizer, write + ask)
    form = answer_form(tokenizer)
    assert (form.before, form.after, form.strips, form.end) == (" ", "", True, tokenizer.eos_token_id)
    roles = ("user", "assistant")
    dialogue = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate([*turns, " Mix flour. "])]
    row = prompt_tokens(tokenizer, turns, "auto") + answer_tokens(tokenizer, " Mix flour. ")
    whole = tokenizer.apply_chat_template(dialogue, tokenize=False)
    assert tokenizer.decode(row) == whole.removesuffix("\n") + tokenizer.eos_token


def test_a_template_without_answers(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(
        byte_tokenizer, "{{ messages[0]['content'] }}{% if not add_generation_prompt %}\n{% endif %}"
    )
    form = answer_form(tokenizer)
    assert (form.before, form.strips, form.end) == ("", False, tokenizer.eos_token_id)
