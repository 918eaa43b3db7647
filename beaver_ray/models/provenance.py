"""What a score model has learnt to read: the template and the tokenizer that it was trained with.

It is written into the folder's config.json under ``score_trained_with``. Read in another way its scores mean little,
which no error shows: `difference` says it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from beaver_ray.data.templates import Template, for_scorer, resolve_template, template_options
from beaver_ray.template_options import TemplateOptions

KEY = "score_trained_with"
_OWN = ("system", "arguments")


def trained_with(tokenizer: PreTrainedTokenizerBase, template: Template) -> dict[str, Any]:
    """The template by name, with its system prompt and arguments where it has them, and digests of the chat template,
    where that is it, and of what makes up the tokenizer."""
    name = resolve_template(tokenizer, template)
    tokens = [sorted(tokenizer.get_vocab().items()), tokenizer.bos_token_id, tokenizer.eos_token_id]
    chat = {"chat_template": _digest(tokenizer.chat_template)} if name == "chat" else {}
    options = template_options(template)
    own = {key: value for key in _OWN if (value := getattr(options, key))}
    return {"template": name, "tokenizer": _digest(tokens), **chat, **own}


def trained_template(config: Mapping[str, Any]) -> TemplateOptions | None:
    """The template of `trained_with` that the model of this config.json was trained with; None where that says none."""
    then = config.get(KEY)
    if not isinstance(then, Mapping) or "template" not in then:
        return None
    own = {key: then[key] for key in _OWN if key in then}
    return TemplateOptions.model_validate({"style": then["template"], **own})


def difference(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: Template) -> str | None:
    """How the model of this config.json is read otherwise than in its training; None where it is not, or is unknown."""
    then = config.get(KEY)
    if not isinstance(then, Mapping):
        return None
    now = trained_with(tokenizer, for_scorer(tokenizer, template))
    changed = []
    if now["template"] != then.get("template"):
        changed.append(f"the {then.get('template')} template, not {now['template']}")
    elif now.get("chat_template") != then.get("chat_template"):
        changed.append("another chat template")
    if now.get("system") != then.get("system"):
        changed.append("another system prompt")
    if now.get("arguments", {}) != then.get("arguments", {}):
        changed.append("other template arguments")
    if now["tokenizer"] != then.get("tokenizer"):
        changed.append("another tokenizer")
    return f"was trained with {' and '.join(changed)}" if changed else None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:16]
