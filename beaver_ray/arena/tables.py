"""The tables of an arena, each as CSV, as Markdown and for the page, from the content of arena.json."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beaver_ray.arena.figures import PARTS
from beaver_ray.report.markdown import markdown_table

NUMBER, SHARE = ".4g", ".1%"


@dataclass(frozen=True)
class Column:
    """A column: its title, and how its figures are written; "" for words and counts."""

    title: str
    form: str = ""


@dataclass(frozen=True)
class Table:
    """One table; a cell is a word, a count, a figure {"mean", "low", "high", "n"}, or None where there is none."""

    name: str
    """Of its files."""
    title: str
    caption: str
    columns: list[Column]
    rows: list[list[Any]]

    def shown(self) -> list[list[str]]:
        """Its cells as they are read."""
        return [[cell(value, column) for value, column in zip(row, self.columns, strict=True)] for row in self.rows]

    def markdown(self) -> str:
        """The table in Markdown, under its title."""
        table = markdown_table([column.title for column in self.columns], self.shown())
        return f"## {self.title}\n\n{self.caption}\n\n{table}"

    def write_csv(self, folder: Path) -> None:
        """Write NAME.csv: a figure is four columns, its mean, the ends of its interval, and n."""
        with (folder / f"{self.name}.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            titles: list[str] = []
            for column in self.columns:
                parts = ("", " low", " high", " n") if column.form else ("",)
                titles += [column.title + part for part in parts]
            writer.writerow(titles)
            for row in self.rows:
                cells: list[Any] = []
                for value, column in zip(row, self.columns, strict=True):
                    figure = value or {}
                    cells += [figure.get(k) for k in ("mean", "low", "high", "n")] if column.form else [value]
                writer.writerow(cells)


def cell(value: Any, column: Column) -> str:
    """A cell in words: "9.8% (8.1% to 11.2%, n 400)"."""
    if value is None:
        return ""
    if not column.form:
        return str(value)
    mean, n = f"{value['mean']:{column.form}}", f"n {value['n']:,}"
    if value["low"] is None:
        return f"{mean} ({n})"
    return f"{mean} ({value['low']:{column.form}} to {value['high']:{column.form}}, {n})"


def write_tables(tables: Sequence[Table], folder: Path) -> None:
    """Write each table as CSV, and all of them as tables.md."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        table.write_csv(folder)
    (folder / "tables.md").write_text("\n".join(table.markdown() for table in tables), encoding="utf-8")


def tables_of(found: Mapping[str, Any]) -> list[Table]:
    """The tables of an arena.json that have a row."""
    costs = list(next(iter(found["policies"].values()))["worst_of_k"])
    made = [
        _policies(found, costs),
        _pairs(found),
        _pairs_by_group(found),
        _ratings(found),
        _matrix(found),
        _matrix_by_group(found),
        _worst_of_k(found, costs),
        _worst_of_k_by_group(found, costs),
        _insistence(found),
        _groups(found, costs),
        _both_orders(found),
        _scored(found),
        _scored_by_group(found),
        _asked(found),
    ]
    return [table for table in made if table.rows]


def _policies(found: Mapping[str, Any], costs: list[str]) -> Table:
    figures = _figures(costs)
    figures += [(Column("share of the optimum", SHARE), "share_of_optimum")]
    caption = "A policy's answers to all prompts. Refusals: of prompts to be refused, and of those that only look so."
    rows = [[name, *(mine.get(key) for _, key in figures)] for name, mine in found["policies"].items()]
    return _filled(Table("policies", "Policies", caption, [Column("policy"), *(column for column, _ in figures)], rows))


def _figures(costs: Sequence[str]) -> list[tuple[Column, str]]:
    """Columns that every group of answers has, with the keys of their figures."""
    columns = [(Column("reward", NUMBER), "reward")]
    for cost in costs:
        columns.append((Column(f"cost {cost}", NUMBER), f"cost/{cost}"))
        columns.append((Column(f"violation rate {cost}", SHARE), f"violation_rate/{cost}"))
        columns.append((Column(f"unsafe {cost}", SHARE), f"unsafe_share/{cost}"))
    kinds = {"harmful": "refused, harmful", "benign": "refused, benign", "other": "refused, other"}
    columns += [(Column(title, SHARE), f"refusal_rate_{kind}") for kind, title in kinds.items()]
    return [*columns, (Column("words", NUMBER), "words"), (Column("truncated", SHARE), "truncated")]


def _pairs(found: Mapping[str, Any]) -> Table:
    columns = list(_COMPARED.values())
    caption = (
        "How the first policy fares against the second on the same prompts, answer by answer: by the higher reward, "
        "the lower cost, or a judge of pairs. The win rate counts a tie as half a win; difference is first less "
        "second. What a judge's reply did not say, or declined to say, is in no share."
    )
    rows = [[pair.get(key) for key in _COMPARED] for pair in found["pairs"]]
    return _filled(Table("pairs", "Pairs", caption, columns, rows))


_COMPARED = {name: Column(name) for name in ("first", "second", "by")}
_COMPARED |= {name: Column(name, SHARE) for name in ("win", "tie", "loss")}
_COMPARED |= {"win_rate": Column("win rate", SHARE), "difference": Column("difference", NUMBER)}
_COMPARED |= {"comparisons": Column("comparisons"), "unparsed": Column("unparsed"), "refused": Column("declined")}
"""Columns of comparisons, by key."""
_OF = {"group": Column("group"), "questions of": Column("questions of")}


def _pairs_by_group(found: Mapping[str, Any]) -> Table:
    caption = "The same over parts of the questions; held out are the categories that no policy was trained on."
    columns = _OF | _COMPARED
    rows = [[pair.get(key) for key in columns] for pair in found.get("pairs_by_group", [])]
    return _filled(Table("pairs_by_group", "Pairs by turn and category", caption, list(columns.values()), rows))


def _ratings(found: Mapping[str, Any]) -> Table:
    caption = (
        "Elo by Bradley and Terry's model, by maximum likelihood on all comparisons; their mean is 1000. None where a "
        "policy always wins or always loses."
    )
    judges = list(found["elo"])
    rows = [[name, *((found["elo"][by] or {}).get(name) for by in judges)] for name in found["policies"]]
    columns = [Column("policy"), *(Column(f"Elo by {by}", NUMBER) for by in judges)]
    return Table("elo", "Ratings", caption, columns, rows if judges and len(rows) > 1 else [])


def _matrix(found: Mapping[str, Any]) -> Table:
    caption = "How often the answers of two policies to one prompt are safe, both, either or neither."
    rows = [[matrix[key] for key in _MATRIX] for matrix in found["safety_matrix"]]
    return Table("safety_matrix", "Who is unsafe where", caption, list(_MATRIX.values()), rows)


_MATRIX = {name: Column(name) for name in ("first", "second", "cost")}
_MATRIX |= {
    f"{one}/{other}": Column(f"first {one}, second {other}", SHARE)
    for one in ("safe", "unsafe")
    for other in ("safe", "unsafe")
}


def _matrix_by_group(found: Mapping[str, Any]) -> Table:
    columns = _OF | _MATRIX
    rows = [[matrix[key] for key in columns] for matrix in found["safety_matrix_by_group"]]
    title = "Who is unsafe where, by turn and category"
    return Table("safety_matrix_by_group", title, "The same over parts of the questions.", list(columns.values()), rows)


def _worst_of_k(found: Mapping[str, Any], costs: list[str]) -> Table:
    caption = (
        "A resampling attack: the share of prompts with an unsafe answer among k, estimated without bias from all the "
        "answers to each."
    )
    columns, rows = _worst(found["policies"], costs)
    return Table("worst_of_k", "Worst of k answers", caption, columns, rows)


def _worst_of_k_by_group(found: Mapping[str, Any], costs: list[str]) -> Table:
    columns, _ = _worst(found["policies"], costs)
    rows = [[*part, *row] for *part, policies in _parts(found) for row in _worst(policies, costs)[1]]
    title, caption = "Worst of k answers, by turn and category", "The same over parts of the questions."
    return Table("worst_of_k_by_group", title, caption, [*_OF.values(), *columns], rows)


def _worst(policies: Mapping[str, Any], costs: list[str]) -> tuple[list[Column], list[list[Any]]]:
    """Columns and rows of worst of k; no rows where each policy has one answer."""
    worst = {(name, cost): mine["worst_of_k"][cost] for name, mine in policies.items() for cost in costs}
    deepest = max(map(len, worst.values()), default=0)
    columns = [Column("policy"), Column("cost"), *(Column(f"k = {k}", SHARE) for k in range(1, deepest + 1))]
    rows = [[*of, *shares, *[None] * (deepest - len(shares))] for of, shares in worst.items()]
    return columns, rows if deepest > 1 else []


def _parts(found: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Each part of the questions: its sort, its name, and the figures of each policy."""
    return [(group, *item) for group, key in PARTS.items() for item in found.get(key, {}).items()]


def _insistence(found: Mapping[str, Any]) -> Table:
    asked = {name: mine["insistence"] for name, mine in found["policies"].items() if "insistence" in mine}
    turns = max((len(mine["gave_in_by_turn"]) for mine in asked.values()), default=0)
    columns = [Column("policy"), Column("refused at first", SHARE)]
    columns += [Column(f"gave in by turn {turn}", SHARE) for turn in range(1, turns + 1)]
    caption = "Refused prompts asked again, and the share of them that the policy then answered, by the time of asking."
    rows = [[name, mine["refused_at_first"], *mine["gave_in_by_turn"]] for name, mine in asked.items()]
    return Table("insistence", "Insistence", caption, columns, rows)


def _groups(found: Mapping[str, Any], costs: list[str]) -> Table:
    figures = _figures(costs)
    columns = [Column("group"), Column("prompts of"), Column("policy"), *(column for column, _ in figures)]
    rows = [
        [group, value, name, *(mine.get(key) for _, key in figures)]
        for group, value, policies in _parts(found)
        for name, mine in policies.items()
    ]
    caption = "The same figures over parts of the prompts; held out are the categories that no policy was trained on."
    return _filled(Table("categories", "By category", caption, columns, rows))


def _both_orders(found: Mapping[str, Any]) -> Table:
    keys = ("judge", "first", "second", "comparisons", "identical", "position_disagreement", "unparsed", "refused")
    titles = ("judge", "first", "second", "comparisons", "identical answers", "orders disagree", "unparsed", "declined")
    caption = (
        "Judges of pairs read each pair of answers in both orders. Where the orders disagree it counts as a tie; "
        "identical answers tie unasked. A fair judge chooses what it is shown first in half of its decisions."
    )
    rows = [[row[key] for key in (*keys, "position_bias")] for row in found.get("judged_pairs", [])]
    columns = [*map(Column, titles), Column("chose what stood first", SHARE)]
    return _filled(Table("both_orders", "Judges of pairs in both orders", caption, columns, rows))


def _scored(found: Mapping[str, Any]) -> Table:
    caption = "Judges of single answers gave each a score from 1 to 10; what they did not say is in no mean."
    rows = [[row[key] for key in _GIVEN] for row in found.get("scored_answers", [])]
    return _filled(Table("scored_answers", "Judges of single answers", caption, list(_GIVEN.values()), rows))


_GIVEN = {name: Column(name) for name in ("judge", "policy", "answers", "unparsed")}
_GIVEN |= {"refused": Column("declined"), "score": Column("score", NUMBER)}


def _scored_by_group(found: Mapping[str, Any]) -> Table:
    caption = "The same scores over parts of the questions; held out are the categories that no policy was trained on."
    columns = _OF | _GIVEN
    rows = [[row[key] for key in columns] for row in found.get("scored_by_group", [])]
    title = "Judges of single answers, by turn and category"
    return _filled(Table("scored_by_group", title, caption, list(columns.values()), rows))


def _asked(found: Mapping[str, Any]) -> Table:
    keys = ("model", "rubric", "requests", "from_cache", "prompt_tokens", "completion_tokens", "unanswered", "cost")
    columns = [Column(title) for title in ("judge", *(key.replace("_", " ") for key in keys))]
    rows = [[name, *(asked[key] for key in keys)] for name, asked in found.get("judges_asked", {}).items()]
    caption = "Requests and tokens of this run; from cache are replies that an earlier run had paid for."
    return _filled(Table("judges_asked", "What judges were asked", caption, columns, rows))


def _filled(table: Table) -> Table:
    """The table without columns in which nothing stands."""
    kept = [i for i in range(len(table.columns)) if any(row[i] is not None for row in table.rows)]
    columns, rows = [table.columns[i] for i in kept], [[row[i] for i in kept] for row in table.rows]
    return Table(table.name, table.title, table.caption, columns, rows)


def in_a_line(name: str, mine: Mapping[str, Any], ratings: Mapping[str, Any]) -> str:
    """A policy's main figures on one line. ratings: its Elo by each judge that compared answers, None where none is."""
    parts = [f"reward {cell(mine['reward'], Column('', NUMBER))}"] if "reward" in mine else []
    rates = [key for key in mine if key.startswith("violation_rate/")]
    parts += [f"{key.partition('/')[2]} {cell(mine[key], Column('', SHARE))}" for key in rates]
    kinds = [kind for kind in ("harmful", "benign") if f"refusal_rate_{kind}" in mine]
    parts += [f"refuses {kind} {cell(mine[f'refusal_rate_{kind}'], Column('', SHARE))}" for kind in kinds]
    parts += [f"Elo by {by} {cell(rating, Column('', NUMBER))}" for by, rating in ratings.items() if rating]
    return f"{name}: {', '.join(parts) or 'no judge'}"
