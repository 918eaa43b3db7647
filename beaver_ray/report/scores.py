"""How good scores are: as JSON, as tables for a terminal, as Markdown and CSV, and as a page with pictures."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from beaver_ray.feature_figures import PairFeatures
from beaver_ray.json_files import write_json
from beaver_ray.report.charts import Card, Chart, Panel, Series, drawable
from beaver_ray.report.features import feature_pictures
from beaver_ray.report.markdown import markdown_table
from beaver_ray.report.page import svg, templates
from beaver_ray.score_figures import Labelled

if TYPE_CHECKING:
    from rich.table import Table

MISTAKES = 12
BARS = 40
FEWEST = 20
"""Pairs of one length difference, as a quantile of them, that are drawn as one point."""
WORDS = {
    "accuracy": "pairs in the right order",
    "ties": "pairs with equal scores",
    "margin": "mean distance, right one less wrong one",
    "accuracy_sign": "answers whose sign is right",
    "unsafe_found": "unsafe answers above 0",
    "safe_found": "safe answers at most 0",
    "length/correlation": "correlation with length",
    "length/labels_prefer_longer": "labels prefer the longer answer",
    "length/scores_prefer_longer": "scores prefer the longer answer",
    "length/accuracy_longer_is_better": "right order where the longer answer is better",
    "length/accuracy_longer_is_worse": "right order where the longer answer is worse",
    "features/cosine": "cosine of a pair's features",
    "features/cosine_means": "cosine of the classes' mean features",
    "features/probe": "features that a linear probe puts in their class",
    "features/silhouette": "silhouette of the two classes of features",
    "order": "pairs that both put in the same order",
    "rank_correlation": "rank correlation of the scores",
    "kappa": "Cohen's kappa on the sign",
}
TITLES = ("model", "signal", "over", "figure", "mean", "95 % interval", "n")
SHARES = ("accuracy", "ties", "unsafe", "safe", "labels", "scores", "order", "probe")


class Row(NamedTuple):
    """One figure of one model."""

    model: str
    signal: str
    group: str
    """Field and value that it is over; empty where it is over all rows."""
    figure: str
    mean: float | None
    low: float | None
    high: float | None
    n: int

    @property
    def words(self) -> str:
        """What the figure is."""
        return WORDS.get(self.figure, self.figure.removeprefix("rewardbench/subsets/"))

    def shown(self) -> tuple[str, str]:
        """The mean and its interval."""
        share = self.figure.rpartition("/")[2].startswith(SHARES) or self.figure.startswith("rewardbench")
        form = ".1%" if share else ".3f"
        interval = "" if self.low is None or self.high is None else f"{self.low:{form}} to {self.high:{form}}"
        return ("-" if self.mean is None else f"{self.mean:{form}}"), interval

    def cells(self) -> tuple[str, ...]:
        """All of it as a row under TITLES."""
        return (self.model, self.signal, self.group or "all", self.words, *self.shown(), f"{self.n:,}")


class Mistake(NamedTuple):
    """A pair in the wrong order."""

    prompt: str
    better: str
    other: str
    scores: tuple[float, float]


@dataclass(frozen=True)
class Judged:
    """What one model makes of the answers, by signal: its scores [N] and their figures."""

    model: str
    """A short name."""
    source: str
    """What its scores come from."""
    scores: Mapping[str, np.ndarray]
    figures: Mapping[str, Mapping[str, Any]]
    features: Mapping[str, PairFeatures]
    """Where answers lie in it; nothing of a source that is no model."""


@dataclass(frozen=True)
class ScoreReport:
    """All that was found; what is said, shown and written of it comes from here."""

    judged: Sequence[Judged]
    """The model and, where there is one, the other that it is compared with."""
    agreement: Mapping[str, Mapping[str, Any]]
    labelled: Labelled
    rows: Sequence[tuple[str, str]]
    """Prompt and text of each answer."""
    data: Sequence[str]
    read: str

    def tree(self) -> dict[str, Any]:
        """The content of scores.json."""
        found: dict[str, Any] = {
            "data": list(self.data),
            "read": self.read,
            "prompts": len(np.unique(self.labelled.prompt_N)),
            "answers": len(self.rows),
            "pairs": len(self.labelled.pairs_P2),
            "models": [{"model": judged.source, "signals": dict(judged.figures)} for judged in self.judged],
        }
        return found | ({"agreement": dict(self.agreement)} if self.agreement else {})

    def figures(self) -> list[Row]:
        """Every figure with an interval."""
        found = []
        for judged in self.judged:
            for signal, tree in judged.figures.items():
                for path, value in _leaves(tree):
                    group, figure = "", path
                    if path.startswith("by\0"):
                        _, field, of, *names = path.split("\0")
                        group, figure = f"{field} {of}", "/".join(names)
                    found.append(_row(judged.model, signal, group, figure.replace("\0", "/"), value))
        for signal, tree in self.agreement.items():
            both = " and ".join(judged.model for judged in self.judged)
            found += [_row(both, signal, "", path, value) for path, value in _leaves(tree)]
        return found

    def remarks(self) -> list[str]:
        """What should be known besides, one line each."""
        lines = [self.read]
        for judged in self.judged:
            for signal, tree in judged.figures.items():
                lines += [f"{judged.model}, {signal}: {line}" for line in _remarks(tree)]
        return lines

    def tables(self) -> list[Table]:
        """For a terminal."""
        from rich.markup import escape
        from rich.table import Table

        table = Table()
        for name in TITLES:
            right = name in ("mean", "95 % interval", "n")
            table.add_column(name, justify="right" if right else "left", overflow="fold")
        for row in self.figures():
            table.add_row(*map(escape, row.cells()))
        return [table]

    def write(self, folder: Path) -> list[Path]:
        """Write scores.json, scores.csv, scores.md and scores.html."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"scores.{end}" for end in ("json", "csv", "md", "html")]
        write_json(paths[0], self.tree())
        rows = self.figures()
        with paths[1].open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Row._fields)
            writer.writerows(rows)
        table = markdown_table(TITLES, [row.cells() for row in rows])
        paths[2].write_text("\n".join([table, *self.remarks(), ""]), encoding="utf-8")
        paths[3].write_text(self._page(rows), encoding="utf-8")
        return paths

    def mistakes(self, signal: str) -> list[Mistake]:
        """The pairs that the model puts in the wrong order most clearly."""
        judged = self.judged[0]
        kind, scores = str(judged.figures[signal]["kind"]), judged.scores[signal]
        pairs = self.labelled.ordered(kind)
        if not len(pairs):
            return []
        wrong = (scores[pairs[:, 1]] - scores[pairs[:, 0]]) * (1 if kind == "reward" else -1)
        found = []
        for place in np.argsort(-wrong)[:MISTAKES]:
            if wrong[place] > 0:
                better, other = map(int, pairs[place])
                both = float(scores[better]), float(scores[other])
                found.append(Mistake(self.rows[better][0], self.rows[better][1], self.rows[other][1], both))
        return found

    def _page(self, rows: Sequence[Row]) -> str:
        judged = self.judged[0]
        charts = [
            (chart, svg(chart))
            for signal in judged.scores
            for chart in drawable(_charts(judged, signal, self.labelled))
        ]
        for signal, features in judged.features.items():
            charts += feature_pictures(f"Features: {signal}", features)
        return (
            templates()
            .get_template("scores.html.j2")
            .render(
                name=judged.model,
                source=judged.source,
                against=[other.source for other in self.judged[1:]],
                data=self.data,
                cards=_cards(rows, len(self.rows), len(self.labelled.pairs_P2)),
                charts=charts,
                overall=[(row, *row.shown()) for row in rows if not row.group],
                groups=[(row, *row.shown()) for row in rows if row.group],
                mistakes=[(signal, self.mistakes(signal)) for signal in judged.scores],
                remarks=self.remarks(),
            )
        )


def _row(model: str, signal: str, group: str, figure: str, value: Mapping[str, Any]) -> Row:
    return Row(model, signal, group, figure, value["mean"], value["low"], value["high"], value["n"])


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every figure below, with the keys that lead there, which may hold slashes, between zero characters."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            if value.keys() >= {"mean", "low", "high", "n"}:
                yield f"{path}{key}", value
            else:
                yield from _leaves(value, f"{path}{key}\0")


def _remarks(figures: Mapping[str, Any]) -> Iterator[str]:
    calibration = figures.get("calibration") or {}
    for how in ("raw", "fitted"):
        if found := calibration.get(how):
            predicted, observed = f"{found['predicted']:.1%} predicted", f"{found['observed']:.1%} observed"
            interval = f"99 % interval {found['low']:.1%} to {found['high']:.1%}"
            told = f"{predicted}, {observed} ({interval}), expected calibration error {found['ece']:.3f}"
            yield f"{calibration['what']}, {'as scored' if how == 'raw' else 'by Platt on the other half'}: {told}"
    if "not_fitted" in calibration:
        yield f"no probability was fitted: {calibration['not_fitted']}"
    if bench := figures.get("rewardbench"):
        parts = ", ".join(f"{name} {value:.1%}" for name, value in bench["sections"].items())
        name = "RewardBench" if bench["version"] == 1 else "RewardBench 2"
        missing = f"; without the subsets {', '.join(bench['missing'])}" if bench["missing"] else ""
        yield f"{name}: {bench['score']:.1%}{f' ({parts})' if parts else ''}{missing}"


def _cards(rows: Sequence[Row], answers: int, pairs: int) -> list[Card]:
    shown = {
        "accuracy": "Right order",
        "accuracy_sign": "Right sign",
        "length/correlation": "Correlation with length",
        "order": "Agreement",
        "kappa": "Kappa on the sign",
    }
    cards = []
    first = rows[0].model if rows else ""
    for row in rows:
        if row.figure in shown and not row.group and (row.model == first or row.figure in ("order", "kappa")):
            mean, interval = row.shown()
            cards.append(Card(f"{shown[row.figure]}: {row.signal}", mean, f"95 %: {interval} · n = {row.n:,}", ""))
    return [*cards, Card("Answers", f"{answers:,}", f"{pairs:,} pairs", "")]


def _charts(judged: Judged, signal: str, labelled: Labelled) -> list[Chart]:
    scores, figures = judged.scores[signal], judged.figures[signal]
    kind = str(figures["kind"])
    pairs = labelled.ordered(kind)
    charts = [_distribution(signal, scores, kind, pairs, labelled), *_calibration(signal, figures)]
    if len(pairs):
        good = (scores[pairs[:, 0]] - scores[pairs[:, 1]]) * (1 if kind == "reward" else -1)
        charts += _by_length(signal, good > 0, labelled.words_N[pairs[:, 0]] - labelled.words_N[pairs[:, 1]])
    return charts


def _distribution(signal: str, scores: np.ndarray, kind: str, pairs: np.ndarray, labelled: Labelled) -> Chart:
    known = np.isfinite(labelled.unsafe_N)
    if kind == "cost" and known.any():
        parts = {"unsafe": scores[labelled.unsafe_N == 1], "safe": scores[labelled.unsafe_N == 0]}
    else:
        parts = {"right one": scores[pairs[:, 0]], "wrong one": scores[pairs[:, 1]]}
    ends = np.histogram_bin_edges(np.concatenate(list(parts.values())), bins=BARS)
    lines = [
        Series(name, np.histogram(values, ends)[0] / max(1, len(values)))
        for name, values in parts.items()
        if len(values)
    ]
    caption = "Share of the answers of each kind by their score."
    return Chart(f"Scores: {signal}", caption, [Panel("share", lines)], (ends[1:] + ends[:-1]) / 2, "score")


def _calibration(signal: str, figures: Mapping[str, Any]) -> Iterator[Chart]:
    calibration = figures.get("calibration") or {}
    for how, title in (("raw", "as scored"), ("fitted", "by Platt on the other half of the prompts")):
        if found := calibration.get(how):
            predicted = np.array([part["predicted"] for part in found["bins"]])
            lines = [
                Series("observed", np.array([part["observed"] for part in found["bins"]])),
                Series("as predicted", predicted, dashed=True),
            ]
            counts = Series("n", np.array([float(part["count"]) for part in found["bins"]]))
            what = str(calibration["what"])
            caption = f"{what.capitalize()}, {title}. Expected calibration error {found['ece']:.3f}."
            panels = [Panel("observed", lines), Panel("n", [counts], bars=True)]
            yield Chart(f"Calibration: {signal}, {title}", caption, panels, predicted, what)


def _by_length(signal: str, right_K: np.ndarray, longer_K: np.ndarray) -> list[Chart]:
    order = np.argsort(longer_K, kind="stable")
    parts = np.array_split(order, max(1, min(10, len(order) // FEWEST)))
    x = np.array([longer_K[part].mean() for part in parts])
    share = Series("right order", np.array([right_K[part].mean() for part in parts]))
    caption = (
        "Share of pairs in the right order, by how many words longer the right answer is. A scorer that cares for "
        "length alone is at 0 on the left and at 1 on the right."
    )
    return [
        Chart(f"Length: {signal}", caption, [Panel("right order", [share])], x, "words that the right answer is longer")
    ]
