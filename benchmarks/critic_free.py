"""Safe PPO without critics against Safe PPO with them on the small world: at equal samples, and at equal time.

    python benchmarks/critic_free.py --seeds 0 1 2 3 4 --jobs 2 --out benchmarks/critic_free.json

Both recipes of configs/local/ have steps of as many answers. Without critics a step is cheaper, so at equal time there
are more of them: as many as the CPU seconds of the run with critics pay for, by the first seed's two runs of equal
steps. CPU seconds and not those of a clock are held against each other, because one thread does the work of a run and
other runs go on beside it. Figures: small_world.py, whose runs with critics these are if it was given the same working
folder; memory is the highest that the run's process had, in MiB.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import CONFIGS, TARGET, prepare, study_options, trained, write
from small_world import figures

from beaver_ray.runs import read_metrics
from launch.config_files import load_config

STEPS = 80
WITH_CRITICS = "safe_ppo"
"""The run with critics, by the name that small_world.py and front.py give it."""


def measured_run(workspace: Path, seed: int, name: str, steps: int) -> dict[str, Any]:
    """One run, unless it is there already, with its CPU seconds and memory."""
    recipe = CONFIGS / ("safe_ppo.yaml" if name == WITH_CRITICS else "safe_ppo_critic_free.yaml")
    spent = trained(workspace, name, seed, recipe, [f"steps={steps}"])
    rollout = load_config(workspace / name / "config.yaml").rollout
    samples = steps * rollout.prompts_per_step * rollout.samples_per_prompt
    rate = round(samples / spent["cpu_seconds"], 1)
    row = figures(read_metrics(workspace / name), TARGET)
    return {"method": name, "seed": seed, **row, **spent, "samples_per_cpu_second": rate}


def main() -> None:
    """Run everything and write one JSON file."""
    options = study_options(__doc__, "critic_free", "runs/benchmark", range(5)).parse_args()
    folders = {seed: options.workspace.resolve() / f"seed_{seed}" for seed in options.seeds}

    def case(chosen: tuple[int, str, int]) -> dict[str, Any]:
        seed, method, steps = chosen
        return measured_run(folders[seed], seed, method, steps)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda seed: prepare(folders[seed], seed), options.seeds))
        equal = [(seed, method, STEPS) for seed in options.seeds for method in (WITH_CRITICS, "equal_samples")]
        rows = list(pool.map(case, equal))
        ratio = rows[0]["cpu_seconds"] / rows[1]["cpu_seconds"]
        rows += pool.map(case, [(seed, "equal_time", round(STEPS * ratio)) for seed in options.seeds])
    write(options.out, {"runs": rows})
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
