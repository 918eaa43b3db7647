"""What self-alignment found: self_align.json, and charts and cards of it in report.html."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beaver_ray.json_files import write_json
from beaver_ray.report.charts import Card, Chart, Panel, Series, drawable

if TYPE_CHECKING:
    import numpy as np

FILE = "self_align.json"


def write_figures(folder: Path, figures: Mapping[str, Any]) -> None:
    """Write self_align.json into a run's folder."""
    write_json(folder / FILE, figures)


def headline(figures: Mapping[str, Any]) -> str:
    """One line."""
    kept = ", ".join(f"{some.get('kept', 0):,} of {some['written']:,} {sort}" for sort, some in _counts(figures))
    return f"kept {kept}; {figures['annotation']['all']} lines written by people"


def cards(figures: Mapping[str, Any] | None) -> list[Card]:
    """The headline figures; none of a run that is still going."""
    if figures is None:
        return []
    found = [
        Card(f"Kept: {sort}", f"{some.get('kept', 0):,}", f"of {some['written']:,} written{_most(some)}")
        for sort, some in _counts(figures)
    ]
    lines = ", ".join(f"{count} {what}" for what, count in figures["annotation"].items() if what != "all" and count)
    found.append(Card("Written by people", f"{figures['annotation']['all']} lines", lines))
    if "coverage" in figures:
        verbs = figures["coverage"]["distinct_verbs"]
        found.append(Card("Root verbs", f"{verbs}", f"commonest: {', '.join([*figures['coverage']['verbs']][:5])}"))
    if "computed_prompt_tokens" in figures:
        read, pruned = figures["prompt_tokens"], figures["pruned_prompt_tokens"]
        said = f"computed, of {read:.0f} read; {pruned:.0f} without rules"
        found.append(Card("Prompt tokens", f"{figures['computed_prompt_tokens']:.0f}", said))
        for pool, shares in figures["rules"].items():
            most = sorted(shares.items(), key=lambda one: -one[1])[:3]
            said = ", ".join(f"{name} {share:.0%}" for name, share in most)
            found.append(Card(f"Rules chosen: {pool}", most[0][0], said))
    return found


def instruction_charts(metrics: Mapping[str, np.ndarray]) -> list[Chart]:
    """What was written and kept, round by round, of each sort."""
    charts = [
        Chart(
            f"Pool: {sort}",
            "Instructions (or topics) after each round.",
            [Panel("number", [Series(part, metrics[f"{sort}/{part}"]) for part in ("written", "kept")])],
        )
        for sort in ("vanilla", "topics", "topic")
        if f"{sort}/kept" in metrics
    ]
    return drawable(charts)


def answer_charts(metrics: Mapping[str, np.ndarray]) -> list[Chart]:
    """What was kept and what was computed, block by block."""
    if "kept" not in metrics:
        return []
    prompt = [Series(name.replace("_", " "), metrics[name]) for name in ("prompt_tokens", "computed_tokens")]
    return drawable(
        [
            Chart("Kept", "Share of the answers so far.", [Panel("share", [Series("kept", metrics["kept"])])]),
            Chart("Prompts", "Tokens of a prompt, and those not in the prefix cache.", [Panel("tokens", prompt)]),
            Chart("Length", "Tokens of a reply.", [Panel("tokens", [Series("tokens", metrics["tokens"])])]),
        ]
    )


def _counts(figures: Mapping[str, Any]) -> list[tuple[str, dict[str, int]]]:
    return [(sort, some) for sort, some in figures["counts"].items() if some.get("written")]


def _most(counts: Mapping[str, int]) -> str:
    """The filter that left most out, in words that follow."""
    filters = {why: count for why, count in counts.items() if why not in ("written", "kept") and count}
    why = max(filters, key=lambda one: filters[one], default=None)
    return f"; most left out: {why} ({filters[why]:,})" if why else ""
