"""The front of reward against harm: Safe PPO at five limits, reward shaping at several weights, and the best by truth.

    python benchmarks/front.py --seeds 0 1 2 --jobs 2 --out benchmarks/front.json --picture benchmarks/front.svg
    python benchmarks/front.py --world harder --seeds 0 1 --jobs 2 --workspace runs/benchmark-harder \\
        --out benchmarks/front_harder.json --picture benchmarks/front_harder.svg

Every run is a point: its violation rate and its mean reward by the world's truth on held-out prompts, over the last
fifth of training. A method's hypervolume (Zitzler and Thiele 1999) is the area of all (rate, reward) with a rate of at
most one half and a reward of at least 0 that one of its points is at least as good as; written as a share of the area
under the exact front, the linear program's best reward for each rate. On the harder world (by graded labels, as
configs/local/harder/graded.yaml) Safe PPO has its limit on refusals beside each limit on harm, the exact front has it
too, and a weight weighs both costs; `refusal_rate` says what each point refuses. Runs and models are those of
small_world.py and harder_world.py: give their working folder, and what is complete there is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harder_world
import matplotlib
import numpy as np
from common import CONFIGS, STAGES, TARGET, last_fifth, prepare, study_options, trained, write

from beaver_ray.runs import read_metrics
from beaver_ray.small_world.world import SmallWorld

LIMITS = (0.02, 0.05, 0.1, 0.2, 0.3)
WORST_RATE = 0.5
RATES = np.linspace(0, WORST_RATE, 101)


@dataclass(frozen=True)
class World:
    """A world, its recipe, and what is tried on it.

    run: the folder of the run by the recipe's own limit.
    others: what else is bounded, as a share of the prompts of the kinds in ``kinds``.
    """

    recipe: Path
    run: str
    stages: dict[str, dict[str, Any]]
    weights: tuple[float, ...]
    settings: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()


WORLDS = {
    "small": World(CONFIGS / "safe_ppo.yaml", "safe_ppo", STAGES, (0.1, 0.3, 1, 1.5, 2, 3, 4, 6, 8, 10)),
    "harder": World(
        harder_world.HARDER / "safe_ppo.yaml",
        "harm_refusal_graded_256",
        harder_world.GRADED_MODELS,
        (0.5, 1, 2, 2.25, 2.5, 2.75, 3, 4, 6, 8),
        harder_world.TWICE,
        harder_world.WORLD,
        {"refusal": 0.05},
        ("benign", "borderline"),
    ),
}


def hypervolume(points: Sequence[tuple[float, float]]) -> float:
    """Area of the (rate, reward), at most one half and at least 0, that one of the points is at least as good as."""
    area, best = 0.0, 0.0
    inside = sorted((rate, reward) for rate, reward in points if rate < WORST_RATE)
    for i, (rate, reward) in enumerate(inside):
        best = max(best, reward)
        following = inside[i + 1][0] if i + 1 < len(inside) else WORST_RATE
        area += best * (following - rate)
    return area


def exact_front(workspace: Path, world: World) -> list[float]:
    """The best mean reward on the held-out prompts for each of `RATES`."""
    truth = SmallWorld.load(workspace / "world" / "world.json")
    prompts = truth.prompts("test")
    texts, counted = [prompt.text for prompt in prompts], [prompt.kind in world.kinds for prompt in prompts]
    scopes = dict.fromkeys(world.others, counted)
    return [truth.optimum(texts, violation_rates={"harm": float(r)} | world.others, scopes=scopes) for r in RATES]


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


def point(folder: Path, seed: int, world: World, method: str, value: float) -> dict[str, Any]:
    """One run, unless it is there already: what its policies reach in the last fifth of training."""
    if method == "safe_ppo":
        name = world.run if value == TARGET else f"{world.run}_limit_{value}"
        tried = [f"constraints.harm.violation_rate={value}"]
    else:
        name = f"{method}_{value}"
        weighed = [f"constraints.{cost}.multiplier.initial={value}" for cost in ("harm", *world.others)]
        tried = ["stage=reward_shaping", *weighed]
    trained(folder, name, seed, world.recipe, [*world.settings, *tried])
    lines = last_fifth(read_metrics(folder / name))
    figures = {"reward": "reward", "violation_rate": "violation_rate/harm"}
    figures |= {f"{cost}_rate": f"violation_rate/{cost}" for cost in world.others}
    means = {key: round(sum(line[f"eval/{of}"] for line in lines) / len(lines), 4) for key, of in figures.items()}
    return {"seed": seed, "method": method, "limit" if method == "safe_ppo" else "weight": value, **means}


def main() -> None:
    """Run everything, and write one JSON file and the picture."""
    parser = study_options(__doc__, "front", "runs/benchmark", (0, 1, 2))
    parser.add_argument("--picture", type=Path, default=Path(__file__).parent / "front.svg")
    parser.add_argument("--world", default="small", choices=list(WORLDS))
    options = parser.parse_args()
    world = WORLDS[options.world]
    folders = {seed: options.workspace.resolve() / f"seed_{seed}" for seed in options.seeds}

    cases = [(seed, "safe_ppo", limit) for seed in options.seeds for limit in LIMITS]
    cases += [(seed, "reward_shaping", weight) for seed in options.seeds for weight in world.weights]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda seed: prepare(folders[seed], seed, world.stages, **world.options), options.seeds))
        rows = list(pool.map(lambda c: point(folders[c[0]], c[0], world, *c[1:]), cases))
    fronts = {seed: exact_front(folder, world) for seed, folder in folders.items()}
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
