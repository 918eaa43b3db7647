"""What the limits of a run cost before it is trained: in words, as a table, as JSON, and as a page with a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from beaver_ray.evaluation import mean_interval
from beaver_ray.json_files import write_json
from beaver_ray.method.feasibility import Outcome, Study
from beaver_ray.report.charts import Card, Chart, Panel, Series
from beaver_ray.report.page import svg, templates

if TYPE_CHECKING:
    from rich.table import Table

FEW_PROMPTS = 30
"""Prompts in a constraint's scope below which its figures say little."""
FEW_ANSWERS = 2.0
"""Answers that the policy rests on at a prompt, below which it is one of those sampled and not a tilt."""
MOSTLY = 0.5


@dataclass(frozen=True)
class Feasibility:
    """What was found for a run: all that is said, shown and written of it comes from here."""

    name: str
    policy: str
    """Folder of the reference that was sampled."""
    study: Study
    most: Mapping[str, float | None]
    """The largest value that a run's multipliers may have, by constraint."""
    sampling: Sequence[str]
    """What should be known of the answers, one line each."""
    folder: Path

    @property
    def answers(self) -> int:
        """The most answers to a prompt."""
        return int(self.study.reference.counts_N.max())

    def verdict(self) -> str:
        """Whether the limits can be kept, and at what price, on one line."""
        found, limits_M = self.study, self.study.reference.limits_M
        if found.rest.kept:
            without = f"{found.free.reward:.4g} without limits"
            return f"the limits can be kept near the reference: reward {found.rest.reward:.4g}, {without}"
        missed = [number for number in range(len(found.names)) if found.missed_M[number]]
        safest = f"by the best of {self.answers} answers to each prompt"
        within_M = limits_M + found.reference.tolerances_M
        if (found.lowest_M > within_M).any():
            lowest = self._against(missed, found.lowest_M, "the lowest reachable is")
            return f"no policy near the reference keeps this limit: {lowest}, {safest}"
        if missed:
            nearest = self._against(range(len(found.names)), found.together_M, "the nearest is")
            return f"no policy near the reference keeps these limits together, though each alone: {nearest}, {safest}"
        above = np.flatnonzero(found.lowest_of_a_run_M > within_M)
        lowest = self._against(above.tolist(), found.lowest_of_a_run_M, "its KL alone holds it at")
        which = f": {lowest}" if len(above) else " together, though each alone"
        kl = f"ppo.kl_coefficient {found.reference.kl_coefficient:g}"
        return f"sampled answers keep the limits, a run with {kl} does not{which}; lower ppo.kl_coefficient"

    def remarks(self) -> list[str]:
        """What should be known before the figures are believed, one line each."""
        found, lines = self.study, list(self.sampling)
        rest, prompts_M = found.rest, found.reference.inside_MN.sum(axis=1)
        for name, prompts in zip(found.names, prompts_M, strict=True):
            if prompts < FEW_PROMPTS:
                lines.append(f"{name} counts for {prompts} sampled prompt(s) alone; raise --samples for better figures")
        if rest.kept and (rest.effective_answers < FEW_ANSWERS or rest.alone > MOSTLY):
            lines.append(
                f"at the limits the policy rests on {rest.effective_answers:.1f} of {self.answers} answers to a prompt "
                f"(on fewer than two at {rest.alone:.0%} of prompts): training may go further than these answers "
                "show, so take the reward as what can be had at least, and the multipliers as rough"
            )
        for name, multiplier in zip(found.names, rest.multipliers_M, strict=True):
            if rest.kept and (most := self.most[name]) is not None and multiplier > most:
                lines.append(f"{name} takes a multiplier of {multiplier:.4g}, above its multiplier.max {most:g}")
        return lines

    def _against(self, numbers: Sequence[int], reached_M: np.ndarray, words: str) -> str:
        names, limits_M = self.study.names, self.study.reference.limits_M
        return ", ".join(f"{names[n]} <= {limits_M[n]:.4g}, {words} {reached_M[n]:.4g}" for n in numbers)

    def figures(self) -> dict[str, Any]:
        """The content of feasibility.json."""
        found, reference = self.study, self.study.reference
        prompts_B, counting_MB = reference.prompts_B, reference.inside_MN[:, reference.prompts_B]
        own = {"reward": mean_interval(reference.rewards_B, prompts_B)}
        for name, costs_B, counting_B in zip(found.names, reference.costs_MB, counting_MB, strict=True):
            own[f"cost/{name}"] = mean_interval(costs_B[counting_B], prompts_B[counting_B])
        return {
            "reference": self.policy,
            "prompts": len(reference.counts_N),
            "answers": self.answers,
            "samples": len(reference.rewards_B),
            "kl_coefficient": reference.kl_coefficient,
            "kept": found.rest.kept,
            "verdict": self.verdict(),
            "remarks": self.remarks(),
            "limits": dict(zip(found.names, reference.limits_M.tolist(), strict=True)),
            "prompts_in_scope": dict(zip(found.names, reference.inside_MN.sum(axis=1).tolist(), strict=True)),
            "as_sampled": own,
            "at_the_limits": self._outcome(found.rest, found.rest.kept),
            "without_limits": self._outcome(found.free, True),
            "lowest_cost": dict(zip(found.names, found.lowest_M.tolist(), strict=True)),
            "lowest_cost_of_a_run": dict(zip(found.names, found.lowest_of_a_run_M.tolist(), strict=True)),
            "sweep": {
                name: [{"limit": limit, **self._outcome(here, here.kept)} for limit, here in points]
                for name, points in found.sweeps.items()
            },
        }

    def _outcome(self, here: Outcome, there: bool) -> dict[str, Any]:
        """A policy's figures; null are multipliers and reward where there is none that keeps its limits."""
        names = self.study.names
        multipliers = here.multipliers_M.tolist() if there else [None] * len(names)
        return {
            "reward": here.reward if there else None,
            "costs": dict(zip(names, here.costs_M.tolist(), strict=True)),
            "multipliers": dict(zip(names, multipliers, strict=True)),
            "kl": here.kl,
            "effective_answers": here.effective_answers,
            "prompts_on_one_answer": here.alone,
        }

    def table(self) -> Table:
        """The figures for a terminal."""
        from rich.markup import escape
        from rich.table import Table

        found, figures = self.study, self.figures()
        prompts, samples = figures["prompts"], figures["samples"]
        title = f"{self.name}: {samples:,} answers of {self.policy} to {prompts:,} prompts"
        table = Table(title=escape(title), title_justify="left")
        columns = ("limit", "as sampled", "without limits", "at the limits", "multiplier", "lowest of a run", "lowest")
        table.add_column("mean", overflow="fold")
        for column in columns:
            table.add_column(column, justify="right")
        kept = found.rest.kept
        own = {key: _number(figure["mean"]) for key, figure in figures["as_sampled"].items()}
        reward = _number(found.rest.reward) if kept else "-"
        table.add_row("reward", "", own["reward"], _number(found.free.reward), reward)
        for number, name in enumerate(found.names):
            table.add_row(
                name,
                _number(found.reference.limits_M[number]),
                own[f"cost/{name}"],
                _number(found.free.costs_M[number]),
                _number(found.rest.costs_M[number]) if kept else "-",
                _number(found.rest.multipliers_M[number]) if kept else "-",
                _number(found.lowest_of_a_run_M[number]),
                _number(found.lowest_M[number]),
            )
        counting = _number(found.rest.effective_answers) if kept else "-"
        table.add_row("answers that count", "", str(self.answers), _number(found.free.effective_answers), counting)
        return table

    def charts(self) -> list[Chart]:
        """For each constraint: reward and multipliers against the limit."""
        return [self._chart(number, name) for number, name in enumerate(self.study.names)]

    def _chart(self, number: int, name: str) -> Chart:
        found, reference = self.study, self.study.reference
        points = found.sweeps[name]
        even_B = 1.0 / reference.counts_N[reference.prompts_B]
        own = float(reference.mean_costs(even_B)[number])
        x = np.array([*(limit for limit, _ in points), own])
        rewards = [here.reward if here.kept else np.nan for _, here in points]
        configured = np.where(x[:-1] == reference.limits_M[number], rewards, np.nan)
        as_sampled = np.append(np.full(len(points), np.nan), reference.means(reference.rewards_B, even_B).mean())
        nothing_M = np.full(len(found.names), np.nan)
        multipliers_M = np.array([here.multipliers_M if here.kept else nothing_M for _, here in points]).T
        reward = [
            Series("best", np.append(rewards, np.nan)),
            Series("configured limit", np.append(configured, np.nan)),
            Series("reference", as_sampled),
        ]
        lines = [Series(n, np.append(m, np.nan)) for n, m in zip(found.names, multipliers_M, strict=True)]
        others = "; the other limits stay" if len(found.names) > 1 else ""
        caption = f"Predicted reward where {name} is kept at a limit, and the multipliers there{others}."
        panels = [Panel("reward", reward), Panel("multiplier", lines)]
        return Chart(f"Limit of {name}", caption, panels, x, f"limit of {name}")

    def cards(self) -> list[Card]:
        """The headline figures."""
        found, figures = self.study, self.figures()
        own = figures["as_sampled"]
        kept, limits_M = found.rest.kept, found.reference.limits_M
        remark = f"{found.free.reward:.4g} without limits, {own['reward']['mean']:.4g} as sampled"
        cards = [Card("Reward at the limits", _number(found.rest.reward) if kept else "-", remark)]
        for number, name in enumerate(found.names):
            value = _number(found.rest.multipliers_M[number]) if kept else "-"
            sampled = f"limit {limits_M[number]:.4g}, {own[f'cost/{name}']['mean']:.4g} as sampled"
            cards.append(Card(f"Multiplier: {name}", value, sampled, "" if found.rest.kept_M[number] else "bad"))
        counting = f"of {self.answers} to a prompt"
        return [*cards, Card("Answers that count", _number(found.rest.effective_answers) if kept else "-", counting)]


def write_feasibility(found: Feasibility) -> None:
    """Write feasibility.json and feasibility.html, which opens offline, into its folder."""
    write_json(found.folder / "feasibility.json", found.figures())
    page = (
        templates()
        .get_template("feasibility.html.j2")
        .render(
            name=found.name,
            verdict=found.verdict(),
            kept=found.study.rest.kept,
            cards=found.cards(),
            charts=[(chart, svg(chart)) for chart in found.charts()],
            remarks=found.remarks(),
        )
    )
    (found.folder / "feasibility.html").write_text(page, encoding="utf-8")


def _number(value: float) -> str:
    return f"{value:.4g}"
