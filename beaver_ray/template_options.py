"""How a stage writes prompts: one option, a word or a mapping.

Nothing heavy is imported here: the command line reads this module first.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import ConfigDict, JsonValue, SerializerFunctionWrapHandler, model_serializer, model_validator

from beaver_ray.options import Strict, option

Style = Literal["auto", "chat", "beaver"]

# What `apply_chat_template` is given by whoever renders, and what every template has from transformers.
_TAKEN = frozenset(
    {"messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"}
    | {"continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"}
    | {"return_assistant_tokens_mask", "tokenizer_kwargs", "raise_exception", "strftime_now"}
    | {"bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"}
)


class TemplateOptions(Strict):
    """How prompts are written; a word stands for the style alone."""

    model_config = ConfigDict(frozen=True)

    style: Style = option(
        "chat: the tokenizer's chat template; beaver: the published one; auto: chat, or beaver.", "auto"
    )
    system: str | None = option("System prompt of rows without one of their own.", None, min_length=1)
    arguments: dict[str, JsonValue] = option("What the chat template is given besides.", default_factory=dict)

    def __hash__(self) -> int:
        return hash(json.dumps([self.style, self.system, self.arguments], sort_keys=True))

    @model_validator(mode="before")
    @classmethod
    def _of_a_word(cls, value: Any) -> Any:
        return {"style": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _arguments_of_a_chat_template(self) -> TemplateOptions:
        if taken := sorted(_TAKEN.intersection(self.arguments)):
            raise ValueError(f"arguments cannot hold {', '.join(taken)}, which every chat template is given; leave out")
        if self.arguments and self.style == "beaver":
            raise ValueError("arguments are for chat templates, and style beaver has none; leave them out")
        return self

    @model_serializer(mode="wrap")
    def _as_a_word(self, whole: SerializerFunctionWrapHandler) -> Any:
        return whole(self) if self.system is not None or self.arguments else self.style


Template = Style | TemplateOptions
"""What functions that write prompts are given."""
