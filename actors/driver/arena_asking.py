"""How an arena asks its policies: who they are, what they are asked, and what each of them says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from actors.driver.evaluate import FIRST_SAMPLE_ID, answers_to, judging
from actors.driver.judged_policy import JudgedPolicy, judged_policy
from actors.driver.processes import Roles, generator_spec
from actors.driver.rollouts import Rollouts
from beaver_ray import experience
from beaver_ray.arena.finished import Answered, Said, dialogues_about
from beaver_ray.arena.options import ArenaConfig
from beaver_ray.arena.safety import NOT_ASKED, STOOD_FIRM
from beaver_ray.arena.turns import next_turns
from beaver_ray.data.mixing import load_mix, prompt_key
from beaver_ray.data.readers import Reader
from beaver_ray.data.sources import RawSample, fits
from beaver_ray.data.templates import Template
from beaver_ray.errors import UserError
from beaver_ray.models.chat import ChatFolder
from beaver_ray.models.folders import fingerprint
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.origins import run_of, template_of
from beaver_ray.small_world.judging import question
from beaver_ray.small_world.world import SmallWorld

TURN_TOKENS = 64
"""Room for what a template writes around a turn of insistence."""
ALL_TURNS = 1 << 20

Note = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """A policy that is asked: its name, the folder of its whole model, and how its prompts are written."""

    name: str
    model: str
    template: Template
    adapter: Path | None = None
    """A LoRA adapter that is yet to be added to the model."""

    @property
    def folder(self) -> ChatFolder:
        """The same as a chat has it."""
        return ChatFolder(self.model, self.adapter)

    def reader(self, trust_remote_code: bool) -> Reader:
        """Its tokenizer and template."""
        return Reader(load_tokenizer(self.folder.tokenizer, trust_remote_code), self.template)


# Who is asked


def find_contenders(arena: ArenaConfig) -> list[Contender]:
    """The policies that are folders. UserError for one that holds no model."""
    found = []
    for name, place in arena.folders.items():
        folder = ChatFolder.find(place, f"policy {name}")
        template: Template = arena.template if arena.template is not None else template_of(run_of(place))
        found.append(Contender(name, folder.model, template, folder.adapter))
    return found


def merged(contender: Contender, scratch: Path, trust_remote_code: bool) -> Contender:
    """The contender with its adapter added to its model, in a folder under ``scratch``."""
    if contender.adapter is None:
        return contender
    folder = scratch / contender.name
    model = contender.folder.load(torch.float32, trust_remote_code)
    model.cpu().save_pretrained(folder)
    load_tokenizer(contender.folder.tokenizer, trust_remote_code).save_pretrained(folder)
    return replace(contender, model=str(folder), adapter=None)


def asking_config(arena: ArenaConfig, contender: Contender) -> JudgedPolicy:
    """The configuration of a policy's generators."""
    turn = arena.rollout.max_new_tokens + len(arena.insistence.split()) * 2 + TURN_TOKENS
    longest = arena.max_prompt_tokens + max(arena.insist * turn, arena.follow_up_tokens)
    return judged_config(arena, contender.model, contender.template, None, [], longest)


def judged_config(
    arena: ArenaConfig, policy: str, template: Template, reward: Any, constraints: list[Any], longest_prompt: int
) -> JudgedPolicy:
    """The configuration of an arena's generators or scorers, for the prompts and tokens of one ``policy``."""
    rollout = arena.rollout.model_dump()
    config = judged_policy(
        policy,
        reward,
        constraints,
        f"arena {arena.name}",
        arena.trust_remote_code,
        seed=arena.seed,
        debug=arena.debug,
        cluster=arena.cluster,
        engine=arena.engine,
        data={"prompts": arena.prompts, "template": template, "max_prompt_tokens": longest_prompt},
        rollout=rollout | {"temperature": 1.0},
    )
    # Training cannot have the temperature 0 that an arena may.
    greedy = config.rollout.model_copy(update={"temperature": arena.rollout.temperature})
    return config.model_copy(update={"rollout": greedy})


# What is asked


def read_prompts(arena: ArenaConfig, world: SmallWorld | None, note: Note) -> list[RawSample]:
    """Distinct prompts in the order of the data; of a world's the field ``kind`` says what they are."""
    samples, reports = load_mix(arena.prompts)
    for label, report in reports.items():
        if report.dropped:
            note(f"{label}: {report.line()}")
    distinct = {(s.system, prompt_key(s), *next_turns(s, arena.follow_ups)): s for s in reversed(samples)}
    found = list(reversed(distinct.values()))
    turns = [len(next_turns(sample, ALL_TURNS)) for sample in found]
    if more := sum(count > arena.follow_ups for count in turns):
        note(f"{more} of {len(found)} prompts have further turns that are not asked; a higher follow_ups asks them")
    if arena.follow_ups and not any(turns):
        note("no prompt has further turns: none of their rows lists them in a field turns, the prompt first")
    if world is None:
        return found
    kinds = [world.parse(question(prompt_key(sample))).kind for sample in found]
    return [replace(s, fields={"kind": kind, **s.fields}) for s, kind in zip(found, kinds, strict=True)]


def common_prompts(
    arena: ArenaConfig,
    samples: list[RawSample],
    contenders: Sequence[Contender],
    files: dict[str, Answered],
    note: Note,
) -> list[RawSample]:
    """The prompts that are short enough for every policy and that every file answers, with a note about the others."""
    readers = {c.name: c.reader(arena.trust_remote_code) for c in contenders}
    limit, kept, lost = arena.max_prompt_tokens, [], dict.fromkeys([*readers, *files], 0)
    for sample in samples:
        without = [name for name, said in files.items() if not dialogues_about(said, sample, arena.follow_ups)]
        without += [name for name, reader in readers.items() if _told_tokens(arena, sample, reader) > limit]
        for name in without:
            lost[name] += 1
        if not without:
            kept.append(sample)
    for name, count in lost.items():
        why = "has no answer to" if name in files else f"has more than {limit} tokens in"
        if count:
            note(f"{name} {why} {count} of {len(samples)} prompts, which are left out for all")
    if not kept:
        raise UserError(
            f"no prompt is left that all policies can be compared on ({len(samples)} were read); raise "
            "max_prompt_tokens, or give files that answer these prompts, word for word"
        )
    return kept


def _told_tokens(arena: ArenaConfig, sample: RawSample, reader: Reader) -> int:
    """Tokens of all that the user says."""
    later = next_turns(sample, arena.follow_ups)
    return len(reader.prompt(prompt_key(sample), sample.system)) + sum(len(reader.next_turn(turn)) for turn in later)


def harmful_and_benign(arena: ArenaConfig, samples: Sequence[RawSample]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which prompts [N] are to be refused, and which only look so."""
    marks = [[bool(where) and fits(where, s.fields) for s in samples] for where in (arena.harmful, arena.benign)]
    return np.array(marks[0], dtype=bool), np.array(marks[1], dtype=bool)


# Asking


def asking_key(arena: ArenaConfig, contender: Contender, samples: Sequence[RawSample]) -> str:
    """Equal where answers that an earlier start has left are those that this one would get."""
    part = arena.model_dump(mode="json", include={"answers", "seed", "debug", "insist", "insistence", "world"})
    part |= arena.rollout.model_dump(include={"max_new_tokens", "temperature"})
    reader = contender.reader(arena.trust_remote_code)
    part |= {"prompts": [reader.prompt(prompt_key(sample), sample.system) for sample in samples]}
    part |= {"next turns": [next_turns(sample, arena.follow_ups) for sample in samples]}
    part |= {"asked again, by prompt": harmful_and_benign(arena, samples)[0].tolist()}
    text = fingerprint(contender.model, arena.engine.dtype) + json.dumps(part)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def ask(
    arena: ArenaConfig, contender: Contender, samples: Sequence[RawSample], refuses: Callable[[str], bool], note: Note
) -> tuple[Said, NDArray[np.int64] | None]:
    """What a policy says to every prompt, and at which turn it gave in where it was asked again."""
    config, reader = asking_config(arena, contender), contender.reader(arena.trust_remote_code)
    tokens = [reader.prompt(prompt_key(sample), sample.system) for sample in samples]
    later = [next_turns(sample, arena.follow_ups) for sample in samples]
    with judging(config, config.generators()) as roles:
        rollouts = Rollouts(roles.rollout, config.rollout.max_sequences, config.cluster.step_timeout, note=note)
        asked = (reader, roles, rollouts)
        dialogues = [[first] for first in _answered(dict(enumerate(tokens * arena.answers)), 0, *asked)]
        _go_on(arena, tokens, later, dialogues, asked)
        by_prompt = [
            [[(one.text, one.whole) for one in dialogue] for dialogue in dialogues[n :: len(samples)]]
            for n in range(len(samples))
        ]
        said = Said.of_dialogues(by_prompt, later)
        if not arena.insist:
            return said, None
        firsts = [dialogue[0].text for dialogue in dialogues[: len(samples)]]
        return said, _insist(arena, config, contender, samples, firsts, refuses, asked, note)


class Spoken(NamedTuple):
    """An answer."""

    text: str
    whole: bool
    """Whether it came to its end."""
    tokens: list[int]


def _go_on(
    arena: ArenaConfig,
    tokens: list[list[int]],
    next_turns_P: Sequence[Sequence[str]],
    dialogues: list[list[Spoken]],
    asked: tuple[Reader, Roles, Rollouts],
) -> None:
    """Put what users say next, and add the answers to the ``dialogues``, of which there are K for each of P prompts.

    What was said stays the very tokens that it was; where an answer was cut, its end is written behind it.
    """
    reader = asked[0]
    read, told = dict(enumerate(tokens * arena.answers)), [*next_turns_P] * arena.answers
    for turn in range(arena.follow_ups):
        prompts = {}
        for number, dialogue in enumerate(dialogues):
            if turn < len(told[number]):
                last = dialogue[-1]
                ended = last.tokens if last.whole else [*last.tokens, reader.form.end]
                prompts[number] = read[number] + ended + reader.next_turn(told[number][turn])
        if not prompts:
            return
        read |= prompts
        # Behind the turns of insistence, whose random numbers are others.
        for number, answer in zip(prompts, _answered(prompts, arena.insist + turn + 1, *asked), strict=True):
            dialogues[number].append(answer)


def _answered(
    prompts: dict[int, list[int]], turn: int, reader: Reader, roles: Roles, rollouts: Rollouts
) -> list[Spoken]:
    """An answer to each of these prompts.

    Their numbers, which rise, and the turn decide the random numbers, and so do not whoever else is still asked.
    """
    batch = experience.make_batch(
        {
            "sample_id": FIRST_SAMPLE_ID + turn * (1 << 20) + np.array(list(prompts)),
            "prompt_id": np.array(list(prompts)),
            "prompt_tokens": [np.asarray(prompt, dtype=np.int32) for prompt in prompts.values()],
        }
    )
    columns = ["sample_id", "response_tokens", "finish_reason"]
    answers = answers_to(batch, columns, roles, rollouts)
    ended = (~experience.truncated(answers)).tolist()
    tokens = experience.rows(answers, "response_tokens")
    return [
        Spoken(reader.answer_text(answer, whole), whole, answer.tolist())
        for answer, whole in zip(tokens, ended, strict=True)
    ]


def _insist(
    arena: ArenaConfig,
    config: JudgedPolicy,
    contender: Contender,
    samples: Sequence[RawSample],
    firsts: Sequence[str],
    refuses: Callable[[str], bool],
    asked: tuple[Reader, Roles, Rollouts],
    note: Note,
) -> NDArray[np.int64] | None:
    """Ask again where the first answer refuses, up to ``insist`` times, over the prompts that are to be refused.

    Over all where none is marked so. None for a template that writes single turns only. Dialogues that grow too long
    for the policy are left out: of each sample the turn, or NOT_ASKED.
    """
    reader = asked[0]
    harmful_N, _ = harmful_and_benign(arena, samples)
    chosen = np.flatnonzero(harmful_N) if harmful_N.any() else np.arange(len(samples))
    dialogues = {n: [*prompt_key(samples[n]), firsts[n]] for n in chosen.tolist()}
    gave_in_at = {n: STOOD_FIRM if refuses(turns[-1]) else 0 for n, turns in dialogues.items()}
    room = generator_spec(config).max_model_len - arena.rollout.max_new_tokens
    for turn in range(1, arena.insist + 1):
        standing = [n for n, found in gave_in_at.items() if found == STOOD_FIRM]
        prompts: dict[int, list[int]] = {}
        for n in standing:
            dialogues[n].append(arena.insistence)
            try:
                prompts[n] = reader.prompt(dialogues[n], samples[n].system)
            except UserError as error:
                note(f"{contender.name} is not asked again: {error}")
                return None
            if len(prompts[n]) > room:
                del prompts[n], gave_in_at[n]
        if prompts:
            answers = _answered(prompts, turn, *asked)
            for n, answer in zip(prompts, answers, strict=True):
                dialogues[n].append(answer.text)
                if not refuses(answer.text):
                    gave_in_at[n] = turn
    if len(gave_in_at) < len(chosen):
        note(
            f"{contender.name}: {len(chosen) - len(gave_in_at)} dialogues grew too long and are left out of insistence"
        )
    return np.array([gave_in_at.get(n, NOT_ASKED) for n in range(len(samples))], dtype=np.int64)
