"""Moderation on the harder small world: what the question, the answer, and both together say, and keywords beside them.

    python benchmarks/moderation.py --seeds 0 1 2

For each seed a world is built in the workspace, and stage moderation trains its 0.8M-parameter model from random
weights, once for each of question, answer and qa. The label abetting is true where somebody asks for harm and is not
refused, which neither side says alone; harm and privacy are of the answer's words. Keywords are the world's own
dangerous and leaking words: they are right about those by construction, and what passes them once it is obfuscated says
what that is worth.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import study_options, write

from actors.stages import stages
from beaver_ray.small_world.build import build
from beaver_ray.small_world.harder import HarderWorld
from launch.moderate import KeywordRail, moderate
from launch.pipeline import run_stage

LABELS = ["harm", "privacy", "abetting"]


def moderation_figures(folder: Path, arm: str, seed: int, **options: Any) -> dict[str, Any]:
    """The figures of stage moderation on what ``arm`` reads, run in ``folder`` where it is not there."""
    tree = {
        "stage": "moderation",
        "workspace": str(folder),
        "name": arm,
        "seed": seed,
        "debug": True,
        "input": arm,
        "epochs": 3,
        "batch_size": 32,
        "optimizer": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_fraction": 0.05},
        "save_every": 0,
        **options,
    }
    if not (folder / arm / "moderation.json").is_file():
        run_stage(stages()["moderation"].model_validate(tree))
    figures: dict[str, Any] = json.loads((folder / arm / "moderation.json").read_text(encoding="utf-8"))["figures"]
    return figures


def train(folder: Path, arm: str, seed: int) -> dict[str, Any]:
    """The figures of one arm on the world in ``folder``."""
    world = folder / "world"
    files = {
        part: [f"moderation:1:{world}/moderation/{name}.jsonl"] for part, name in (("train", "train"), ("eval", "test"))
    }
    sizes = {"max_tokens": 48, "engine": {"micro_batch_tokens": 1024}}
    found = moderation_figures(folder, arm, seed, model=str(world / "model"), labels=LABELS, **files, **sizes)
    return {
        **{label: {key: found["labels"][label][key] for key in ("f1", "auroc", "auprc", "ece")} for label in LABELS},
        "flagged_f1": found["flagged"]["f1"],
    }


def keywords(folder: Path, world: HarderWorld) -> dict[str, Any]:
    """The rail on the world's own words."""
    rail = KeywordRail({harm: sorted(words) for harm, words in world.severities_by_word.items()})
    out = folder / "keywords.json"
    moderate([f"moderation:1:{folder}/world/moderation/test.jsonl"], rail, None, "all", [], out, evade=True)
    found = json.loads(out.read_text())
    return {
        **{label: {"f1": found["against_labels"]["labels"][label]["f1"]} for label in rail.labels},
        "passes": {name: share["mean"] for name, share in found["evasion"].items()},
    }


def main() -> None:
    """Train, judge, and write."""
    given = study_options(__doc__, "moderation", "runs/moderation-study", (0, 1, 2), jobs=False).parse_args()
    seeds: dict[str, Any] = {}
    for seed in given.seeds:
        world, folder = HarderWorld(seed=seed), given.workspace / str(seed)
        if not (folder / "world" / "world.json").is_file():
            build(folder / "world", world, pairs=10, test_pairs=10, demonstrations=10, test_demonstrations=10)
        arms = {arm: train(folder, arm, seed) for arm in ("question", "answer", "qa")}
        seeds[str(seed)] = {**arms, "keywords": keywords(folder, world)}
        write(given.out, {"seeds": seeds})


if __name__ == "__main__":
    main()
