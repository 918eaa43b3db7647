"""What a report shows: charts and headline cards, and small tools for making them from a run's metrics.

Metrics are float64 [rows] by key, nan where a row of metrics.jsonl has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from beaver_ray.runs import duration
from beaver_ray.verdicts import Reliability

RECENT_STEPS = 10


@dataclass
class Series:
    """One line: its label, and y over the steps (nan where it was not measured)."""

    label: str
    y: np.ndarray
    dashed: bool = False


@dataclass
class Panel:
    """One pair of axes."""

    ylabel: str
    series: list[Series]
    stacked: bool = False
    bars: bool = False
    """The only series as bars, where ``x`` of the chart is not the steps."""


@dataclass
class Chart:
    """One figure of the page: panels under one another."""

    title: str
    caption: str
    panels: list[Panel]
    x: np.ndarray | None = None
    """What y is over; None for the steps."""
    xlabel: str = "step"
    log: bool = False
    """``x`` is drawn on a logarithmic scale."""


State = Literal["", "good", "bad"]
"""How a figure stands to its limit, where it has one."""


class Card(NamedTuple):
    """One headline figure."""

    title: str
    value: str
    remark: str
    state: State = ""


def drawable(charts: list[Chart]) -> list[Chart]:
    """The charts without panels and lines that nothing was measured for."""
    for chart in charts:
        for panel in chart.panels:
            panel.series = [s for s in panel.series if np.isfinite(s.y).any()]
        chart.panels = [p for p in chart.panels if p.series]
    return [chart for chart in charts if chart.panels]


def reliability_charts(reliability: Reliability) -> list[Chart]:
    """The reliability curve of each constraint, with the number of answers in each of its bins."""
    charts = []
    for name, found in reliability.constraints.items():
        predicted = np.array([part.predicted for part in found.bins])
        seen = [
            Series("observed", np.array([part.observed for part in found.bins])),
            Series("as predicted", predicted, dashed=True),
        ]
        counts = Series("answers", np.array([float(part.count) for part in found.bins]))
        charts.append(
            Chart(
                f"Reliability: {name}",
                f"The calibration {found.in_words()}. Labels: {reliability.labelled_by}.",
                [Panel("share unsafe", seen), Panel("answers", [counts], bars=True)],
                x=predicted,
                xlabel="predicted probability of being unsafe",
            )
        )
    return charts


def running_cards(metrics: dict[str, np.ndarray], speed: tuple[str, str]) -> list[Card]:
    cards: list[Card] = []
    key, title = speed
    if key in metrics:
        cards.append(Card(title, round_short(float(np.nanmedian(metrics[key]))), "median of the steps", ""))
    cards.append(Card("Steps", f"{int(metrics['step'][-1]):,}", "", ""))
    if "time/elapsed" in metrics:
        cards.append(Card("Wall time", duration(float(np.nanmax(metrics["time/elapsed"]))), "h:mm:ss", ""))
    return cards


def recent(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known[-RECENT_STEPS:].mean()) if len(known) else float("nan")


def recently(metrics: dict[str, np.ndarray]) -> str:
    steps = min(RECENT_STEPS, len(metrics["step"]))
    return f"training, last {steps} steps" if steps > 1 else "training, one step"


def round_short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def interval(figure: dict[str, Any], form: str) -> str:
    if figure["low"] is None:
        return f"n = {figure['n']}"
    return f"95 %: {figure['low']:{form}} to {figure['high']:{form}} · n = {figure['n']}"
