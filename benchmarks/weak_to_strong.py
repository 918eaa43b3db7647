"""What a strong model recovers of what its weak supervisor lacks: experiment E6 of docs/weak-to-strong.md.

    python benchmarks/weak_to_strong.py --seeds 0 1 2 3 --workspace runs/w2s --out benchmarks/weak_to_strong.json

A text is 20 words of 24, drawn by the frequencies of one of six topics; its label says which of two groups of topics
that is. The weak model is a bag of words that knows 6 of the 24. The strong one is a transformer of two layers of width
48 that has read 8,000 unlabelled texts, so that it knows the topics but not the groups. Stage weak_to_strong does the
rest: 2,000 labelled texts for the weak model, 2,000 others that it labels for the students, 2,000 tests; two epochs and
six. The chain goes through transformers of one layer of width 16 and 32. Negative control: a weak model that is the
strong one, so that there is no gap to recover. A seed takes about 4 CPU minutes, and is kept in the workspace.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import launch, study_options, write
from preference_world import BOS, EOS, FIRST_WORD, TURN, WORDS, config, text, write_model
from transformers import GPT2LMHeadModel

from beaver_ray.manifest import write_rows
from beaver_ray.method.weak_to_strong import confidence_weight

TOPICS, LENGTH, KNOWN = 6, 20, 6
UNLABELLED, ROWS, TESTS = 8000, 4000, 2000
PASSES = 6
"""Over the unlabelled texts."""
SIZES = {"small": (16, 1), "middle": (32, 1), "strong": (48, 2)}
"""Width and layers."""
LOSSES: dict[str, dict[str, Any]] = {
    "xent": {"loss": "xent"},
    "conf_.5": {"loss": "confidence", "alpha": 0.5},
    "conf_.75": {"loss": "confidence", "alpha": 0.75},
    "jump_.5": {"loss": "confidence", "alpha": 0.5, "warmup": 0.1, "schedule": "published"},
}
EPOCHS = (2, 6)
OPTIMIZER = {"learning_rate": 3e-4, "schedule": "cosine", "warmup_fraction": 0.05}


class TopicWorld:
    """Word frequencies of one seed's topics, which are in two groups by turns."""

    def __init__(self, seed: int) -> None:
        weights_KV = np.exp(np.random.default_rng([seed, 60]).normal(0.0, 1.0, (TOPICS, WORDS)))
        self.upto_KV = (weights_KV / weights_KV.sum(1, keepdims=True)).cumsum(1)

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(Texts [N, L] of word numbers, topics [N])."""
        topics_N = rng.integers(0, TOPICS, count)
        draws_NL = rng.random((count, LENGTH))
        words_NL = (draws_NL[:, :, None] > self.upto_KV[topics_N][:, None, :]).sum(2)
        return words_NL.clip(max=WORDS - 1), topics_N


def write_texts(path: Path, words_NL: np.ndarray, topics_N: np.ndarray) -> None:
    """Texts with their label, as data set moderation."""
    write_rows(
        path,
        (
            {"prompt": text(words), "labels": {"group": bool(topic % 2)}, "topic": int(topic)}
            for words, topic in zip(words_NL, topics_N, strict=True)
        ),
    )


def pretrained(folder: Path, size: str, words_NL: np.ndarray, seed: int) -> None:
    """A language model of a size that has read the texts; no label is known to it."""
    write_model(folder, seed)
    width, layers = SIZES[size]
    shape = config()
    shape.n_embd, shape.n_layer = width, layers
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(shape)
    column = np.ones((len(words_NL), 1), dtype=np.int64)
    ids_NT = torch.from_numpy(
        np.concatenate([BOS * column, words_NL + FIRST_WORD, TURN * column, EOS * column], axis=1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for _ in range(PASSES):
        for rows in torch.randperm(len(ids_NT)).split(64):
            loss = model(input_ids=ids_NT[rows], labels=ids_NT[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(folder)


def stage(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    """Run the stage, unless it has run already; the content of weak_to_strong.json."""
    out = folder / name
    if not (out / "final").is_dir():
        tree = {
            "stage": "weak_to_strong",
            "workspace": str(folder),
            "name": name,
            "resume": True,
            "debug": True,
            "task": "classification",
            "label": "group",
            "model": str(folder / "strong"),
            "train": [f"moderation:1:{folder}/train.jsonl"],
            "eval": [f"moderation:1:{folder}/test.jsonl"],
            "epochs": 2,
            "batch_size": 32,
            "max_tokens": 32,
            "optimizer": OPTIMIZER,
            "engine": {"micro_batch_tokens": 512},
            "looks": 0.5,
            "cluster": {"threads": 1},
            "by": ["topic"],
        }
        file = folder / f"{name}.yaml"
        file.write_text(json.dumps(tree | more), encoding="utf-8")  # JSON is YAML
        launch("train", str(file))
    found: dict[str, Any] = json.loads((out / "weak_to_strong.json").read_text(encoding="utf-8"))
    return found


def study(root: Path, seed: int) -> dict[str, Any]:
    """All models of a seed, and what they recover."""
    folder, world = root / f"seed_{seed}", TopicWorld(seed)
    rng = np.random.default_rng([seed, 61])
    unlabelled_NL, _ = world.draw(UNLABELLED, rng)
    for name, count in (("train", ROWS), ("test", TESTS)):
        drawn = world.draw(count, rng)
        if not (folder / f"{name}.jsonl").is_file():
            write_texts(folder / f"{name}.jsonl", *drawn)
    for size in SIZES:
        if not (folder / size / "config.json").is_file():
            pretrained(folder / size, size, unlabelled_NL, seed)
    known = [text(np.array([word])) for word in range(KNOWN)]
    students = [
        {"name": f"{name}_{epochs}", "epochs": epochs, **loss}
        for epochs in EPOCHS
        for name, loss in LOSSES.items()
        if epochs == EPOCHS[0] or name != "jump_.5"
    ]
    chained = [{"name": "chain_xent", "chain": True}]
    chain = [str(folder / size) for size in ("small", "middle")]
    found = stage(folder, "w2s", seed=seed, weak={"known": known}, students=[*students, *chained], chain=chain)
    same = stage(folder, "same", seed=seed, weak={"model": str(folder / "strong")}, students=[{"name": "xent"}])
    models = found["questions"]["label"]
    keys = ("mean", "pgr", "pgr_low", "pgr_high", "agreement", "copied", "spoilt")
    return {
        "weak": models["weak"]["mean"],
        "weak_labels": found["weak_labels"],
        "ceiling": models["ceiling"]["mean"],
        "gap": found["gap"],
        "valid": found["valid"],
        "students": {name.removeprefix("student_"): {k: models[name][k] for k in keys} for name in found["students"]},
        "chain": found["chain"],
        "curves": {name: [one["accuracy"] for one in curve] for name, curve in found["curves"].items()},
        "same": {"gap": same["gap"], "valid": same["valid"], "pgr": same["questions"]["label"]["student_xent"]["pgr"]},
    }


def verdicts(seeds: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, bool]]:
    """Means over seeds, and which marks are met."""
    pgr = {
        name: [one["students"][name]["pgr"] for one in seeds.values()]
        for name in next(iter(seeds.values()))["students"]
    }
    means = {name: float(np.mean(values)) for name, values in pgr.items()}
    marks = {"the gap is at least .1 on every seed": all(one["gap"] >= 0.1 for one in seeds.values())}
    for epochs in EPOCHS:
        for loss in ("conf_.5", "conf_.75"):
            gains = np.array(pgr[f"{loss}_{epochs}"]) - np.array(pgr[f"xent_{epochs}"])
            marks[f"{loss}, {epochs} epochs: mean PGR at least .08 above xent's"] = bool(gains.mean() >= 0.08)
            marks[f"{loss}, {epochs} epochs: above xent's on 3 of 4 seeds"] = bool((gains > 0).mean() >= 0.75)
    marks["xent: six epochs recover less than two"] = means["xent_6"] < means["xent_2"]
    marks["control: weak == strong is not valid on any seed"] = not any(one["same"]["valid"] for one in seeds.values())
    return {"pgr": means, "pgr_by_seed": pgr}, marks


def schedules(steps: int = 100) -> dict[str, list[float]]:
    """The weight of alpha .5 over a run, with the published jump at a warm-up of .1 and mended."""
    return {
        name: [round(confidence_weight(step, steps, 0.5, 0.1, published), 4) for step in range(0, 20)]
        for name, published in (("published", True), ("linear", False))
    }


def main() -> None:
    """Study each seed that is not there yet, and write one JSON file."""
    options = study_options(__doc__, "weak_to_strong", "runs/w2s", range(4)).parse_args()
    torch.set_num_threads(1)
    root = options.workspace.resolve()
    with ThreadPoolExecutor(options.jobs) as pool:
        seeds = dict(zip(map(str, options.seeds), pool.map(lambda s: study(root, s), options.seeds), strict=True))
    means, marks = verdicts(seeds)
    sizes = {"unlabelled": UNLABELLED, "rows": ROWS, "tests": TESTS, "topics": TOPICS, "known_words": KNOWN}
    command = f"python benchmarks/weak_to_strong.py --seeds {' '.join(seeds)}"
    content = {"sizes": sizes, "means": means, "marks": marks, "first_20_of_100_steps": schedules(), "seeds": seeds}
    write(options.out, command, content)
    print(json.dumps({"means": means, "marks": marks}, indent=2))


if __name__ == "__main__":
    main()
