"""What stage strength found: strength.json, and strength.html with quantiles and the pairs at both ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beaver_ray.data.mixing import prompt_key
from beaver_ray.data.sources import RawSample
from beaver_ray.json_files import write_json
from beaver_ray.method.noise import detection, quantiles, u_shape
from beaver_ray.report.charts import Card, Chart, Panel, Series, State
from beaver_ray.report.page import svg, templates

FILE = "strength.json"
PAIRS = 12
"""At each end."""
NO_EFFECT = 0.6
"""Area under the curve below which nothing was ever gained by it."""


@dataclass(frozen=True)
class StrengthReport:
    """N pairs, M models of the ensemble."""

    label: str
    samples: Sequence[RawSample]
    preferred_N: NDArray[np.bool_]
    """Whether the first answer is the preferred one."""
    mean_N: NDArray[np.float64]
    deviation_N: NDArray[np.float64]
    differences_MN: NDArray[np.float64]

    def figures(self) -> dict[str, Any]:
        """The content of strength.json."""
        wrong_N, agrees_N = self._known(f"{self.label}_flipped"), self._known("judge_agrees")
        parts = quantiles(self.mean_N, self.deviation_N, wrong_N)
        found: dict[str, Any] = {
            "label": self.label,
            "pairs": len(self.mean_N),
            "members": len(self.differences_MN),
            "mean": float(self.mean_N.mean()),
            "below_zero": float((self.mean_N < 0).mean()),
            "u_shape": u_shape(parts),
            "quantiles": [asdict(part) for part in parts],
        }
        if wrong_N is not None:
            lowest = np.argsort(self.mean_N, kind="stable")[: int(wrong_N.sum())]
            found["detection"] = detection(self.mean_N, wrong_N)
            found["flipped"] = float(wrong_N.mean())
            # As many as there are: were all of them found, this would be 1.
            found["precision"] = float(wrong_N[lowest].mean()) if len(lowest) else None
        if agrees_N is not None:
            for part, of_judge in zip(
                found["quantiles"], quantiles(self.mean_N, self.deviation_N, agrees_N), strict=True
            ):
                part["judge_agrees"] = of_judge.flipped
        return found

    def write(self, folder: Path) -> dict[str, Any]:
        """Write strength.json, whose content it returns, and strength.html."""
        figures = self.figures()
        write_json(folder / FILE, figures)
        order = np.argsort(self.mean_N, kind="stable")
        page = (
            templates()
            .get_template("strength.html.j2")
            .render(
                label=self.label,
                cards=cards(figures),
                charts=[(chart, svg(chart)) for chart in _charts(figures)],
                quantiles=figures["quantiles"],
                ends=[
                    ("Weakest: the models disagree with the label", self._shown(order[:PAIRS])),
                    ("Strongest", self._shown(order[::-1][:PAIRS])),
                ],
                remarks=remarks(figures),
            )
        )
        (folder / "strength.html").write_text(page, encoding="utf-8")
        return figures

    def _known(self, field: str) -> NDArray[np.bool_] | None:
        """A further field of true and false that all rows have; None where some have it not."""
        values = [sample.fields.get(field) for sample in self.samples]
        return np.array(values, dtype=np.bool_) if all(isinstance(value, bool) for value in values) else None

    def _shown(self, rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        shown = []
        for row in rows.tolist():
            sample = self.samples[row]
            answers = [sample.answer, sample.other_answer]
            preferred, other = answers if self.preferred_N[row] else answers[::-1]
            said = {"prompt": "\n\n".join(prompt_key(sample)), "preferred": preferred, "other": other}
            shown.append({**said, "mean": float(self.mean_N[row]), "deviation": float(self.deviation_N[row])})
        return shown


def headline(figures: Mapping[str, Any]) -> str:
    """One line."""
    share = f"{figures['below_zero']:.1%}"
    what = f"{figures['pairs']:,} pairs, {figures['members']} models"
    return f"{what}: {share} of strength below 0, mean {figures['mean']:.3g}"


def remarks(figures: Mapping[str, Any]) -> list[str]:
    """What came of it, one line each."""
    lines = [headline(figures)]
    found = figures.get("detection")
    if found is not None:
        precision = "" if figures["precision"] is None else f", precision {figures['precision']:.2f} of as many"
        lines.append(f"labels that are known to be wrong: {figures['flipped']:.1%}; AUC {found:.2f}{precision}")
        if found < NO_EFFECT:
            lines.append(f"no effect expected: below an AUC of {NO_EFFECT} strength does not tell wrong labels")
    if figures["u_shape"] is not None:
        lines.append(f"standard deviation at both ends over that in the middle: {figures['u_shape']:.2f}")
    return lines


def cards(figures: Mapping[str, Any]) -> list[Card]:
    """The headline figures."""
    found = [
        Card("Pairs", f"{figures['pairs']:,}", f"{figures['members']} models"),
        Card("Strength below 0", f"{figures['below_zero']:.1%}", "the models disagree with the label"),
        Card("Mean strength", f"{figures['mean']:.3g}", "score of the preferred answer less the other's"),
    ]
    if figures["u_shape"] is not None:
        found.append(Card("Deviation, ends to middle", f"{figures['u_shape']:.2f}", "above 1: a U"))
    if figures.get("detection") is not None:
        state: State = "good" if figures["detection"] >= NO_EFFECT else "bad"
        found.append(Card("Wrong labels found", f"{figures['detection']:.2f}", "area under the ROC curve", state))
    return found


def _charts(figures: Mapping[str, Any]) -> list[Chart]:
    parts = figures["quantiles"]
    x = (np.arange(len(parts)) + 0.5) / len(parts)

    def line(name: str, label: str) -> Series:
        return Series(
            label, np.array([np.nan if part.get(name) is None else part[name] for part in parts], dtype=float)
        )

    caption = "Pairs by rising strength, in parts of equal size."
    charts = [
        Chart("Strength", caption, [Panel("mean", [line("mean", "strength")])], x, "share of the pairs"),
        Chart("Deviation", caption, [Panel("deviation", [line("deviation", "deviation")])], x, "share of the pairs"),
    ]
    for name, title in (("flipped", "Labels known to be wrong"), ("judge_agrees", "Labels that the judge agrees with")):
        if any(part.get(name) is not None for part in parts):
            charts.append(Chart(title, caption, [Panel("share", [line(name, title)])], x, "share of the pairs"))
    return charts
