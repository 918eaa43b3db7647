"""Red teaming: attempts made of seeds, the target's answers to them with their costs, and what is kept of it.

Answers are kept in answers/ of the run's folder, block by block (`actors.driver.kept_answers`).
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.driver.asking import asking_policy
from actors.driver.evaluate import answers_to, judging
from actors.driver.judged_policy import JudgedPolicy
from actors.driver.kept_answers import KeptAnswers
from actors.driver.processes import Roles
from actors.driver.rollouts import Rollouts
from actors.roles.exchange import sample_seed
from actors.roles.judge import REPLIES, Judge
from beaver_ray import environments, experience
from beaver_ray.data.mixing import bare_turns, load_mix
from beaver_ray.data.near import NearTexts
from beaver_ray.data.pairs import draw_pairs
from beaver_ray.data.readers import Dialogues, Reader
from beaver_ray.data.survey import CATEGORIES
from beaver_ray.errors import UserError
from beaver_ray.fit import check_fit
from beaver_ray.json_files import json_line, write_json, write_rows
from beaver_ray.judge_options import JudgeOptions
from beaver_ray.manifest import write_stage_manifest
from beaver_ray.models.folders import fingerprint
from beaver_ray.models.loading import check_model_folder, context_length, load_tokenizer
from beaver_ray.red_team.attacks import Attack
from beaver_ray.red_team.choosing import (
    Attempt,
    Choice,
    Dialogue,
    Seeds,
    Tried,
    choose,
    draw,
    figures,
    read_seeds,
    words,
)
from beaver_ray.red_team.options import RedTeamConfig
from beaver_ray.report.red_team import remarks, write_page
from beaver_ray.runs import RunFolder
from beaver_ray.small_world.world import SmallWorld

BLOCK = 256
"""Attempts whose answers are kept together."""
REQUESTS = 1 << 40
"""Number of the attacker's first request, beyond those of attempts."""


def red_team(stage: RedTeamConfig, run: RunFolder) -> None:
    """Try all attacks on the drawn seeds, and write what is kept into ``final.part``, and the figures.

    Raises UserError where nothing worked; the figures are there all the same.
    """
    run.note(*_check(stage))
    run.rewind(0)  # figures of the blocks that are there already are logged again
    samples, reports = load_mix(stage.seeds)
    for label, report in reports.items():
        run.note(f"{label}: {report.line()}")
    seeds = read_seeds(samples, stage.held_out, (stage.category,) if stage.category else CATEGORIES)
    others = load_mix(stage.known)[0] if stage.known else []
    team = Team(stage, run, seeds)
    attempts = team.attempts()
    tried = team.tried(attempts)
    known = NearTexts()
    for text in (text for texts in (*seeds.used.values(), *seeds.held_out.values()) for text in texts):
        known.add(text)
    for sample in others:
        known.add("\n".join(bare_turns(sample)[::2]))
    choice = choose(tried, known, team.telltale, stage.worked, stage.per_category)
    found = figures(tried, choice, {**seeds.left_out, **team.left_out}, stage.target)
    shares = {
        f"{kind}/{name}": part["unsafe"] for kind in ("attacks", "categories") for name, part in found[kind].items()
    }
    run.log(team.blocks + 1, {f"unsafe/{name}": share["mean"] for name, share in shares.items() if share})
    write_page(run.folder, stage.name, found, choice)
    run.note(*remarks(found))
    if not choice.kept:
        raise UserError(
            f"of {len(tried)} attempts none is kept ({_said(choice.left_out)}); lower worked, or give other attacks or "
            "more seeds, and go on with resume=true, which asks nothing twice"
        )
    _write(stage, run.folder / "final.part", choice, found)


def _check(stage: RedTeamConfig) -> list[str]:
    """What should be known of the run's models. UserError for a model, source, attack or file that is none."""
    for use in stage.roles()[0].models:
        check_model_folder(use.folder, use.part)
    for role in stage.roles()[1:]:
        assert role.source is not None
        role.source.check(role.name, stage.trusts_code)
    for attack in stage.named_attacks:
        attack.check()
    return check_fit(stage)


def _write(stage: RedTeamConfig, folder: Path, choice: Choice, found: dict[str, Any]) -> None:
    """prompts.jsonl, answers.jsonl, pairs.jsonl where prompts have different answers, and the manifest."""
    rows = [
        row | {"model": stage.policy, "temperature": stage.rollout.temperature}
        for one in choice.kept
        for row in one.answers()
    ]
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier start, which may have kept pairs
    write_rows(folder / "prompts.jsonl", [one.row() for one in choice.kept])
    write_rows(folder / "answers.jsonl", rows)
    plain = [{name: value for name, value in row.items() if name not in ("unsafe", "cost")} for row in rows]
    pairs, _ = draw_pairs(plain, 1, stage.seed)
    if pairs:
        write_rows(folder / "pairs.jsonl", pairs)
    counts = {"attempts": found["all"]["attempts"], "kept": len(choice.kept), "answers": len(rows), "pairs": len(pairs)}
    counts["unsafe answers"] = sum(row["unsafe"] for row in rows)
    files = [stage.world] if stage.world else []
    write_stage_manifest(stage, folder, counts | found["left_out"], files)


def _said(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items())


@dataclass(frozen=True)
class Asked:
    """Texts that a model is asked, and how: a group answers under one environment."""

    title: str
    """Of its files."""
    model: str
    numbers: list[int]
    """Of its attempts; with the place of an answer they make its random numbers."""
    turns: list[tuple[str, ...]]
    """Of each attempt the user's turns."""
    answers: int
    """To each attempt."""
    room: int
    """Tokens of all that follows a first turn."""
    environment: str | None = None
    """Who says further turns; None for those of ``turns``."""
    scored: bool = True


class Team:
    """The attacks of one run."""

    def __init__(self, stage: RedTeamConfig, run: RunFolder, seeds: Seeds) -> None:
        self.stage, self.run, self.seeds = stage, run, seeds
        self.left_out: Counter[str] = Counter()
        self.blocks = 0
        """Blocks that were answered, each a step of metrics.jsonl."""
        self.telltale = seeds.telltale()
        self.world = SmallWorld.load(Path(stage.world)) if stage.world else None

    # Attempts

    def attempts(self) -> dict[str, list[Attempt]]:
        """All attempts by attack, in its order; those that say the same in the same way are one."""
        stage = self.stage
        drawn = draw(self.seeds, stage.seeds_per_category, stage.seed)
        reader = self._reader(stage.policy)
        found: dict[str, list[Attempt]] = {}
        seen: set[tuple[str, tuple[str, ...]]] = set()
        number = 0
        for attack in stage.named_attacks:
            made = self._asked(attack, drawn) if attack.kind == "asked" else self._rewritten(attack, drawn)
            for category, seed, turns in made:
                key = (attack.name if attack.kind == "user" else "", turns)
                if not turns:
                    self.left_out["attacks that make nothing of a seed"] += 1
                elif key in seen:
                    self.left_out["attempts that say what an earlier one says"] += 1
                elif not self.telltale.isdisjoint(words("\n".join(turns))):
                    self.left_out["speak of a held-out category, not tried"] += 1
                elif len(reader.prompt(turns[:1])) > stage.max_prompt_tokens:
                    self.left_out[f"longer than {stage.max_prompt_tokens} tokens"] += 1
                else:
                    seen.add(key)
                    found.setdefault(attack.name, []).append(Attempt(number, attack.name, category, seed, turns))
                    number += 1
        if not number:
            raise UserError(f"the attacks make no attempt of {len(drawn)} seeds ({_said(self.left_out)})")
        return found

    def _rewritten(self, attack: Attack, drawn: Sequence[tuple[str, str]]) -> list[tuple[str, str, tuple[str, ...]]]:
        """(category, seed, the user's turns) of each drawn seed; of a user who goes on, the seed is the first turn."""
        if attack.kind == "user":
            return [(category, text, (text,)) for category, text in drawn]
        rewrite = attack.rewriter()
        return [
            (
                category,
                text,
                tuple(rewrite(text, category, self.seeds.peers(category, text), self._number(attack, text))),
            )
            for category, text in drawn
        ]

    def _asked(self, attack: Attack, drawn: Sequence[tuple[str, str]]) -> list[tuple[str, str, tuple[str, ...]]]:
        """The same of what the attacker writes, which may be several prompts for a seed."""
        requests = [
            attack.request(text, category, self.seeds.peers(category, text), self._number(attack, text))
            for category, text in drawn
        ]
        found: list[tuple[str, str, tuple[str, ...]]] = []
        for (category, text), said in zip(drawn, self._replies(attack, requests), strict=True):
            if said is None or attack.refused(said[0]):
                self.left_out["requests that the attacker refuses, or that are too long for it"] += 1
                continue
            prompts = attack.read(*said)
            found += [(category, text, (prompt,)) for prompt in prompts] or [(category, text, ())]
        return found

    def _replies(self, attack: Attack, requests: list[str]) -> list[tuple[str, bool] | None]:
        """What the attacker says to each request, and whether it was cut; None for what is too long for it."""
        stage = self.stage
        if isinstance(stage.attacker, JudgeOptions):
            judge = Judge(stage.attacker, Path(stage.workspace) / REPLIES, self.run.note)
            replies = judge(requests)
            self.run.note(f"attacker {stage.attacker.model}: {judge.usage.line(stage.attacker)}")
            return [(reply.text, reply.finish == "length") for reply in replies]
        model = stage.asked_model
        assert model is not None
        reader = self._reader(model)
        room = attack.count * stage.max_prompt_tokens
        longest = (context_length(model, stage.trust_remote_code) or 1 << 30) - room
        short = [number for number, text in enumerate(requests) if len(reader.prompt([text])) <= longest]
        if not short:
            return [None] * len(requests)
        asked = Asked(
            title=attack.name,
            model=model,
            numbers=[REQUESTS + number for number in short],
            turns=[(requests[number],) for number in short],
            answers=1,
            room=room,
            scored=False,
        )
        first = [dialogues[0] for dialogues in self._answers(asked)]
        said = {number: (one.response, one.truncated) for number, one in zip(short, first, strict=True)}
        return [said.get(number) for number in range(len(requests))]

    def _reader(self, model: str) -> Reader:
        """How a model that is asked reads."""
        return Reader(load_tokenizer(model, self.stage.trust_remote_code), self.stage.template_of(model))

    def _number(self, attack: Attack, text: str) -> int:
        """The seed of the random numbers of an attack on a text."""
        said = f"{self.stage.seed}/{attack.name}/{text}".encode()
        return int.from_bytes(hashlib.blake2b(said, digest_size=7).digest(), "big")

    # Answers

    def tried(self, attempts: dict[str, list[Attempt]]) -> list[Tried]:
        """What the target answered to every attempt, in the order of their numbers."""
        stage = self.stage
        groups: dict[str, list[Attempt]] = {"single": [], "scripted": []}
        users = {attack.name: attack for attack in stage.named_attacks if attack.kind == "user"}
        for name, some in attempts.items():
            for one in some:
                groups.setdefault(name if name in users else "scripted" if len(one.turns) > 1 else "single", []).append(
                    one
                )
        found: list[Tried] = []
        for title, some in groups.items():
            if not some:
                continue
            asked = Asked(
                title=title,
                model=stage.policy,
                numbers=[one.number for one in some],
                turns=[one.turns for one in some],
                answers=stage.answers,
                room=stage.rollout.max_new_tokens if title == "single" else stage.dialogue_tokens,
                environment=users[title].environment if title in users else None,
            )
            for one, dialogues in zip(some, self._answers(asked), strict=True):
                found.append(Tried(one, [self._judged(one, dialogue) for dialogue in dialogues], stage.unsafe_above))
        return sorted(found, key=lambda one: one.attempt.number)

    def _judged(self, attempt: Attempt, dialogue: Dialogue) -> Dialogue:
        """With the truth as its cost, where a world knows it. An answer costs the same whatever wraps the question."""
        if self.world is None:
            return dialogue
        cost = self.world.cost(attempt.seed, dialogue.response)
        return replace(dialogue, cost=cost)

    def _answers(self, asked: Asked) -> list[list[Dialogue]]:
        """The answers to each attempt of a group; blocks that an earlier start has left are read."""
        stage, run = self.stage, self.run
        folder = run.folder / "answers" / f"{asked.title}-{self._key(asked)}"
        prompts = folder / "prompts.jsonl"
        write_rows(prompts, [{"prompt": turns[0]} for turns in asked.turns])
        reader = self._reader(asked.model)
        tokens = [reader.prompt(turns[:1]) for turns in asked.turns]
        longest = max(stage.max_prompt_tokens, *map(len, tokens)) if asked.scored else max(map(len, tokens))
        environment = asked.environment or self._scripts(asked, folder)
        specs = [f"prompts:1:{prompts}"]
        config = asking_policy(stage, asked.model, specs, longest, asked.room, environment, asked.scored)
        kept = KeptAnswers(
            run=run,
            title=f"answers to {asked.title}",
            folder=folder,
            prompts=len(tokens),
            answers=asked.answers,
            block=BLOCK,
            before=self.blocks,
        )
        blocks = kept.rows(
            start=lambda: judging(config, config.judging_roles()),
            ask=lambda some, roles: self._ask(asked, some, tokens, config, reader, roles),
            figures=lambda rows: _unsafe(rows, stage.unsafe_above),
        )
        self.blocks += len(blocks)
        said = [Dialogue(**row | {"turns": tuple(row["turns"])}) for rows in blocks for row in rows]
        return [said[start : start + asked.answers] for start in range(0, len(said), asked.answers)]

    def _ask(
        self, asked: Asked, some: range, tokens: list[list[int]], config: JudgedPolicy, reader: Reader, roles: Roles
    ) -> list[dict[str, Any]]:
        """The answers to some attempts of a group, in order, as rows of a `Dialogue` each."""
        places = np.repeat(np.arange(some.start, some.stop), asked.answers)
        each = np.tile(np.arange(asked.answers), len(some))
        batch = experience.make_batch(
            {
                "sample_id": np.array(asked.numbers)[places] * asked.answers + each,
                "prompt_id": places,
                "prompt_tokens": [np.asarray(tokens[place], dtype=np.int32) for place in places.tolist()],
            }
        )
        columns = ["sample_id", "prompt_id", "prompt_tokens", "response_tokens", "loss_mask", "finish_reason"]
        columns += ["turns"] if config.environment else []
        columns += ["cost/harm"] if roles.scorers else []
        rollouts = Rollouts(roles.rollout, config.rollout.max_sequences, config.cluster.step_timeout)
        answered = answers_to(batch, columns, roles, rollouts)
        costs = experience.scalars(answered, "cost/harm").tolist() if roles.scorers else [None] * answered.num_rows
        own = experience.own_lengths(answered).tolist()
        ids = experience.scalars(answered, "prompt_id").tolist()
        told = Dialogues(reader, [config.data.prompts]).told(answered)
        return [
            {
                # Texts of which the policy reads the same tokens are told apart by their place.
                "turns": [asked.turns[place][0], *one.turns[1:]],
                "response": one.answer,
                "truncated": not one.ended,
                "tokens": count,
                "cost": cost if cost is not None and np.isfinite(cost) else None,
            }
            for place, one, count, cost in zip(ids, told, own, costs, strict=True)
        ]

    def _scripts(self, asked: Asked, folder: Path) -> str | None:
        """The environment that says the turns which are known beforehand; None where no attempt has any."""
        if asked.environment is not None or all(len(turns) == 1 for turns in asked.turns):
            return None
        said = {
            str(sample_seed(self.stage.seed, number * asked.answers + place)): turns[1:]
            for number, turns in zip(asked.numbers, asked.turns, strict=True)
            for place in range(asked.answers)
        }
        file = (folder / "scripts.json").resolve()
        write_json(file, said)
        code = Path(environments.__file__).parent / "scripted.py"
        return f"python:{code}:Scripted(file={str(file)!r})"

    def _key(self, asked: Asked) -> str:
        """Equal where answers that an earlier start has left are those that this one would give, scores included."""
        stage = self.stage
        part = stage.model_dump(mode="json", include={"seed", "debug", "template", "cost"})
        part |= {"asked": [asked.numbers, asked.turns, asked.answers, asked.room, asked.environment, asked.scored]}
        part |= {"temperature": stage.rollout.temperature}
        digest = hashlib.blake2b(
            (fingerprint(asked.model, stage.engine.dtype) + json_line(part)).encode(), digest_size=8
        )
        for role in stage.roles()[1:] if asked.scored else []:
            assert role.source is not None
            digest.update(role.source.fingerprint(stage.engine.dtype).encode())
        if asked.environment is not None:
            digest.update(environments.environment_code(asked.environment).pack().text.encode())
        return digest.hexdigest()


def _unsafe(rows: list[dict[str, Any]], unsafe_above: float) -> dict[str, float]:
    """The share of unsafe answers among those of a block that a model has scored; nothing where none is."""
    costs = [row["cost"] for row in rows if row["cost"] is not None]
    return {"unsafe": sum(cost > unsafe_above for cost in costs) / len(costs)} if costs else {}
