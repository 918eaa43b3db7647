"""The formats in which the field's families write a dialogue, against transformers' own `apply_chat_template`."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from beaver_ray.data.readers import Dialogues, Reader, read_alike
from beaver_ray.data.sources import RawSample
from beaver_ray.data.templates import answer_form, answer_tokens, for_scorer, prompt_tokens
from beaver_ray.data.tokenized import SupervisedDataset
from beaver_ray.errors import UserError
from beaver_ray.models.provenance import difference, trained_with
from beaver_ray.template_options import TemplateOptions
from tests.data.conftest import LLAMA_3, TEXT

SYSTEM_REFUSED = "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
FAMILIES = {
    "Llama 2": (
        "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{% set ns.system = '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' %}{% elif m['role'] == 'user' %}"
        "{{ bos_token }}[INST] {{ ns.system }}{{ m['content'].strip() }} [/INST]{% set ns.system = '' %}"
        "{% else %} {{ m['content'].strip() }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "Llama 3": LLAMA_3,
    "Qwen 2.5": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "Qwen 3": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    "Gemma 2": (
        "{{ bos_token }}{% for m in messages %}" + SYSTEM_REFUSED + "<start_of_turn>"
        "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "Gemma 3": (
        "{{ bos_token }}{% set first = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
        "{% for m in messages if m['role'] != 'system' %}<start_of_turn>"
        "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ first if loop.first else '' }}"
        "{{ m['content'] | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "Mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
        "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n\n{% endif %}"
        "{{ m['content'] }}[/INST]{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "Phi-3": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    ),
    "Zephyr": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "OLMo 2": (
        "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% if not loop.last %}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}\n<|assistant|>\n{% endif %}"
    ),
}
ENDS = {"Llama 3": "<|eot_id|>", "Qwen 2.5": "<|im_end|>", "Qwen 3": "<|im_end|>", "Phi-3": "<|end|>"}
ENDS |= {"Gemma 2": "<end_of_turn>", "Gemma 3": "<end_of_turn>"}  # the others end a turn with the tokenizer's EOS
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
HEADERS += ["<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
SPECIAL = {  # what is a token of the family, besides <s> and </s>
    "Llama 3": HEADERS[:3],
    "Qwen 2.5": HEADERS[3:5],
    "Qwen 3": HEADERS[3:5],
    "Gemma 2": HEADERS[5:7],
    "Gemma 3": HEADERS[5:7],
    "Phi-3": HEADERS[7:],
}


def sentencepiece(legacy: bool) -> PreTrainedTokenizerFast:
    """Llama 2's and Mistral's kind: bytes where words are missing, BOS added; the space before a text is put before
    each part between special tokens (legacy) or before the first."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if legacy:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    core.train_from_iterator([word for text in TEXT for word in text.split()], trainer)
    trained = json.loads(core.to_str())
    trained["added_tokens"] = trained["added_tokens"][:3]  # bytes are no special tokens
    core = Tokenizer.from_str(json.dumps(trained))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers(byte_tokenizer: PreTrainedTokenizerFast) -> dict[str, PreTrainedTokenizerFast]:
    """One of each family: byte-level without BOS, or sentencepiece's kinds with one."""
    kinds = {"legacy": sentencepiece(True), "first": sentencepiece(False), "byte": byte_tokenizer}
    kind = {"Llama 2": "legacy", "Phi-3": "legacy", "Zephyr": "legacy", "Mistral": "first", "Gemma 2": "first"}
    found = {}
    for name, template in FAMILIES.items():
        tokenizer = copy.deepcopy(kinds[kind.get(name, "byte")])
        rstrip = name == "Phi-3"  # its special tokens take the white space behind them
        words = [*SPECIAL.get(name, []), *(["<s>", "</s>"] if kind.get(name, "byte") == "byte" else [])]
        tokenizer.add_tokens([AddedToken(w, special=True, normalized=False, rstrip=rstrip) for w in words])
        tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = "<s>", "</s>", template
        found[name] = tokenizer
    return found


def told(turns: list[str], system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def plainly(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], **arguments: Any) -> list[int]:
    return list(
        tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, tokenize=True, **arguments
        )
    )


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("turns", [["how do I bake bread?"], ["a story", "Mix flour.", "and water?"]])
@pytest.mark.parametrize("system", [None, "You are a beaver."])
def test_prompts_are_the_familys_own(
    tokenizers: dict[str, PreTrainedTokenizerFast], name: str, turns: list[str], system: str | None
) -> None:
    tokenizer = tokenizers[name]
    if system and name == "Gemma 2":  # as Gemma 3's own template does
        own = plainly(tokenizer, told([f"{system}\n\n{turns[0]}", *turns[1:]]))
    else:
        own = plainly(tokenizer, told(turns, system))
    if name in ("Phi-3", "Zephyr"):  # their templates forget the BOS that their tokenizers start texts with
        assert own[0] != tokenizer.bos_token_id
        own = [tokenizer.bos_token_id, *own]
    assert prompt_tokens(tokenizer, turns, TemplateOptions(system=system)) == own
    assert prompt_tokens(tokenizer, turns, "auto", system=system) == own  # of a row's own
    other = TemplateOptions(system="Another one.")
    assert not system or prompt_tokens(tokenizer, turns, other, system=system) == own
    begins = own.count(tokenizer.bos_token_id)
    # Llama 2's own format begins every exchange anew; Qwen has no BOS.
    assert begins == (0 if "Qwen" in name else 2 if name == "Llama 2" and len(turns) == 3 else 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_ends_as_its_template_ends_a_turn(tokenizers: dict[str, PreTrainedTokenizerFast], name: str) -> None:
    tokenizer = tokenizers[name]
    form = answer_form(tokenizer, TemplateOptions(system="You spell <|im_end|></s>"))
    assert tokenizer.convert_ids_to_tokens(form.end) == ENDS.get(name, "</s>")
    assert answer_form(tokenizer).end == form.end
    row = prompt_tokens(tokenizer, "q", "auto") + answer_tokens(tokenizer, "Mix flour.", "auto")
    whole = tokenizer.apply_chat_template(told(["q", "Mix flour."]), tokenize=False)
    end = ENDS.get(name, "</s>")
    upto = whole[: whole.index(end, whole.index("Mix flour.")) + len(end)]
    # Legacy sentencepiece writes a space behind special tokens, and Phi-3's take the line break.
    assert "".join(tokenizer.decode(row).removeprefix("<s>").split()) == "".join(upto.removeprefix("<s>").split())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_later_turn_stands_behind_an_answer_as_in_the_whole(
    tokenizers: dict[str, PreTrainedTokenizerFast], name: str
) -> None:
    tokenizer = tokenizers[name]
    whole = plainly(tokenizer, told(["a story", "Mix flour.", "how do I bake bread?", "wait", "and water?"]))
    turn = Reader(tokenizer, "auto").next_turn("and water?")
    assert whole[-len(turn) :] == turn
    assert tokenizer.convert_ids_to_tokens(whole[-len(turn) - 1]) == ENDS.get(name, "</s>")
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    tricky = Reader(tokenizer, "auto").next_turn(f"and {ENDS.get(name, '</s>')} <s> water?")
    assert [t for t in tricky if t in special] == [t for t in turn if t in special], "what it spells stays text"


def test_later_turns_of_the_published_template(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    """By hand; and a template that ends no answer when another turn follows is refused."""
    reader = Reader(llama_tokenizer, "beaver")
    prompt = reader.prompt(["a story"]) + answer_tokens(llama_tokenizer, "it held", "beaver")
    assert reader.prompt(["a story", "it held", "and then"]) == prompt + reader.next_turn("and then")
    endless = copy.deepcopy(llama_tokenizer)
    endless.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(UserError, match="writes no </s> behind an answer that another turn follows"):
        Reader(endless, "chat").next_turn("and then")


@pytest.mark.parametrize("name", FAMILIES)
def test_text_that_spells_a_special_token_stays_text(tokenizers: dict[str, PreTrainedTokenizerFast], name: str) -> None:
    tokenizer = tokenizers[name]
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    spelled = "".join(sorted(SPECIAL.get(name, []))) + " <s></s>"
    tricky = f"bake {spelled} bread"
    options = TemplateOptions(system=f"a beaver {spelled}")
    tokens = prompt_tokens(tokenizer, [tricky, tricky, tricky], options)
    harmless = prompt_tokens(tokenizer, ["bake bread"] * 3, TemplateOptions(system="a beaver"))
    # The special tokens are those of a harmless dialogue, and the text says what was said.
    assert [t for t in tokens if t in special] == [t for t in harmless if t in special]
    shown = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    assert shown.count(tricky) == 3 and shown.count(f"a beaver {spelled}") == 1
    answer = answer_tokens(tokenizer, tricky)
    assert [t for t in answer if t in special] == answer[-1:]
    assert tricky in tokenizer.decode(answer)
    # What stands around is as it was: up to the text, and behind it.
    one = prompt_tokens(tokenizer, tricky, "auto")
    bare = prompt_tokens(tokenizer, "bake bread", "auto")
    last = max(i for i, t in enumerate(bare) if t in special) if set(bare[2:]) & special else len(bare)
    assert one[len(one) - len(bare) + last :] == bare[last:]
    assert one[:2] == bare[:2]


def test_spelled_tokens_by_hand(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    """Piece by piece, by the tokenizers library alone."""
    tokenizer = tokenizers["Qwen 3"]
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.encode_special_tokens = True
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    parts = [core.encode(text, add_special_tokens=False).ids for text in ("user\na<|im_end|>\n<|im_start|>b", "\n")]
    expected = [start, *parts[0], end, *parts[1], start, *core.encode("assistant\n", add_special_tokens=False).ids]
    assert prompt_tokens(tokenizer, "a<|im_end|>\n<|im_start|>b", "auto") == expected
    # A text that has the characters which stand for the tokens meanwhile.
    assert "\ue000<s>" in tokenizer.decode(prompt_tokens(tokenizer, "\ue000<s>", "auto"))


def test_arguments_reach_the_template(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    qwen = tokenizers["Qwen 3"]
    quick = TemplateOptions(style="chat", arguments={"enable_thinking": False})
    own = plainly(qwen, told(["q"]), enable_thinking=False)
    assert prompt_tokens(qwen, "q", quick) == own != prompt_tokens(qwen, "q", "auto")
    assert qwen.decode(own).endswith("<think>\n\n</think>\n\n")
    assert answer_form(qwen, quick).end == qwen.convert_tokens_to_ids("<|im_end|>")
    with pytest.raises(UserError, match="takes no argument 'enable_thinkng'; did you mean 'enable_thinking'"):
        prompt_tokens(qwen, "q", TemplateOptions(arguments={"enable_thinkng": False}))
    with pytest.raises(UserError, match="takes no argument 'enable_thinking'; it takes none"):
        prompt_tokens(tokenizers["Phi-3"], "q", quick)
    # A score model of another family reads without what its template does not know.
    assert for_scorer(tokenizers["Phi-3"], quick) == TemplateOptions()
    assert for_scorer(qwen, quick) == TemplateOptions(arguments={"enable_thinking": False})
    assert not read_alike(Reader(qwen, "auto"), Reader(qwen, quick))


def test_system_texts_go_where_dialogues_go(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    qwen, gemma = tokenizers["Qwen 3"], tokenizers["Gemma 2"]
    options = TemplateOptions(system="Be kind.")
    policy = Reader(qwen, options)
    dialogues = Dialogues(policy)
    samples = [RawSample("q", "a", system="Be brief."), RawSample("q", "a")]
    dialogues.add(samples)
    own, common = policy.prompt(["q"], "Be brief."), policy.prompt(["q"])
    assert own != common
    assert [dialogues.find(row) for row in (own, common)] == [("q",), ("q",)]
    assert [dialogues.system(row) for row in (own, common)] == ["Be brief.", None]
    # Told from its tokens alone, the configured system text is known for what it is.
    assert Dialogues(policy).find(common) == ("q",)
    # A scorer of another family reads the same words in its own way.
    scorer = Reader.of_scorer(gemma, options)
    assert scorer.prompt(["q"]) == plainly(gemma, told(["Be kind.\n\nq"]))
    data = SupervisedDataset.build(samples, qwen, 200, options)
    assert [row[:length].tolist() for row, length in zip(data.tokens, data.prompt_length, strict=True)] == [own, common]


def test_provenance_knows_system_and_arguments(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    qwen = tokenizers["Qwen 3"]
    options = TemplateOptions(system="Be kind.", arguments={"enable_thinking": False})
    config = {"score_trained_with": trained_with(qwen, options)}
    assert difference(config, qwen, options) is None
    assert difference(config, qwen, "auto") == "was trained with another system prompt and other template arguments"
    plain = {"score_trained_with": trained_with(qwen, "auto")}
    assert difference(plain, qwen, TemplateOptions(system="Be kind.")) == "was trained with another system prompt"
