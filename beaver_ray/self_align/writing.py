"""Principles as a reward model reads them: one text that stands where a dialogue's system text does.

The same function writes them into the pairs that the model is trained on and into what it scores in a run, so that both
are the same tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from beaver_ray.errors import UserError
from beaver_ray.options import near
from beaver_ray.principle_options import ChosenPrinciple
from beaver_ray.self_align.principles import Principle, read_principles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEAD = "Judge the answer by these principles:"


def chosen(choices: Sequence[ChosenPrinciple], file: str | None) -> list[Principle]:
    """The principles that are meant, in the order of ``choices``. UserError for a name that the file does not have."""
    known = {principle.name: principle for principle in read_principles(file)}
    for choice in choices:
        if choice.name not in known:
            where = file or "our file of principles"
            raise UserError(f"{where} has no principle {choice.name!r}{near(choice.name, known)}")
    return [known[choice.name] for choice in choices]


def worded(principle: Principle, negated: bool) -> str:
    """What a principle, or its opposite, asks for."""
    return principle.negated if negated else principle.text


def written(texts: Sequence[str], system: str | None = None) -> str:
    """Principles in words as a system text; behind the dialogue's own one where it has one."""
    said = "\n".join([HEAD, *(f"- {text}" for text in texts)])
    return f"{system}\n\n{said}" if system else said


def drawn(choices: Sequence[ChosenPrinciple], count: int, turns: Sequence[str], system: str | None) -> list[int]:
    """Numbers of ``count`` of the choices, without replacement, by their weights.

    The draw depends on the dialogue before the answer alone: all answers to a prompt are judged by the same.
    """
    digest = hashlib.blake2b(json.dumps([system, *turns]).encode(), digest_size=8).digest()
    weights = np.array([choice.weight for choice in choices])
    rng = np.random.default_rng(int.from_bytes(digest, "big"))
    return [int(i) for i in rng.choice(len(choices), size=count, replace=False, p=weights / weights.sum())]


def check_apart(tokenizer: PreTrainedTokenizerBase, file: str | None) -> None:
    """UserError where a tokenizer makes the same tokens of two principles of a file, or of one and its opposite."""
    seen: dict[tuple[int, ...], str] = {}
    for principle in read_principles(file):
        for negated in (False, True):
            called = ChosenPrinciple(name=principle.name, negated=negated).called
            tokens = tuple(tokenizer.encode(worded(principle, negated), add_special_tokens=False))
            if tokens in seen:
                raise UserError(
                    f"the tokenizer of {tokenizer.name_or_path} makes the same tokens of the principles "
                    f"{seen[tokens]!r} and {called!r}; give a file whose words it knows"
                )
            seen[tokens] = called
