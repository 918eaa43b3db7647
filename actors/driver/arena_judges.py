"""Judges behind an address: they compare an arena's policies pair by pair, or score each answer by itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from actors.driver.arena import Held
from actors.roles.judge import REPLIES, Judge
from beaver_ray.arena.comparisons import FAILURES, VERDICT, by_words
from beaver_ray.arena.options import ArenaConfig
from beaver_ray.data.mixing import prompt_key
from beaver_ray.evaluation import mean_interval, share_interval
from beaver_ray.judge.pairwise import Answer, Comparison, PairCounts, Verdict, compare, judge_each
from beaver_ray.judge.prompts import Rubric, load_rubric
from beaver_ray.judge.replies import PAIR, SCORE

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


def ask_judges(judges: Judges, held: Held) -> None:
    """Put every judge's verdicts on every pair of policies into ``held``, and what is to be known of the judge."""
    for name, (judge, rubric) in judges.items():
        held.verdicts[name] = {}
        (_score_answers if rubric.form is SCORE else _compare_answers)(name, judge, rubric, held)
        held.asked[name] = {"model": judge.options.model, "rubric": rubric.name, "rubric_hash": rubric.digest}
        held.asked[name] |= asdict(judge.usage) | {"cost": judge.usage.cost(judge.options)}


def _compare_answers(name: str, judge: Judge, rubric: Rubric, held: Held) -> None:
    """The judge reads two answers at a time, in both orders."""
    for first, second in itertools.combinations(held.said, 2):
        answers = min(held.said[first].answers, held.said[second].answers)
        comparisons = [
            Comparison(prompt_key(sample), held.said[first].texts[n][k], held.said[second].texts[n][k], sample.system)
            for n, sample in enumerate(held.samples)
            for k in range(answers)
        ]
        verdicts = compare(comparisons, rubric, judge)
        values_NK = np.array([v.value for v in verdicts], dtype=VERDICT).reshape(len(held.samples), answers)
        held.verdicts[name][first, second] = values_NK
        held.judged.append({"judge": name, "first": first, "second": second, **_in_both_orders(verdicts, answers)})


def _score_answers(name: str, judge: Judge, rubric: Rubric, held: Held) -> None:
    """The judge reads one answer at a time, without knowing whose it is; the higher score wins."""
    words = {}
    for policy, said in held.said.items():
        single = [
            Answer(prompt_key(sample), text, sample.system)
            for sample, texts in zip(held.samples, said.texts, strict=True)
            for text in texts
        ]
        words[policy] = np.array(judge_each(single, rubric, judge), dtype=VERDICT).reshape(-1, said.answers)
        failed_NK = np.isin(words[policy], FAILURES)
        prompts_M = np.nonzero(~failed_NK)[0]
        score = mean_interval(words[policy][~failed_NK].astype(np.float64), prompts_M) if len(prompts_M) else None
        counts = {failure: int((words[policy] == failure).sum()) for failure in FAILURES}
        held.scored.append({"judge": name, "policy": policy, "answers": len(single), **counts, "score": score})
    for first, second in itertools.combinations(held.said, 2):
        answers = min(held.said[first].answers, held.said[second].answers)
        held.verdicts[name][first, second] = by_words(words[first][:, :answers], words[second][:, :answers])


def _in_both_orders(verdicts: list[Verdict], answers: int) -> dict[str, Any]:
    """Counts of the comparisons, ``answers`` to a prompt, and how often what stood first was chosen."""
    read = [(i // answers, v.orders) for i, v in enumerate(verdicts) if v.orders and v.value not in FAILURES]
    chose_a = [(n, orders[0] == "first") for n, orders in read if orders[0] != "tie"]
    chose_a += [(n, orders[1] == "second") for n, orders in read if orders[1] != "tie"]
    bias = None
    if chose_a:
        bias = share_interval(np.array([flag for _, flag in chose_a]), np.array([n for n, _ in chose_a]))
    counts = asdict(PairCounts.of(verdicts))
    return {name: counts[name] for name in _COUNTS} | {"position_bias": bias}
