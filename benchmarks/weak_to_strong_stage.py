"""Experiment E6 through stage weak_to_strong itself, beside the quick loop of weak_to_strong.py.

    python benchmarks/weak_to_strong_stage.py --seeds 0 1 2 3 --out benchmarks/weak_to_strong_stage.json

Each seed's world as files: the labelled texts as rows of task classification, and the language models that have read
the unlabelled ones, with a tokenizer; then `beaver-ray train` in debug mode on one configuration with all students.
Texts, starts, learning rate and lengths are those of the quick loop; the stage cuts the 4,000 labelled texts in two by
itself, draws another head, and sees the rows in another order, so that the two can agree as two seeds do and no better.
What the quick loop found is read from weak_to_strong.json. Complete runs are skipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from common import launch, study_options, write
from preference_world import text, write_tokenizer
from weak_to_strong import BATCH, EPOCHS, KNOWN, LOSSES, RATE, Texts, drawn, pretrained

from beaver_ray.json_files import write_rows

KEYS = ("mean", "pgr", "copied", "spoilt")
LABEL = "group"


def students() -> list[dict[str, Any]]:
    """The students of the quick loop, as the stage has them."""
    found: list[dict[str, Any]] = []
    for epochs in EPOCHS:
        for name, loss in LOSSES.items():
            if name == "jump_.5" and epochs != EPOCHS[0]:
                continue
            student: dict[str, Any] = {"name": f"{name}_{epochs}", "epochs": epochs}
            if loss["most"]:
                schedule = "published" if loss.get("published") else "linear"
                student |= {"loss": "confidence", "alpha": loss["most"], "warmup": loss["warmup"], "schedule": schedule}
            found.append(student)
    return [*found, {"name": "chain_xent", "chain": True}]


def write_texts(path: Path, *parts: Texts) -> str:
    """The texts as rows with a label; what a configuration calls them."""
    rows = [
        {"prompt": written, "labels": {LABEL: bool(truth)}}
        for part in parts
        for written, truth in zip(part.written, part.truth_N, strict=True)
    ]
    write_rows(path, rows)
    return f"moderation:1:{path}"


def study(root: Path, seed: int) -> dict[str, Any]:
    """Run the stage on a seed's world, and read its figures."""
    folder = root / f"seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    unlabelled, weak, strong, tests = drawn(seed)
    models = {}
    for size in ("small", "middle", "strong"):
        pretrained(folder, size, unlabelled.ids_NT, seed)
        write_tokenizer(folder / size)
        models[size] = str(folder / size)
    config = {
        **{"stage": "weak_to_strong", "workspace": str(folder), "name": "stage", "seed": seed, "debug": True},
        **{"task": "classification", "label": LABEL, "model": models["strong"], "students": students()},
        **{"weak": {"known": [text(np.array([word])) for word in range(KNOWN)]}},
        **{"chain": [models["small"], models["middle"]], "epochs": EPOCHS[0], "batch_size": BATCH, "max_tokens": 32},
        **{"train": [write_texts(folder / "labelled.jsonl", weak, strong)]},
        **{"eval": [write_texts(folder / "tests.jsonl", tests)]},
        "optimizer": {"learning_rate": RATE, "schedule": "cosine", "warmup_fraction": 0.05},
        "cluster": {"threads": 1},
    }
    file = folder / "stage.yaml"
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")  # JSON is YAML
    launch("train", str(file), "resume=true")
    found = json.loads((folder / "stage" / "weak_to_strong.json").read_text(encoding="utf-8"))
    said = found["questions"]["label"]
    return {
        **{"weak": said["weak"]["mean"], "weak_labels": found["weak_labels"]},
        **{"ceiling": said["ceiling"]["mean"], "gap": found["gap"]},
        "students": {s["name"]: {key: said[f"student_{s['name']}"][key] for key in KEYS} for s in students()},
    }


def beside(seeds: dict[str, dict[str, Any]], loop: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each student the share recovered by seed, and means over seeds of that and of mistakes copied."""
    found: dict[str, Any] = {}
    for name in next(iter(seeds.values()))["students"]:
        found[name] = {}
        for where, of in (("stage", seeds), ("loop", {seed: loop[seed] for seed in seeds})):
            each = [one["students"][name] for one in of.values()]
            means = {key: round(float(np.mean([one[key] for one in each])), 4) for key in ("pgr", "copied", "spoilt")}
            found[name][where] = means | {"pgr_by_seed": [round(one["pgr"], 4) for one in each]}
    return found


def main() -> None:
    """Run the stage for each seed, and write one JSON file."""
    options = study_options(__doc__, "weak_to_strong_stage", "runs/w2s", range(4), jobs=False).parse_args()
    root = options.workspace.resolve()
    seeds = {str(seed): study(root, seed) for seed in options.seeds}
    loop = json.loads((Path(__file__).parent / "weak_to_strong.json").read_text(encoding="utf-8"))["seeds"]
    students_beside = beside(seeds, loop)
    write(options.out, {"students": students_beside, "seeds": seeds})
    print(json.dumps(students_beside, indent=2))


if __name__ == "__main__":
    main()
