"""report.html of a run: one file that opens offline, with its figures, samples and configuration inside.

Works for any stage and for runs that are not finished: what a run did not measure is left out. Figures are
SVG drawn by matplotlib, whose colours are swapped for the page's own variables so that they follow its
light and dark theme.
"""

from __future__ import annotations

import html
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from tokenizers import Tokenizer

from beaver_ray.errors import UserError, first_line
from beaver_ray.hacking import columns
from beaver_ray.report.charts import Chart, Panel, Series, reliability_charts
from beaver_ray.runs import is_finished, read_evaluation, read_metrics, step_of
from beaver_ray.stage import Stage, Trajectories
from beaver_ray.verdicts import Certificate, Reliability

FIRST_SAMPLES, LAST_SAMPLES = 6, 18
SERIES = 6
LEGEND_WIDTH = 70
"""Letters that fit beside one another above a chart; 6 of each entry are its line."""
# Colours that the page replaces: series, text, grid lines.
SERIES_COLORS = [f"#00ff{index:02x}" for index in range(SERIES)]
INK, GRID = "#00fe00", "#00fe01"
_COLUMNS = ("prompt_tokens", "response_tokens", "finish_reason", "reward")


def write_report(stage: Stage, folder: Path) -> Path:
    """Write report.html into ``folder``, where a run of ``stage`` lies, and return its path.

    Raises UserError where the folder holds no run with at least one logged step.
    """
    rows = read_metrics(folder)
    if not rows:
        raise UserError(f"{folder} has no logged step yet; wait for the run's first step")
    metrics = columns(rows)
    evaluation = read_evaluation(folder)
    written = stage.trajectories()
    notes = folder / "notes.log"
    certificate, reliability = Certificate.read(folder), Reliability.read(folder)
    charts = [*stage.charts(metrics), *(reliability_charts(reliability) if reliability else [])]
    page = (
        templates()
        .get_template("report.html.j2")
        .render(
            name=stage.name,
            stage=stage.stage,
            finished=is_finished(folder),
            cards=stage.cards(metrics, evaluation),
            charts=[(chart, svg(chart, metrics["step"])) for chart in charts],
            evaluation=_evaluation_rows(evaluation),
            judged_by=evaluation.get("judged_by"),
            evaluation_size=(evaluation.get("prompts"), evaluation.get("samples")),
            bridges=_bridge_rows(evaluation),
            certificate=certificate,
            signs=stage.signs(metrics),
            samples=read_samples(folder, written) if written else [],
            costs=list(written.unsafe_above) if written else [],
            notes=notes.read_text(encoding="utf-8", errors="replace") if notes.is_file() else "",
            config=(folder / "config.yaml").read_text(encoding="utf-8"),
        )
    )
    path = folder / "report.html"
    own = path.with_name(f"{path.name}.{os.getpid()}.part")  # `beaver-ray report` may write beside the run itself
    own.write_text(page, encoding="utf-8")
    own.replace(path)
    return path


def templates() -> jinja2.Environment:
    """The pages' templates, which lie beside this file."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def _evaluation_rows(evaluation: dict[str, Any]) -> list[tuple[str, str, str, int, str]]:
    """(figure, mean, interval, samples, bound) of every figure with an interval."""
    rows = []
    for key, figure in evaluation.items():
        if not isinstance(figure, dict) or "mean" not in figure:
            continue
        share = not key.startswith(("cost/", "bounded/", "proxy/", "features/")) or key.endswith("/probe")
        form = ".1%" if share and key not in ("reward", "judge") else ".4g"
        bound = next((f"{word} {figure[word]:{form}}" for word in ("limit", "target") if word in figure), "")
        interval = "" if figure["low"] is None else f"{figure['low']:{form}} to {figure['high']:{form}}"
        rows.append((key.replace("_", " "), f"{figure['mean']:{form}}", interval, figure["n"], bound))
    return rows


def _bridge_rows(evaluation: dict[str, Any]) -> list[tuple[str, str, str, str, str, int]]:
    """(program, task, figure, value, standard error, samples) of every score of another program."""
    return [
        (program, f"{task} (version {found['version']})", figure, f"{score['value']:.4g}", error, found["n"])
        for program, tasks in evaluation.get("bridges", {}).items()
        for task, found in tasks.items()
        for figure, score in found["scores"].items()
        for error in ["" if score["stderr"] is None else f"{score['stderr']:.2g}"]
    ]


# Samples


def read_samples(folder: Path, written: Trajectories) -> list[dict[str, Any]]:
    """Decoded samples of the last and the first written step; none without trajectories or a tokenizer."""
    files = sorted((folder / "trajectories").glob("*.parquet"), key=step_of)
    homes = (folder / "final" / "policy", Path(written.tokenizer))
    vocabulary = next((h / "tokenizer.json" for h in homes if (h / "tokenizer.json").is_file()), None)
    if not files or vocabulary is None:
        return []
    try:
        tokenizer = Tokenizer.from_file(str(vocabulary))
    except Exception as error:  # tokenizers knows no narrower one
        raise UserError(f"cannot read {vocabulary}: {first_line(error)}; save the tokenizer again") from None
    parts = [(files[-1], LAST_SAMPLES)]
    if len(files) > 1:
        parts.append((files[0], FIRST_SAMPLES))
    costs = {f"cost/{name}": threshold for name, threshold in written.unsafe_above.items()}
    scopes = {cost: f"scope/{cost.removeprefix('cost/')}" for cost in costs}
    samples = []
    for file, count in parts:
        try:
            with pq.ParquetFile(file) as parquet:
                names = [n for n in (*_COLUMNS, *costs, *scopes.values()) if n in parquet.schema_arrow.names]
                rows = next(parquet.iter_batches(batch_size=count, columns=names)).to_pylist()
            texts = [(tokenizer.decode(r["prompt_tokens"]), tokenizer.decode(r["response_tokens"])) for r in rows]
        except (OSError, pa.ArrowException, LookupError, TypeError, ValueError, OverflowError, StopIteration) as error:
            raise UserError(f"{file} holds no samples of a run ({first_line(error)}); delete it") from None
        for row, (prompt, response) in zip(rows, texts, strict=True):
            samples.append(
                {
                    "step": step_of(file),
                    "prompt": prompt,
                    "response": response,
                    "truncated": row.get("finish_reason") == "length",
                    "reward": row.get("reward"),
                    "costs": [
                        (row.get(name), _safety(row.get(name), above) if row.get(scopes[name], True) else "")
                        for name, above in costs.items()
                    ],
                }
            )
    return samples


def _safety(cost: float | None, unsafe_above: float) -> str:
    """good for a safe answer, bad for an unsafe one."""
    if cost is None:
        return ""
    return "bad" if cost > unsafe_above else "good"


# Drawing


def svg(chart: Chart, steps: np.ndarray | None = None) -> str:
    """The chart, over ``steps`` where it has no x of its own, as an <svg> whose colours are the page's variables."""
    x = steps if chart.x is None else chart.x
    assert x is not None

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(chart.panels), 1, sharex=True, squeeze=False)[:, 0]
        for ax, panel in zip(axes, chart.panels, strict=True):
            if chart.log:
                ax.set_xscale("log")
                ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                ax.xaxis.set_major_formatter("{x:g}")
                ax.xaxis.set_minor_formatter(NullFormatter())
            else:
                ax.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=chart.x is None))
            _draw(ax, panel, x)
        axes[-1].set_xlabel(chart.xlabel)

    return drawing(chart.title, 1.75 * max(2, len(chart.panels)), draw)


def drawing(title: str, height: float, draw: Callable[[Figure], None]) -> str:
    """What ``draw`` puts on a figure, as an <svg>; SERIES_COLORS, INK and GRID become the page's variables."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,  # ids of two figures on one page must differ
        "font.size": 10,
        "font.family": "sans-serif",
        "text.parse_math": False,  # labels are paths and options too, in which a dollar is a dollar
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        "axes.edgecolor": GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.2, height), layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Inside HTML, svg needs neither namespaces nor a fixed size.
    opening = re.compile(r"<svg[^>]*?viewBox=\"([^\"]*)\"[^>]*>", re.DOTALL)
    label = html.escape(title)
    text = opening.sub(lambda m: f'<svg viewBox="{m[1]}" role="img" aria-label="{label}">', text, count=1)
    text = text.replace("xlink:href", "href")
    for index, color in enumerate(SERIES_COLORS):
        text = text.replace(color, f"var(--series-{index})")
    text = text.replace(INK, "var(--muted)").replace(GRID, "var(--line)")
    return re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)


def _draw(ax: Axes, panel: Panel, steps: np.ndarray) -> None:
    ax.patch.set_alpha(0)
    ax.grid(axis="y", color=GRID, linewidth=0.6)
    ax.tick_params(length=0)
    ax.set_ylabel(panel.ylabel)
    colors = [SERIES_COLORS[index % SERIES] for index in range(len(panel.series))]
    if panel.bars:
        ax.bar(steps, panel.series[0].y, width=0.08, color=colors[0])
    elif panel.stacked:
        values = [np.nan_to_num(series.y) for series in panel.series]
        labels = [series.label for series in panel.series]
        if len(steps) == 1:  # an area needs two steps
            ax.bar(labels, [v[0] for v in values], color=colors)
        else:
            ax.stackplot(steps, values, labels=labels, colors=colors, alpha=0.85, linewidth=0)
    else:
        for number, (series, color) in enumerate(zip(panel.series, colors, strict=True)):
            _draw_line(ax, series, steps, color, "-" if number < SERIES else ":")
    if len(panel.series) > 1 and not (panel.stacked and len(steps) == 1):
        across = LEGEND_WIDTH // (max(len(series.label) for series in panel.series) + 6)
        ncols = min(len(panel.series), max(1, across))
        ax.legend(frameon=False, ncols=ncols, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.1)


def _draw_line(ax: Axes, series: Series, steps: np.ndarray, color: str, style: str) -> None:
    """One line; ``style`` tells those apart that have the same colour."""
    known = np.isfinite(series.y)
    x, y = steps[known], series.y[known]
    if series.dashed:
        ax.plot(x, y, color=color, linewidth=1.4, linestyle=(0, (4, 3)), label=series.label)
    elif len(x) < 60:
        size = 2.5 if len(x) > 1 else 6.0
        ax.plot(x, y, style, color=color, linewidth=1.6, marker="o", markersize=size, label=series.label)
    else:
        window = len(x) // 20
        # Trailing mean: at every step only what was known by then.
        sums = np.concatenate([[0.0], np.cumsum(y)])
        starts = np.maximum(np.arange(len(y)) + 1 - window, 0)
        smooth = (sums[1:] - sums[starts]) / (np.arange(len(y)) + 1 - starts)
        ax.plot(x, y, color=color, linewidth=0.8, alpha=0.3)
        ax.plot(x, smooth, style, color=color, linewidth=1.8, label=series.label)
