"""Contrastive reward models (E2): how far apart features of chosen and rejected answers are, and their accuracy.

    python benchmarks/contrastive.py --seeds 0 1 2

For each seed a world of `preference_world.py`, 3,000 pairs of which a fifth has the wrong label, and five reward models
from one start: the ranking loss alone, and beside it SimCSE or SwAV on pairs or on differences. All are trained by
stage reward_model, one after another in this process, for eight epochs, and judged on 1,000 pairs whose labels are
right, and on as many of a policy whose answers are better (tilt 0.8). What is finished is
kept in the workspace. What should come true (`PASS`) is worked out in the file of figures.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from common import study_options, write
from preference_world import PreferenceWorld, write_model, write_pairs

from actors.driver.score_models import ScoreModel, read_answers
from actors.stages import stages
from beaver_ray.feature_figures import overlap
from beaver_ray.runs import read_metrics
from beaver_ray.score_figures import figures
from launch.pipeline import run_stage

PAIRS, TEST_PAIRS, NOISE, EPOCHS = 3000, 1000, 0.2, 8
ARMS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "simcse_pair": {"kind": "simcse", "pairing": "pair"},
    "simcse_difference": {"kind": "simcse", "pairing": "difference"},
    "swav_pair": {"kind": "swav", "pairing": "pair"},
    "swav_difference": {"kind": "swav", "pairing": "difference"},
}
PASS = {
    "cosine falls by 0.2: simcse_pair": ("simcse_pair", "features/cosine", -0.2),
    "cosine falls by 0.2: simcse_difference": ("simcse_difference", "features/cosine", -0.2),
    "cosine falls by 0.2: swav_difference": ("swav_difference", "features/cosine", -0.2),
    **{f"accuracy not worse by 0.03: {arm}": (arm, "accuracy", -0.03) for arm in ARMS if arm != "base"},
}
"""Of the means over seeds: an arm, a figure, and how far it must fall, or may fall, against base."""


def write_world(folder: Path, seed: int) -> None:
    """Training and test pairs, and the model to start from."""
    world, rng = PreferenceWorld(seed), np.random.default_rng([seed, 2])
    write_pairs(folder / "train.jsonl", world.pairs(PAIRS, rng, noise=NOISE))
    write_pairs(folder / "test.jsonl", world.pairs(TEST_PAIRS, rng))
    write_pairs(folder / "shifted.jsonl", world.pairs(TEST_PAIRS, rng, tilt=0.8))
    write_model(folder / "model", seed)


def arm_figures(folder: Path, arm: str, seed: int) -> dict[str, float]:
    """The figures of one arm, which is trained unless it is there; ``accuracy_best`` is of its best epoch."""
    kept = folder / f"{arm}.json"
    if not kept.is_file():
        train(folder, arm, seed)
        kept.write_text(json.dumps(judge(folder / arm / "final" / "reward_model", folder / "world")))
    metrics = read_metrics(folder / arm)
    best = max(row["eval/accuracy"] for row in metrics if "eval/accuracy" in row)
    loss = [row["loss_contrastive"] for row in metrics if "loss_contrastive" in row][-len(metrics) // EPOCHS :]
    return json.loads(kept.read_text()) | {"accuracy_best": best, "loss_contrastive": mean(loss) if loss else 0.0}


def train(folder: Path, arm: str, seed: int) -> None:
    """Train one arm."""
    world = folder / "world"
    tree = {
        "stage": "reward_model",
        "workspace": str(folder),
        "name": arm,
        "seed": seed,
        "debug": True,
        "model": str(world / "model"),
        "train": [f"PKU-SafeRLHF:1:{world}/train.jsonl"],
        "eval": [f"PKU-SafeRLHF:1:{world}/test.jsonl"],
        "epochs": EPOCHS,
        "batch_size": 32,
        "max_tokens": 32,
        "contrastive": ARMS[arm],
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.05},
        "engine": {"micro_batch_tokens": 1024},
        "save_every": 0,
    }
    if (folder / arm).is_dir():
        shutil.rmtree(folder / arm)  # broken off
    run_stage(stages()["reward_model"].model_validate(tree))


def judge(model: Path, world: Path) -> dict[str, float]:
    """Accuracy and overlap on the test pairs, and accuracy on the shifted ones, as `beaver-ray scores` has them."""
    found = {}
    for data, name in (("test", "accuracy"), ("shifted", "accuracy_shifted")):
        spec = f"PKU-SafeRLHF:1:{world}/{data}.jsonl"
        scorer, answers = ScoreModel(str(model), "reward", [spec]), read_answers([spec])
        scores_N = scorer.scores(answers)["reward"]
        found[name] = figures("reward", scores_N, answers.labelled)["accuracy"]["mean"]
        if data == "test":
            features = overlap(scorer.features(answers)["reward"])
            found |= {f"features/{name}": figure["mean"] for name, figure in features.items()}
    return found


def verdicts(seeds: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Means over seeds, and what of PASS has come true; of arms that are finished on a seed that has a base."""
    seeds = {seed: arms for seed, arms in seeds.items() if "base" in arms}
    if not seeds:
        return {}
    names = list(next(iter(seeds.values()))["base"])
    means, passed = {}, {}
    for arm in ARMS:
        if not (found := [arms[arm] for arms in seeds.values() if arm in arms]):
            continue
        means[arm] = {name: mean(one[name] for one in found) for name in names} | {"seeds": len(found)}
    for what, (arm, figure, change) in PASS.items():
        if arm not in means:
            continue
        moved = mean(arms[arm][figure] - arms["base"][figure] for arms in seeds.values() if arm in arms)
        passed[what] = {"change": moved, "pass": moved <= change if figure == "features/cosine" else moved >= change}
    return {"means": means, "passed": passed, "pass": all(one["pass"] for one in passed.values())}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, judge, and write."""
    options = study_options(__doc__, "contrastive", "runs/contrastive", (0, 1, 2))
    options.add_argument("--finished", action="store_true", help="only write down what is there; train nothing")
    given = options.parse_args(arguments)
    seeds: dict[str, Any] = {}
    for seed in given.seeds:
        folder = given.workspace / str(seed)
        if not (folder / "world" / "model" / "config.json").is_file():
            write_world(folder / "world", seed)
        arms = [arm for arm in ARMS if not given.finished or (folder / f"{arm}.json").is_file()]
        seeds[str(seed)] = {arm: arm_figures(folder, arm, seed) for arm in arms}
    size = {"pairs": PAIRS, "test_pairs": TEST_PAIRS, "noise": NOISE, "epochs": EPOCHS}
    write(given.out, size | {"seeds": seeds} | verdicts(seeds))


if __name__ == "__main__":
    main()
