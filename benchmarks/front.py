"""The front of reward against harm: Safe PPO at five limits, reward shaping at ten weights, and what is best by truth.

    python benchmarks/front.py --seeds 0 1 2 --jobs 2 --out benchmarks/front.json --picture benchmarks/front.svg

Every run is a point: its violation rate and its mean reward by the world's truth on held-out prompts, over the last
fifth of training. A method's hypervolume (Zitzler and Thiele 1999) is the area of all (rate, reward) with a rate of at
most one half and a reward of at least 0 that one of its points is at least as good as; written as a share of the area
under the exact front, the linear program's best reward for each rate. Runs and models are those of small_world.py: give
its working folder, and what is complete there is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from common import TARGET, prepare, study_options, write
from small_world import METHODS, run

from beaver_ray.small_world.world import SmallWorld

LIMITS = (0.02, 0.05, 0.1, 0.2, 0.3)
WEIGHTS = (0.1, 0.3, 1, 1.5, 2, 3, 4, 6, 8, 10)
WORST_RATE = 0.5
RATES = np.linspace(0, WORST_RATE, 101)


def hypervolume(points: Sequence[tuple[float, float]]) -> float:
    """Area of the (rate, reward), at most one half and at least 0, that one of the points is at least as good as."""
    area, best = 0.0, 0.0
    inside = sorted((rate, reward) for rate, reward in points if rate < WORST_RATE)
    for i, (rate, reward) in enumerate(inside):
        best = max(best, reward)
        following = inside[i + 1][0] if i + 1 < len(inside) else WORST_RATE
        area += best * (following - rate)
    return area


def exact_front(workspace: Path) -> list[float]:
    """The best mean reward on the held-out prompts for each of `RATES`."""
    world = SmallWorld.load(workspace / "world" / "world.json")
    prompts = [prompt.text for prompt in world.prompts("test")]
    return [world.optimum(prompts, violation_rates={"harm": float(rate)}) for rate in RATES]


def draw(rows: list[dict[str, Any]], fronts: dict[int, list[float]], file: Path) -> None:
    """All points, and the mean of the exact fronts."""
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "front"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    axes.plot(RATES, np.mean(list(fronts.values()), axis=0), color="0.5", label="best by truth (linear program)")
    for method, marker, label in (
        ("safe_ppo", "o", "Safe PPO, one limit each"),
        ("reward_shaping", "x", "reward shaping, one weight each"),
    ):
        chosen = [row for row in rows if row["method"] == method]
        rates, rewards = [r["violation_rate"] for r in chosen], [r["reward"] for r in chosen]
        axes.plot(rates, rewards, marker, label=label)
    for limit in LIMITS:
        axes.axvline(limit, color="0.85", linewidth=0.8, zorder=0)
    axes.set(xlabel="share of harmful answers, by truth (limits: grey lines)", ylabel="mean reward, by truth")
    axes.legend(loc="upper left")
    figure.savefig(file, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """Run everything, and write one JSON file and the picture."""
    parser = study_options(__doc__, "front", "runs/benchmark", (0, 1, 2))
    parser.add_argument("--picture", type=Path, default=Path(__file__).parent / "front.svg")
    options = parser.parse_args()
    folders = {seed: options.workspace.resolve() / f"seed_{seed}" for seed in options.seeds}

    def case(chosen: tuple[int, str, float]) -> dict[str, Any]:
        seed, method, value = chosen
        if method == "safe_ppo":
            name = method if value == TARGET else f"safe_ppo_limit_{value}"
            row = run(folders[seed], seed, name, METHODS["safe_ppo"], value)
        else:
            settings = ["stage=reward_shaping", f"constraints.harm.multiplier.initial={value}"]
            row = run(folders[seed], seed, f"{method}_{value}", settings)
        return {**row, "method": method, "limit" if method == "safe_ppo" else "weight": value}

    cases = [(seed, "safe_ppo", limit) for seed in options.seeds for limit in LIMITS]
    cases += [(seed, "reward_shaping", weight) for seed in options.seeds for weight in WEIGHTS]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda seed: prepare(folders[seed], seed), options.seeds))
        rows = list(pool.map(case, cases))
    fronts = {seed: exact_front(folder) for seed, folder in folders.items()}
    shares = []
    for seed, front in fronts.items():
        best = hypervolume(list(zip(RATES, front, strict=True)))
        for method in ("safe_ppo", "reward_shaping"):
            points = [(r["violation_rate"], r["reward"]) for r in rows if r["seed"] == seed and r["method"] == method]
            shares.append({"seed": seed, "method": method, "hypervolume_share": round(hypervolume(points) / best, 4)})
    write(options.out, {"hypervolume": shares, "runs": rows})
    draw(rows, fronts, options.picture)
    print(json.dumps(shares, indent=2))


if __name__ == "__main__":
    main()
