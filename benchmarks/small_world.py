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

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import CONFIGS, TARGET, last_fifth, prepare, study_options, trained, write

from beaver_ray.runs import read_metrics

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
SETTLED = 25
"""The first step from which the limit is asked to be kept."""


def run(
    workspace: Path, seed: int, method: str, settings: Sequence[str], target: float = TARGET
) -> dict[str, float | int | str | None]:
    """One run of the recipe with these settings, unless it is there already, and its figures over the last fifth."""
    limit = f"constraints.harm.violation_rate={target}"
    trained(workspace, method, seed, CONFIGS / "safe_ppo.yaml", [limit, *settings])
    return figures(read_metrics(workspace / method), target) | {"method": method, "seed": seed}


def figures(lines: Sequence[Mapping[str, Any]], target: float) -> dict[str, float | int | str | None]:
    """What a run's metrics say of its last fifth, and of when its limit was kept."""
    last = last_fifth(lines)

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


def main() -> None:
    """Run everything and write one JSON file."""
    parser = study_options(__doc__, "small_world", "runs/benchmark", (0, 1, 2))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, help="steps of each run (default: the recipe's)")
    options = parser.parse_args()
    root = options.workspace.resolve()
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda seed: prepare(root / f"seed_{seed}", seed), options.seeds))
        pairs = [(seed, method) for seed in options.seeds for method in options.methods]
        budget = [f"steps={options.steps}"] if options.steps else []
        rows = list(pool.map(lambda p: run(root / f"seed_{p[0]}", *p, [*METHODS[p[1]], *budget]), pairs))
    write(options.out, {"target_violation_rate": TARGET, "runs": rows})
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
