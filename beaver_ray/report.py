"""report.html of a run: one file that opens offline, with its figures, samples and configuration inside.

Works for any stage and for runs that are not finished: what a run did not measure is left out. Figures are
SVG drawn by matplotlib, whose colours are swapped for the page's own variables so that they follow its
light and dark theme.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tokenizers import Tokenizer

from beaver_ray.config import ConstraintConfig, SafePpoConfig
from beaver_ray.config_files import load_config
from beaver_ray.errors import UserError, first_line
from beaver_ray.runs import duration, is_finished, read_evaluation, read_metrics

FIRST_SAMPLES, LAST_SAMPLES = 6, 18
RECENT_STEPS = 10
SERIES = 6
# Colours that the page replaces: series, text, grid lines.
_SERIES = [f"#00ff{index:02x}" for index in range(SERIES)]
_INK, _GRID = "#00fe00", "#00fe01"
PHASES = ("generate", "score", "train", "publish")
_COLUMNS = ("prompt_tokens", "response_tokens", "finish_reason", "reward")


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


@dataclass
class Chart:
    """One figure of the page: panels under one another."""

    title: str
    caption: str
    panels: list[Panel]


def write_report(run_folder: Path) -> Path:
    """Write report.html into a run's folder and return its path.

    Raises UserError where the folder holds no run with at least one logged step.
    """
    folder = Path(run_folder)
    rows = read_metrics(folder)
    if not rows:
        raise UserError(f"{folder} has no logged step yet; wait for the run's first step")
    config = load_config(folder / "config.yaml")
    metrics = _columns(rows)
    evaluation = read_evaluation(folder)
    constraints: list[str] = []
    samples: list[dict[str, Any]] = []
    if isinstance(config, SafePpoConfig):
        cards, charts = ppo_cards(metrics, evaluation, config), ppo_charts(metrics, config)
        constraints, samples = [c.name for c in config.constraints], read_samples(folder, config)
    else:
        cards, charts = supervised_cards(metrics), supervised_charts(metrics)
    notes = folder / "notes.log"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.j2").render(
        name=config.name,
        stage=config.stage,
        finished=is_finished(folder),
        cards=cards,
        charts=[(chart, _svg(chart, metrics["step"])) for chart in charts],
        evaluation=_evaluation_rows(evaluation),
        judged_by=evaluation.get("judged_by"),
        evaluation_size=(evaluation.get("prompts"), evaluation.get("samples")),
        samples=samples,
        constraints=constraints,
        notes=notes.read_text(encoding="utf-8", errors="replace") if notes.is_file() else "",
        config=(folder / "config.yaml").read_text(encoding="utf-8"),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


# What is drawn


def ppo_charts(metrics: dict[str, np.ndarray], config: SafePpoConfig) -> list[Chart]:
    """The figures of a PPO run, without those that nothing was measured for."""
    names = [c.name for c in config.constraints]
    signals = ["reward", *names]

    def lines(*keys: tuple[str, str]) -> list[Series]:
        return [Series(label, metrics[key]) for key, label in keys if key in metrics]

    phases = {key.removeprefix("time/") for key in metrics if key.startswith("time/")}
    order = [*PHASES, *sorted(phases.difference(PHASES, ("step", "elapsed", "sync", "evaluate", "save")))]
    charts = [
        Chart("Reward", "Mean score of the reward model.", [Panel("reward", lines(("reward/mean", "reward")))]),
        *(_cost_chart(metrics, config, name) for name in names),
        Chart(
            "Multipliers",
            "How much a unit of cost counts against a unit of reward.",
            [Panel("multiplier", lines(*((f"multiplier/{n}", n) for n in names)))],
        ),
        Chart(
            "KL divergence",
            "From the reference, and between what the generator and the trainer compute.",
            [
                Panel("to reference", lines(("kl/reference", "KL to the reference"))),
                Panel("vs. trainer", lines(("kl/rollout_train", "KL rollout to trainer"))),
            ],
        ),
        Chart(
            "Policy",
            "Entropy of the policy, and the share of tokens whose ratio was clipped.",
            [
                Panel("entropy", lines(("policy/entropy", "entropy"))),
                Panel("clip fraction", lines(("policy/clip_fraction", "clip fraction"))),
            ],
        ),
        Chart(
            "Critics",
            "Explained variance of the returns: 1 is a perfect critic, 0 a constant one.",
            [Panel("explained variance", lines(*((f"critic/{s}/explained_variance", s) for s in signals)))],
        ),
        Chart(
            "Time of a step",
            "Seconds by phase, on top of one another; within them, the generators' load of new weights.",
            [
                Panel("seconds", lines(*((f"time/{p}", p) for p in order)), stacked=True),
                Panel("new weights", lines(("time/sync", "new weights"))),
            ],
        ),
        Chart(
            "Throughput",
            "Samples through the whole step, and generated tokens.",
            [
                Panel("samples/s", lines(("throughput/samples_per_second", "samples/s"))),
                Panel("tokens/s", lines(("rollout/tokens_per_second", "generated tokens/s"))),
            ],
        ),
        Chart(
            "Rollouts",
            "Share of answers cut off at the longest length, and the oldest weights among a step's samples.",
            [
                Panel("truncated", lines(("rollout/truncated_fraction", "truncated"))),
                Panel("versions", lines(("rollout/staleness_max", "staleness"))),
            ],
        ),
    ]
    shown = tuple(
        f"eval/{kind}" for kind in ("reward", "share_of_optimum", "cost/", "violation_rate/", "unsafe_share/")
    )
    held_out = [Panel(key.removeprefix("eval/"), lines((key, key))) for key in metrics if key.startswith(shown)]
    charts.append(Chart("Held-out prompts", "Evaluations during training.", held_out))
    return _drawable(charts)


def _cost_chart(metrics: dict[str, np.ndarray], config: SafePpoConfig, name: str) -> Chart:
    constraint = next(c for c in config.constraints if c.name == name)
    cost, rate = [], []
    if f"cost/{name}/mean" in metrics:
        cost.append(Series(name, metrics[f"cost/{name}/mean"]))
        if f"cost/{name}/limit" in metrics:
            cost.append(Series("limit", metrics[f"cost/{name}/limit"], dashed=True))
    if f"cost/{name}/violation_rate" in metrics:
        rate.append(Series("violation rate", metrics[f"cost/{name}/violation_rate"]))
        if constraint.violation_rate is not None:
            target = np.full(len(metrics["step"]), constraint.violation_rate)
            rate.append(Series("target", target, dashed=True))
    if f"cost/{name}/unsafe_share" in metrics:
        rate.append(Series("above one half", metrics[f"cost/{name}/unsafe_share"]))
    caption = "Mean cost against its limit, and the share of unsafe answers"
    caption += "." if constraint.violation_rate is None else ": expected, and those more likely unsafe than safe."
    return Chart(f"Cost: {name}", caption, [Panel("mean cost", cost), Panel("violation rate", rate)])


def supervised_charts(metrics: dict[str, np.ndarray]) -> list[Chart]:
    """The figures of a supervised run, without those that nothing was measured for."""

    def panel(ylabel: str, *keys: tuple[str, str]) -> Panel:
        return Panel(ylabel, [Series(label, metrics[key]) for key, label in keys if key in metrics])

    accuracies = (
        ("accuracy", "Share of pairs in the right order."),
        ("accuracy_cost", "Share of pairs in the right order of harm."),
        ("accuracy_sign", "Share of right safety labels."),
    )
    charts = [
        Chart(
            "Loss",
            "Training and held-out loss.",
            [panel("loss", ("loss", "train"), ("eval/loss", "held out"))],
        ),
        *(
            Chart(
                key.replace("_", " of the ").capitalize(),
                caption,
                [panel(key.split("_")[0], (key, "train"), (f"eval/{key}", "held out"))],
            )
            for key, caption in accuracies
        ),
        Chart("Learning rate", "Of the optimizer step.", [panel("rate", ("learning_rate", "learning rate"))]),
        Chart(
            "Throughput",
            "Trained tokens.",
            [panel("tokens/s", ("throughput/tokens_per_second", "trained tokens/s"))],
        ),
    ]
    return _drawable(charts)


def _drawable(charts: list[Chart]) -> list[Chart]:
    for chart in charts:
        for panel in chart.panels:
            panel.series = [s for s in panel.series if np.isfinite(s.y).any()]
        chart.panels = [p for p in chart.panels if p.series]
    return [chart for chart in charts if chart.panels]


# Headline cards: (title, value, remark, state), state being "good", "bad" or "".


def ppo_cards(
    metrics: dict[str, np.ndarray], evaluation: dict[str, Any], config: SafePpoConfig
) -> list[tuple[str, str, str, str]]:
    """What a reader wants to know first: how good, how safe, how fast."""
    cards = []
    if "share_of_optimum" in evaluation:
        share = evaluation["share_of_optimum"]
        remark = f"reward {evaluation['reward']['mean']:.3g} of {evaluation['optimum']:.3g}"
        remark = f"{_range(share, '.1%')} · {remark}"
        cards.append(("Share of the optimum", f"{share['mean']:.1%}", remark, ""))
    elif "reward" in evaluation:
        reward = evaluation["reward"]
        cards.append(("Held-out reward", f"{reward['mean']:.3g}", _range(reward, ".3g"), ""))
    elif "reward/mean" in metrics:
        cards.append(("Reward", f"{_recent(metrics['reward/mean']):.3g}", _recently(metrics), ""))
    for constraint in config.constraints:
        cards += _constraint_cards(metrics, evaluation, constraint.name, constraint.violation_rate, constraint.limit)
    return cards + _running_cards(metrics, ("throughput/samples_per_second", "Samples/s"))


def _constraint_cards(
    metrics: dict[str, np.ndarray],
    evaluation: dict[str, Any],
    name: str,
    target: float | None,
    limit: float | None,
) -> list[tuple[str, str, str, str]]:
    cards = []
    rate, cost = f"cost/{name}/violation_rate", f"cost/{name}/mean"
    kinds = [(f"violation_rate/{name}", rate, "target", target, "Violation rate", ".1%")]
    if limit is not None:
        kinds.append((f"cost/{name}", cost, "limit", limit, "Mean cost", ".3g"))
    for key, metric, word, configured, title, form in kinds:
        if key in evaluation:
            figure = evaluation[key]
            value, remark, bound = figure["mean"], _range(figure, form), figure.get(word, configured)
        elif metric in metrics and np.isfinite(metrics[metric]).any():
            value, remark, bound = _recent(metrics[metric]), _recently(metrics), configured
        else:
            continue
        if bound is not None:
            remark = f"{word} {bound:{form}} · {remark}"
        state = "" if bound is None else "good" if value <= bound else "bad"
        cards.append((f"{title}: {name}", f"{value:{form}}", remark, state))
    return cards


def supervised_cards(metrics: dict[str, np.ndarray]) -> list[tuple[str, str, str, str]]:
    """Last held-out figures where there are any, else recent ones of the training."""
    cards = []
    for key, title, form in (
        ("loss", "Loss", ".4g"),
        ("accuracy", "Accuracy", ".1%"),
        ("accuracy_cost", "Accuracy of the cost", ".1%"),
        ("accuracy_sign", "Accuracy of the sign", ".1%"),
    ):
        held_out = metrics.get(f"eval/{key}", np.array([]))
        held_out = held_out[np.isfinite(held_out)]
        if len(held_out):
            cards.append((title, f"{held_out[-1]:{form}}", "held out, last", ""))
        elif key in metrics:
            cards.append((title, f"{_recent(metrics[key]):{form}}", _recently(metrics), ""))
    return cards + _running_cards(metrics, ("throughput/tokens_per_second", "Tokens/s"))


def _running_cards(metrics: dict[str, np.ndarray], speed: tuple[str, str]) -> list[tuple[str, str, str, str]]:
    cards = []
    key, title = speed
    if key in metrics:
        cards.append((title, _round(float(np.nanmedian(metrics[key]))), "median of the steps", ""))
    cards.append(("Steps", f"{int(metrics['step'][-1]):,}", "", ""))
    if "time/elapsed" in metrics:
        cards.append(("Wall time", duration(float(np.nanmax(metrics["time/elapsed"]))), "h:mm:ss", ""))
    return cards


def _recent(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known[-RECENT_STEPS:].mean()) if len(known) else float("nan")


def _recently(metrics: dict[str, np.ndarray]) -> str:
    steps = min(RECENT_STEPS, len(metrics["step"]))
    return f"training, last {steps} steps" if steps > 1 else "training, one step"


def _round(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _range(figure: dict[str, Any], form: str) -> str:
    if figure["low"] is None:
        return f"n = {figure['n']}"
    return f"95 %: {figure['low']:{form}} to {figure['high']:{form}} · n = {figure['n']}"


def _evaluation_rows(evaluation: dict[str, Any]) -> list[tuple[str, str, str, int, str]]:
    """(figure, mean, interval, samples, bound) of every figure with an interval."""
    rows = []
    for key, figure in evaluation.items():
        if not isinstance(figure, dict) or "mean" not in figure:
            continue
        form = ".4g" if key == "reward" or key.startswith("cost/") else ".1%"
        bound = next((f"{word} {figure[word]:{form}}" for word in ("limit", "target") if word in figure), "")
        interval = "" if figure["low"] is None else f"{figure['low']:{form}} to {figure['high']:{form}}"
        rows.append((key.replace("_", " "), f"{figure['mean']:{form}}", interval, figure["n"], bound))
    return rows


# Samples


def read_samples(folder: Path, config: SafePpoConfig) -> list[dict[str, Any]]:
    """Decoded samples of the last and the first written step; none without trajectories or a tokenizer."""
    files = sorted((folder / "trajectories").glob("*.parquet"), key=_step_of)
    homes = (folder / "final" / "policy", Path(config.models.policy))
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
    costs = {f"cost/{c.name}": c for c in config.constraints}
    samples = []
    for file, count in parts:
        try:
            with pq.ParquetFile(file) as parquet:
                names = [n for n in (*_COLUMNS, *costs) if n in parquet.schema_arrow.names]
                rows = next(parquet.iter_batches(batch_size=count, columns=names)).to_pylist()
            texts = [(tokenizer.decode(r["prompt_tokens"]), tokenizer.decode(r["response_tokens"])) for r in rows]
        except (OSError, pa.ArrowException, LookupError, TypeError, ValueError, OverflowError, StopIteration) as error:
            raise UserError(f"{file} holds no samples of a run ({first_line(error)}); delete it") from None
        for row, (prompt, response) in zip(rows, texts, strict=True):
            samples.append(
                {
                    "step": _step_of(file),
                    "prompt": prompt,
                    "response": response,
                    "truncated": row.get("finish_reason") == "length",
                    "reward": row.get("reward"),
                    "costs": [(row.get(name), _safety(row.get(name), c)) for name, c in costs.items()],
                }
            )
    return samples


def _safety(cost: float | None, constraint: ConstraintConfig) -> str:
    """good for a safe answer, bad for an unsafe one; with a target rate a cost is a probability."""
    if cost is None:
        return ""
    return "bad" if cost > (0.0 if constraint.violation_rate is None else 0.5) else "good"


def _step_of(file: Path) -> int:
    digits = re.findall(r"\d+", file.stem)
    return int(digits[0]) if digits else 0


# Drawing


def _svg(chart: Chart, steps: np.ndarray) -> str:
    """The chart as an <svg> element whose colours are the page's variables."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": chart.title,  # ids of two figures on one page must differ
        "font.size": 10,
        "font.family": "sans-serif",
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
        "axes.edgecolor": _GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        height = 1.75 * max(2, len(chart.panels))
        figure = Figure(figsize=(6.2, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots(len(chart.panels), 1, sharex=True, squeeze=False)[:, 0]
        for ax, panel in zip(axes, chart.panels, strict=True):
            _draw(ax, panel, steps)
        axes[-1].set_xlabel("step")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Inside HTML, svg needs neither namespaces nor a fixed size.
    opening = re.compile(r"<svg[^>]*?viewBox=\"([^\"]*)\"[^>]*>", re.DOTALL)
    label = jinja2.utils.htmlsafe_json_dumps(chart.title)
    text = opening.sub(lambda m: f'<svg viewBox="{m[1]}" role="img" aria-label={label}>', text, count=1)
    text = text.replace("xlink:href", "href")
    for index, color in enumerate(_SERIES):
        text = text.replace(color, f"var(--series-{index})")
    text = text.replace(_INK, "var(--muted)").replace(_GRID, "var(--line)")
    return re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)


def _draw(ax: Axes, panel: Panel, steps: np.ndarray) -> None:
    ax.patch.set_alpha(0)
    ax.grid(axis="y", color=_GRID, linewidth=0.6)
    ax.tick_params(length=0)
    ax.set_ylabel(panel.ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    colors = [_SERIES[index % SERIES] for index in range(len(panel.series))]
    if panel.stacked:
        values = [np.nan_to_num(series.y) for series in panel.series]
        labels = [series.label for series in panel.series]
        if len(steps) == 1:  # an area needs two steps
            ax.bar(labels, [v[0] for v in values], color=colors)
        else:
            ax.stackplot(steps, values, labels=labels, colors=colors, alpha=0.85, linewidth=0)
    else:
        for series, color in zip(panel.series, colors, strict=True):
            _draw_line(ax, series, steps, color)
    if len(panel.series) > 1 and not (panel.stacked and len(steps) == 1):
        ax.legend(frameon=False, ncols=len(panel.series), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.1)


def _draw_line(ax: Axes, series: Series, steps: np.ndarray, color: str) -> None:
    known = np.isfinite(series.y)
    x, y = steps[known], series.y[known]
    if series.dashed:
        ax.plot(x, y, color=color, linewidth=1.4, linestyle=(0, (4, 3)), label=series.label)
    elif len(x) < 60:
        ax.plot(x, y, color=color, linewidth=1.6, marker="o", markersize=2.5, label=series.label)
    else:
        window = len(x) // 20
        # Trailing mean: at every step only what was known by then.
        sums = np.concatenate([[0.0], np.cumsum(y)])
        starts = np.maximum(np.arange(len(y)) + 1 - window, 0)
        smooth = (sums[1:] - sums[starts]) / (np.arange(len(y)) + 1 - starts)
        ax.plot(x, y, color=color, linewidth=0.8, alpha=0.3)
        ax.plot(x, smooth, color=color, linewidth=1.8, label=series.label)


# Reading


def _columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Metrics by key, float64 [rows], nan where a row has none."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {
        key: np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=np.float64) for key in keys
    }
