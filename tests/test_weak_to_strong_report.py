"""weak_to_strong.html: whole, offline, with the bars, the curve over alpha, and no PGR where there is no gap."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from beaver_ray.method.weak_to_strong import figures as method_figures
from beaver_ray.report.charts import Chart, Panel, Series
from beaver_ray.report.page import svg
from beaver_ray.report.weak_to_strong import bars, cards, page, remarks
from beaver_ray.weak_to_strong_options import StudentConfig
from tests.test_report import Page

STUDENTS = [
    StudentConfig(name="xent"),
    StudentConfig(name="half", loss="confidence", alpha=0.5),
    StudentConfig(name="most", loss="confidence", alpha=0.75),
]


def told(weak: float, ceiling: float) -> dict[str, Any]:
    """Figures of 400 tests whose models are right so often."""
    shares = dict(
        zip(
            ("weak", "student_xent", "student_half", "student_most", "ceiling"),
            (weak, 0.8, 0.85, 0.9, ceiling),
            strict=True,
        )
    )
    right = {name: np.arange(400) < share * 400 for name, share in shares.items()}
    names = [f"student_{student.name}" for student in STUDENTS]
    models = method_figures(right, names, np.arange(400), 0.05)
    look = {"epochs": 1.0, "accuracy": 0.8, "agreement": None, "loss": None, "kept": False}
    return {
        "task": "cost",
        "question": "sign",
        "rows": {"weak": 10, "strong": 10, "watched": 0, "tests": 400},
        "min_gap": 0.05,
        "gap": ceiling - weak,
        "valid": ceiling - weak >= 0.05,
        "weak_labels": weak,
        "students": {f"student_{s.name}": s.model_dump(exclude={"name"}) for s in STUDENTS},
        "questions": {"sign": models},
        "chain": [0.7, 0.8],
        "by": {"topic": {"<lock>": models}},
        "curves": {"student_xent": [look, look | {"epochs": 2.0, "accuracy": 0.7}]},
        "language_loss": None,
    }


def test_the_page_has_bars_and_curves(tmp_path: Path) -> None:
    found = told(weak=0.7, ceiling=0.95)
    (tmp_path / "page.html").write_text(page(found))
    shown = Page(tmp_path / "page.html")
    assert not shown.open and "script" not in shown.tags and all(link.startswith("#") for link in shown.loads)
    assert shown.tags.count("svg") == 3, "bars, accuracy over alpha, accuracy over epochs"
    text = " ".join(shown.text)
    for name in ("weak", "xent", "half", "most", "ceiling", "0.850", "Accuracy over alpha", "By topic", "<lock>"):
        assert name in text
    assert [card.value for card in cards(found)] == ["0.700", "0.800", "0.850", "0.900", "0.950"]
    assert cards(found)[1].remark.startswith("PGR 0.40 (")
    assert remarks(found)[1].startswith("student_xent: 0.800, PGR 0.40 (") and "chain: 0.700 -> 0.800" in remarks(found)


def test_without_a_gap_there_is_no_pgr(tmp_path: Path) -> None:
    found = told(weak=0.82, ceiling=0.86)
    (tmp_path / "page.html").write_text(page(found))
    text = " ".join(Page(tmp_path / "page.html").text)
    assert "not valid" in text and "PGR 0" not in text
    assert cards(found)[-1].state == "bad" and "cannot be read" in remarks(found)[1]


def test_many_students_are_still_told_apart() -> None:
    model = {"mean": 0.8, "low": 0.7, "high": 0.9}
    few = bars({name: model for name in ("weak", "student_xent", "student_confidence", "ceiling")})
    many = bars({name: model for name in ("weak", *(f"student_conf_.{n}_6" for n in range(8)), "ceiling")})
    assert "rotate(-30)" in many and "rotate(-30)" not in few
    # The legend has rows: in one, no room would be left for the axes, of which there is a warning.
    lines = [Series(f"conf_.{n}_6", np.array([0.7, 0.8])) for n in range(10)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg(Chart("Accuracy over epochs", "", [Panel("accuracy", lines)], np.array([1.0, 2.0]), "epochs"))
