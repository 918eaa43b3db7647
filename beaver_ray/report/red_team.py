"""What red teaming found: red_team.json, and red_team.html with shares by attack and category, and what is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beaver_ray.json_files import write_json
from beaver_ray.red_team.choosing import CROWDED, Choice
from beaver_ray.report.charts import Card, State
from beaver_ray.report.page import templates

FILE, PAGE = "red_team.json", "red_team.html"
SHOWN = 24
"""Prompts on the page."""


def write_page(folder: Path, name: str, figures: Mapping[str, Any], choice: Choice) -> None:
    """Write red_team.json and red_team.html into a run's folder."""
    write_json(folder / FILE, figures)
    step = max(1, len(choice.kept) // SHOWN)
    examples = [
        {
            "attack": one.attempt.attack,
            "category": one.attempt.category,
            "rate": one.rate,
            "turns": one.worst.turns,
            "answer": one.worst.response,
        }
        for one in choice.kept[::step][:SHOWN]
    ]
    parts = [("By attack", "attack", figures["attacks"]), ("By category", "category", figures["categories"])]
    page = templates().get_template("red_team.html.j2")
    text = page.render(
        name=name,
        cards=cards(figures),
        parts=parts,
        cells=figures["cells"],
        categories=list(figures["categories"]),
        examples=examples,
        remarks=remarks(figures),
    )
    (folder / PAGE).write_text(text, encoding="utf-8")


def headline(figures: Mapping[str, Any]) -> str:
    """One line."""
    every, kept = figures["all"], figures["kept"]
    line = f"{every['attempts']:,} attempts, {_share(every)} of their answers unsafe; {every['kept']:,} kept"
    return line if kept["unsafe"] is None else f"{line}, {_share(kept)} of their answers unsafe"


def remarks(figures: Mapping[str, Any]) -> list[str]:
    """What came of it, one line each."""
    lines = [headline(figures)]
    seeds = figures["attacks"].get("plain")
    if seeds and seeds["unsafe"]:
        lines.append(f"seeds as they are: {_share(seeds)} unsafe")
    said = ", ".join(f"{count} {what}" for what, count in figures["left_out"].items() if count)
    lines += [f"left out: {said}"] if said else []
    kept, (low, high) = figures["kept"]["unsafe"], figures["target"]
    if kept and not low <= kept["mean"] <= high:
        # Of a category the best are kept: while others are left over, it is not ``worked`` that decides how bad.
        lower = "raise per_category" if figures["left_out"].get(CROWDED) else "lower worked"
        lines.append(
            f"{_share(figures['kept'])} of the answers to what is kept are unsafe, outside the target of {low:.0%} to "
            f"{high:.0%}: {'raise worked' if kept['mean'] < low else lower}, or mix in other prompts"
        )
    return lines


def cards(figures: Mapping[str, Any]) -> list[Card]:
    """The headline figures."""
    every, kept, (low, high) = figures["all"], figures["kept"], figures["target"]
    found = [
        Card("Attempts", f"{every['attempts']:,}", f"{_share(every)} of their answers unsafe"),
        Card(
            "Kept", f"{every['kept']:,}", f"in {sum(p['kept'] > 0 for p in figures['categories'].values())} categories"
        ),
    ]
    if kept["unsafe"]:
        state: State = "good" if low <= kept["unsafe"]["mean"] <= high else "bad"
        found.append(Card("Unsafe, of what is kept", _share(kept), f"target {low:.0%} to {high:.0%}", state))
    seeds = figures["attacks"].get("plain")
    if seeds:
        found.append(Card("Unsafe, of the seeds", _share(seeds), "as they are, before any attack"))
    return found


def _share(part: Mapping[str, Any]) -> str:
    return "-" if part["unsafe"] is None else f"{part['unsafe']['mean']:.1%}"
