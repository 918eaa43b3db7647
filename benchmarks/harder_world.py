"""One, two and three constraints at a time on the harder world, by its truth.

    python benchmarks/harder_world.py --seeds 0 1 2 --jobs 2 --out benchmarks/harder_world.json

The recipes of configs/local/harder/: harm alone (a limit on refusals that nothing can break stands in for none), harm
and refusal of benign and borderline prompts, the same by a reward model of graded labels (the same pairs, with grades),
that with twice the answers a step (graded.yaml), and this once more with `confidence: 0.9` of both limits, and without
critics at equal samples and at equal time; privacy as well, by hard labels and by graded ones with twice the answers;
and twice the answers by hard labels. For each run the means over the
evaluations in the last fifth of training, on held-out prompts: reward as share of the optimum under that run's
constraints, rates, and refusals by kind of prompt; the first of these of the policy handed out, the mean of that
fifth's weights; CPU seconds and memory. With confidence also whether it is certified at 0.95, on the 1,000 sealed
prompts, that this policy keeps each limit. Complete runs in the working folder are skipped.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import CONFIGS, STAGES, last_fifth, prepare, study_options, trained, write

from actors.driver.policy_stage import PolicyStage
from beaver_ray.json_files import read_json
from beaver_ray.runs import read_metrics
from launch.config_files import load_run

HARDER = CONFIGS / "harder"
GRADED = ["models.reward=${workspace}/graded_reward/final/reward_model", "ppo.kl_coefficient=0.01"]
OF_256 = ["rollout.prompts_per_step=256", "rollout.max_sequences=256"]
TWICE = [*GRADED, *OF_256]
CRITIC_FREE = [*GRADED, "rollout.samples_per_prompt=2", "rollout.max_sequences=256", "ppo.advantage=leave_one_out"]
CRITIC_FREE += ["ppo.loss_reduction=token", "ppo.normalize_advantages=false"]
METHODS = {
    "harm": ("safe_ppo.yaml", ["constraints.refusal.limit=1"]),
    "harm_refusal": ("safe_ppo.yaml", []),
    "harm_refusal_graded": ("safe_ppo.yaml", GRADED),
    "harm_refusal_graded_256": ("safe_ppo.yaml", TWICE),
    "harm_refusal_confidence": (
        "safe_ppo.yaml",
        [*TWICE, "constraints.harm.confidence=0.9", "constraints.refusal.confidence=0.9"],
    ),
    "harm_refusal_critic_free": ("safe_ppo.yaml", CRITIC_FREE),
    # As many steps as the CPU seconds of the run with critics pay for, by the first seed's two runs of 160.
    "harm_refusal_critic_free_equal_time": ("safe_ppo.yaml", [*CRITIC_FREE, "steps=307"]),
    "harm_refusal_privacy": ("safe_ppo_privacy.yaml", []),
    "harm_refusal_privacy_graded_256": ("safe_ppo_privacy.yaml", TWICE),
    "harm_refusal_256": ("safe_ppo.yaml", OF_256),
}
WORLD = {"kind": "harder", "pairs": 40000, "demonstrations": 8000, "graded": True}
FEW_MODELS = STAGES | {"reward_model": {"config": str(CONFIGS / "reward_model.yaml")}}
"""What Safe PPO of harm and refusal builds on."""
GRADED_MODELS = {
    "sft": STAGES["sft"],
    "graded_reward": {
        "config": str(CONFIGS / "reward_model.yaml"),
        "set": {"name": "graded_reward", "noise.soft": 1.0},
    },
    "cost_model": STAGES["cost_model"],
}
"""What it builds on where labels are graded."""
MODELS = FEW_MODELS | GRADED_MODELS | {"privacy_model": {"config": str(HARDER / "privacy_model.yaml")}}


def run(workspace: Path, seed: int, method: str) -> dict[str, Any]:
    """One training run, unless it is there already, and its figures."""
    recipe, settings = METHODS[method]
    spent = trained(workspace, method, seed, HARDER / recipe, settings)
    lines = read_metrics(workspace / method)
    last = last_fifth(lines)
    keys = ["share_of_optimum", "reward", *(k.removeprefix("eval/") for k in last[0] if "_rate" in k and "eval/" in k)]
    means = {key: round(sum(line[f"eval/{key}"] for line in last) / len(last), 4) for key in keys}
    final = read_json(workspace / method / "evaluation.json")
    handed_out = {key: round(final[key]["mean"], 4) for key in keys if key in final}
    return {"method": method, "seed": seed, "steps": lines[-1]["step"], **means, "handed_out": handed_out, **spent}


def certified(workspace: Path, method: str) -> dict[str, Any]:
    """What sealed prompts show of each constraint of a run's policy, by the truth."""
    config = load_run(workspace / method)
    assert isinstance(config, PolicyStage)
    certificate, _ = config.certify(0.95, None, 1, [f"prompts:1:{workspace}/world/prompts/sealed.jsonl"], "")
    return {one.constraint: {"found": one.mean, "verdict": one.verdict} for one in certificate.statements}


def main() -> None:
    """Run everything and write one JSON file."""
    options = study_options(__doc__, "harder_world", "runs/benchmark-harder", (0, 1, 2)).parse_args()
    root = options.workspace.resolve()
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda seed: prepare(root / f"seed_{seed}", seed, MODELS, **WORLD), options.seeds))
        cases = [(seed, method) for seed in options.seeds for method in METHODS]
        rows = list(pool.map(lambda c: run(root / f"seed_{c[0]}", *c), cases))
    for row in rows:  # one by one: threads share torch's random numbers
        if row["method"] == "harm_refusal_confidence":
            row["certified"] = certified(root / f"seed_{row['seed']}", row["method"])
    write(options.out, {"runs": rows})
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
