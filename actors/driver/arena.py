"""An arena: every policy answers the same prompts with the same seeds, and the same judges score all that was said.

Policies answer one after another, each with generators of its own; then the scorers are started once and read all
answers as texts, whoever wrote them, in the tokens of one reader. So a finished answer from a file is judged as one
that was just sampled, and on a GPU no two phases need room at a time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.driver.evaluate import FIRST_SAMPLE_ID, answers_to, judging
from actors.driver.judged_policy import JudgedPolicy, judged_policy
from actors.driver.processes import Roles, generator_spec
from actors.driver.rollouts import Rollouts
from actors.roles.scorer import ScorerBase
from beaver_ray import experience
from beaver_ray.arena.finished import Said, keep, read_answers, read_kept
from beaver_ray.arena.options import ArenaConfig
from beaver_ray.arena.origins import run_of, template_of
from beaver_ray.arena.safety import STOOD_FIRM
from beaver_ray.data.mixing import load_mix, prompt_key
from beaver_ray.data.readers import Reader
from beaver_ray.data.sources import RawSample, fits
from beaver_ray.data.templates import Template
from beaver_ray.errors import UserError
from beaver_ray.models.chat import ChatFolder
from beaver_ray.models.folders import fingerprint
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.rules.refusals import is_refusal
from beaver_ray.score_sources import score_source
from beaver_ray.small_world.judging import question, truths
from beaver_ray.small_world.world import SmallWorld

CHUNK = 256
"""Answers in one call of a scorer."""
MERGED, ASKED = "merged", "asked"
"""Folders of a run that has not ended: models with their adapters added, and what policies have said so far."""
TURN_TOKENS = 64
"""Room for what a template writes around a turn of insistence."""
UNKNOWN = float("nan")

Note = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """A policy that is asked: its name, the folder of its whole model, and how its prompts are written."""

    name: str
    model: str
    template: Template
    adapter: Path | None = None
    """A LoRA adapter that is yet to be added to the model."""

    def reader(self, trust_remote_code: bool) -> Reader:
        """Its tokenizer and template."""
        return Reader(load_tokenizer(self.model, trust_remote_code), self.template)


@dataclass(frozen=True)
class Held:
    """What came of an arena: the prompts, what each policy said to them, and what judges say of that; all in one order.

    Arrays are [N, K] by policy, with nan where a judge said nothing of use.
    """

    samples: list[RawSample]
    said: dict[str, Said]
    rewards: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    costs: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)
    """By policy, then by cost."""
    refused: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    gave_in_at: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    verdicts: dict[str, dict[tuple[str, str], NDArray[np.str_]]] = field(default_factory=dict)
    """Of judges behind an address, as `beaver_ray.arena.figures.Match` has them."""
    seconds: dict[str, float] = field(default_factory=dict)
    judged: list[dict[str, Any]] = field(default_factory=list)
    """How each judge compared each pair: counts of both orders."""
    scored: list[dict[str, Any]] = field(default_factory=list)
    """What each judge of single answers gave each policy."""
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By judge what was asked of it: requests, tokens, cost."""


def hold(arena: ArenaConfig, folder: Path, note: Note) -> Held:
    """Ask all policies, judge what they say, and keep the prompts that every policy answered and every judge read.

    In the run's ``folder`` adapters are merged, and lies what each policy has said: it is not asked again where the
    run is resumed. Raises UserError, before anything is started, for a policy or a judge that is none; and where no
    prompt is left.
    """
    contenders = find_contenders(arena)
    judge = judge_config(arena, contenders)
    judge.check_sources()
    world = SmallWorld.load(Path(arena.world)) if arena.world else None
    if world and (strange := [c.name for c in arena.costs if c.model is None and c.name not in world.constraints]):
        raise UserError(f"cost {strange[0]} has no model, and the world knows {', '.join(world.constraints)} alone")
    refuses = world.is_refusal if world else is_refusal
    files = {name: read_answers(Path(place)) for name, place in arena.files.items()}
    samples = common_prompts(arena, read_prompts(arena, world, note), contenders, files, note)
    held = Held(samples, {name: Said.of_file(found, samples) for name, found in files.items()})
    for contender in contenders:
        started = time.monotonic()
        whole = merged(contender, folder / MERGED)
        kept = folder / ASKED / f"{contender.name}-{_key(arena, whole, samples)}.jsonl"
        if not kept.is_file():
            keep(kept, *ask(arena, whole, samples, refuses, note))
        held.said[contender.name], turns_R = read_kept(kept)
        if turns_R is not None:
            held.gave_in_at[contender.name] = turns_R
        held.seconds[contender.name] = time.monotonic() - started
    started = time.monotonic()
    held = replace(held, said={name: held.said[name] for name in arena.policies})  # in the order of the configuration
    score(arena, judge, held, note)
    if world:
        by_truth(arena, world, held)
    for name, said in held.said.items():
        held.refused[name] = np.array([[refuses(text) for text in texts] for texts in said.texts], dtype=bool)
    held.seconds["judging"] = time.monotonic() - started
    return usable(held, note)


# Who is asked, and who judges


def find_contenders(arena: ArenaConfig) -> list[Contender]:
    """The policies that are folders. UserError for one that holds no model."""
    found = []
    for name, place in arena.folders.items():
        folder = ChatFolder.find(place, f"policy {name}")
        template: Template = arena.template if arena.template is not None else template_of(run_of(place))
        found.append(Contender(name, folder.model, template, folder.adapter))
    return found


def merged(contender: Contender, scratch: Path) -> Contender:
    """The contender with its adapter added to its model, in a folder under ``scratch``."""
    if contender.adapter is None:
        return contender
    folder = scratch / contender.name
    ChatFolder(contender.model, contender.adapter).load(torch.float32).cpu().save_pretrained(folder)
    load_tokenizer(contender.model).save_pretrained(folder)
    return replace(contender, model=str(folder), adapter=None)


def asking_config(arena: ArenaConfig, contender: Contender) -> JudgedPolicy:
    """The configuration of a policy's generators."""
    turn = arena.rollout.max_new_tokens + len(arena.insistence.split()) * 2 + TURN_TOKENS
    longest = arena.max_prompt_tokens + arena.insist * turn
    return _config(arena, contender.model, contender.template, None, [], longest)


def judge_config(arena: ArenaConfig, contenders: Sequence[Contender]) -> JudgedPolicy:
    """The configuration of the scorers, which are handed texts in the tokens of the first policy that is asked.

    Without one these are the tokens of the first model that judges. Raises UserError where there is neither.
    """
    sources = [source for source in (arena.reward, *(cost.model for cost in arena.costs)) if source is not None]
    if contenders:
        model, template = contenders[0].model, contenders[0].template
    else:
        folders = [folder for source in sources if (folder := score_source(source).folder) is not None]
        if sources and not folders:
            raise UserError(
                "answers from files alone, and judges without a model: nobody here has a tokenizer to hand them over "
                "in; add a policy's folder to policies"
            )
        model, template = (folders or [""])[0], arena.template or "auto"
    constraints = [
        {
            "name": cost.name,
            "model": cost.model,
            "calibration": cost.calibration,
            # Neither is bounded here; a violation rate says that the cost is a probability.
            **({"violation_rate": cost.violation_rate or 0.5} if cost.calibration else {"limit": 0.0}),
        }
        for cost in arena.costs
        if cost.model is not None
    ]
    return _config(arena, model, template, arena.reward, constraints, arena.max_prompt_tokens)


def _config(
    arena: ArenaConfig, policy: str, template: Template, reward: Any, constraints: list[Any], longest_prompt: int
) -> JudgedPolicy:
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
    distinct = {(sample.system, prompt_key(sample)): sample for sample in reversed(samples)}
    found = list(reversed(distinct.values()))
    if world is None:
        return found
    kinds = [world.parse(question(prompt_key(sample))).kind for sample in found]
    return [replace(s, fields={"kind": kind, **s.fields}) for s, kind in zip(found, kinds, strict=True)]


def common_prompts(
    arena: ArenaConfig,
    samples: list[RawSample],
    contenders: Sequence[Contender],
    files: dict[str, dict[tuple[str, ...], list[tuple[str, bool]]]],
    note: Note,
) -> list[RawSample]:
    """The prompts that are short enough for every policy and that every file answers, with a note about the others."""
    readers = {c.name: c.reader(arena.trust_remote_code) for c in contenders}
    limit, kept, lost = arena.max_prompt_tokens, [], dict.fromkeys([*readers, *files], 0)
    for sample in samples:
        turns = prompt_key(sample)
        without = [name for name, answered in files.items() if turns not in answered]
        without += [name for name, r in readers.items() if len(r.prompt(turns, sample.system)) > limit]
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


def harmful_and_benign(arena: ArenaConfig, samples: Sequence[RawSample]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which prompts [N] are to be refused, and which only look so."""
    marks = [[bool(where) and fits(where, s.fields) for s in samples] for where in (arena.harmful, arena.benign)]
    return np.array(marks[0], dtype=bool), np.array(marks[1], dtype=bool)


# Asking


def _key(arena: ArenaConfig, contender: Contender, samples: Sequence[RawSample]) -> str:
    """Equal where answers that an earlier start has left are those that this one would get."""
    part = arena.model_dump(mode="json", include={"answers", "seed", "debug", "insist", "insistence", "world"})
    part |= arena.rollout.model_dump(include={"max_new_tokens", "temperature"})
    reader = contender.reader(arena.trust_remote_code)
    part |= {"prompts": [reader.prompt(prompt_key(sample), sample.system) for sample in samples]}
    part |= {"asked again": harmful_and_benign(arena, samples)[0].tolist()}
    text = fingerprint(contender.model, arena.engine.dtype) + json.dumps(part)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def ask(
    arena: ArenaConfig, contender: Contender, samples: Sequence[RawSample], refuses: Callable[[str], bool], note: Note
) -> tuple[Said, NDArray[np.int64] | None]:
    """What a policy says to every prompt, and at which turn it gave in where it was asked again."""
    config, reader = asking_config(arena, contender), contender.reader(arena.trust_remote_code)
    tokens = [reader.prompt(prompt_key(sample), sample.system) for sample in samples]
    with judging(config, config.generators()) as roles:
        rollouts = Rollouts(roles.rollout, config.rollout.max_sequences, config.cluster.step_timeout, note=note)
        answers = _answered(dict(enumerate(tokens * arena.answers)), 0, reader, roles, rollouts)
        said = Said.of_rounds(answers, len(samples))
        if not arena.insist:
            return said, None
        return said, _insist(arena, config, contender, samples, said, refuses, (reader, roles, rollouts), note)


def _answered(
    prompts: dict[int, list[int]], turn: int, reader: Reader, roles: Roles, rollouts: Rollouts
) -> list[tuple[str, bool]]:
    """The text of an answer to each of these prompts, and whether it came to its end.

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
    answers = answers_to(batch, lambda sequences: [], columns, roles, rollouts)
    ended = (~experience.truncated(answers)).tolist()
    tokens = experience.rows(answers, "response_tokens")
    return [(reader.answer_text(answer, whole), whole) for answer, whole in zip(tokens, ended, strict=True)]


def _insist(
    arena: ArenaConfig,
    config: JudgedPolicy,
    contender: Contender,
    samples: Sequence[RawSample],
    said: Said,
    refuses: Callable[[str], bool],
    asked: tuple[Reader, Roles, Rollouts],
    note: Note,
) -> NDArray[np.int64] | None:
    """Ask again where the first answer refuses, up to ``insist`` times, over the prompts that are to be refused.

    Over all where none is marked so. None for a template that writes single turns only. Dialogues that grow too long
    for the policy are left out.
    """
    reader = asked[0]
    harmful_N, _ = harmful_and_benign(arena, samples)
    chosen = np.flatnonzero(harmful_N) if harmful_N.any() else np.arange(len(samples))
    dialogues = {n: [*prompt_key(samples[n]), said.texts[n][0]] for n in chosen.tolist()}
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
            for n, (text, _) in zip(prompts, answers, strict=True):
                dialogues[n].append(text)
                if not refuses(text):
                    gave_in_at[n] = turn
    if len(gave_in_at) < len(chosen):
        note(
            f"{contender.name}: {len(chosen) - len(gave_in_at)} dialogues grew too long and are left out of insistence"
        )
    return np.array(list(gave_in_at.values()), dtype=np.int64)


# Judging


def score(arena: ArenaConfig, judge: JudgedPolicy, held: Held, note: Note) -> None:
    """Put what scorers say of every answer into ``held``; nan where one is too long for them."""
    wanted = judge.scorers()
    if not wanted:
        return
    reader = Reader(load_tokenizer(judge.models.policy, arena.trust_remote_code), judge.data.template)
    rows = [
        (name, n, k) for name, said in held.said.items() for n in range(len(said.texts)) for k in range(said.answers)
    ]
    prompts = [reader.prompt(prompt_key(sample), sample.system) for sample in held.samples]
    answers = [
        reader.answer(reader.form.bare(held.said[p].texts[n][k]), held.said[p].ended_NK[n, k]) for p, n, k in rows
    ]
    longest = judge.lengths().longest
    fits_in = [i for i, (_, n, _) in enumerate(rows) if len(prompts[n]) + len(answers[i]) <= longest]
    if lost := len(rows) - len(fits_in):
        long = f"{lost} of {len(rows)} answers are longer than {longest} tokens with their prompt"
        if not fits_in:
            raise UserError(f"{long}, and none is left to be judged; raise rollout.max_new_tokens")
        note(f"{long}, and are not judged")
    batches = [_batch(rows, prompts, answers, held, fits_in[at : at + CHUNK]) for at in range(0, len(fits_in), CHUNK)]
    with judging(judge, wanted) as roles:
        for line in roles.notes:
            note(line)
        for group in roles.scorers.values():
            calls = [group.next().call(ScorerBase.score, batch) for batch in batches]
            scored = experience.concat(group.wait(calls, "judging answers"))
            for column in (name for name in scored.schema.names if name != "sample_id"):
                found = np.full(len(rows), UNKNOWN)
                found[experience.scalars(scored, "sample_id")] = experience.scalars(scored, column)
                _put(held, column, found)


def _batch(rows: Sequence[Any], prompts: Sequence[Any], answers: Sequence[Any], held: Held, some: list[int]) -> Any:
    ended = [held.said[name].ended_NK[n, k] for name, n, k in (rows[i] for i in some)]
    return experience.make_batch(
        {
            "sample_id": np.array(some),
            "prompt_tokens": [np.asarray(prompts[rows[i][1]], dtype=np.int32) for i in some],
            "response_tokens": [np.asarray(answers[i], dtype=np.int32) for i in some],
            "finish_reason": ["stop" if whole else "length" for whole in ended],
        }
    )


def _put(held: Held, column: str, found: NDArray[np.float64]) -> None:
    """The scores of all answers in a row to where each policy's belong."""
    start = 0
    for name, said in held.said.items():
        scores_NK = found[start : start + said.ended_NK.size].reshape(said.ended_NK.shape)
        start += said.ended_NK.size
        if column == "reward":
            held.rewards[name] = scores_NK
        else:
            held.costs.setdefault(name, {})[column.removeprefix("cost/")] = scores_NK


def by_truth(arena: ArenaConfig, world: SmallWorld, held: Held) -> None:
    """Put the world's true reward into ``held`` where nobody else gives one, and the costs that have no model."""
    names = [cost.name for cost in arena.costs if cost.model is None]
    for name, said in held.said.items():
        prompts = [question(prompt_key(sample)) for sample in held.samples for _ in range(said.answers)]
        responses = [text for texts in said.texts for text in texts]
        found = truths(world, prompts, responses, ~said.ended_NK.ravel())
        if arena.true_reward:
            held.rewards[name] = found.reward.reshape(said.ended_NK.shape)
        costs = held.costs.setdefault(name, {})
        costs |= {cost: found.costs[cost].reshape(said.ended_NK.shape) for cost in names}


def usable(held: Held, note: Note) -> Held:
    """The prompts all whose answers have finite scores, with a note about the others; UserError where none is left."""
    everything = [*held.rewards.values(), *(c for costs in held.costs.values() for c in costs.values())]
    good_N = np.ones(len(held.samples), dtype=bool)
    for scores_NK in everything:
        good_N &= np.isfinite(scores_NK).all(axis=1)
    if good_N.all():
        return held
    if not good_N.any():
        raise UserError("no prompt is left whose answers all have a finite score; mend the models that score them")
    note(f"{(~good_N).sum()} of {len(good_N)} prompts have an answer without a finite score, and are left out for all")
    kept = np.flatnonzero(good_N)
    return replace(
        held,
        samples=[held.samples[n] for n in kept],
        said={name: said.some(kept) for name, said in held.said.items()},
        rewards={name: scores_NK[kept] for name, scores_NK in held.rewards.items()},
        costs={name: {c: scores_NK[kept] for c, scores_NK in costs.items()} for name, costs in held.costs.items()},
        refused={name: flags_NK[kept] for name, flags_NK in held.refused.items()},
    )


def clear(folder: Path) -> None:
    """Remove merged models, which the policies are made of at any time, or what has come to its place by now."""
    shutil.rmtree(folder, ignore_errors=True)
