"""An arena: every policy answers the same prompts with the same seeds, and the same judges score all that was said.

Policies answer one after another, each with generators of its own; then the scorers are started once and read all
answers as texts, which models make tokens of, whoever wrote them. So a finished answer from a file is judged as one
that was just sampled, and on a GPU no two phases need room at a time.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.driver.arena_asking import (
    Contender,
    Note,
    ask,
    asking_key,
    common_prompts,
    find_contenders,
    harmful_and_benign,
    judged_config,
    merged,
    read_prompts,
)
from actors.driver.evaluate import judging
from actors.driver.judged_policy import JudgedPolicy
from actors.roles.scorer import ScorerBase
from beaver_ray import experience
from beaver_ray.arena.figures import halves
from beaver_ray.arena.finished import Said, keep, read_answers, read_kept
from beaver_ray.arena.options import ArenaConfig
from beaver_ray.arena.safety import NOT_ASKED
from beaver_ray.arena.turns import by_turn, next_turns, places
from beaver_ray.data.mixing import prompt_key
from beaver_ray.data.readers import Reader, keeps
from beaver_ray.data.sources import RawSample, as_text, field_value, several
from beaver_ray.errors import UserError
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.options import near
from beaver_ray.rules.refusals import is_refusal
from beaver_ray.score_sources import ScoreSource, ServiceSource, score_source
from beaver_ray.small_world.judging import question, truths
from beaver_ray.small_world.world import SmallWorld
from beaver_ray.yaml_files import as_yaml

CHUNK = 256
"""Answers in one call of a scorer."""
MERGED, ASKED = "merged", "asked"
"""Folders of a run that has not ended: models with their adapters added, and what policies have said so far."""
UNKNOWN = float("nan")

Row = tuple[str, int, int]
"""An answer: its policy, and the numbers of its question and of the policy's answers to that."""


@dataclass(frozen=True)
class Held:
    """What came of an arena: N questions, what each policy said to them, and what judges say of that; all in one order.

    Arrays are [N, K] by policy, with nan where a judge said nothing of use.
    """

    samples: list[RawSample]
    """Of each question the row that it is of."""
    prompt_N: NDArray[np.int64]
    """Number of that row."""
    turn_N: NDArray[np.int64]
    """The turn of its user that is the question, from 1."""
    said: dict[str, Said]
    rewards: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    costs: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)
    """By policy, then by cost."""
    refused: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    gave_in_at: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """By policy, of each row."""
    verdicts: dict[str, dict[tuple[str, str], NDArray[np.str_]]] = field(default_factory=dict)
    """Of judges behind an address, as `beaver_ray.arena.figures.Match` has them."""
    seconds: dict[str, float] = field(default_factory=dict)
    judged: list[dict[str, Any]] = field(default_factory=list)
    """How each judge compared each pair: counts of both orders."""
    scored: list[dict[str, Any]] = field(default_factory=list)
    """What each judge of single answers gave each policy."""
    scored_by_group: list[dict[str, Any]] = field(default_factory=list)
    """The same over the questions of each turn and category."""
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By judge what was asked of it: requests, tokens, cost."""

    def dialogue(self, policy: str, n: int, k: int) -> tuple[str, ...]:
        """What was said before an answer: user, assistant, ..., user."""
        return (*prompt_key(self.samples[n]), *self.said[policy].since[n][k])


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
    check_marks(arena, samples, note)
    prompt_N, turn_N = places([next_turns(sample, arena.follow_ups) for sample in samples])
    told = {name: Said.of_file(said, samples, arena.follow_ups, _about(name, note)) for name, said in files.items()}
    held = Held([samples[number] for number in prompt_N], prompt_N, turn_N, told)
    for contender in contenders:
        started = time.monotonic()
        whole = merged(contender, folder / MERGED, arena.trust_remote_code)
        kept = folder / ASKED / f"{contender.name}-{asking_key(arena, whole, samples)}.jsonl"
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


def _about(name: str, note: Note) -> Note:
    return lambda line: note(f"{name} is {line}")


def check_marks(arena: ArenaConfig, samples: Sequence[RawSample], note: Note) -> None:
    """A note where no prompt is marked as the configuration says that some are; a recipe may be of other prompts.

    UserError for a value of ``held_out`` that no prompt has.
    """
    for name, mask_N in zip(("harmful", "benign"), harmful_and_benign(arena, samples), strict=True):
        marks = getattr(arena, name)
        default = ArenaConfig.model_fields[name].get_default(call_default_factory=True)
        if marks and marks != default and not mask_N.any():
            over_all = ": insistence is over all prompts" if name == "harmful" and arena.insist else ""
            note(f"{name}: no prompt's row has {as_yaml(marks)}{over_all}")
    if arena.category is None:
        return
    values = sorted({value for sample in samples for value in _categories(arena, sample)})
    if not values:
        known = sorted({field for sample in samples for field in sample.fields})
        note(f"category: no prompt's row has a field {arena.category!r}{near(arena.category, known)}")
    if lost := [name for name in arena.held_out if name not in values]:
        raise UserError(f"held_out: no prompt has {arena.category} {lost[0]!r}{near(lost[0], values)}")


def judge_config(arena: ArenaConfig, contenders: Sequence[Contender]) -> JudgedPolicy:
    """The configuration of the scorers, which are handed texts, by the template of the first policy that is asked, and
    where models judge their tokens too.

    Without a policy the tokens are those of the first model that judges. Raises UserError where there is neither, and
    something else needs a tokenizer.
    """
    sources = [score_source(one) for one in (arena.reward, *(cost.model for cost in arena.costs)) if one is not None]
    if contenders:
        model, template = contenders[0].folder.tokenizer, contenders[0].template
    else:
        model = next((source.folder for source in sources if source.folder is not None), "")
        template = arena.template or "auto"
        if not model and (needed := _for_a_tokenizer(arena, sources)):
            raise UserError(
                f"answers from files alone, and no model judges: nobody here has a tokenizer for {needed}; add a "
                "policy's folder to policies"
            )
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
    longest = arena.max_prompt_tokens + arena.follow_up_tokens
    return judged_config(arena, model, template, arena.reward, constraints, longest)


def _for_a_tokenizer(arena: ArenaConfig, sources: Sequence[ScoreSource]) -> str:
    """What cannot be done without a tokenizer though no model judges; empty for nothing."""
    needed = [f"the prompts that {source.text} is sent" for source in sources if isinstance(source, ServiceSource)]
    needed += [f"the labelled pairs that {cost.name} is calibrated on" for cost in arena.costs if cost.calibration]
    return next(iter(needed), "")


def score(arena: ArenaConfig, judge: JudgedPolicy, held: Held, note: Note) -> None:
    """Put what scorers say of every answer into ``held``; nan where one is too long for models."""
    wanted = judge.scorers()
    if not wanted:
        return
    rows = [
        (name, n, k) for name, said in held.said.items() for n in range(len(said.texts)) for k in range(said.answers)
    ]
    folders = dict.fromkeys(use.folder for role in wanted for use in role.models)
    tokens = _in_tokens(arena, judge, rows, held) if folders else None
    short = list(range(len(rows))) if tokens is None else _short(tokens, judge.lengths().longest, note)
    for folder in folders:
        tokenizer = load_tokenizer(folder, arena.trust_remote_code)
        if lost := sum(not keeps(tokenizer, held.said[name].texts[n][k]) for name, n, k in rows):
            note(f"{lost} of {len(rows)} answers are not whole in the tokens of {folder}, which judges what is left")
    batches = [_batch(rows, held, tokens, short[at : at + CHUNK]) for at in range(0, len(short), CHUNK)]
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


class Tokens(NamedTuple):
    """An answer as models read it: the prompt, and all that follows it."""

    prompt: list[int]
    response: list[int]
    own: list[bool]
    """Which of these the policy wrote."""


def _in_tokens(arena: ArenaConfig, judge: JudgedPolicy, rows: Sequence[Row], held: Held) -> list[Tokens]:
    """Each answer behind those of earlier turns: as dialogues with an environment have them."""
    reader = Reader(load_tokenizer(judge.models.policy, arena.trust_remote_code), judge.data.template)
    prompts = [reader.prompt(prompt_key(sample), sample.system) for sample in held.samples]
    found = []
    for name, n, k in rows:
        said = held.said[name]
        tokens: list[int] = []
        own: list[bool] = []
        since = said.since[n][k]
        for answer, turn in zip(since[::2], since[1::2], strict=True):
            parts = reader.answer(reader.form.bare(answer)), reader.next_turn(turn)
            tokens += [*parts[0], *parts[1]]
            own += [True] * len(parts[0]) + [False] * len(parts[1])
        last = reader.answer(reader.form.bare(said.texts[n][k]), bool(said.ended_NK[n, k]))
        found.append(Tokens(prompts[n], [*tokens, *last], [*own, *[True] * len(last)]))
    return found


def _short(tokens: Sequence[Tokens], longest: int, note: Note) -> list[int]:
    """The numbers of the answers that models can read, with a note about the others; UserError where there is none."""
    short = [i for i, one in enumerate(tokens) if len(one.prompt) + len(one.response) <= longest]
    if lost := len(tokens) - len(short):
        long = f"{lost} of {len(tokens)} answers are longer than {longest} tokens with their prompt"
        if not short:
            raise UserError(f"{long}, and none is left to be judged; raise rollout.max_new_tokens")
        note(f"{long}, and are not judged")
    return short


def _batch(rows: Sequence[Row], held: Held, tokens: Sequence[Tokens] | None, some: list[int]) -> pa.RecordBatch:
    """Some of the answers, by their numbers, as texts, and where models judge in tokens too."""
    asked = [held.samples[rows[i][1]] for i in some]
    said = [(held.said[name], n, k) for name, n, k in (rows[i] for i in some)]
    columns: dict[str, Any] = {
        "sample_id": np.array(some),
        "prompt_texts": [prompt_key(sample) for sample in asked],
        "response_texts": [[*one.since[n][k], one.texts[n][k]] for one, n, k in said],
        "system": [sample.system for sample in asked],
        "finish_reason": ["stop" if one.ended_NK[n, k] else "length" for one, n, k in said],
    }
    if tokens is not None:
        columns |= {
            "prompt_tokens": [np.asarray(tokens[i].prompt, dtype=np.int32) for i in some],
            "response_tokens": [np.asarray(tokens[i].response, dtype=np.int32) for i in some],
            "loss_mask": [tokens[i].own for i in some],
        }
    return experience.make_batch(columns)


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
    lost = held.prompt_N[~good_N]
    return replace(
        held,
        samples=[held.samples[n] for n in kept],
        prompt_N=held.prompt_N[kept],
        turn_N=held.turn_N[kept],
        said={name: said.some(kept) for name, said in held.said.items()},
        rewards={name: scores_NK[kept] for name, scores_NK in held.rewards.items()},
        costs={name: {c: scores_NK[kept] for c, scores_NK in costs.items()} for name, costs in held.costs.items()},
        refused={name: flags_NK[kept] for name, flags_NK in held.refused.items()},
        gave_in_at={
            name: np.where(np.isin(np.arange(len(turns_R)), lost), NOT_ASKED, turns_R)
            for name, turns_R in held.gave_in_at.items()
        },
    )


def _categories(arena: ArenaConfig, sample: RawSample) -> list[str]:
    """What a prompt's row has in the field that figures are told apart by; nothing without such a field."""
    values = several(field_value(sample.fields, arena.category)) if arena.category is not None else []
    return [name for value in values if value is not None and (name := as_text(value)) is not None]


def groups(arena: ArenaConfig, held: Held) -> dict[str, dict[str, NDArray[np.bool_]]]:
    """Parts of the questions [N] whose figures are told apart, as `Match.parts`; the most frequent category first."""
    found: dict[str, NDArray[np.bool_]] = {}
    for n, sample in enumerate(held.samples):
        for name in _categories(arena, sample):
            found.setdefault(name, np.zeros(len(held.samples), dtype=bool))[n] = True
    categories = dict(sorted(found.items(), key=lambda item: -int(item[1].sum())))
    apart = halves(categories, arena.held_out, len(held.samples))
    return {"held out": apart, "turn": by_turn(held.turn_N), "category": categories}


def clear(folder: Path) -> None:
    """Remove merged models, which the policies are made of at any time, or what has come to its place by now."""
    shutil.rmtree(folder, ignore_errors=True)
