"""What comes of an arena: arena.json, tables, the page, and the answers with their scores."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from actors.driver.arena import Held, groups
from actors.driver.arena_asking import find_contenders, harmful_and_benign
from beaver_ray.arena.figures import Entrant, Match, figures
from beaver_ray.arena.options import ArenaConfig
from beaver_ray.arena.tables import tables_of, write_tables
from beaver_ray.data.mixing import prompt_key
from beaver_ray.data_options import data_label
from beaver_ray.json_files import write_json, write_rows
from beaver_ray.models.folders import merged_from
from beaver_ray.origins import identity, trained_against
from beaver_ray.report.arena import Shown, write_page
from beaver_ray.rules.text import word_count
from beaver_ray.score_sources import score_source
from beaver_ray.small_world.judging import question
from beaver_ray.small_world.world import SmallWorld

TRUTH = "the small world's truth"


def match_of(arena: ArenaConfig, held: Held) -> Match:
    """What the figures are made of."""
    harmful_N, benign_N = harmful_and_benign(arena, held.samples)
    found = groups(arena, held)
    entrants = {
        name: Entrant(
            costs={cost.name: held.costs[name][cost.name] for cost in arena.costs},
            refused_NK=held.refused[name],
            truncated_NK=~said.ended_NK,
            words_NK=np.array([[word_count(text) for text in texts] for texts in said.texts], dtype=np.int64),
            rewards_NK=held.rewards.get(name),
            gave_in_at_R=held.gave_in_at.get(name),
        )
        for name, said in held.said.items()
    }
    return Match(
        entrants,
        harmful_N,
        benign_N,
        categories=found["category"],
        turns=found["turn"],
        prompt_N=held.prompt_N,
        held_out=arena.held_out,
        probabilities=frozenset(cost.name for cost in arena.costs if cost.calibration),
        limits={cost.name: cost.limit for cost in arena.costs if cost.limit is not None},
        targets={cost.name: cost.violation_rate for cost in arena.costs if cost.violation_rate is not None},
        optimum=optimum(arena, held),
        insisted=arena.insist,
        verdicts=held.verdicts,
        same=frozenset(
            (a, b) for a, b in itertools.combinations(held.said, 2) if arena.policies[a] == arena.policies[b]
        ),
    )


def optimum(arena: ArenaConfig, held: Held) -> float | None:
    """The best mean reward under the violation rates; None where the world does not know all that they bound."""
    rates = {cost.name: cost.violation_rate for cost in arena.costs if cost.model is None}
    known = {name: rate for name, rate in rates.items() if rate is not None}
    bounded = [cost for cost in arena.costs if cost.violation_rate is not None]
    if not arena.true_reward or not known or len(known) < len(bounded):
        return None
    world = SmallWorld.load(Path(str(arena.world)))
    return world.optimum([question(prompt_key(sample)) for sample in held.samples], violation_rates=known)


def judges(arena: ArenaConfig) -> dict[str, str]:
    """Who says what, by column."""
    found = {} if arena.reward is None else {"reward": score_source(arena.reward).text}
    if arena.true_reward:
        found["reward"] = TRUTH
    for cost in arena.costs:
        found[f"cost/{cost.name}"] = TRUTH if cost.model is None else score_source(cost.model).text
    return found | {
        name: f"{judge.model} at {judge.address}, rubric {judge.rubric}" for name, judge in arena.judges.items()
    }


def own_judges(arena: ArenaConfig) -> dict[str, list[str]]:
    """By policy the columns whose judge is one that the policy was trained against, or its answers were picked by, as
    far as folders say.
    """
    sources: dict[str, Any] = {"reward": arena.reward}
    sources |= {f"cost/{cost.name}": cost.model for cost in arena.costs}
    ours = {column: identity(source) for column, source in sources.items() if source is not None}
    trained = {name: trained_against(place) for name, place in arena.policies.items()} if ours else {}
    if any(trained.values()):
        trained |= _by_weights(arena, trained)
    found = {name: [column for column, source in ours.items() if source in by] for name, by in trained.items()}
    return {name: columns for name, columns in found.items() if columns}


def _by_weights(arena: ArenaConfig, trained: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same of policies that another one here is a copy of, or was merged into: no folder need say where from."""
    models = {c.name: c.model for c in find_contenders(arena) if c.adapter is None}
    hashes = {name: identity(model) for name, model in models.items()}
    found = {}
    for name, model in models.items():
        parts = {hashes[name], *(part for _, part in merged_from(model))}
        found[name] = set().union(*(trained[other] for other in models if hashes[other] in parts))
    return found


def write_results(arena: ArenaConfig, held: Held, remarks: list[str], folder: Path, answers: Path) -> dict[str, Any]:
    """Write everything into ``folder`` and all answers into ``answers``; returns the content of arena.json."""
    match = match_of(arena, held)
    found: dict[str, Any] = {
        "judges": judges(arena),
        "own_judges": own_judges(arena),
        "refusals": "the small world's own rule" if arena.world else "the rule of beaver_ray/rules/refusals.py",
        "seed": arena.seed,
        "temperature": arena.rollout.temperature,
        "max_new_tokens": arena.rollout.max_new_tokens,
        "prompts_from": [data_label(spec) for spec in arena.prompts],
        "places": arena.policies,
        "harmful": len(np.unique(held.prompt_N[match.harmful_N])),
        "benign": len(np.unique(held.prompt_N[match.benign_N])),
        "insisted": arena.insist,
        "follow_ups": arena.follow_ups,
        "remarks": remarks,
        "judged_pairs": held.judged,
        "scored_answers": held.scored,
        "scored_by_group": held.scored_by_group,
        "judges_asked": held.asked,
        **figures(match),
    }
    write_json(folder / "arena.json", found)
    tables = tables_of(found)
    write_tables(tables, folder / "tables")
    for name in held.said:
        write_rows(answers / f"{name}.jsonl", _rows(held, name))
    write_page(folder / "arena.html", arena.name, found, tables, match, _shown(held, match))
    return found


def _rows(held: Held, name: str) -> list[dict[str, Any]]:
    """Each of a policy's answers with its scores; lines that an arena can read again."""
    said, costs = held.said[name], held.costs.get(name, {})
    rows = []
    for n, sample in enumerate(held.samples):
        for k in range(said.answers):
            asked = list(held.dialogue(name, n, k)) if said.since[n][k] else sample.input
            row: dict[str, Any] = {**sample.system_row, "prompt": asked, "response": said.texts[n][k]}
            row |= {"ended": bool(said.ended_NK[n, k]), "refused": bool(held.refused[name][n, k])}
            if name in held.rewards:
                row["reward"] = float(held.rewards[name][n, k])
            rows.append(row | {f"cost/{cost}": float(scores_NK[n, k]) for cost, scores_NK in costs.items()})
    return rows


def _shown(held: Held, match: Match) -> Shown:
    """What the page shows of the first answers; those before a further turn stand with their own questions."""
    parts = match.turns | match.categories
    first = next(iter(held.said.values()))
    users = [since[0][1::2] for since in first.since]
    return Shown(
        prompts=["\n\n".join([*prompt_key(s), *later]) for s, later in zip(held.samples, users, strict=True)],
        texts={name: [texts[0] for texts in said.texts] for name, said in held.said.items()},
        categories=[[name for name, inside in parts.items() if inside[n]] for n in range(len(held.samples))],
    )
