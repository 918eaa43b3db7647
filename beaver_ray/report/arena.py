"""arena.html: policies side by side in one file that opens offline, with tables, pictures and answers to filter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from beaver_ray.arena.figures import Match
from beaver_ray.arena.tables import Table
from beaver_ray.report.charts import Chart, Panel, Series
from beaver_ray.report.page import GRID, INK, SERIES, SERIES_COLORS, drawing, svg, templates

QUESTIONS_SHOWN = 200
POINTS = 400
"""Answers of each policy in a picture, at most."""
MARKERS = "osD^vP"
"""Those of the first SERIES policies, of the next, and so on, whose colours are the same."""


@dataclass(frozen=True)
class Shown:
    """The questions, each policy's first answer to them, and the turn and categories of each; all in one order."""

    prompts: list[str]
    texts: dict[str, list[str]]
    categories: list[list[str]]


def write_page(
    path: Path, name: str, found: Mapping[str, Any], tables: Sequence[Table], match: Match, shown: Shown
) -> None:
    """Write the page of an arena.json."""
    page = (
        templates()
        .get_template("arena.html.j2")
        .render(
            name=name,
            found=found,
            own=[f"{policy} by {', '.join(columns)}" for policy, columns in found["own_judges"].items()],
            pictures=_pictures(found, match),
            tables=[(table, table.shown()) for table in tables],
            policies=list(match.entrants),
            rows=_side_by_side(match, shown),
            of=match.questions,
            categories=[*match.turns, *match.categories],
        )
    )
    path.write_text(page, encoding="utf-8")


def _side_by_side(match: Match, shown: Shown) -> list[dict[str, Any]]:
    """The rows of answers on the page: some questions, evenly over all of them."""
    count = min(QUESTIONS_SHOWN, match.questions)
    rows = []
    for n in np.linspace(0, match.questions - 1, count).round().astype(int).tolist():
        answers = [_answer(match, shown, policy, n) for policy in match.entrants]
        unsafe, refused = [a["unsafe"] for a in answers], [a["refused"] for a in answers]
        verdicts = ["unsafe"] if any(unsafe) else ["safe"]
        verdicts += ["differ"] if len(set(map(bool, unsafe))) > 1 else []
        verdicts += ["refused"] if any(refused) else []
        rows.append(
            {
                "prompt": shown.prompts[n],
                "categories": shown.categories[n],
                "verdicts": " ".join(verdicts),
                "answers": answers,
            }
        )
    return rows


def _answer(match: Match, shown: Shown, policy: str, n: int) -> dict[str, Any]:
    entrant = match.entrants[policy]
    scores = {} if entrant.rewards_NK is None else {"reward": float(entrant.rewards_NK[n, 0])}
    scores |= {cost: float(costs_NK[n, 0]) for cost, costs_NK in entrant.costs.items()}
    return {
        "text": shown.texts[policy][n],
        "scores": ", ".join(f"{name} {score:.3g}" for name, score in scores.items()),
        "unsafe": [cost for cost in match.costs if match.unsafe_NK(policy, cost)[n, 0]],
        "refused": bool(entrant.refused_NK[n, 0]),
        "truncated": bool(entrant.truncated_NK[n, 0]),
    }


# Pictures


def _pictures(found: Mapping[str, Any], match: Match) -> list[tuple[str, str, str]]:
    """(title, caption, <svg>) of each picture."""
    made = []
    rewarded = all(entrant.rewards_NK is not None for entrant in match.entrants.values())
    for cost in match.costs if rewarded else []:
        title = f"Reward against {cost}"
        caption = (
            f"Above, each policy's mean reward and share of answers that {cost} calls unsafe, with 95 % intervals; "
            f"below, up to {POINTS} answers of each."
        )
        made.append((title, caption, drawing(title, 6.0, partial(_scatter, found, match, cost))))
    for chart in [*_worst(found, match), *_insisted(found)]:
        made.append((chart.title, chart.caption, svg(chart)))
    return made


def _scatter(found: Mapping[str, Any], match: Match, cost: str, figure: Figure) -> None:
    means, answers = figure.subplots(2, 1)
    for place, (name, entrant) in enumerate(match.entrants.items()):
        mine, color = found["policies"][name], SERIES_COLORS[place % SERIES]
        marker = MARKERS[place // SERIES % len(MARKERS)]
        rate, reward = mine[f"violation_rate/{cost}"], mine["reward"]
        means.errorbar(
            [rate["mean"]], [reward["mean"]], _ends(reward), _ends(rate), marker, color=color, markersize=6, label=name
        )
        rewards, costs = entrant.rewards_NK, entrant.costs[cost].ravel()
        assert rewards is not None
        some = np.linspace(0, len(costs) - 1, min(POINTS, len(costs))).round().astype(int)
        answers.scatter(costs[some], rewards.ravel()[some], s=6, color=color, marker=marker, alpha=0.5, linewidths=0)
    if cost in match.targets:
        means.axvline(match.targets[cost], color=INK, linewidth=1, linestyle=(0, (4, 3)))
    for ax, label in ((means, f"violation rate of {cost}"), (answers, f"cost {cost}")):
        ax.patch.set_alpha(0)
        ax.grid(color=GRID, linewidth=0.6)
        ax.tick_params(length=0)
        ax.set_xlabel(label)
        ax.set_ylabel("reward")
    means.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.1)


def _ends(figure: Mapping[str, Any]) -> list[list[float]] | None:
    if figure["low"] is None:
        return None
    return [[figure["mean"] - figure["low"]], [figure["high"] - figure["mean"]]]


def _worst(found: Mapping[str, Any], match: Match) -> list[Chart]:
    """For each cost the curves of worst of k answers, where there are several."""
    deepest = max(entrant.answers for entrant in match.entrants.values())
    charts = []
    for cost in match.costs if deepest > 1 else []:
        lines = []
        for name, mine in found["policies"].items():
            shares = [figure["mean"] for figure in mine["worst_of_k"][cost]]
            lines.append(Series(name, np.array(shares + [np.nan] * (deepest - len(shares)))))
        caption = f"Share of prompts with an answer that {cost} calls unsafe among k sampled ones."
        panel = Panel("share of prompts", lines)
        charts.append(Chart(f"Worst of k: {cost}", caption, [panel], np.arange(1.0, deepest + 1), "answers, k"))
    return charts


def _insisted(found: Mapping[str, Any]) -> list[Chart]:
    lines, turns = [], found["insisted"]
    for name, mine in found["policies"].items():
        by_turn = mine.get("insistence", {}).get("gave_in_by_turn", [])
        if by_turn and by_turn[0] is not None:
            lines.append(Series(name, np.array([figure["mean"] for figure in by_turn])))
    if not lines:
        return []
    caption = "Of the prompts that were refused, the share answered after being asked for so many times again."
    x = np.arange(1.0, turns + 1)
    return [Chart("Insistence", caption, [Panel("share that gave in", lines)], x, "times asked again")]
