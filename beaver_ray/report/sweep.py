"""What came of a sweep: the held-out figures of its runs by value, as sweep.json, sweep.csv and sweep.html.

A sweep whose values change how many rows are trained on is a learning curve: its figures are drawn over rows, and a
power law is put through them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from beaver_ray.errors import UserError
from beaver_ray.json_files import write_json
from beaver_ray.method.power_law import PowerLaw, fit_power_law
from beaver_ray.report.charts import Chart, Panel, Series
from beaver_ray.report.page import svg, templates
from beaver_ray.runs import kept_step, read_evaluation, read_metrics

if TYPE_CHECKING:
    from rich.table import Table

ROWS = "data/rows"
SIZES = (ROWS, "model/trained_parameters", "memory/planned_gib")
"""Figures that are only worth a column where they differ."""
SEEDS_DRAWN = 4
"""More have one line for their mean."""


@dataclass(frozen=True)
class SweptRun:
    """One run: the value of each key that is swept, its seed, and its figures by name."""

    name: str
    values: dict[str, Any]
    seed: int
    figures: dict[str, float]


@dataclass(frozen=True)
class Row:
    """The runs of the same values: of each figure the mean over seeds, and the standard deviation of two or more."""

    values: dict[str, Any]
    seeds: int
    mean: dict[str, float]
    deviation: dict[str, float]
    runs: dict[str, int]
    """How many have each figure: one that is not valid, or not defined, is none."""


def run_figures(folder: Path) -> dict[str, float]:
    """The held-out figures of a finished run, what it trained on how much, and its seconds.

    Of a run that has evaluated a policy they are the means of evaluation.json, else the last ``eval/...`` of
    metrics.jsonl, or those of the step whose model was kept; a score model's features stand beside these. UserError for
    a run without any.
    """
    rows = read_metrics(folder)
    found = {
        key: float(figure["mean"])
        for key, figure in read_evaluation(folder).items()
        if isinstance(figure, dict) and "mean" in figure
    }
    if all(key.startswith("features/") for key in found):
        evaluated = [one for one in rows if any(key.startswith("eval/") for key in one)]
        step = kept_step(folder)
        row: dict[str, Any] = next((row for row in reversed(evaluated) if step in (None, row["step"])), {})
        names = [key for key in row if key.startswith("eval/") and key != "eval/pairs"]
        found = {key: float(row[key]) for key in [*names, *SIZES] if row.get(key) is not None} | found
    if not found:
        raise UserError(f"{folder} has no held-out figures to compare; sweep a stage that evaluates what it trains")
    elapsed = [row["time/elapsed"] for row in rows if row.get("time/elapsed") is not None]
    return found | ({"time/elapsed": float(elapsed[-1])} if elapsed else {})


@dataclass(frozen=True)
class SweepReport:
    """The finished runs of a sweep, in order; ``keys`` are those that are swept."""

    title: str
    command: str
    keys: list[str]
    runs: Sequence[SweptRun]

    @cached_property
    def rows(self) -> list[Row]:
        """The runs of each combination of values."""
        groups: dict[str, list[SweptRun]] = {}
        for run in self.runs:
            groups.setdefault(json.dumps(run.values), []).append(run)
        return [_row(runs) for runs in groups.values()]

    @cached_property
    def names(self) -> list[str]:
        """The figures that a run has, without sizes that are the same for all."""
        found = dict.fromkeys(name for run in self.runs for name in run.figures)
        same = {name for name in SIZES if len({run.figures.get(name) for run in self.runs}) == 1}
        return [name for name in found if name not in same]

    @cached_property
    def is_curve(self) -> bool:
        """Whether the one key is of the training data, and each of its values another number of rows.

        Another key, as max_tokens, may drop rows too, and then more than their number differs.
        """
        found = [row.mean.get(ROWS) for row in self.rows]
        of_data = len(self.keys) == 1 and self.keys[0].partition(".")[0] == "train"
        return of_data and None not in found and len(set(found)) == len(found) > 1

    @cached_property
    def laws(self) -> dict[str, PowerLaw]:
        """The power law through each held-out figure of a learning curve, where there are runs enough for one."""
        if not self.is_curve:
            return {}
        rows = np.array([run.figures[ROWS] for run in self.runs])
        everywhere = [name for name in self._held_out() if all(name in run.figures for run in self.runs)]
        figures = {name: np.array([run.figures[name] for run in self.runs]) for name in everywhere}
        found = {name: fit_power_law(rows, values) for name, values in figures.items()}
        return {name: law for name, law in found.items() if law is not None}

    def lines(self) -> list[str]:
        """The power laws in words."""
        return [f"{name}: {law.in_words()}" for name, law in self.laws.items()]

    def table(self) -> Table:
        """Means over seeds, with the standard deviation, for a terminal."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=self.title, title_justify="left")
        for column in (*self.keys, "seeds"):
            table.add_column(column, overflow="fold")
        for name in self.names:
            table.add_column(name.removeprefix("eval/"), justify="right", overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, self._cells(row)))
        return table

    def write(self, folder: Path) -> Path:
        """Write sweep.json, sweep.csv and sweep.html, whose path it returns."""
        told = {
            "command": self.command,
            "rows": [asdict(row) for row in self.rows],
            "power_laws": {
                name: {part: asdict(getattr(law, part)) for part in ("floor", "exponent", "doubled")}
                | {"determined": law.determined}
                for name, law in self.laws.items()
            },
            "runs": [asdict(run) for run in self.runs],
        }
        write_json(folder / "sweep.json", told)
        figures = list(dict.fromkeys(name for run in self.runs for name in run.figures))
        with (folder / "sweep.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["run", *self.keys, "seed", *figures])
            for run in self.runs:
                own = [run.figures.get(name) for name in figures]
                writer.writerow([run.name, *(shown(run.values[key]) for key in self.keys), run.seed, *own])
        page = folder / "sweep.html"
        charts = [(chart, svg(chart)) for chart in self._charts()]
        page.write_text(
            templates()
            .get_template("sweep.html.j2")
            .render(
                title=self.title,
                command=self.command,
                charts=charts,
                columns=[*self.keys, "seeds", *self.names],
                rows=[self._cells(row) for row in self.rows],
                lines=self.lines(),
            ),
            encoding="utf-8",
        )
        return page

    def _held_out(self) -> list[str]:
        return [name for name in self.names if name not in (*SIZES, "time/elapsed")]

    def _cells(self, row: Row) -> list[str]:
        figures = []
        for name in self.names:
            if name not in row.mean:
                figures.append("-")
            elif name in SIZES[:2]:
                figures.append(f"{row.mean[name]:,.0f}")
            else:
                spread = f" ± {row.deviation[name]:.2g}" if row.deviation.get(name) else ""
                some = f" ({row.runs[name]} of {row.seeds})" if row.runs[name] < row.seeds else ""
                figures.append(f"{row.mean[name]:,.4g}{spread}{some}")
        return [*(shown(row.values[key]) for key in self.keys), str(row.seeds), *figures]

    def _charts(self) -> list[Chart]:
        """Each held-out figure over rows, or over the first key; a line for each seed, or for each further value."""
        first = self.keys[0]
        values = list({json.dumps(row.values[first]): row.values[first] for row in self.rows}.values())
        if self.is_curve:
            places, xlabel = [row.mean[ROWS] for row in self.rows], "training rows"
        elif all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            places, xlabel = [float(value) for value in values], first
        else:
            places = [float(number) for number in range(len(values))]
            xlabel = f"{first}: " + ", ".join(f"{number} {shown(value)}" for number, value in enumerate(values))
        place = dict(zip(map(json.dumps, values), places, strict=True))
        log = min(places) > 0 and max(places) / min(places) >= 10
        dense = np.geomspace(min(places), 2 * max(places), 60) if self.is_curve else np.array([])
        x = np.unique(np.concatenate([np.array(places), dense]))
        charts = []
        for name in self._held_out():
            lines = [
                Series(label, _at(x, {place[json.dumps(values[first])]: figure for values, figure in points}))
                for label, points in self._lines(name).items()
            ]
            if name in self.laws and self.laws[name].determined:
                lines.append(Series("power law", self.laws[name].at(x), dashed=True))
            charts.append(Chart(name.removeprefix("eval/"), "On held-out data.", [Panel(name, lines)], x, xlabel, log))
        return charts

    def _lines(self, name: str) -> dict[str, list[tuple[Mapping[str, Any], float]]]:
        """(values, figure) of the points of each line, by its label."""
        found: dict[str, list[tuple[Mapping[str, Any], float]]] = {}
        seeds = {run.seed for run in self.runs}
        if len(self.keys) == 1 and 1 < len(seeds) <= SEEDS_DRAWN:
            for run in (run for run in self.runs if name in run.figures):
                found.setdefault(f"seed {run.seed}", []).append((run.values, run.figures[name]))
            return found
        for row in (row for row in self.rows if name in row.mean):
            others = ", ".join(f"{key} {shown(row.values[key])}" for key in self.keys[1:])
            label = others or ("mean of the seeds" if len(seeds) > 1 else "one run")
            found.setdefault(label, []).append((row.values, row.mean[name]))
        return found


def shown(value: Any) -> str:
    """A value as it is written on a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _row(runs: Sequence[SweptRun]) -> Row:
    names = dict.fromkeys(name for run in runs for name in run.figures)
    found = {name: np.array([run.figures[name] for run in runs if name in run.figures]) for name in names}
    mean = {name: float(values.mean()) for name, values in found.items()}
    deviation = {name: float(values.std(ddof=1)) for name, values in found.items() if len(values) > 1}
    return Row(runs[0].values, len(runs), mean, deviation, {name: len(values) for name, values in found.items()})


def _at(x: np.ndarray, figures: Mapping[float, float]) -> np.ndarray:
    """Figures over x, nan where there is none."""
    return np.array([figures.get(float(value), np.nan) for value in x])
