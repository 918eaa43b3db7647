"""What is in the data: a survey as a table for a terminal, and as a page with pictures that opens offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from beaver_ray.data.survey import Survey, quantiles
from beaver_ray.report.charts import Card, Chart, Panel, Series, State
from beaver_ray.report.page import svg, templates

if TYPE_CHECKING:
    from rich.table import Table

LABELS = {"better": "more helpful", "safer": "less harmful"}
WAYS = {"better": "pairs, more helpful", "safer": "pairs, less harmful", "is_safe": "answers, safe"}


def lines(found: Survey) -> list[tuple[str, str]]:
    """(what, how much) of everything that was found, in words."""
    rows = [(spec, report.line()) for spec, report in found.reports.items()]
    once = f"{found.rows - found.prompts:,} rows repeat a prompt, the most frequent has {found.most_repeated:,}"
    rows.append(("rows", f"{found.rows:,} with {found.prompts:,} distinct prompts; {once}"))
    rows.append(("duplicates", f"{found.duplicates:,} rows, word for word with their labels"))
    rows.append(
        ("near-duplicates", f"{_share(found.near_duplicates, found.prompts)} prompts are nearly an earlier one")
    )
    for what, values in found.lengths.items():
        told = ", ".join(f"{name} {value:,.0f}" for name, value in quantiles(values).items() if name != "texts")
        rows.append((f"{what}, {found.unit}", told))
    for label, (count, first) in found.first_preferred.items():
        rows.append((f"which is {LABELS[label]}", f"{count:,} pairs say so; {_share(first, count)} prefer the first"))
    if found.answers_labelled:
        rows.append(("unsafe", f"{_share(found.answers_unsafe, found.answers_labelled)} labelled answers"))
    both = [f"{count:,} {WAYS[label]}" for label, count in found.contradictions.items() if count]
    rows.append(("labelled both ways", "; ".join(both) or "none"))
    if found.held_out:
        prompts, trained, nearly = found.held_out.values()
        rows.append(("held out", f"{prompts:,} prompts: {trained:,} are trained on, {nearly:,} more nearly so"))
    return rows


def tables(found: Survey) -> list[Table]:
    """The figures for a terminal, and the categories where rows have any."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for row in lines(found):
        table.add_row(*map(escape, row))
    if not found.categories:
        return [table]
    categories = Table("category", "rows", "labelled answers", "unsafe")
    for name, part in sorted(found.categories.items(), key=lambda item: -item[1].rows):
        share = f"{part.unsafe / part.labelled:.1%}" if part.labelled else "-"
        categories.add_row(escape(name), f"{part.rows:,}", f"{part.labelled:,}", share)
    return [table, categories]


def write_page(found: Survey, path: Path) -> None:
    """Write the page, one file."""
    unsafe = _share(found.answers_unsafe, found.answers_labelled) if found.answers_labelled else "-"
    cards = [
        Card("Rows", f"{found.rows:,}", f"{sum(r.dropped.total() for r in found.reports.values()):,} dropped"),
        Card("Prompts", f"{found.prompts:,}", f"{found.near_duplicates:,} nearly an earlier one"),
        Card("Duplicates", f"{found.duplicates:,}", "rows, word for word", "bad" if found.duplicates else ""),
        Card("Unsafe", unsafe, "labelled answers"),
    ]
    if found.held_out:
        prompts, trained, nearly = found.held_out.values()
        state: State = "bad" if trained else "good"
        cards.append(Card("Held out, trained on", f"{trained:,}", f"of {prompts:,}; {nearly:,} more nearly", state))
    charts = [(chart, svg(chart)) for chart in _charts(found)]
    categories = sorted(found.categories.items(), key=lambda item: -item[1].rows)
    page = templates().get_template("data.html.j2")
    text = page.render(name=", ".join(found.reports), cards=cards, charts=charts, lines=lines(found), parts=categories)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _charts(found: Survey) -> list[Chart]:
    """Of prompts and of answers: which share is no longer than so much."""
    charts = []
    for what, values in found.lengths.items():
        x = np.unique(np.quantile(values, np.linspace(0, 1, 201), method="nearest"))
        share = np.searchsorted(np.sort(values), x, side="right") / len(values)
        caption = f"Share of the {len(values):,} {what}s that have no more {found.unit} than this."
        panels = [Panel("share", [Series(what, share)])]
        charts.append(Chart(f"Length of {what}s", caption, panels, x.astype(np.float64), found.unit))
    return charts


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / whole:.1%})"
