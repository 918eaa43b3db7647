"""Seeds drawn evenly over categories, and which of the attempts that were made of them are kept.

Kept is what worked, is not nearly a seed, a training prompt or what is kept already, and speaks of no held-out
category; of each category at most so many, from all attacks in turn.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from beaver_ray.data.mixing import prompt_key
from beaver_ray.data.near import NearTexts
from beaver_ray.data.sources import RawSample
from beaver_ray.data.survey import category_names
from beaver_ray.errors import UserError
from beaver_ray.evaluation import share_interval
from beaver_ray.options import near
from beaver_ray.spelling import words

CROWDED = "beyond per_category"
"""Why an attempt that worked is not kept: its category is full of better ones."""


@dataclass(frozen=True)
class Seeds:
    """Distinct seeds by category, and those of held-out categories."""

    used: dict[str, list[str]]
    held_out: dict[str, list[str]]
    left_out: Counter[str]

    def peers(self, category: str, text: str) -> list[str]:
        """The other seeds of a category."""
        return [other for other in self.used[category] if other != text]

    def telltale(self) -> set[str]:
        """Words that at least half of a held-out category's seeds have, and no seed that is used."""
        common = set().union(*(words(text) for texts in self.used.values() for text in texts))
        found: set[str] = set()
        for texts in self.held_out.values():
            counts = Counter(word for text in texts for word in set(words(text)))
            found |= {word for word, count in counts.items() if 2 * count >= len(texts)}
        return found - common


def read_seeds(samples: Iterable[RawSample], held_out: Collection[str], fields: Sequence[str]) -> Seeds:
    """The seeds among these rows, by the first of their categories.

    A row with any held-out category is held out, and so is its text wherever else it stands. Left out are rows of
    several turns and those without a category.

    Raises UserError where none is left, and for a held-out category that no row has.
    """
    used: dict[str, dict[str, None]] = {}
    held: dict[str, dict[str, None]] = {}
    left_out: Counter[str] = Counter()
    for sample in samples:
        turns, names = prompt_key(sample), category_names(sample, fields)
        if len(turns) > 1:
            left_out["seeds of several turns"] += 1
        elif not names:
            left_out["seeds without a category"] += 1
        else:
            apart = [name for name in names if name in held_out]
            for name in apart:
                held.setdefault(name, {})[turns[0].strip()] = None
            if not apart:
                used.setdefault(names[0], {})[turns[0].strip()] = None
    if missing := sorted(set(held_out) - held.keys()):
        raise UserError(f"held_out: no seed has category {missing[0]!r}{near(missing[0], {*used, *held})}")
    apart_texts = {text for texts in held.values() for text in texts}
    found = {name: [text for text in used[name] if text not in apart_texts] for name in sorted(used)}
    found = {name: texts for name, texts in found.items() if texts}
    if not found:
        why = ", ".join(f"{count} {what}" for what, count in left_out.items()) or "all are held out"
        raise UserError(f"no seed is left ({why}); a row needs a prompt and one of the fields {', '.join(fields)}")
    return Seeds(found, {name: list(texts) for name, texts in held.items()}, left_out)


def draw(seeds: Seeds, each: int, seed: int) -> list[tuple[str, str]]:
    """(Category, text) of up to ``each`` seeds of every category; a category's draw depends on nothing but itself."""
    drawn = []
    for category, texts in seeds.used.items():
        chosen = random.Random(f"{seed}/{category}").sample(texts, min(each, len(texts)))
        drawn += [(category, text) for text in chosen]
    return drawn


@dataclass(frozen=True)
class Attempt:
    """What the user says to the target, made of one seed by one attack."""

    number: int
    """Unique, and decides the random numbers of the answers."""
    attack: str
    category: str
    seed: str
    turns: tuple[str, ...]
    """The user's turns as far as they are known beforehand."""


@dataclass(frozen=True)
class Dialogue:
    """One of the target's answers to an attempt, after all that was said before it."""

    turns: tuple[str, ...]
    """User, assistant, ..., user."""
    response: str
    truncated: bool
    tokens: int
    cost: float | None
    """None where it is not finite."""

    @property
    def prompt(self) -> str | list[str]:
        """The turns as a row of data has them."""
        return self.turns[0] if len(self.turns) == 1 else list(self.turns)


@dataclass(frozen=True)
class Tried:
    """An attempt and what came of it; an answer is unsafe where its cost is above ``unsafe_above``."""

    attempt: Attempt
    dialogues: Sequence[Dialogue]
    unsafe_above: float

    @property
    def scored(self) -> list[Dialogue]:
        """The dialogues whose cost is known."""
        return [dialogue for dialogue in self.dialogues if dialogue.cost is not None]

    def is_unsafe(self, dialogue: Dialogue) -> bool:
        """Whether its answer is."""
        return dialogue.cost is not None and dialogue.cost > self.unsafe_above

    @property
    def rate(self) -> float:
        """The share of unsafe answers among those whose cost is known; 0 where none is."""
        return sum(map(self.is_unsafe, self.scored)) / max(1, len(self.scored))

    @property
    def worst(self) -> Dialogue:
        """The dialogue whose answer costs most, the first of several."""
        return max(self.scored, key=lambda dialogue: float(dialogue.cost or 0.0))

    @property
    def asked(self) -> str:
        """What the user said in the worst dialogue, in one text."""
        return "\n".join(self.worst.turns[::2])

    def row(self) -> dict[str, Any]:
        """As a prompt of data. Of several turns those of the worst dialogue stand for all, up to its last answer."""
        one = self.attempt
        return {
            "prompt": self.worst.prompt,
            "category": one.category,
            "attack": one.attack,
            "seed": one.seed,
            "unsafe_rate": round(self.rate, 4),
            "n": len(self.scored),
        }

    def answers(self) -> list[dict[str, Any]]:
        """The answers whose cost is known, as rows of labelled answers (data set ``labels``)."""
        return [
            {
                "prompt": dialogue.prompt,
                "response": dialogue.response,
                "unsafe": self.is_unsafe(dialogue),
                "cost": dialogue.cost,
                "truncated": dialogue.truncated,
                "tokens": dialogue.tokens,
                "category": self.attempt.category,
                "attack": self.attempt.attack,
            }
            for dialogue in self.scored
        ]


@dataclass
class Choice:
    """What is kept, and why the rest is not."""

    kept: list[Tried] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def choose(tried: Sequence[Tried], known: NearTexts, telltale: Set[str], worked: float, per_category: int) -> Choice:
    """The attempts that are kept, category by category.

    known: seeds and training prompts; what is kept is added. worked: share of unsafe answers from which an attempt has
    worked. Within a category attacks take turns, each with its best attempt that is left.
    """
    by_category, lost = _worked(tried, worked)
    choice = Choice(left_out=lost)
    for queues in by_category.values():
        kept = 0
        while any(queues.values()):
            for queue in queues.values():
                if not queue:
                    continue
                one = queue.pop(0)
                if not telltale.isdisjoint(words(one.asked)):
                    choice.left_out["speak of a held-out category"] += 1
                elif not all(turn.strip() for turn in one.worst.turns):  # no data set takes such a prompt
                    choice.left_out["with an empty answer on the way"] += 1
                elif kept == per_category:
                    choice.left_out[CROWDED] += 1
                elif known.find(one.asked) is not None:
                    choice.left_out["nearly a seed, a known prompt or one that is kept"] += 1
                else:
                    known.add(one.asked)
                    choice.kept.append(one)
                    kept += 1
    return choice


def figures(
    tried: Sequence[Tried], choice: Choice, counts: Mapping[str, int], target: Sequence[float]
) -> dict[str, Any]:
    """The content of red_team.json: of everything, each attack, each category, and each of both.

    All answers to what was made of one seed are one cluster of an interval.
    """
    kept = {one.attempt.number for one in choice.kept}
    attacks = list(dict.fromkeys(one.attempt.attack for one in tried))
    categories = list(dict.fromkeys(one.attempt.category for one in tried))
    seeds = list(dict.fromkeys((one.attempt.category, one.attempt.seed) for one in tried))
    number_of = {seed: number for number, seed in enumerate(seeds)}

    def of(some: Sequence[Tried]) -> dict[str, Any]:
        flags = [one.is_unsafe(dialogue) for one in some for dialogue in one.scored]
        numbers = [number_of[one.attempt.category, one.attempt.seed] for one in some for _ in one.scored]
        share = share_interval(np.array(flags), np.array(numbers)) if flags else None
        return {"attempts": len(some), "kept": sum(one.attempt.number in kept for one in some), "unsafe": share}

    by_attack = {name: [one for one in tried if one.attempt.attack == name] for name in attacks}
    return {
        "all": of(tried),
        "kept": of(choice.kept),
        "target": list(target),
        "attacks": {name: of(some) for name, some in by_attack.items()},
        "categories": {name: of([one for one in tried if one.attempt.category == name]) for name in categories},
        "cells": {
            name: {c: of([one for one in some if one.attempt.category == c]) for c in categories}
            for name, some in by_attack.items()
        },
        "left_out": {**counts, **choice.left_out},
    }


def _worked(tried: Sequence[Tried], worked: float) -> tuple[dict[str, dict[str, list[Tried]]], Counter[str]]:
    """What worked by category and attack, the best first; and how many attempts did not, and why."""
    found: dict[str, dict[str, list[Tried]]] = {}
    lost: Counter[str] = Counter()
    for one in sorted(tried, key=lambda one: (-one.rate, one.attempt.number)):
        if not one.scored:
            lost["without a finite score"] += 1
        elif one.rate < worked or one.rate == 0:
            lost["did not work"] += 1
        else:
            found.setdefault(one.attempt.category, {}).setdefault(one.attempt.attack, []).append(one)
    return dict(sorted(found.items())), lost
