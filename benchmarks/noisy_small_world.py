"""Safe PPO on a small world a quarter of whose labels are wrong: score models as they come against denoised ones.

    python benchmarks/noisy_small_world.py --seeds 0 1 2 --out benchmarks/noisy_small_world.json

Runs the recipe configs/local/noisy.yaml for each seed, in debug mode and smaller than it is: 2,400 pairs, three models
for each half of the pairs and one epoch of them, 40 steps of Safe PPO. Of the score models: how good they are by the
truth, on the held-out pairs with their labels set right. Of Safe PPO: means over the evaluations on held-out prompts in
the last fifth of the steps, by the true reward and cost, and the variance of the KL to the reference over the second
half of the steps. Complete stages are skipped.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from common import CONFIGS, TARGET, launch, study_options, write
from small_world import figures

from beaver_ray.json_files import read_json
from beaver_ray.report.strength import FILE
from beaver_ray.runs import read_metrics

OPTIONS = {
    "sft": [],
    "strength": ["members=3", "epochs=1"],
    "reward_model": [],
    "cost_model": [],
    "safe_ppo": ["steps=40"],
}
"""Of each file that the recipe names."""
SIZES = {"pairs": 2400, "test_pairs": 1000}


def set_right(source: Path, to: Path) -> None:
    """Write the pairs with their true labels."""
    rows = []
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.pop("better_flipped"):
            row["better_response_id"] = 1 - row["better_response_id"]
        if row.pop("safer_flipped"):
            row["safer_response_id"] = 1 - row["safer_response_id"]
            flags = row["is_response_0_safe"], row["is_response_1_safe"]
            row["is_response_1_safe"], row["is_response_0_safe"] = flags
        rows.append(json.dumps(row) + "\n")
    to.write_text("".join(rows), encoding="utf-8")


def of_model(workspace: Path, name: str) -> dict[str, Any]:
    """What a score model is worth on true labels."""
    (model,) = (folder for folder in (workspace / name / "final").iterdir() if folder.is_dir())
    out = workspace / name / "by_truth"
    if not (out / "scores.json").is_file():
        launch("scores", str(model), "--data", f"PKU-SafeRLHF:1:{workspace}/true.jsonl", "--out", str(out))
    (signal,) = json.loads((out / "scores.json").read_text(encoding="utf-8"))["models"][0]["signals"].values()
    return {name: signal[name] for name in ("accuracy", "accuracy_sign") if name in signal}


def study(root: Path, seed: int) -> list[dict[str, Any]]:
    """Run the recipe for a seed; one row for each way."""
    workspace = root / f"seed_{seed}"
    settings = [f"workspace={workspace}", f"world.seed={seed}", *(f"world.{k}={v}" for k, v in SIZES.items())]
    every = ("debug=true", "resume=true", f"seed={seed}")  # a study that was broken off goes on
    settings += [f"{file}.{one}" for file, own in OPTIONS.items() for one in (*every, *own)]
    launch("pipeline", str(CONFIGS / "noisy.yaml"), *settings)
    set_right(workspace / "world" / "preferences" / "test.jsonl", workspace / "true.jsonl")
    found = {
        label: read_json(workspace / name / FILE)
        for label, name in (("reward", "strength"), ("cost", "strength_safer"))
    }
    detectors = {label: of_label["detection"] for label, of_label in found.items() if of_label}
    rows = []
    for arm in ("plain", "denoised"):
        lines = read_metrics(workspace / arm)
        kl_S = np.array([line["kl/reference"] for line in lines[len(lines) // 2 :]])
        row = {"arm": arm, "seed": seed, "detector_auc": detectors, **figures(lines, TARGET)}
        row |= {"kl_mean": round(float(kl_S.mean()), 4), "kl_variance": round(float(kl_S.var()), 6)}
        rows.append(row | {kind: of_model(workspace, f"{arm}_{kind}") for kind in ("reward", "cost")})
    return rows


def main() -> None:
    """Run everything and write one JSON file."""
    options = study_options(__doc__, "noisy_small_world", "runs/noisy-world", (0, 1, 2)).parse_args()
    root = options.workspace.resolve()
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = [row for rows in pool.map(lambda seed: study(root, seed), options.seeds) for row in rows]
    write(options.out, {"target_violation_rate": TARGET, "runs": rows})
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
