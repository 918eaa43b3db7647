"""What stage weak_to_strong found: weak_to_strong.json, and weak_to_strong.html with the three bars and the curves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from beaver_ray.evaluation import share_interval
from beaver_ray.json_files import plain, write_json
from beaver_ray.method.weak_to_strong import figures as method_figures
from beaver_ray.method.weak_to_strong import imitation, recovered
from beaver_ray.report.charts import Card, Chart, Panel, Series
from beaver_ray.report.page import GRID, INK, SERIES_COLORS, drawing, svg, templates
from beaver_ray.weak_to_strong_options import QUESTIONS, STUDENT

FILE = "weak_to_strong.json"
ASKED = {
    "order": "which of two answers is better, or safer",
    "sign": "whether an answer is unsafe",
    "label": "whether a text has the label",
}
"""What the questions of a task are, in words."""


@dataclass(frozen=True)
class WeakToStrongReport:
    """The stage, its data (`actors.driver.weak_to_strong.Halves`) and what its models say (`Found`)."""

    stage: Any
    halves: Any
    found: Any

    def _right(self, logits_NK: np.ndarray, columns: list[int], rows: Any) -> np.ndarray:
        """[N * columns] whether each answer is right; ``rows`` are those that the logits are of."""
        right: np.ndarray = ((logits_NK[:, columns] > 0) == (rows.truth_NK[:, columns] > 0.5)).reshape(-1)
        return right

    @cached_property
    def right(self) -> dict[str, dict[str, np.ndarray]]:
        """Of each question, by model: whether it is right about each test."""
        tested, tests = self.halves.tested, self.halves.tests
        return {
            question: {
                name: self._right(self.found.logits[name][tested:], columns, tests) for name in self.stage.model_names
            }
            for question, columns in QUESTIONS[self.stage.task].items()
        }

    def figures(self) -> dict[str, Any]:
        """The content of weak_to_strong.json."""
        stage, halves = self.stage, self.halves
        columns = QUESTIONS[stage.task]
        questions: dict[str, Any] = {}
        for question, right in self.right.items():
            cluster_N = np.repeat(halves.tests.key_N, len(columns[question]))
            questions[question] = method_figures(right, stage.student_names, cluster_N, stage.min_gap, stage.seed)
        main = next(iter(questions))
        models = questions[main]
        gap = models["ceiling"]["mean"] - models["weak"]["mean"]
        strong = self._right(self.found.logits["weak"][: len(halves.strong)], columns[main], halves.strong)
        return {
            "task": stage.task,
            "question": main,
            "rows": {
                "weak": len(halves.weak),
                "strong": len(halves.strong),
                "watched": len(halves.watched) if halves.watched else 0,
                "tests": len(halves.tests),
            },
            "min_gap": stage.min_gap,
            "gap": gap,
            "valid": bool(gap >= stage.min_gap),
            "weak_labels": float(strong.mean()),
            "students": {STUDENT + s.name: s.model_dump(exclude={"name"}) for s in stage.students},
            "questions": questions,
            "chain": self._chain(columns[main]),
            "by": {name: self._by(name, main) for name in stage.by},
            "curves": {name: self._curve(name, columns[main]) for name in self.found.told},
            "language_loss": self.found.language_loss,
        }

    def _chain(self, columns: list[int]) -> list[float]:
        """The accuracy of each link's labels on the tests."""
        tested, tests = self.halves.tested, self.halves.tests
        return [float(self._right(said_NK[tested:] - 0.5, columns, tests).mean()) for said_NK in self.found.chained]

    def _by(self, name: str, question: str) -> dict[str, Any]:
        """Of each value of a field: accuracies, and for students what they recover and copy there."""
        each = len(QUESTIONS[self.stage.task][question])
        tests = self.halves.tests
        values_N = np.repeat(np.array([str(one.get(name)) for one in tests.fields]), each)
        cluster_N = np.repeat(tests.key_N, each)
        found: dict[str, Any] = {}
        for value in np.unique(values_N).tolist():
            some_N = values_N == value
            right = {model: right_N[some_N] for model, right_N in self.right[question].items()}
            part: dict[str, Any] = {m: share_interval(right_N, cluster_N[some_N]) for m, right_N in right.items()}
            for student in self.stage.student_names:
                ends = (part["weak"]["mean"], part[student]["mean"], part["ceiling"]["mean"])
                enough = ends[2] - ends[0] >= self.stage.min_gap
                part[student] |= imitation(right["weak"], right[student])
                part[student] |= {"pgr": recovered(*ends), "valid": bool(enough)}
            found[value] = part
        return found

    def _curve(self, name: str, columns: list[int]) -> list[dict[str, Any]]:
        """Accuracy on the tests at each look, and what the student saw of its supervisor's held-out labels."""
        truth_NK, told = self.halves.tests.truth_NK[:, columns], self.found.told[name]
        return [
            {
                "epochs": seen["epochs"],
                "accuracy": float((np.array(seen["says"])[:, columns] == truth_NK).mean()),
                "agreement": seen.get("agreement"),
                "loss": seen.get("loss"),
                "kept": number == told["best"],
            }
            for number, seen in enumerate(told["seen"])
        ]

    def metrics(self, figures: Mapping[str, Any]) -> Iterator[dict[str, float]]:
        """What metrics.jsonl says of each model; in its last line everything, for a sweep: no PGR that is not valid."""
        models = figures["questions"][figures["question"]]
        for name in self.stage.model_names[:-1]:
            yield {"accuracy": models[name]["mean"]}
        found = {f"eval/{name}": models[name]["mean"] for name in self.stage.model_names} | {"eval/gap": figures["gap"]}
        for name in self.stage.student_names:
            for figure in ("pgr", "agreement", "copied"):
                known = models[name][figure] is not None and (figure != "pgr" or models[name]["valid"])
                found[f"eval/{name}/{figure}"] = models[name][figure] if known else math.nan
        yield {"accuracy": models["ceiling"]["mean"]} | found | self.found.told["ceiling"]["sizes"]

    def write(self, folder: Path) -> dict[str, Any]:
        """Write weak_to_strong.json, whose content it returns, and weak_to_strong.html."""
        figures: dict[str, Any] = plain(self.figures())
        write_json(folder / FILE, figures)
        (folder / "weak_to_strong.html").write_text(page(figures), encoding="utf-8")
        return figures


def page(figures: Mapping[str, Any]) -> str:
    """weak_to_strong.html, from the figures alone."""
    models = figures["questions"][figures["question"]]
    charts = [(BARS, bars(models)), *((chart, svg(chart)) for chart in _curves(figures))]
    return (
        templates()
        .get_template("weak_to_strong.html.j2")
        .render(
            figures=figures,
            cards=cards(figures),
            charts=charts,
            students=list(figures["students"]),
            asked=ASKED,
            remarks=remarks(figures),
        )
    )


BARS = Chart(
    "Weak, student, ceiling",
    "Accuracy on the tests: the supervisor, whoever learnt its labels, and the same model taught the truth. Whiskers "
    "are 95 % intervals, the line is the supervisor's height, and bars begin at one half, or below where one is lower.",
    [],
)


def bars(models: Mapping[str, Mapping[str, Any]]) -> str:
    """The picture that people know, with as many students as there are."""
    students = [name for name in models if name.startswith(STUDENT)]
    order = ["weak", *students, "ceiling"]

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        ax.patch.set_alpha(0)
        ax.grid(axis="y", color=GRID, linewidth=0.6)
        ax.tick_params(length=0)
        means = [models[name]["mean"] for name in order]
        low, high = ([models[name][end] for name in order] for end in ("low", "high"))
        known = [
            (m - (m if lo is None else lo), (m if hi is None else hi) - m)
            for m, lo, hi in zip(means, low, high, strict=True)
        ]
        colors = [SERIES_COLORS[1], *[SERIES_COLORS[0]] * len(students), SERIES_COLORS[2]]
        places = np.arange(len(order))
        ax.bar(places, means, width=0.62, color=colors, alpha=0.85)
        ax.errorbar(places, means, yerr=np.array(known).clip(min=0).T, fmt="none", ecolor=INK, elinewidth=1, capsize=3)
        ax.axhline(means[0], color=SERIES_COLORS[1], linewidth=1, linestyle=(0, (4, 3)))
        for place, mean, (_, up) in zip(places, means, known, strict=True):
            ax.annotate(f"{mean:.3f}", (place, mean + max(0.0, up)), (0, 4), textcoords="offset points", ha="center")
        names = [name.removeprefix(STUDENT) for name in order]
        # Many or long names would run into one another.
        lie: dict[str, Any] = {} if max(map(len, names)) * len(names) < 80 else {"rotation": 30, "ha": "right"}
        ax.set_xticks(places, names, **lie)
        # From chance, where that is below all of them.
        ax.set_ylim(min(0.5, min(means) - 0.05), max(1.0, max(means)) + 0.04)
        ax.set_ylabel("accuracy")

    return drawing(BARS.title, 3.5, draw)


def _curves(figures: Mapping[str, Any]) -> list[Chart]:
    models, charts = figures["questions"][figures["question"]], []
    # A student of cross-entropy gives its own decisions the weight 0.
    weights = {
        name: 0.0 if s["loss"] == "xent" else s["alpha"]
        for name, s in figures["students"].items()
        if s["loss"] != "product" and s["schedule"] == "linear" and not s["chain"] and s["stop"] == "none"
    }
    lengths = {name: figures["students"][name]["epochs"] for name in weights}
    for length in dict.fromkeys(lengths.values()):
        some = sorted((alpha, name) for name, alpha in weights.items() if lengths[name] == length)
        if len(some) > 1:
            y = np.array([models[name]["mean"] for _, name in some])
            flat = [Series(end, np.full(len(y), models[end]["mean"]), dashed=True) for end in ("weak", "ceiling")]
            title = "Accuracy over alpha" + (f", {length:g} epochs" if length else "")
            caption = "alpha: the weight of the student's own decisions in what it learns."
            x = np.array([alpha for alpha, _ in some])
            charts.append(Chart(title, caption, [Panel("accuracy", [Series("student", y), *flat])], x, "alpha"))
    told = {name: curve for name, curve in figures["curves"].items() if len(curve) > 1}
    x = np.unique([round(seen["epochs"], 6) for curve in told.values() for seen in curve])
    if len(x) > 1:
        lines = [_line(name, curve, x, "accuracy") for name, curve in told.items()]
        if "weak" not in told:
            lines.append(Series("weak", np.full(len(x), models["weak"]["mean"]), dashed=True))
        caption = "On the tests. A student that rises above its supervisor and falls again has begun to copy mistakes."
        charts.append(Chart("Accuracy over epochs", caption, [Panel("accuracy", lines)], x, "epochs"))
        agreeing = [_line(n, c, x, "agreement") for n, c in told.items() if c[0]["agreement"] is not None]
        if agreeing:
            caption = "With the weak labels that were held out: what stop looks at."
            charts.append(Chart("Agreement over epochs", caption, [Panel("share", agreeing)], x, "epochs"))
    return charts


def _line(name: str, curve: Sequence[Mapping[str, Any]], x: np.ndarray, figure: str) -> Series:
    values = {round(seen["epochs"], 6): seen[figure] for seen in curve}
    y = np.array([math.nan if values.get(place) is None else values[place] for place in x.tolist()], dtype=float)
    return Series(name.removeprefix(STUDENT), y)


def cards(figures: Mapping[str, Any]) -> list[Card]:
    """The headline figures."""
    models = figures["questions"][figures["question"]]
    found = [Card("Weak", f"{models['weak']['mean']:.3f}", f"accuracy on {figures['rows']['tests']:,} tests")]
    for name in figures["students"]:
        found.append(Card(name.removeprefix(STUDENT), f"{models[name]['mean']:.3f}", _recovers(models[name])))
    found.append(Card("Ceiling", f"{models['ceiling']['mean']:.3f}", f"gap to weak {figures['gap']:.3f}"))
    if not figures["valid"]:
        found.append(Card("Gap", f"{figures['gap']:.3f}", f"below {figures['min_gap']:g}: no PGR", "bad"))
    return found


def _recovers(model: Mapping[str, Any]) -> str:
    if not model["valid"]:
        return "PGR not valid"
    ends = "" if model["pgr_low"] is None else f" ({model['pgr_low']:.2f} to {model['pgr_high']:.2f})"
    return f"PGR {model['pgr']:.2f}{ends}"


def remarks(figures: Mapping[str, Any]) -> list[str]:
    """What came of it, one line each."""
    models = figures["questions"][figures["question"]]
    lines = [
        f"weak {models['weak']['mean']:.3f} (its labels {figures['weak_labels']:.3f}), "
        f"ceiling {models['ceiling']['mean']:.3f}: {ASKED[figures['question']]}"
    ]
    if not figures["valid"]:
        gap = f"{figures['gap']:.3f} is below {figures['min_gap']:g} (min_gap)"
        lines.append(f"ceiling - weak = {gap}: what students recover of it cannot be read")
    for name in figures["students"]:
        model = models[name]
        copied = "" if model["copied"] is None else f", copies {model['copied']:.0%} of the weak model's mistakes"
        lines.append(f"{name}: {model['mean']:.3f}, {_recovers(model)}, agrees in {model['agreement']:.0%}{copied}")
    if figures["chain"]:
        lines.append("chain: " + " -> ".join(f"{accuracy:.3f}" for accuracy in figures["chain"]))
    return lines
