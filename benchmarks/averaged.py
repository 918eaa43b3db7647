"""The policy of the last step against the mean of the last steps' weights, on the small world's sealed prompts.

    python benchmarks/averaged.py --seeds 0 1 2 --jobs 2

For each seed the recipe trains once as it is and once with `confidence: 0.9`, each without `ppo.average_last` and with
a checkpoint of every step, so that all weights that are averaged are of one run. Asked are the 1,000 sealed prompts,
each ANSWERS times; the truth judges. Of each policy: `averaged`, over which last share of the training its weights are
averaged (0: those of the last step), its violation rate and share of the optimum, and `verdict`, whether that the limit
is kept is certified at 0.95 by the first answer to each prompt (`beaver_ray.bounds`). `single` says what the policies
of the single steps of the last fifth do: their mean rate and share, and the standard deviation of their rates.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CONFIGS, TARGET, prepare, study_options, trained, write
from safetensors.torch import load_file, save_file

from actors.driver.evaluate import HeldOut, judging, with_policy
from actors.driver.policy_stage import PolicyStage
from actors.driver.rollouts import Rollouts
from beaver_ray.bounds import clopper_pearson, verdict
from launch.config_files import load_run

ANSWERS, CONFIDENCE = 2, 0.95
METHODS = {"safe_ppo": [], "safe_ppo_confidence": ["constraints.harm.confidence=0.9"]}
SHARES = (0.0, 0.1, 0.2, 0.3)
SINGLE = 0.2
EVERY_STEP = ["ppo.average_last=0", "save_every=1", "keep_checkpoints=24"]
Row = dict[str, Any]


def judge(config: PolicyStage, policy: Path, answers: int) -> Row:
    """A policy's figures on the sealed prompts, by the truth."""
    sealed = f"prompts:1:{config.workspace}/world/prompts/sealed.jsonl"
    asked = config.evaluation.model_copy(update={"prompts": [sealed]})
    judged = with_policy(config.model_copy(update={"evaluation": asked}), str(policy))
    held_out = HeldOut(judged)
    with judging(judged, judged.judging_roles()) as roles:
        rollouts = Rollouts(roles.rollout, judged.rollout.max_sequences, judged.cluster.step_timeout)
        samples, best = held_out.judged(held_out.answers(roles, rollouts, 0, answers))
    assert samples.reward is not None and best is not None
    harmful = samples.costs["harm"] > 0
    first = harmful[: len(held_out.prompts)]
    return {
        "violation_rate": round(float(harmful.mean()), 4),
        "share_of_optimum": round(float(samples.reward.mean() / best), 4),
        "verdict": verdict(clopper_pearson, float(first.mean()), len(first), TARGET, CONFIDENCE),
    }


def averaged(folders: Sequence[Path], to: Path) -> Path:
    """A folder of the policy whose weights are the mean of these policies'."""
    shutil.copytree(folders[-1], to, dirs_exist_ok=True)
    states = [load_file(folder / "model.safetensors") for folder in folders]
    mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    save_file(mean, to / "model.safetensors", {"format": "pt"})
    return to


def case(workspace: Path, seed: int, method: str) -> list[Row]:
    """A row for each share of one run, and one of its single steps."""
    torch.set_num_threads(1)
    trained(workspace, method, seed, CONFIGS / "safe_ppo.yaml", [*METHODS[method], *EVERY_STEP])
    config = load_run(workspace / method)
    assert isinstance(config, PolicyStage)
    steps = config.total_steps(0)
    last = range(steps - round(max(SHARES) * steps) + 1, steps)
    saved = [workspace / method / "checkpoints" / f"step_{step}" / "policy" for step in last]
    policies = [*saved, workspace / method / "final" / "policy"]
    rows = []
    for share in SHARES:
        some = policies[-max(1, round(share * steps)) :]
        folder = averaged(some, workspace / f"averaged_{method}_{share}") if share else some[-1]
        rows.append({"averaged": share} | judge(config, folder, ANSWERS))
    each = [judge(config, policy, 1) for policy in policies[-round(SINGLE * steps) :]]
    rates, shares = ([one[name] for one in each] for name in ("violation_rate", "share_of_optimum"))
    single = {"violation_rate": np.mean(rates), "share_of_optimum": np.mean(shares), "rate_std": np.std(rates)}
    rows.append({"single": {name: round(float(value), 4) for name, value in single.items()}})
    return [{"method": method, "seed": seed} | row for row in rows]


def main() -> None:
    """Run everything, and write one JSON file."""
    options = study_options(__doc__, "averaged", "runs/averaged-benchmark", (0, 1, 2)).parse_args()
    root = options.workspace.resolve()
    for seed in options.seeds:
        prepare(root / f"seed_{seed}", seed)
    # Processes: policies are judged in them, and threads share torch's random numbers.
    with ProcessPoolExecutor(options.jobs) as pool:
        cases = [(seed, method) for method in METHODS for seed in options.seeds]
        started = [pool.submit(partial(case, root / f"seed_{seed}", seed, method)) for seed, method in cases]
        rows = [row for future in started for row in future.result()]
    write(options.out, {"target_violation_rate": TARGET, "prompts": 1000, "answers": ANSWERS, "runs": rows})


if __name__ == "__main__":
    main()
