"""From a dialogue to the tokens of a prompt and of an answer.

"beaver" is the published template:

    BEGINNING OF CONVERSATION: USER: {input} ASSISTANT:{answer}</s>USER: {input} ASSISTANT:

with the tokenizer's EOS after every answer and no space before an answer. "chat" is the tokenizer's own chat
template with its generation prompt. "auto" is "chat" where the tokenizer has a chat template, else "beaver".
"""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedTokenizerBase

from beaver_ray.errors import UserError, first_line

Template = Literal["auto", "beaver", "chat"]


def resolve_template(tokenizer: PreTrainedTokenizerBase, template: Template) -> Literal["beaver", "chat"]:
    """What "auto" means for this tokenizer; a UserError where "chat" is asked of one without a chat
    template."""
    if template == "auto":
        return "chat" if tokenizer.chat_template else "beaver"
    if template == "chat" and not tokenizer.chat_template:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template: set the template to 'beaver', "
            "or use a model whose tokenizer has one"
        )
    if template not in ("beaver", "chat"):
        raise UserError(f"unknown template '{template}': use auto, beaver or chat")
    return template


def prompt_text(tokenizer: PreTrainedTokenizerBase, input: str | list[str], template: Template) -> str:
    """The prompt as text, up to where the answer starts. BOS is part of it only where a chat template writes
    it."""
    turns = [input] if isinstance(input, str) else input
    if len(turns) % 2 == 0:
        raise ValueError(f"a prompt has an odd number of turns, not {len(turns)}")
    if resolve_template(tokenizer, template) == "chat":
        roles = ("user", "assistant")
        messages = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program of the folder's own
            raise UserError(
                f"the chat template of {tokenizer.name_or_path!r} fails on {len(turns)} turns ({first_line(error)}): "
                "set the template to 'beaver'"
            ) from error
    pieces = ["BEGINNING OF CONVERSATION: "]
    for number, turn in enumerate(turns):
        pieces.append(f"USER: {turn} ASSISTANT:" if number % 2 == 0 else f"{turn}{tokenizer.eos_token}")
    return "".join(pieces)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, input: str | list[str], template: Template) -> list[int]:
    """Token ids of a prompt, up to where the answer starts; exactly one BOS where the tokenizer uses one.

    Text that spells a special token becomes that token, as in every Hugging Face pipeline.
    """
    text = prompt_text(tokenizer, input, template)
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    if resolve_template(tokenizer, template) == "beaver" and bos is not None and _adds_bos(tokenizer):
        tokens = [bos, *tokens]
    return tokens


def answer_tokens(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Token ids of an answer that follows a prompt, with EOS at the end and no BOS.

    Encoded behind a colon, as the beaver template has it, which is then cut off: sentencepiece tokenizers
    would otherwise start the answer with a space that is not there. Where the colon melts into the answer, it
    is encoded on its own.
    """
    colon = tokenizer.encode(":", add_special_tokens=False)
    tokens: list[int] = tokenizer.encode(":" + answer, add_special_tokens=False)
    if tokens[: len(colon)] == colon and tokenizer.unk_token_id not in colon:
        tokens = tokens[len(colon) :]
    else:
        tokens = tokenizer.encode(answer, add_special_tokens=False)
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {tokenizer.name_or_path!r} has no EOS token: set its eos_token")
    return [*tokens, tokenizer.eos_token_id]


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself starts a text with BOS (Llama does, GPT-2 and Qwen do not)."""
    return tokenizer.encode("a", add_special_tokens=True)[:1] == [tokenizer.bos_token_id]
