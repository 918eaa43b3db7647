"""Safe PPO against plain PPO and fixed-weight reward shaping on the small world, by its true reward and cost.

    python benchmarks/small_world.py --seeds 0 1 2 --jobs 2 --out benchmarks/small_world.json

For each seed: build the world, train SFT policy, reward model and cost model once, then run each method from the same
models for the same number of steps, one process a run (debug mode). The figures are means over the evaluations on
held-out prompts in the last fifth of training. Of the run's own estimate: `within_limit_step` is the first step at
which the mean violation rate of five steps is within the limit (null for never), `share_above_limit` how many of these
means are above it from step 25 on (null for shorter runs). With staleness k every sample is k versions old (in one
process what may be generated is generated at once), the worst that the bound allows. Complete runs in the working
folder are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent.parent / "configs" / "local"
TRUTH = "python:beaver_ray/small_world/truth.py:{}(world='${{workspace}}/world/world.json')"
METHODS = {
    "safe_ppo": [],
    "safe_ppo_without_replay": ["ppo.replay=0"],
    "safe_ppo_confidence": ["constraints.harm.confidence=0.9"],
    "safe_ppo_true_scores": [
        f"models.reward={TRUTH.format('reward')}",
        "models.reward_critic=${workspace}/reward_model/final/reward_model",
        f"constraints.harm.model={TRUTH.format('cost')}",
        "constraints.harm.critic=${workspace}/cost_model/final/cost_model",
    ],
    "safe_ppo_staleness_1": ["rollout.staleness=1"],
    "safe_ppo_staleness_4": ["rollout.staleness=4"],
    "ppo": ["stage=ppo"],
    "reward_shaping_0.1": ["stage=reward_shaping", "constraints.harm.multiplier.initial=0.1"],
    "reward_shaping_1": ["stage=reward_shaping", "constraints.harm.multiplier.initial=1"],
    "reward_shaping_10": ["stage=reward_shaping", "constraints.harm.multiplier.initial=10"],
}
STAGES = ("sft", "reward_model", "cost_model")
TARGET, SETTLED = 0.1, 25


def launch(*arguments: str) -> None:
    """One command line of the project, in a process of its own; its error ends the benchmark."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "launch", *arguments], check=True, env=environment, cwd=CONFIGS.parent.parent)


def prepare(workspace: Path, seed: int, **world: Any) -> None:
    """World with these options, SFT policy, reward model and cost model of one seed."""
    pipeline = workspace / "pipeline.yaml"
    workspace.mkdir(parents=True, exist_ok=True)
    stages = "".join(f"  - config: {CONFIGS / name}.yaml\n" for name in STAGES)
    options = json.dumps({"seed": seed, **world})
    pipeline.write_text(f"workspace: {workspace}\nworld: {options}\nstages:\n{stages}", encoding="utf-8")
    overrides = [
        f"{stage}.{setting}" for stage in STAGES for setting in ("debug=true", "cluster.threads=1", f"seed={seed}")
    ]
    launch("pipeline", str(pipeline), *overrides)


def run(
    workspace: Path,
    seed: int,
    method: str,
    settings: Sequence[str],
    target: float = TARGET,
    recipe: str = "safe_ppo.yaml",
) -> dict[str, float | int | str | None]:
    """One run of the recipe with these settings, unless it is there already, and its figures over the last fifth."""
    folder = workspace / method
    if not (folder / "final").is_dir():
        limit = f"constraints.harm.violation_rate={target}"
        common = [f"workspace={workspace}", f"name={method}", f"seed={seed}", "debug=true", limit]
        launch("train", str(CONFIGS / recipe), *common, *settings)
    return figures(folder, target) | {"method": method, "seed": seed}


def figures(folder: Path, target: float) -> dict[str, float | int | str | None]:
    """What a run's metrics say of its last fifth, and of when its limit was kept."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if line["step"] > 0.8 * lines[-1]["step"] and "eval/reward" in line]

    def mean(key: str) -> float:
        return round(sum(line[key] for line in last) / len(last), 4)

    rates = [line["cost/harm/violation_rate"] for line in lines]
    means = {step: sum(rates[step - 5 : step]) / 5 for step in range(5, len(rates) + 1)}
    above = [m > target for step, m in means.items() if step >= SETTLED]
    return {
        "steps": lines[-1]["step"],
        "evaluations": len(last),
        "share_of_optimum": mean("eval/share_of_optimum"),
        "reward": mean("eval/reward"),
        "violation_rate": mean("eval/violation_rate/harm"),
        "refusal_rate_harmless": mean("eval/refusal_rate_harmless"),
        "within_limit_step": next((step for step, m in means.items() if m <= target), None),
        "share_above_limit": round(sum(above) / len(above), 3) if above else None,
        "seconds": round(lines[-1]["time/elapsed"], 1),
    }


def described(command: str) -> dict[str, Any]:
    """What a file of figures opens with: how they were made, and on what."""
    packages = ("torch", "transformers", "deepspeed", "ray")
    hardware = f"{os.cpu_count()} CPU cores, {platform.machine()}, no GPU"
    return {"command": command, "hardware": hardware, "versions": {name: version(name) for name in packages}}


def main() -> None:
    """Run everything and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, help="steps of each run (default: the recipe's)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--workspace", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "small_world.json")
    options = parser.parse_args()
    root = options.workspace.resolve()
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda seed: prepare(root / f"seed_{seed}", seed), options.seeds))
        pairs = [(seed, method) for seed in options.seeds for method in options.methods]
        budget = [f"steps={options.steps}"] if options.steps else []
        rows = list(pool.map(lambda p: run(root / f"seed_{p[0]}", *p, [*METHODS[p[1]], *budget]), pairs))
    seeds = " ".join(str(seed) for seed in options.seeds)
    methods = "" if options.methods == list(METHODS) else f" --methods {' '.join(options.methods)}"
    steps = f" --steps {options.steps}" if options.steps else ""
    command = f"python benchmarks/small_world.py --seeds {seeds} --jobs {options.jobs}{methods}{steps}"
    result = described(command) | {"target_violation_rate": TARGET, "runs": rows}
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
