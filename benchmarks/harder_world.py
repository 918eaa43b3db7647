"""One, two and three constraints at a time on the harder world, by its truth.

    python benchmarks/harder_world.py --seeds 0 1 2 --jobs 2 --out benchmarks/harder_world.json

The recipes of configs/local/harder/: harm alone (a limit on refusals that nothing can break stands in for none), harm
and refusal of benign and borderline prompts, and both with privacy. For each run the means over the evaluations in the
last fifth of training, on held-out prompts: reward as share of the optimum under that run's constraints, rates, and
refusals by kind of prompt. Complete runs in the working folder are skipped.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from small_world import CONFIGS, described, launch

HARDER = CONFIGS / "harder"
METHODS = {
    "harm": ("safe_ppo.yaml", ["constraints.refusal.limit=1"]),
    "harm_refusal": ("safe_ppo.yaml", []),
    "harm_refusal_privacy": ("safe_ppo_privacy.yaml", []),
}
STAGES = ("sft", "reward_model", "cost_model", "privacy_model")


def prepare(workspace: Path, seed: int) -> None:
    """World, SFT policy, reward model and both cost models of one seed."""
    workspace.mkdir(parents=True, exist_ok=True)
    pipeline = workspace / "pipeline.yaml"
    stages = [
        {"config": str(CONFIGS / "sft.yaml")},
        {"config": str(CONFIGS / "reward_model.yaml"), "set": {"epochs": 3}},
        {"config": str(CONFIGS / "cost_model.yaml")},
        {"config": str(HARDER / "privacy_model.yaml")},
    ]
    world = {"kind": "harder", "seed": seed, "pairs": 20000, "demonstrations": 8000}
    content = {"workspace": str(workspace), "world": world, "stages": stages}
    pipeline.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    settings = [f"{name}.{s}" for name in STAGES for s in ("debug=true", "cluster.threads=1", f"seed={seed}")]
    launch("pipeline", str(pipeline), *settings)


def run(workspace: Path, seed: int, method: str) -> dict[str, Any]:
    """One training run, unless it is there already, and its figures."""
    recipe, settings = METHODS[method]
    folder = workspace / method
    if not (folder / "final").is_dir():
        common = [f"workspace={workspace}", f"name={method}", f"seed={seed}", "debug=true"]
        launch("train", str(HARDER / recipe), *common, *settings)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if line["step"] > 0.8 * lines[-1]["step"] and "eval/reward" in line]
    keys = ["share_of_optimum", "reward", *(k.removeprefix("eval/") for k in last[0] if "_rate" in k and "eval/" in k)]
    means = {key: round(sum(line[f"eval/{key}"] for line in last) / len(last), 4) for key in keys}
    return {"method": method, "seed": seed, "steps": lines[-1]["step"], **means}


def main() -> None:
    """Run everything and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--workspace", type=Path, default=Path("runs/benchmark-harder"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "harder_world.json")
    options = parser.parse_args()
    root = options.workspace.resolve()
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda seed: prepare(root / f"seed_{seed}", seed), options.seeds))
        cases = [(seed, method) for seed in options.seeds for method in METHODS]
        rows = list(pool.map(lambda c: run(root / f"seed_{c[0]}", *c), cases))
    seeds = " ".join(str(seed) for seed in options.seeds)
    result = described(f"python benchmarks/harder_world.py --seeds {seeds} --jobs {options.jobs}") | {"runs": rows}
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
