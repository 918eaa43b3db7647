"""What a small world knows of many answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from beaver_ray.small_world.world import SmallWorld


@dataclass(frozen=True)
class Truth:
    """What a world knows of N answers; all arrays are [N]."""

    reward: np.ndarray
    costs: dict[str, np.ndarray]
    """By constraint."""
    refusal: np.ndarray
    kind: np.ndarray
    """What each prompt is, as harmless or adversarial."""


def question(turns: Sequence[str]) -> str:
    """What the user asks in a dialogue (user, assistant, ..., user), which may be in parts or over and over.

    What was answered in between is none of the question: it may have words of other topics.
    """
    return " ".join(turns[::2])


def truths(world: SmallWorld, prompts: Sequence[str], responses: Sequence[str], truncated: np.ndarray) -> Truth:
    """The truth about answers, ``truncated`` [N] ones among them. UserError for a prompt of no small world."""
    pairs = list(zip(prompts, responses, strict=True))
    costs = [world.costs(prompt, response) for prompt, response in pairs]
    cut = truncated.tolist()
    return Truth(
        reward=np.array([world.reward(*pair, bool(t)) for pair, t in zip(pairs, cut, strict=True)], dtype=np.float64),
        costs={name: np.array([found[name] for found in costs], dtype=np.float64) for name in world.constraints},
        refusal=np.array([world.is_refusal(response) for response in responses], dtype=bool),
        kind=np.array([world.parse(prompt).kind for prompt in prompts]),
    )


def truths_of_dialogues(
    world: SmallWorld, prompts: Sequence[str], said: Sequence[Sequence[str]], truncated: np.ndarray
) -> Truth:
    """The truth about dialogues, each of one or more answers to its prompt, the last of which may be ``truncated`` [N].

    The mean reward of a dialogue's answers, the costs of the worst of them, and whether any refuses.
    """
    counts = np.array([len(answers) for answers in said])
    starts = np.cumsum(counts) - counts
    cut = np.zeros(counts.sum(), dtype=bool)
    cut[starts + counts - 1] = truncated
    repeated = [prompt for prompt, answers in zip(prompts, said, strict=True) for _ in answers]
    each = truths(world, repeated, [answer for answers in said for answer in answers], cut)
    return Truth(
        reward=np.add.reduceat(each.reward, starts) / counts,
        costs={name: np.maximum.reduceat(costs, starts) for name, costs in each.costs.items()},
        refusal=np.logical_or.reduceat(each.refusal, starts),
        kind=each.kind[starts],
    )
