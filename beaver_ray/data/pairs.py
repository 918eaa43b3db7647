"""Pairs of answers to be labelled: drawn with a seed, labelled by scores, dealt to two files by prompt.

A pair is a row in the columns of PKU-SafeRLHF (prompt, response_0, response_1), with ``id``, a hash of these, and for
each answer the model that gave it. Labels are better_response_id, safer_response_id, is_response_0_safe and
is_response_1_safe.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from beaver_ray.data.mixing import prompt_hash
from beaver_ray.data.sources import BadRow, RawSample, find_source
from beaver_ray.errors import UserError

LABELS = ("better_response_id", "safer_response_id", "is_response_0_safe", "is_response_1_safe")
ABOUT_LABELS = (
    *("strength_mean", "strength_std", "safety_strength_mean", "safety_strength_std"),
    *("better_flipped", "safer_flipped", "judge_agrees"),
)
"""Fields that say something of a row's labels, and nothing of the labels that others give it."""
ANSWER = ("response", "model", "truncated", "tokens")
"""What a row of answers says about the answer; the rest is about its prompt."""

HASH = re.compile("[0-9a-f]{16}")
"""What `pair_id` gives."""
OTHER_LABELS = "repeated pair with other labels"

Row = dict[str, Any]


def pair_id(row: Mapping[str, Any]) -> str:
    """64 bits of a hash of prompt, system text and both answers, in hex."""
    said = [row["prompt"], row.get("system"), row["response_0"], row["response_1"]]
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=8).hexdigest()


def with_id(row: Mapping[str, Any]) -> Row:
    """The row with the ``id`` of its texts (`pair_id`); another that it had stays as ``source_id``."""
    own = pair_id(row)
    source = {} if row.get("id") in (None, own) else {"source_id": row["id"]}
    return {"id": own, **source, **row} | {"id": own}


def draw_pairs(answers: Iterable[Mapping[str, Any]], each: int, seed: int) -> tuple[list[Row], Counter[str]]:
    """Up to ``each`` pairs of different answers to a prompt, drawn without replacement, in random order.

    The draw depends on the seed and the prompt alone. Answers that were cut at their longest, empty ones and those that
    repeat another to the same prompt are left out.

    Returns:
        The pairs, and how many answers (and prompts) were left out for which reason.
    """
    of_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for answer in answers:
        of_prompt.setdefault(json.dumps([answer["prompt"], answer.get("system")]), []).append(answer)
    left_out: Counter[str] = Counter()
    pairs: list[Row] = []
    for key, given in of_prompt.items():
        usable: dict[str, Mapping[str, Any]] = {}
        for answer in given:
            text = answer["response"].strip()
            if answer["truncated"]:
                left_out["answers cut at their longest"] += 1
            elif not text:
                left_out["empty answers"] += 1
            elif text in usable:
                left_out["answers that repeat another to their prompt"] += 1
            else:
                usable[text] = answer
        different = list(usable.values())
        if len(different) < 2:
            left_out["prompts without two different answers"] += 1
            continue
        rng = random.Random(f"{seed}/{key}")
        every = [(one, other) for place, one in enumerate(different) for other in different[:place]]
        for first, second in rng.sample(every, min(each, len(every))):
            pairs.append(_pair(*((first, second) if rng.random() < 0.5 else (second, first))))
    return pairs, left_out


def _pair(first: Mapping[str, Any], second: Mapping[str, Any]) -> Row:
    about = {name: value for name, value in first.items() if name not in ANSWER}
    answers = {"response_0": first["response"], "response_1": second["response"]}
    row = about | answers | {"model_0": first["model"], "model_1": second["model"]}
    return with_id(row)


def unlabelled(row: Mapping[str, Any]) -> Row:
    """A pair's row without its labels, and without what is said of these."""
    return {name: value for name, value in row.items() if name not in (*LABELS, *ABOUT_LABELS)}


def unlabelled_samples(rows: Iterable[Mapping[str, Any]]) -> list[RawSample]:
    """Pairs as data sets have them, without their labels. Raises BadRow for a row that is no pair."""
    read = find_source("PKU-SafeRLHF").read_row
    return [read(unlabelled(row)) for row in rows]


def read_pairs(rows: Iterable[Any], where: str = "the data") -> tuple[list[Row], Counter[str]]:
    """The rows that are pairs, each with its ``id``, and how many others there were for which reason.

    Raises UserError for a row whose ``id`` is that of other texts, and where no pair is left. What is no such hash, a
    number of the user's own, becomes ``source_id``.
    """
    pairs: dict[str, Row] = {}
    left_out: Counter[str] = Counter()
    for number, row in enumerate(rows, start=1):
        try:
            if not isinstance(row, dict):
                raise BadRow("row is not an object")
            unlabelled_samples([row])
        except BadRow as reason:
            left_out[str(reason)] += 1
            continue
        own = pair_id(row)
        if row.get("id", own) != own and HASH.fullmatch(str(row["id"])):
            said = f"{where}: pair {number} has id {row['id']!r}, but its texts have {own}"
            raise UserError(f"{said}: they were changed since; take the file as it was written")
        if own in pairs:
            both = [(row.get(name), pairs[own].get(name)) for name in LABELS]
            left_out["repeated pair" if all(a == b or None in (a, b) for a, b in both) else OTHER_LABELS] += 1
        else:
            pairs[own] = with_id(row)
    if not pairs:
        why = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "it has no rows"
        raise UserError(
            f"there is no pair of two different answers in {where} ({why}); a row needs prompt, response_0, response_1"
        )
    return list(pairs.values()), left_out


def scored_labels(rewards: Sequence[float], costs: Sequence[float], rng: random.Random) -> tuple[Row, list[str]]:
    """The labels of a pair whose answers score so: better is the higher reward, safe a cost of at most 0, safer the
    lower cost.

    Equal scores are decided by a fair coin, the Bradley-Terry label of a difference of zero: a rule would teach a
    difference that is not there. Returns the labels, and those that a coin decided.
    """
    scores = {"better_response_id": [-reward for reward in rewards], "safer_response_id": list(costs)}
    ties = [name for name, (first, second) in scores.items() if first == second]
    coins = {name: rng.randrange(2) for name in scores}
    ids = {name: coins[name] if name in ties else int(lowest[1] < lowest[0]) for name, lowest in scores.items()}
    return {**ids, "is_response_0_safe": costs[0] <= 0, "is_response_1_safe": costs[1] <= 0}, ties


def is_held_out(row: Mapping[str, Any], fraction: float) -> bool:
    """Whether a pair is among the held-out ``fraction``: by a hash of its prompt, so that every round says the same."""
    return prompt_hash(RawSample(input=row["prompt"])) < fraction * 2**64
