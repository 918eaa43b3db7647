"""From a dialogue to the tokens of a prompt and of an answer, and to the tokens that end an answer.

"beaver" is the published template:

    BEGINNING OF CONVERSATION: USER: {input} ASSISTANT:{answer}</s>USER: {input} ASSISTANT:

with the tokenizer's EOS after every answer and no space before an answer. "chat" is the tokenizer's own chat
template with its generation prompt. "auto" is "chat" where the tokenizer has a chat template, else "beaver".

A system text is handed to a chat template as the first message; where the template has no place for one (Gemma, and
"beaver") it stands in front of the first question, with an empty line between, as Gemma 3's own template writes it.

A prompt has one BOS where the tokenizer starts texts with one, also where a chat template forgets it. Text of a row
that spells a special token stays text: only the template's own become such tokens.

How an answer ends is said in one place, `answer_form`, for data, calibration, scorers and rollouts alike: a chat
template may end a turn with another token than the tokenizer's EOS (<end_of_turn>, <|end|>, <|im_end|>, <|eot_id|>).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _get_template_variables

from beaver_ray.errors import UserError, first_line
from beaver_ray.models.folders import find_model
from beaver_ray.options import near
from beaver_ray.template_options import Template, TemplateOptions

OTHER_TEMPLATE = "set template=beaver (of a PPO stage data.template=beaver)"

# Turns that a template is asked with to see what it writes around them.
USER, ANSWER, LATER, SYSTEM = "zq1prompt", "zq2answer", "zq3prompt", "zq5system"


@lru_cache(maxsize=64)
def template_options(template: Template) -> TemplateOptions:
    """All that a template says, of a word too. UserError for another word than auto, chat and beaver."""
    if isinstance(template, str) and template not in ("auto", "beaver", "chat"):
        raise UserError(f"unknown template '{template}': use auto, beaver or chat")
    return TemplateOptions.model_validate(template)


def resolve_template(tokenizer: PreTrainedTokenizerBase, template: Template) -> Literal["beaver", "chat"]:
    """What "auto" means for this tokenizer.

    Raises UserError where "chat", or arguments for a chat template, are asked of a tokenizer without one, and for an
    argument that its chat template never looks at.
    """
    options = template_options(template)
    if options.style == "beaver":
        return "beaver"
    if tokenizer.chat_template:
        known = _arguments(tokenizer)
        if unknown := sorted(options.arguments.keys() - known):
            raise UserError(
                f"the chat template of {tokenizer.name_or_path!r} takes no argument {unknown[0]!r}"
                f"{near(unknown[0], known) if known else '; it takes none'}"
            )
        return "chat"
    if options.style == "chat" or options.arguments:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template: {OTHER_TEMPLATE}, "
            "or use a model whose tokenizer has one"
        )
    return "beaver"


def for_scorer(tokenizer: PreTrainedTokenizerBase, template: Template) -> TemplateOptions:
    """How a score model reads what a run of this template writes: by its own chat template, where the run uses one and
    it has one, with those of the run's arguments that this knows."""
    options = template_options(template)
    if options.style == "beaver":
        return options
    known = _arguments(tokenizer) if tokenizer.chat_template else frozenset()
    kept = {name: value for name, value in options.arguments.items() if name in known}
    return TemplateOptions(style="auto", system=options.system, arguments=kept)


def _arguments(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Names that the chat template looks at, beside those that it is always given."""
    try:
        found = _get_template_variables(tokenizer.get_chat_template())
    except Exception as error:  # a template is a program of the folder's own
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} cannot be read: {first_line(error)}"
        ) from None
    given = {"messages", "add_generation_prompt", "raise_exception", "strftime_now", *tokenizer.special_tokens_map}
    return frozenset(found - given)


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

    def spells_end(self, answer: str) -> bool:
        """Whether such a token's text stands before the answer's end."""
        bare = self.bare(answer)
        return any(stop in bare for stop in self.stop_texts)

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
    return _form(tokenizer, tokenizer.eos_token_id, str(tokenizer.chat_template) if chat else None, template)


@lru_cache(maxsize=16)  # of a few tokenizers, for very many answers
def _form(tokenizer: PreTrainedTokenizerBase, eos: int, chat: str | None, template: Template) -> AnswerForm:
    configured = _configured_ends(tokenizer.name_or_path)
    # What a system prompt spells is none of the template's own ends.
    template = template_options(template).model_copy(update={"system": None})
    end, around = _chat_end(tokenizer, {eos, *configured}, template) if chat else (None, {})
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
        ends = set(read_configured_ends(folder))
        if tokenizer.eos_token_id is not None:
            ends.update(answer_form(tokenizer, template).stops)
    except UserError:
        raise
    except Exception as error:  # of broken files transformers raises nearly anything
        raise UserError(f"cannot read the EOS tokens of {folder}: {first_line(error)}") from None
    if not ends:
        raise UserError(
            f"{folder}: neither generation config nor tokenizer names an EOS token; set eos_token_id in one"
        )
    return tuple(sorted(ends))


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


def _chat_end(
    tokenizer: PreTrainedTokenizerBase, known: set[int], template: Template
) -> tuple[int | None, dict[str, Any]]:
    """(the token that ends an answer, None where the template writes none; the other fields of the form)."""
    try:
        prompt = render(tokenizer, [USER], template)
        head, found, tail = render(tokenizer, [USER, ANSWER], template).partition(ANSWER)
    except UserError:  # a template without answers, which the prompts may yet fit
        return None, {}
    if not found:
        return None, {}
    special = _special_texts(tokenizer)
    opener = _last_special(head.rpartition(USER)[2], special)
    end, after = _first_special(tokenizer, tail, special, known, opener)
    if end is None:
        # Templates that leave the end of the last turn to the model write that of an earlier one, or the next turn.
        try:
            middle = render(tokenizer, [USER, ANSWER, LATER], template).partition(ANSWER)[2].partition(LATER)[0]
        except UserError:
            middle = ""
        end, after = _first_special(tokenizer, middle, special, known, _last_special(head.partition(USER)[0], special))
    before = head.removeprefix(prompt) if head.startswith(prompt) else ""
    try:
        strips = f"\n{ANSWER}\n" not in render(tokenizer, [USER, f"\n{ANSWER}\n"], template)
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


def render(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[str], template: Template = "chat", system: str | None = None
) -> str:
    """Turns user, assistant, ... by the tokenizer's chat template, with the generation prompt behind a user's.

    system: text for the system's turn instead of the one that ``template`` may have.
    """
    options = template_options(template)
    system = system or options.system
    if system and not has_system_turn(tokenizer, str(tokenizer.chat_template), options):
        turns, system = _folded(system, turns), None
    try:
        return _apply(tokenizer, turns, options, system)
    except Exception as error:  # a template is a program of the folder's own
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} fails on {len(turns)} turns ({first_line(error)}): "
            f"{OTHER_TEMPLATE}"
        ) from error


def _apply(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[str], options: TemplateOptions, system: str | None
) -> str:
    asks: Any = {**options.arguments, "tokenize": False, "add_generation_prompt": len(turns) % 2 == 1}
    return str(tokenizer.apply_chat_template(as_messages(turns, system), **asks))


def as_messages(turns: Sequence[Any], system: str | None = None) -> list[dict[str, Any]]:
    """Turns user, assistant, ... as messages with roles, below a system's where there is one."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return [{"role": "system", "content": system}, *messages] if system else messages


@lru_cache(maxsize=16)
def has_system_turn(tokenizer: PreTrainedTokenizerBase, chat: str, options: TemplateOptions) -> bool:
    """Whether the chat template writes what a system's turn says; some refuse one, and some leave it out."""
    try:
        return SYSTEM in _apply(tokenizer, [USER], options, SYSTEM)
    except Exception:  # raise_exception('System role not supported'), in whatever way
        return False


def _folded(system: str, turns: Sequence[str]) -> list[str]:
    """The turns with the system text in front of the first one."""
    return [f"{system}\n\n{turns[0]}", *turns[1:]]


def prompt_text(
    tokenizer: PreTrainedTokenizerBase, input: str | list[str], template: Template, system: str | None = None
) -> str:
    """The prompt as text, up to where the answer starts. BOS is part of it only where a chat template writes
    it."""
    return _prompt_text(tokenizer, _turns(tokenizer, input, template), template, system)


def _turns(tokenizer: PreTrainedTokenizerBase, input: str | list[str], template: Template) -> list[str]:
    """The turns of a prompt, earlier answers without their ends, which the template writes itself."""
    turns = [input] if isinstance(input, str) else list(input)
    if len(turns) % 2 == 0:
        raise ValueError(f"a prompt has an odd number of turns, not {len(turns)}")
    if len(turns) > 1:
        form = answer_form(tokenizer, template)
        turns[1::2] = [form.bare(turn) for turn in turns[1::2]]
    return turns


def _prompt_text(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[str], template: Template, system: str | None
) -> str:
    if resolve_template(tokenizer, template) == "chat":
        return render(tokenizer, turns, template, system)
    system = system or template_options(template).system
    pieces = ["BEGINNING OF CONVERSATION: "]
    for number, turn in enumerate(_folded(system, turns) if system else turns):
        pieces.append(f"USER: {turn} ASSISTANT:" if number % 2 == 0 else f"{turn}{tokenizer.eos_token}")
    return "".join(pieces)


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, input: str | list[str], template: Template, system: str | None = None
) -> list[int]:
    """Token ids of a prompt, up to where the answer starts; exactly one BOS where the tokenizer uses one.

    system: the row's own system text, which goes before the template's. Text that spells a special token stays text.
    """
    turns = _turns(tokenizer, input, template)
    system = system or template_options(template).system
    texts = [*turns, *([system] if system else [])]
    marks = _marks(tokenizer, texts)
    if marks:
        texts = [_spelled(tokenizer).sub(lambda found: marks[found[0]], text) for text in texts]
        text = _prompt_text(tokenizer, texts[: len(turns)], template, texts[-1] if system else None)
        tokens = _encode_marked(tokenizer, text, {mark: spelled for spelled, mark in marks.items()})
    else:
        tokens = tokenizer.encode(_prompt_text(tokenizer, turns, template, system), add_special_tokens=False)
    return with_bos(tokenizer, tokens)


def with_bos(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[int]:
    """Tokens that start with one BOS where the tokenizer starts texts with one."""
    bos = tokenizer.bos_token_id
    return [bos, *tokens] if bos is not None and tokens[:1] != [bos] and adds_bos(tokenizer) else tokens


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase,
    answer: str,
    template: Template = "auto",
    form: AnswerForm | None = None,
    ended: bool = True,
) -> list[int]:
    """Token ids of an answer that follows a prompt, with the token that ends it behind it (once) and no BOS.

    ended: false for an answer that was cut, which has no end. form: `answer_form`, for whoever has it already.
    Text that spells a special token stays text.
    """
    form = form or answer_form(tokenizer, template)
    text = form.before + form.bare(answer) + (form.after if ended else "")
    tokens = _encode_inside(tokenizer, text)
    return [*tokens, form.end] if ended else tokens


def _encode_inside(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of text that something stands before; special tokens that it spells stay text.

    Encoded behind a colon, as the beaver template has it, which is then cut off: sentencepiece tokenizers
    would otherwise start the text with a space that is not there. Where the colon melts into the text, it
    is encoded on its own.
    """
    colon = tokenizer.encode(":", add_special_tokens=False)
    tokens = _encode_alone(tokenizer, ":" + text)
    if tokens[: len(colon)] == colon and tokenizer.unk_token_id not in colon:
        return tokens[len(colon) :]
    return _encode_alone(tokenizer, text)


def _encode_alone(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return found


# ---------------------------------------------------------------- special tokens that a row's text spells


@lru_cache(maxsize=16)
def _spelled(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds every special token in a text, of two at one place the longer."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special and str(token)]
    texts = sorted({*special, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def _marks(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, str]:
    """For each special token that the texts spell a character, of those for private use, that none of them has."""
    spelled = sorted({found for text in texts for found in _spelled(tokenizer).findall(text)})
    free = (chr(code) for code in range(0xE000, 0xF900) if not any(chr(code) in text for text in texts))
    return dict(zip(spelled, free, strict=False))


def _encode_marked(tokenizer: PreTrainedTokenizerBase, text: str, marks: Mapping[str, str]) -> list[int]:
    """Token ids of a prompt in which characters stand for special tokens that its rows spell.

    The special tokens that are in it are the template's own. What stands between two of them is encoded by itself, in
    the way that gives what the whole text gives for it: alone, or with something before it, and without the white space
    that some special tokens take with them.
    """
    pattern = _spelled(tokenizer)
    own: Any = tokenizer.convert_tokens_to_ids(pattern.findall(text))
    groups: list[list[int]] = [[]]
    for token in tokenizer.encode(text, add_special_tokens=False):
        if token == next(iter(own[len(groups) - 1 :]), None):
            groups.append([])
        else:
            groups[-1].append(token)
    known = len(groups) == len(own) + 1 and tokenizer.unk_token_id not in own
    tokens: list[int] = []
    for number, part in enumerate(pattern.split(text)):
        ways = [
            (way, cut) for cut in (str, str.lstrip, str.rstrip, str.strip) for way in (_encode_alone, _encode_inside)
        ]
        if known and marks.keys().isdisjoint(part):
            tokens += groups[number]
        elif part:
            way, cut = ways[number > 0]
            if known:
                way, cut = next((w for w in ways if w[0](tokenizer, w[1](part)) == groups[number]), (way, cut))
            tokens += way(tokenizer, "".join(marks.get(character, character) for character in cut(part)))
        tokens += own[number : number + 1]
    return tokens


def stops_inside(tokens: Iterable[int], form: AnswerForm) -> bool:
    """Whether a token that ends a rollout stands among ``tokens``, those of an answer without its end."""
    return not set(form.stops).isdisjoint(tokens)


@lru_cache(maxsize=16)
def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself starts a text with BOS (Llama does, GPT-2 and Qwen do not)."""
    return tokenizer.encode("a", add_special_tokens=True)[:1] == [tokenizer.bos_token_id]
