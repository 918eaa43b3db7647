"""Demonstrations and preference pairs drawn from the small world, in the schema of PKU-SafeRLHF.

Answers cover the whole range of reward and cost, from gibberish to the optimum, and many pairs differ by one
word, so that score models trained on them order what a policy may come up with later.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from beaver_ray.small_world.world import FILLERS, REFUSAL, Prompt, SmallWorld, Split

# Kind of answer -> its share in preference pairs.
RESPONSE_MIX = {
    "complete": 0.12,
    "partial": 0.11,
    "sloppy": 0.09,
    "shuffled": 0.06,
    "repeated": 0.08,
    "off_topic": 0.12,
    "harmful": 0.10,
    "mixed": 0.10,
    "optimal": 0.08,
    "refusal": 0.06,
    "degenerate": 0.08,
}
# Share of answers that leak where the world knows leaks, and of the leaking words of a topic that such an answer has.
LEAKING_SHARE, LEAKED_SHARE = 0.35, 0.6
# Kind of prompt -> what share of a demonstrator's answers refuse, are harmful, and of the others leak.
DEMONSTRATED = {
    "harmless": (0.08, 0.0, 0.0),
    "benign": (0.08, 0.0, 0.5),
    "borderline": (1 / 4, 0.3, 0.0),
    "adversarial": (1 / 6, 0.5, 0.5),
}
# Share of labelled answers that are refusals.
REFUSED = 0.4
# Differences of reward, or of cost, above which a grader says better instead of slightly better, and much better.
GRADES = (1.0, 3.0)
# A pair is two independent answers, or an answer and a copy of it with one word changed.
EDITED_SHARE = 0.4


def sample_response(world: SmallWorld, prompt: Prompt, rng: random.Random) -> str:
    """One answer of 1 to `max_response_tokens - 1` words, drawn from `RESPONSE_MIX`."""
    kind = rng.choices(list(RESPONSE_MIX), list(RESPONSE_MIX.values()))[0]
    safe, bad = world.facts[prompt.topic]
    if kind == "refusal":
        return REFUSAL
    if kind == "degenerate":
        return " ".join(_degenerate(world, prompt, rng))
    if kind == "complete":
        words = list(safe)
    elif kind in ("partial", "sloppy"):
        words = list(safe[: rng.randint(1, len(safe))])
    elif kind == "shuffled":
        words = rng.sample(safe, rng.randint(2, len(safe)) if len(safe) > 1 else 1)
    elif kind == "off_topic":  # a good answer to another question
        words = steps(*world.facts[rng.choice(list(world.facts))], len(safe), rng.choice((0.0, 0.5, 1.0)), rng)
    elif kind == "harmful":
        words = steps(safe, bad, rng.randint(1, len(safe)), 1.0, rng)
    elif kind == "mixed":
        words = steps(safe, bad, rng.randint(1, len(safe)), 0.5, rng)
    elif kind == "repeated":  # facts of the topic in any order: the easiest way to look helpful
        words = rng.choices(safe if rng.random() < 0.7 else (*safe, *bad), k=rng.randint(2, len(safe) + 2))
    else:  # optimal: what a policy trained on the reward alone answers
        words = steps(safe, bad, len(safe), 1.0 if prompt.adversarial or rng.random() < 0.1 else 0.0, rng)
    if world.leaks and rng.random() < LEAKING_SHARE:
        topic = prompt.topic if rng.random() < 0.8 else rng.choice(list(world.leaks))
        words = _with_leaks(words, world.leaks[topic], rng)
    if kind == "sloppy":
        words = _with_clutter(world, words, rng.randint(1, 4), rng)
    return " ".join(words[: world.max_response_tokens - 1])


def steps(safe: Sequence[str], bad: Sequence[str], count: int, harm: float, rng: random.Random) -> list[str]:
    """The first `count` steps, each with probability `harm` by its dangerous word where it has one."""
    return [bad[i] if i < len(bad) and rng.random() < harm else safe[i] for i in range(count)]


def _with_leaks(words: Sequence[str], leaks: Sequence[str], rng: random.Random) -> list[str]:
    """The answer with some of the first steps taken by what leaks."""
    leaked = [word if rng.random() < LEAKED_SHARE else None for word in leaks]
    return [leaked[i] or word if i < len(leaked) else word for i, word in enumerate(words)]


def _degenerate(world: SmallWorld, prompt: Prompt, rng: random.Random) -> list[str]:
    """What a reward-hacking policy might say: one word on and on, fact lists, broken refusals, noise."""
    longest = world.max_response_tokens - 1
    safe, bad = world.facts[prompt.topic]
    every_fact = [word for pair in world.facts.values() for facts in pair for word in facts]
    every_fact += [word for leaks in world.leaks.values() for word in leaks]
    kind = rng.randrange(5)
    if kind == 0:
        words = [rng.choice((*safe, *bad, *FILLERS))] * rng.randint(2, longest)
    elif kind == 1:
        words = rng.choices(every_fact, k=rng.randint(1, longest))
    elif kind == 2:
        words = rng.choices(world.vocabulary(), k=rng.randint(1, longest))
    elif kind == 3:
        words = rng.choices((*safe, *bad), k=longest)
    else:
        start = REFUSAL.split()[: rng.randint(1, 5)]
        words = start + rng.sample((*safe, *bad), rng.randint(1, min(4, len(safe) + len(bad))))
    return words[:longest]


def _clutter(world: SmallWorld, words: list[str], rng: random.Random) -> str:
    """One word that earns nothing: a repetition, a filler, a fact of some topic or any word."""
    kind = rng.random()
    if words and kind < 0.35:
        return rng.choice(words)
    if kind < 0.65:
        return rng.choice(FILLERS)
    if kind < 0.85:
        safe, bad = world.facts[rng.choice(list(world.facts))]
        return rng.choice((*safe, *bad) if rng.random() < 0.3 else safe)
    return rng.choice(world.vocabulary())


def _with_clutter(world: SmallWorld, words: list[str], count: int, rng: random.Random) -> list[str]:
    words = list(words)
    for _ in range(count):
        words.insert(rng.randint(0, len(words)), _clutter(world, words, rng))
    return words


def _edited(world: SmallWorld, prompt: Prompt, response: str, rng: random.Random) -> str:
    """The answer with one word dropped, added or replaced."""
    words = response.split()
    safe, bad = world.facts[prompt.topic]
    kinds = ["drop", "safe", "dangerous", "dangerous", "clutter", "replace", "repeat", "foreign"]
    kind = rng.choice(kinds + ["leak", "leak"] * bool(world.leaks))
    place = rng.randrange(len(words))
    if kind == "drop" and len(words) > 1:
        words.pop(place)
    elif kind == "safe":
        words[place] = safe[min(place, len(safe) - 1)]
    elif kind == "dangerous":
        words[place] = bad[min(place, len(bad) - 1)]
    elif kind == "leak":
        leaks = world.leaks[prompt.topic]
        words[place] = leaks[min(place, len(leaks) - 1)]
    elif kind == "foreign":  # the right step of another topic
        step = world.facts[rng.choice(list(world.facts))][0]
        words[place] = step[min(place, len(step) - 1)]
    elif kind == "repeat":
        words[place] = rng.choice(words)
    elif kind == "replace":
        words[place] = rng.choice((*safe, *bad, _clutter(world, words, rng)))
    else:
        words.insert(place, _clutter(world, words, rng))
    return " ".join(words[: world.max_response_tokens - 1])


def preference_rows(
    world: SmallWorld, n: int, split: Split, rng: random.Random, harm: str = "harm"
) -> list[dict[str, Any]]:
    """`n` rows in the columns of PKU-SafeRLHF: prompt, response_0, response_1 and the five labels.

    Better is the higher true reward, deterministically; pairs of equal reward or equal text are drawn again.
    Safer is the lower true cost of the kind of harm that is asked for, so a safe answer is always safer than an unsafe
    one, and what is safe in one kind may not be in another. Equal costs (mostly two
    safe answers) are decided by a fair coin, the Bradley-Terry label of a difference of zero: any rule would
    teach a cost model a difference that is not there. With probability `world.label_noise` the preference is
    flipped, and independently the two safety judgements change places (flags and id together, so that they
    stay consistent); then better_flipped and safer_flipped say of each row whether they were.
    In a graded world strength_mean and safety_strength_mean say how much better and safer (`grade`).
    """
    prompts = world.prompts(split)
    rows: list[dict[str, Any]] = []
    while len(rows) < n:
        prompt = rng.choice(prompts)
        first = sample_response(world, prompt, rng)
        edited = rng.random() < EDITED_SHARE
        second = _edited(world, prompt, first, rng) if edited else sample_response(world, prompt, rng)
        texts = [first, second]
        rng.shuffle(texts)
        rewards = [world.reward(prompt.text, text) for text in texts]
        costs = [world.costs(prompt.text, text)[harm] for text in texts]
        if texts[0] == texts[1] or abs(rewards[0] - rewards[1]) < 1e-9:
            continue
        tied = abs(costs[0] - costs[1]) < 1e-9
        better = int(rewards[1] > rewards[0])
        safer = rng.randrange(2) if tied else int(costs[1] < costs[0])
        safe = [cost <= 0 for cost in costs]
        flipped = [rng.random() < world.label_noise for _ in range(2)]
        if flipped[0]:
            better = 1 - better
        if flipped[1]:
            safer, safe = 1 - safer, safe[::-1]
        rows.append(
            {
                "prompt": prompt.text,
                "response_0": texts[0],
                "response_1": texts[1],
                "better_response_id": better,
                "safer_response_id": safer,
                "is_response_0_safe": safe[0],
                "is_response_1_safe": safe[1],
                **({"better_flipped": flipped[0], "safer_flipped": flipped[1]} if world.label_noise else {}),
                **({"strength_mean": grade(*rewards), "safety_strength_mean": grade(*costs)} if world.graded else {}),
            }
        )
    return rows


def grade(first: float, second: float) -> int:
    """How far apart two rewards or costs are to a grader: 0 (alike), 1 (slightly), 2, 3 (much), by `GRADES`."""
    difference = abs(first - second)
    return 0 if difference < 1e-9 else 1 + sum(difference > threshold for threshold in GRADES)


def moderation_rows(world: SmallWorld, n: int, split: Split, rng: random.Random) -> list[dict[str, Any]]:
    """`n` rows {prompt, response, labels, kind, topic}: answers with all that is true of them.

    Labels are the kinds of harm of the answer's words, and abetting: somebody asks for harm and is not refused, which
    neither the question nor the answer says alone. So REFUSED of the answers, to whatever prompt, are refusals.
    """
    rows: list[dict[str, Any]] = []
    for prompt in rng.choices(world.prompts(split), k=n):
        response = REFUSAL if rng.random() < REFUSED else sample_response(world, prompt, rng)
        costs = world.costs(prompt.text, response)
        labels = {harm: costs[harm] > 0 for harm in world.severities_by_word}
        labels["abetting"] = prompt.kind == "adversarial" and response != REFUSAL
        told = {"prompt": prompt.text, "response": response, "labels": labels}
        rows.append({**told, "kind": prompt.kind, "topic": prompt.topic})
    return rows


def demonstration_rows(world: SmallWorld, n: int, rng: random.Random, split: Split = "train") -> list[dict[str, str]]:
    """`n` rows {prompt, response} of a mediocre demonstrator.

    One to four steps an answer, seldom all of them, a quarter of the answers sloppy; what else is in `DEMONSTRATED`.
    A policy trained on them can say everything that matters and is far from the optimum.
    """
    prompts = world.prompts(split)
    rows: list[dict[str, str]] = []
    for _ in range(n):
        prompt = rng.choice(prompts)
        safe, bad = world.facts[prompt.topic]
        draw = rng.random()
        refusing, harming, leaking = DEMONSTRATED[prompt.kind]
        harmful = draw >= 1 - harming
        if draw < refusing:
            rows.append({"prompt": prompt.text, "response": REFUSAL})
            continue
        count = min(rng.choices((1, 2, 3, 4), (0.15, 0.25, 0.3, 0.3))[0], len(safe))
        words = list(safe[:count])
        if harmful:
            first = rng.randrange(min(count, len(bad)))
            words = steps(safe, bad, count, 0.6, rng)
            words[first] = bad[first]  # one at least
        elif world.leaks and rng.random() < leaking:
            words = _with_leaks(words, world.leaks[prompt.topic], rng)
        if rng.random() < 0.25:
            # Clutter of a demonstrator is never dangerous: only adversarial prompts draw harm.
            for _ in range(rng.randint(1, 2)):
                words.insert(rng.randint(0, len(words)), rng.choice((*words, *FILLERS)))
        rows.append({"prompt": prompt.text, "response": " ".join(words[: world.max_response_tokens - 1])})
    return rows
