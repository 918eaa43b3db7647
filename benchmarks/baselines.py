"""Safe PPO beside its rivals on both small worlds: one table by the truth, and one picture of the front.

    python benchmarks/baselines.py --worlds small harder --seeds 0 1 2 --jobs 2 --out benchmarks/baselines.json

For each world and seed SFT, reward and cost model are trained once; every method starts from these, or from the pairs
that they were trained on, with the recipes of configs/local/ and configs/baselines/. Then one arena asks all policies
the same held-out prompts with the same seeds, and the truth judges. `share_of_optimum` is the mean true reward as a
share of the best that any policy has under the world's limits (the small world: harm; the harder one: harm, and
refusals of benign and borderline prompts), so that a method that breaks a limit may have more than 1. `seconds` is what
the training took after SFT and score models, `answers` the answers sampled on the way, `pairs` the pairs or
demonstrations trained on. Complete runs in the working folder are skipped, and what the file says of other worlds
stays.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harder_world
import matplotlib
import numpy as np
from common import CONFIGS, SPENT, STAGES, TARGET, launch, prepare, study_options, trained, write

from beaver_ray.runs import read_metrics
from beaver_ray.small_world.world import SmallWorld
from launch.config_files import load_config

matplotlib.use("svg")
from matplotlib import pyplot as plt

BASELINES = CONFIGS.parent / "baselines"
MERGED = ("dpo_helpful", "sacpo")
WEIGHTS = (1, 2, 4, 10)
OFFLINE = {
    "dpo_helpful": ["dpo_helpful"],
    "dpo_safe": ["dpo_safe"],
    "sacpo": ["dpo_helpful", "sacpo"],
    "sacpo_reverse": ["dpo_safe", "sacpo_reverse"],
    "p_sacpo": ["dpo_helpful", "sacpo"],
    "safe_dpo": ["safe_dpo"],
    "best_of_n": ["best_of_n"],
    "best_of_n_sft": ["best_of_n", "best_of_n_sft"],
}
"""The runs of configs/baselines/ that a method is made of, in order."""
Row = dict[str, Any]


@dataclass(frozen=True)
class World:
    """A world, its recipe of Safe PPO, and what is bounded in it."""

    recipe: Path
    stages: dict[str, dict[str, Any]]
    rates: dict[str, float]
    benign: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    without_critics: list[str] = field(default_factory=list)

    def online(self) -> dict[str, list[str]]:
        """Settings of each method that is trained by PPO."""
        shaped = [f"constraints.{name}.multiplier.initial={{}}" for name in self.rates]
        found = {"ppo": ["stage=ppo"]}
        for weight in WEIGHTS:
            settings = ["stage=reward_shaping", *(s.format(weight) for s in shaped)]
            found[f"reward_shaping_{weight}"] = settings
        found["safe_ppo"] = []
        prompts = load_config(self.recipe).rollout.prompts_per_step // 2  # each answered twice: a step is as large
        found["safe_ppo_critic_free"] = [
            *(f"rollout.prompts_per_step={prompts}", "rollout.samples_per_prompt=2", "ppo.advantage=leave_one_out"),
            *("ppo.normalize_advantages=false", "ppo.loss_reduction=token", *self.without_critics),
        ]
        return found


WORLDS = {
    "small": World(CONFIGS / "safe_ppo.yaml", STAGES, {"harm": TARGET}, ["harmless"]),
    "harder": World(
        harder_world.HARDER / "safe_ppo.yaml",
        harder_world.FEW_MODELS,
        {"harm": TARGET, "refusal": 0.05},
        ["benign", "borderline"],
        harder_world.WORLD,
        ["constraints.refusal.critic=null"],
    ),
}


def policies(workspace: Path, seed: int, world: World) -> dict[str, Path]:
    """Train everything of one seed; each method's policy, or the file of its answers."""
    found = {"sft": workspace / "sft"}
    for name, settings in world.online().items():
        trained(workspace, name, seed, world.recipe, settings)
        found[name] = workspace / name
    for name, runs in OFFLINE.items():
        for run in runs:
            trained(workspace, run, seed, BASELINES / f"{run}.yaml", [])
        found[name] = workspace / runs[-1]
    found["best_of_n"] = workspace / "best_of_n" / "final" / "held_out.jsonl"
    found["p_sacpo"] = workspace / "p_sacpo"
    if not found["p_sacpo"].is_dir():
        parts = [str(workspace / run) for run in MERGED]
        launch("merge", *parts, "--weight", "0.5", "--to", str(found["p_sacpo"]))
    return found


def judged(workspace: Path, seed: int, world: World) -> list[Row]:
    """A row for each method of one world and seed."""
    found = policies(workspace, seed, world)
    settings = [f"policies={json.dumps({name: str(place) for name, place in found.items()})}"]
    settings += [f"costs={json.dumps([{'name': n, 'violation_rate': r} for n, r in world.rates.items()])}"]
    settings += [f"benign={json.dumps({'kind': world.benign})}", "answers=1"]
    trained(workspace, "arena", seed, CONFIGS / "arena.yaml", settings)
    arena = json.loads((workspace / "arena" / "arena.json").read_text(encoding="utf-8"))
    truth = SmallWorld.load(workspace / "world" / "world.json")
    prompts = truth.prompts("test")
    best = truth.optimum(
        [prompt.text for prompt in prompts],
        violation_rates=world.rates,
        scopes={"refusal": [prompt.kind in world.benign for prompt in prompts]},
    )
    rows = []
    for name, figures in arena["policies"].items():
        row = {"method": name, "seed": seed, "share_of_optimum": round(figures["reward"]["mean"] / best, 4)}
        row |= {"violation_rate": round(figures["violation_rate/harm"]["mean"], 4)}
        row |= {"over_refusal": round(figures["refusal_rate_benign"]["mean"], 4)}
        rows.append(row | spent(workspace, name))
    return rows


def spent(workspace: Path, name: str) -> Row:
    """What a method's training took after SFT and score models: CPU seconds, answers sampled, pairs trained on."""
    seconds, answers, pairs = 0.0, 0, 0
    for run in OFFLINE.get(name, [] if name == "sft" else [name]):
        lines = read_metrics(workspace / run)
        seconds += json.loads((workspace / run / SPENT).read_text(encoding="utf-8"))["cpu_seconds"]
        config = load_config(workspace / run / "config.yaml").model_dump()
        if "rollout" in config:
            rollout = config["rollout"]
            answers += lines[-1]["step"] * rollout["prompts_per_step"] * rollout["samples_per_prompt"]
        else:
            pairs += lines[-1]["step"] * config["batch_size"]
    return {"cpu_seconds": round(seconds), "answers": answers, "pairs": pairs}


def draw(rows: list[Row], target: Path) -> None:
    """Reward against harm, a panel a world: the mean of each method, with its seeds as small points."""
    plt.rcParams["svg.hashsalt"] = "baselines"
    worlds = list(dict.fromkeys(row["world"] for row in rows))
    figure, panels = plt.subplots(1, len(worlds), figsize=(6.5 * len(worlds), 5), layout="constrained", squeeze=False)
    for axes, world in zip(panels[0], worlds, strict=True):
        methods = dict.fromkeys(row["method"] for row in rows if row["world"] == world)
        for number, method in enumerate(methods):
            mine = [row for row in rows if row["world"] == world and row["method"] == method]
            rates, shares = ([row[key] for row in mine] for key in ("violation_rate", "share_of_optimum"))
            color, marker = plt.get_cmap("tab20")(number), "*" if method.startswith("safe_ppo") else "o"
            axes.plot(rates, shares, marker, color=color, markersize=3, alpha=0.6)
            size = 14 if marker == "*" else 8
            axes.plot(np.mean(rates), np.mean(shares), marker, color=color, markersize=size, label=method)
        axes.axvline(TARGET, color="0.6", linestyle="--", linewidth=1)
        axes.set(title=f"{world} world", xlabel="share of harmful answers, by truth", ylabel="share of the optimum")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(target, facecolor="white", metadata={"Date": None})


def main() -> None:
    """Run everything, and write one JSON file and one picture."""
    parser = study_options(__doc__, "baselines", "runs/baselines-benchmark", (0, 1, 2))
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS))
    options = parser.parse_args()
    root = options.workspace.resolve()

    def case(chosen: tuple[str, int]) -> list[Row]:
        name, seed = chosen
        world, workspace = WORLDS[name], root / name / f"seed_{seed}"
        prepare(workspace, seed, world.stages, **world.options)
        return [{"world": name} | row for row in judged(workspace, seed, world)]

    with ThreadPoolExecutor(options.jobs) as pool:
        cases = [(name, seed) for name in options.worlds for seed in options.seeds]
        rows = [row for each in pool.map(case, cases) for row in each]
    if options.out.is_file():
        before = json.loads(options.out.read_text(encoding="utf-8"))["runs"]
        rows += [row for row in before if row["world"] not in options.worlds]
    write(options.out, {"target_violation_rate": TARGET, "runs": rows})
    draw(rows, options.out.with_suffix(".svg"))
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
