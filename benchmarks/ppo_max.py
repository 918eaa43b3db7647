"""Vanilla PPO against PPO-max under a reward model of few and noisy pairs, on the small world and by its true reward.

    python benchmarks/ppo_max.py --seeds 0 1 2 --out benchmarks/ppo_max.json

For each seed: a world a quarter of whose labels are wrong, its SFT policy, and a reward model of PAIRS pairs. Then
from the same models `configs/local/ppo_max.yaml`, the same without its PTX loss and with one of ten times the weight,
and vanilla PPO: no normalised reward, no KL penalty, no critic's warm-up, no cut value update, no PTX loss (and the
same learning rates, batches and steps). One process a run (debug mode); complete runs in the working folder are
skipped. With ``--safe`` also Safe PPO under PPO-max's options, on the models of `small_world.py` for one seed.

Gold is the true reward of answers to held-out prompts, proxy the learned one, both means of three evaluations at the
end, and at first those of the SFT policy (one evaluation); `gold_peak` is the best there was. Entropy is in nats a
token, KL in nats an answer, both means of the last five steps. `sft_loss` is the cross-entropy of held-out
demonstrations in nats a token: of the SFT policy, and at the end. Signs are those that the run's report tells at its
end, without the truth and with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import CONFIGS, STAGES, TARGET, prepare, study_options, trained, write
from small_world import figures as safe_figures

from beaver_ray.hacking import columns, signs
from beaver_ray.runs import read_metrics

NOISE, PAIRS, ALL_PAIRS = 0.25, 1500, 12_000
WITHOUT_PTX = ["data.ptx=[]", "ppo.ptx_coefficient=0"]
VANILLA = [
    *WITHOUT_PTX,
    "ppo.normalize_rewards=null",
    "ppo.kl_coefficient=0",
    "ppo.critic_warmup_steps=0",
    "ppo.clip_value=null",
]
METHODS = {
    "vanilla": VANILLA,
    "ppo_max": [],
    "ppo_max_without_ptx": WITHOUT_PTX,
    "ppo_max_more_ptx": ["ppo.ptx_coefficient=1"],
}
SAFE = [
    "ppo.normalize_rewards=0.8",
    "ppo.clip_value=0.2",
    "ppo.critic_warmup_steps=5",
    "ppo.normalize_advantages=false",
]
SIZE = [
    "rollout.prompts_per_step=64",
    "evaluation.every=8",
    "ppo.critic_warmup_steps=8",
    'evaluation.prompts=["demonstrations:1:${workspace}/world/demonstrations/test.jsonl"]',
    "trajectory_every=0",
]
"""Of all runs: half of the recipe's answers in a step, and a first evaluation before the policy has moved."""
REWARD_MODEL = {
    **STAGES["reward_model"],
    "set": {"train": [f"PKU-SafeRLHF:{PAIRS / ALL_PAIRS}:${{workspace}}/world/preferences/train.jsonl"], "epochs": 4},
}
TOGETHER = 3
"""Evaluations whose mean is one figure."""
LAST = 5
"""Steps whose mean is the end."""


def rolling(lines: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Means of TOGETHER evaluations in a row."""
    known = [line[key] for line in lines if line.get(key) is not None]
    return [sum(known[end - TOGETHER : end]) / TOGETHER for end in range(TOGETHER, len(known) + 1)]


def figures(lines: Sequence[Mapping[str, Any]], start: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's metrics say of its end, and an evaluation of the policy that has not moved."""
    gold, proxy = rolling(lines, "eval/reward"), rolling(lines, "eval/proxy/reward")
    ends = {
        name: sum(line[key] for line in lines[-LAST:]) / LAST
        for name, key in {
            "entropy": "policy/entropy",
            "kl": "kl/reference",
            "perplexity": "rollout/perplexity",
            "length": "rollout/response_tokens",
            "distinct_2": "rollout/distinct_2",
        }.items()
    }
    peak = max(start["eval/reward"], *gold)
    ends |= {"gold_first": start["eval/reward"], "gold_peak": peak, "gold": gold[-1], "fall": peak - gold[-1]}
    ends |= {"proxy_first": start["eval/proxy/reward"], "proxy": proxy[-1]}
    ends |= {"sft_loss_first": math.log(start["eval/perplexity"]), "sft_loss": math.log(lines[-1]["eval/perplexity"])}
    said = {f"signs_{name}": [s.name for s in signs(columns(lines), truth)] for name, truth in SIGNS.items()}
    return {name: round(value, 4) for name, value in ends.items()} | {
        "entropy_first": round(next(line["policy/entropy"] for line in lines if "policy/entropy" in line), 4),
        **said,
        "steps": lines[-1]["step"],
        "seconds": round(lines[-1]["time/elapsed"], 1),
    }


SIGNS = {"blind": False, "by_truth": True}


def study(folder: Path, seed: int) -> list[dict[str, Any]]:
    """All methods of one seed; the first evaluation of PPO-max, in its critic's warm-up, is of the SFT policy."""
    for method, settings in METHODS.items():
        trained(folder, method, seed, CONFIGS / "ppo_max.yaml", [*SIZE, *settings])
    runs = {method: read_metrics(folder / method) for method in METHODS}
    start = next(line for line in runs["ppo_max"] if "eval/reward" in line)
    return [{"method": m, "seed": seed, **figures(lines, start)} for m, lines in runs.items()]


def safe(folder: Path, seed: int) -> dict[str, Any]:
    """Safe PPO with PPO-max's options; beside it the means of what the multiplier compares, over the last fifth."""
    trained(folder, "safe_ppo_max", seed, CONFIGS / "safe_ppo.yaml", SAFE)
    lines = read_metrics(folder / "safe_ppo_max")
    last = [line for line in lines if line["step"] > 0.8 * lines[-1]["step"]]
    measured = {key: sum(line[f"cost/harm/{key}"] for line in last) / len(last) for key in ("mean", "limit")}
    return {"method": "safe_ppo_max", "seed": seed, **safe_figures(lines, TARGET), "cost": measured}


def main() -> None:
    """Run everything and write one JSON file."""
    parser = study_options(__doc__, "ppo_max", "runs/ppo-max", (0, 1, 2))
    parser.add_argument("--safe", type=Path, help="folder of a world of small_world.py's (its seed_0)")
    options = parser.parse_args()
    root = options.workspace.resolve()
    stages = {"sft": STAGES["sft"], "reward_model": REWARD_MODEL}
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda seed: prepare(root / f"seed_{seed}", seed, stages, label_noise=NOISE), options.seeds))
        rows = [row for part in pool.map(lambda s: study(root / f"seed_{s}", s), options.seeds) for row in part]
    rows += [safe(options.safe.resolve(), 0)] if options.safe else []
    write(options.out, {"label_noise": NOISE, "pairs": PAIRS, "runs": rows})
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
