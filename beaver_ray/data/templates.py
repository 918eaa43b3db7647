"""From a dialogue to the tokens of a prompt and of an answer, and to the tokens that end an answer.

"beaver" is the published template:

    BEGINNING OF CONVERSATION: USER: {input} ASSISTANT:{answer}</s>USER: {input} ASSISTANT:

with the tokenizer's EOS after every answer and no space before an answer. "chat" is the tokenizer's own chat
template with its generation prompt. "auto" is "chat" where the tokenizer has a chat template, else "beaver".

How an answer ends is said in one place, `answer_form`, for data, calibration, scorers and rollouts alike: a chat
template may end a turn with another token than the tokenizer's EOS (<end_of_turn>, <|end|>, <|im_end|>, <|eot_id|>).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from beaver_ray.errors import UserError, first_line
from beaver_ray.models.folders import find_model

Template = Literal["auto", "beaver", "chat"]

OTHER_TEMPLATE = "set template=beaver (of a PPO stage data.template=beaver)"

# Turns that a template is asked with to see what it writes around them.
USER, ANSWER, LATER = "zq1prompt", "zq2answer", "zq3prompt"


def resolve_template(tokenizer: PreTrainedTokenizerBase, template: Template) -> Literal["beaver", "chat"]:
    """What "auto" means for this tokenizer; a UserError where "chat" is asked of one without a chat
    template."""
    if template == "auto":
        return "chat" if tokenizer.chat_template else "beaver"
    if template == "chat" and not tokenizer.chat_template:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template: {OTHER_TEMPLATE}, "
            "or use a model whose tokenizer has one"
        )
    if template not in ("beaver", "chat"):
        raise UserError(f"unknown template '{template}': use auto, beaver or chat")
    return template


# ---------------------------------------------------------------- how an answer ends


@dataclass(frozen=True)
class AnswerForm:
    """How a template writes an answer behind a prompt."""

    end: int
    """The token that ends it: the last one of an answer in data, and one that ends a rollout."""
    stops: tuple[int, ...]
    """All tokens that end a rollout: that one, the tokenizer's EOS, and those of the folder's generation config."""
    stop_texts: tuple[str, ...] = ()
    """Those of them that are no words."""
    before: str = ""
    """White space between the prompt and the answer."""
    after: str = ""
    """What the template writes between the answer and `end`, mostly nothing."""
    strips: bool = False
    """The template takes white space off both ends of a turn."""

    def ends(self, text: str) -> bool:
        """Whether the text is written with a token at its end that would end a rollout."""
        return text.rstrip().endswith(self.stop_texts)

    def bare(self, answer: str) -> str:
        """An answer without the ends that it may have been written with, and as the template would take it."""
        text = answer
        while self.ends(text):
            text = text.rstrip()
            text = text.removesuffix(next(stop for stop in self.stop_texts if text.endswith(stop)))
        if text != answer:
            text = text.removesuffix(self.after)
        return text.strip() if self.strips else text


def answer_form(tokenizer: PreTrainedTokenizerBase, template: Template = "auto") -> AnswerForm:
    """How an answer stands behind a prompt of this template, and what ends it.

    The template is asked itself: what ends an answer is the first special token that it writes behind one. Where it
    writes none, or "beaver" is the template, it is the tokenizer's EOS.

    Raises:
        UserError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {tokenizer.name_or_path!r} has no EOS token: set its eos_token")
    chat = resolve_template(tokenizer, template) == "chat"
    return _form(tokenizer, tokenizer.eos_token_id, str(tokenizer.chat_template) if chat else None)


@lru_cache(maxsize=16)  # of a few tokenizers, for very many answers
def _form(tokenizer: PreTrainedTokenizerBase, eos: int, chat: str | None) -> AnswerForm:
    configured = _configured_ends(tokenizer.name_or_path)
    end, around = _chat_end(tokenizer, {eos, *configured}) if chat else (None, {})
    end = eos if end is None else end
    stops = tuple(sorted({end, eos, *configured}))
    # A word that ends a rollout may well end an answer in data for its own sake.
    texts = [text for text in _special_texts(tokenizer) if tokenizer.convert_tokens_to_ids(text) in stops]
    return AnswerForm(end, stops, tuple(texts), **around)


def read_end_tokens(folder: str, template: Template = "auto", trust_remote_code: bool = False) -> tuple[int, ...]:
    """The tokens that end a rollout of the policy in ``folder``: `AnswerForm.stops`.

    Raises UserError where the files are broken, or name no EOS token at all.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        configured = read_configured_ends(folder)
    except UserError:
        raise
    except Exception as error:  # of broken files transformers raises nearly anything
        raise UserError(f"cannot read the EOS tokens of {folder}: {first_line(error)}") from None
    if tokenizer.eos_token_id is not None:
        return tuple(sorted({*answer_form(tokenizer, template).stops, *configured}))
    if not configured:
        raise UserError(
            f"{folder}: neither generation config nor tokenizer names an EOS token; set eos_token_id in one"
        )
    return tuple(sorted(set(configured)))


def read_configured_ends(folder: str) -> list[int]:
    """The EOS tokens that a folder's generation config names or, where it has none, its model config.

    What a file does not say is nothing: model classes have defaults that are some other model's tokens.

    Raises UserError for what is no number of a token; transformers raises nearly anything for broken files.
    """
    try:
        found = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:  # a folder without generation_config.json
        config = PreTrainedConfig.get_config_dict(folder)[0]
        found = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
    ids = [token for token in (found if isinstance(found, list) else [found]) if token is not None]
    if not all(type(token) is int for token in ids):
        raise UserError(f"{folder}: eos_token_id must be a token's number, or a list of them, not {found!r}")
    return ids


def _configured_ends(folder: str) -> list[int]:
    """Those of the folder that a tokenizer was read from; none where it has no model beside it."""
    try:
        found = find_model(folder) if folder else None
        return read_configured_ends(str(found)) if found else []
    except Exception:  # whoever loads the model says what is wrong with it
        return []


def _chat_end(tokenizer: PreTrainedTokenizerBase, known: set[int]) -> tuple[int | None, dict[str, Any]]:
    """(the token that ends an answer, None where the template writes none; the other fields of the form)."""
    try:
        prompt = render(tokenizer, [USER])
        head, _, tail = render(tokenizer, [USER, ANSWER]).partition(ANSWER)
    except UserError:  # a template without answers, which the prompts may yet fit
        return None, {}
    special = _special_texts(tokenizer)
    opener = _last_special(head.rpartition(USER)[2], special)
    end, after = _first_special(tokenizer, tail, special, known, opener)
    if end is None:
        # Templates that leave the end of the last turn to the model write that of an earlier one, or the next turn.
        try:
            middle = render(tokenizer, [USER, ANSWER, LATER]).partition(ANSWER)[2].partition(LATER)[0]
        except UserError:
            middle = ""
        end, after = _first_special(tokenizer, middle, special, known, _last_special(head.partition(USER)[0], special))
    if end is None:
        return None, {}
    before = head.removeprefix(prompt) if head.startswith(prompt) else ""
    try:
        strips = f"\n{ANSWER}\n" not in render(tokenizer, [USER, f"\n{ANSWER}\n"])
    except UserError:
        strips = False
    return end, {"before": before if before.isspace() else "", "after": after, "strips": strips}


def _special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that are one token each and no words, the longest first."""
    added = [text for text in tokenizer.get_added_vocab() if text.strip()]
    return sorted({*tokenizer.all_special_tokens, *added}, key=lambda text: (-len(text), text))


def _first_special(
    tokenizer: PreTrainedTokenizerBase, text: str, special: list[str], known: set[int], opener: str | None
) -> tuple[int | None, str]:
    """The first special token in ``text``, and what stands before it; not one that only opens a turn."""
    places = [(text.find(token), token) for token in special if token in text]
    if not places:
        return None, ""
    # Of two at one place the longer, which comes first in `special`.
    start, token = min(places, key=lambda place: place[0])
    number: Any = tokenizer.convert_tokens_to_ids(token)
    return (None, "") if token == opener and number not in known else (number, text[:start])


def _last_special(text: str, special: list[str]) -> str | None:
    return max((token for token in special if token in text), key=text.rfind, default=None)


# ---------------------------------------------------------------- text and tokens


def render(tokenizer: PreTrainedTokenizerBase, turns: list[str], system: str | None = None) -> str:
    """Turns user, assistant, ... by the tokenizer's chat template, with the generation prompt behind a user's."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    asks = len(turns) % 2 == 1
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))
    except Exception as error:  # a template is a program of the folder's own
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} fails on {len(turns)} turns ({first_line(error)}): "
            f"{OTHER_TEMPLATE}"
        ) from error


def prompt_text(
    tokenizer: PreTrainedTokenizerBase, input: str | list[str], template: Template, system: str | None = None
) -> str:
    """The prompt as text, up to where the answer starts. BOS is part of it only where a chat template writes
    it."""
    turns = [input] if isinstance(input, str) else list(input)
    if len(turns) % 2 == 0:
        raise ValueError(f"a prompt has an odd number of turns, not {len(turns)}")
    if len(turns) > 1:  # the template ends earlier answers itself
        form = answer_form(tokenizer, template)
        turns[1::2] = [form.bare(turn) for turn in turns[1::2]]
    if resolve_template(tokenizer, template) == "chat":
        return render(tokenizer, turns, system)
    pieces = ["BEGINNING OF CONVERSATION: ", *([f"{system} "] if system is not None else [])]
    for number, turn in enumerate(turns):
        pieces.append(f"USER: {turn} ASSISTANT:" if number % 2 == 0 else f"{turn}{tokenizer.eos_token}")
    return "".join(pieces)


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, input: str | list[str], template: Template, system: str | None = None
) -> list[int]:
    """Token ids of a prompt, up to where the answer starts; exactly one BOS where the tokenizer uses one.

    Text that spells a special token becomes that token, as in every Hugging Face pipeline.
    """
    text = prompt_text(tokenizer, input, template, system)
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    if resolve_template(tokenizer, template) == "beaver" and bos is not None and adds_bos(tokenizer):
        tokens = [bos, *tokens]
    return tokens


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase,
    answer: str,
    template: Template = "auto",
    form: AnswerForm | None = None,
    ended: bool = True,
) -> list[int]:
    """Token ids of an answer that follows a prompt, with the token that ends it behind it (once) and no BOS.

    ended: false for an answer that was cut, which has no end. form: `answer_form`, for whoever has it already.

    Encoded behind a colon, as the beaver template has it, which is then cut off: sentencepiece tokenizers
    would otherwise start the answer with a space that is not there. Where the colon melts into the answer, it
    is encoded on its own.
    """
    form = form or answer_form(tokenizer, template)
    text = form.before + form.bare(answer) + (form.after if ended else "")
    colon = tokenizer.encode(":", add_special_tokens=False)
    tokens: list[int] = tokenizer.encode(":" + text, add_special_tokens=False)
    if tokens[: len(colon)] == colon and tokenizer.unk_token_id not in colon:
        tokens = tokens[len(colon) :]
    else:
        tokens = tokenizer.encode(text, add_special_tokens=False)
    return [*tokens, form.end] if ended else tokens


def stops_inside(tokens: Iterable[int], form: AnswerForm) -> bool:
    """Whether a token that ends a rollout stands among ``tokens``, those of an answer without its end."""
    return not set(form.stops).isdisjoint(tokens)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself starts a text with BOS (Llama does, GPT-2 and Qwen do not)."""
    return tokenizer.encode("a", add_special_tokens=True)[:1] == [tokenizer.bos_token_id]
