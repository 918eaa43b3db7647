"""Judges behind an address: they compare an arena's policies pair by pair, or score each answer by itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.driver.arena import Held, groups
from actors.roles.judge import REPLIES, Judge
from beaver_ray.arena.comparisons import FAILURES, VERDICT, by_words
from beaver_ray.arena.options import ArenaConfig
from beaver_ray.data.mixing import prompt_key
from beaver_ray.evaluation import mean_interval, share_interval
from beaver_ray.judge.pairwise import Answer, Comparison, PairCounts, Verdict, compare, judge_each
from beaver_ray.judge.prompts import Reading, Rubric, load_rubric
from beaver_ray.judge.replies import PAIR, SCORE

_SCALE = float(SCORE.words[0]), float(SCORE.words[-1])
_COUNTS = ("comparisons", "identical", "position_disagreement", *FAILURES)

Judges = dict[str, tuple[Judge, Rubric]]


def find_judges(arena: ArenaConfig, note: Callable[[str], None]) -> Judges:
    """The judges, greeted where policies are to be asked first, which takes long; with files alone nobody needs to be
    there whose replies are kept. UserError for one that is not there or may not be asked, or has no such rubric.
    """
    replies = Path(arena.workspace) / REPLIES
    found = {
        name: (Judge(options, replies, note), load_rubric(options.rubric, (PAIR, SCORE), options.rubrics))
        for name, options in arena.judges.items()
    }
    if arena.folders:
        for judge, _ in found.values():
            judge.greet()
    return found


def ask_judges(arena: ArenaConfig, judges: Judges, held: Held) -> None:
    """Put every judge's verdicts on every pair of policies into ``held``, and what is to be known of the judge."""
    parts = [(kind, *item) for kind, some in groups(arena, held).items() for item in some.items()]
    for name, (judge, rubric) in judges.items():
        held.verdicts[name] = {}
        if rubric.form is SCORE:
            _score_answers(name, judge, rubric, held, parts)
        else:
            _compare_answers(name, judge, rubric, held)
        held.asked[name] = {"model": judge.options.model, "rubric": rubric.name, "rubric_hash": rubric.digest}
        held.asked[name] |= asdict(judge.usage) | {"cost": judge.usage.cost(judge.options)}


def _compare_answers(name: str, judge: Judge, rubric: Rubric, held: Held) -> None:
    """The judge reads two answers at a time, in both orders; of later turns both dialogues from the prompt on."""
    for first, second in itertools.combinations(held.said, 2):
        answers = min(held.said[first].answers, held.said[second].answers)
        comparisons = [
            Comparison(prompt_key(sample), _told(held, first, n, k), _told(held, second, n, k), sample.system)
            for n, sample in enumerate(held.samples)
            for k in range(answers)
        ]
        verdicts = compare(comparisons, rubric, judge)
        values_NK = np.array([v.value for v in verdicts], dtype=VERDICT).reshape(len(held.samples), answers)
        held.verdicts[name][first, second] = values_NK
        held.judged.append(
            {"judge": name, "first": first, "second": second, **_in_both_orders(verdicts, held.prompt_N)}
        )


def _told(held: Held, policy: str, n: int, k: int) -> Reading:
    """All that was said behind the prompt."""
    said = held.said[policy]
    return (*said.since[n][k], said.texts[n][k]) if said.since[n][k] else said.texts[n][k]


def _score_answers(
    name: str, judge: Judge, rubric: Rubric, held: Held, parts: Sequence[tuple[str, str, NDArray[np.bool_]]]
) -> None:
    """The judge reads one answer at a time, without knowing whose it is; the higher score wins."""
    words = {}
    for policy, said in held.said.items():
        single = [
            Answer(held.dialogue(policy, n, k), text, sample.system)
            for n, (sample, texts) in enumerate(zip(held.samples, said.texts, strict=True))
            for k, text in enumerate(texts)
        ]
        words[policy] = np.array(judge_each(single, rubric, judge), dtype=VERDICT).reshape(-1, said.answers)
        held.scored.append({"judge": name, "policy": policy, **_mean_score(words[policy], held.prompt_N)})
        held.scored_by_group.extend(
            {"group": kind, "questions of": group, "judge": name, "policy": policy}
            | _mean_score(words[policy][inside_N], held.prompt_N[inside_N])
            for kind, group, inside_N in parts
        )
    for first, second in itertools.combinations(held.said, 2):
        answers = min(held.said[first].answers, held.said[second].answers)
        held.verdicts[name][first, second] = by_words(words[first][:, :answers], words[second][:, :answers])


def _mean_score(words_NK: NDArray[np.str_], prompt_N: NDArray[np.integer]) -> dict[str, Any]:
    """How many answers a judge scored, how many it did not, and the mean, clustered by prompt."""
    failed_NK = np.isin(words_NK, FAILURES)
    prompts_M = prompt_N[np.nonzero(~failed_NK)[0]]
    scores_M = words_NK[~failed_NK].astype(np.float64)
    score = mean_interval(scores_M, prompts_M, _SCALE) if len(prompts_M) else None
    counts = {failure: int((words_NK == failure).sum()) for failure in FAILURES}
    return {"answers": words_NK.size, **counts, "score": score}


def _in_both_orders(verdicts: list[Verdict], prompt_N: NDArray[np.integer]) -> dict[str, Any]:
    """Counts of the comparisons, equally many of each question [N], and how often what stood first was chosen."""
    prompts_M = np.repeat(prompt_N, len(verdicts) // len(prompt_N))
    read = [(n, v.orders) for n, v in zip(prompts_M, verdicts, strict=True) if v.orders and v.value not in FAILURES]
    chose_a = [(n, orders[0] == "first") for n, orders in read if orders[0] != "tie"]
    chose_a += [(n, orders[1] == "second") for n, orders in read if orders[1] != "tie"]
    bias = None
    if chose_a:
        bias = share_interval(np.array([flag for _, flag in chose_a]), np.array([n for n, _ in chose_a]))
    counts = asdict(PairCounts.of(verdicts))
    return {name: counts[name] for name in _COUNTS} | {"position_bias": bias}
