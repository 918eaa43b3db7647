"""Reward, violation rate and multiplier over a run's steps: the picture in the README.

    python benchmarks/plot_run.py runs/small-world/safe_ppo benchmarks/small_world.svg

Dots are the training batches by the learned scorers; lines are held-out prompts by the small world's truth, where the
run evaluated as it went (evaluation.every).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from actors.driver.policy_stage import PolicyStage
from beaver_ray.errors import UserError
from beaver_ray.runs import read_metrics
from launch.config_files import load_run

BLUE, RED, GREEN, GREY = "#1f5fa8", "#b8432f", "#3c7d4f", "#666666"


def main() -> None:
    """Draw the run of the first argument into the file of the second."""
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/plot_run.py RUN_FOLDER OUT.svg")
    try:
        draw(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        sys.exit(f"error: {error}")


def draw(run: Path, target: Path) -> None:
    """Write the picture; raises UserError where the folder is not that of a PPO run with a constraint."""
    rows = read_metrics(run)
    config = load_run(run)
    if not isinstance(config, PolicyStage) or not config.constraints or not rows:
        raise UserError(f"{run} is not a run with a constraint: give the folder of a safe_ppo run that has steps")
    constraint = config.constraints[0]
    name = constraint.name
    plt.rcParams["svg.hashsalt"] = "beaver"  # with no date, the same bytes for the same run
    figure, (reward, unsafe, multiplier) = plt.subplots(3, 1, figsize=(8, 7), sharex=True, layout="constrained")
    lines(reward, rows, "reward/mean", "eval/reward", BLUE)
    evaluation = run / "evaluation.json"
    optimum = json.loads(evaluation.read_text(encoding="utf-8")).get("optimum") if evaluation.is_file() else None
    if optimum is not None:
        reward.axhline(optimum, color=GREY, linestyle="--", linewidth=1.2, label="best reachable under the target")
    reward.set_ylabel("mean reward")
    # With a violation rate as the target the cost is a calibrated probability, and its mean is the expected rate.
    of_mean, bound = constraint.form == "mean", constraint.bound
    as_rate = constraint.violation_rate is not None and of_mean
    train, held_out = ("mean", "violation_rate" if as_rate else "cost") if of_mean else ("bounded", "bounded")
    lines(unsafe, rows, f"cost/{name}/{train}", f"eval/{held_out}/{name}", RED)
    label = f"target {bound:.0%}" if as_rate else f"limit {bound:g}"
    unsafe.axhline(bound, color=GREY, linestyle="--", linewidth=1.2, label=label)
    what = "violation rate" if as_rate else "mean cost" if of_mean else f"cost ({constraint.form})"
    unsafe.set_ylabel(f"{what} of {name}")
    if as_rate:
        unsafe.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        unsafe.set_ylim(bottom=0)
    lines(multiplier, rows, f"multiplier/{name}", None, GREEN)
    multiplier.set_ylabel(f"multiplier of {name}")
    multiplier.set_xlabel("step")
    for axes in (reward, unsafe):
        axes.legend(frameon=False, loc="best")
    for axes in (reward, unsafe, multiplier):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, facecolor="white", dpi=110, metadata={"Date": None} if target.suffix == ".svg" else None)


def lines(axes: Axes, rows: list[dict[str, Any]], train: str, held_out: str | None, color: str) -> None:
    """The training metric as dots (as a line where it stands alone), the held-out one as a line."""
    steps, values = points(rows, train)
    if held_out is None:
        axes.plot(steps, values, color=color)
        return
    axes.plot(steps, values, ".", color=color, alpha=0.35, markersize=5, label="training batch, learned scorers")
    steps, values = points(rows, held_out)
    if values:
        axes.plot(steps, values, color=color, marker="o", markersize=3.5, label="held-out prompts")


def points(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps at which the metric was measured, and its values."""
    found = [(int(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


if __name__ == "__main__":
    main()
