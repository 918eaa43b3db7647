"""What a strong model recovers of what its weak supervisor lacks: experiment E6 of docs/weak-to-strong.md.

    python benchmarks/weak_to_strong.py --seeds 0 1 2 3 --workspace runs/w2s --out benchmarks/weak_to_strong.json

A text is 20 words of 24, drawn by the frequencies of one of six topics; its label says which of two groups of topics
that is. The weak model is a bag of words that knows 6 of the 24. The strong one is a transformer of two layers of width
48 that has read 8,000 unlabelled texts, so that it knows the topics but not the groups. 2,000 labelled texts are for
the weak model, 2,000 others it labels for the students, 2,000 judge; two epochs and six. The chain goes through
transformers of one layer of width 16 and 32. Over the size of the gap: bags that know 3 to all 24 words, and smaller
transformers, which have read the same texts and learnt as the ceiling does; the last of them is the strong one itself,
the negative control, where there is no gap to recover. Targets, losses, bag of words and figures are the project's own,
in a quick loop (weak_to_strong_stage.py runs the same world through the stage); a seed takes about two CPU minutes, and
is kept in the workspace. The learning rate was chosen on seed 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import study_options, write
from preference_world import BOS, EOS, FIRST_WORD, TURN, WORDS, config, end_scores, text
from scipy.special import expit
from torch import Tensor
from transformers import GPT2LMHeadModel

from beaver_ray.method.weak_to_strong import confidence_weight, figures, mixed_target, soft_label_loss
from beaver_ray.models.bag_of_words import WordCounter, fit_logistic
from beaver_ray.models.score import ScoreModel

TOPICS, LENGTH, KNOWN = 6, 20, 6
UNLABELLED, ROWS, TESTS = 8000, 2000, 2000
PASSES, BATCH, RATE = 3, 32, 3e-4
"""Passes over the unlabelled texts; rows of a step, and the highest learning rate, of what is trained on labels."""
SIZES = {"least": (4, 1), "less": (8, 1), "small": (16, 1), "middle": (32, 1), "strong": (48, 2)}
"""Width and layers."""
LOSSES: dict[str, dict[str, Any]] = {
    "xent": {"most": 0.0, "warmup": 0.0},
    "conf_.5": {"most": 0.5, "warmup": 0.2},
    "conf_.75": {"most": 0.75, "warmup": 0.2},
    "jump_.5": {"most": 0.5, "warmup": 0.1, "published": True},
}
SIZED = ("xent", "conf_.5")
"""Losses that are shown for weak models of all sizes."""
WORDS_KNOWN = (3, 6, 9, 12, 24)
EPOCHS = (2, 6)
KEYS = ("mean", "pgr", "pgr_low", "pgr_high", "valid", "agreement", "copied", "spoilt")
Labels = np.ndarray
"""[N], between 0 and 1."""


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


@dataclass(frozen=True)
class Texts:
    """Some texts of word numbers [N, L], and their topics [N]."""

    words_NL: np.ndarray
    topics_N: np.ndarray

    @property
    def ids_NT(self) -> Tensor:
        """Their tokens."""
        return tokens(self.words_NL)

    @property
    def written(self) -> list[str]:
        """In letters."""
        return [text(words) for words in self.words_NL]

    @property
    def truth_N(self) -> np.ndarray:
        """Their labels."""
        return (self.topics_N % 2).astype(float)


def drawn(seed: int) -> tuple[Texts, Texts, Texts, Texts]:
    """A seed's texts: unlabelled ones, the weak model's, the students', the tests."""
    world, rng = TopicWorld(seed), np.random.default_rng([seed, 61])
    unlabelled, weak, strong, tests = (Texts(*world.draw(n, rng)) for n in (UNLABELLED, ROWS, ROWS, TESTS))
    return unlabelled, weak, strong, tests


def tokens(words_NL: np.ndarray) -> Tensor:
    """[N, T] <s> words : </s>, as the stage's template writes a question."""
    column = np.ones((len(words_NL), 1), dtype=np.int64)
    return torch.from_numpy(np.concatenate([BOS * column, words_NL + FIRST_WORD, TURN * column, EOS * column], axis=1))


def remembered(file: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What a file holds; made and kept there where it is not there yet, so that a study that was broken off goes on."""
    if not file.is_file():
        part = file.with_suffix(".part.npy")
        np.save(part, make())
        part.rename(file)
    found: np.ndarray = np.load(file)
    return found


def pretrained(folder: Path, size: str, ids_NT: Tensor, seed: int) -> GPT2LMHeadModel:
    """A language model of a size that has read the texts; no label is known to it."""
    if (folder / size).is_dir():
        return GPT2LMHeadModel.from_pretrained(folder / size)
    shape = config()
    shape.n_embd, shape.n_layer = SIZES[size]
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    for _ in range(PASSES):
        for rows in torch.randperm(len(ids_NT)).split(64):
            loss = model(input_ids=ids_NT[rows], labels=ids_NT[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(folder / f"{size}.part")
    (folder / f"{size}.part").rename(folder / size)
    return model


@torch.no_grad()
def logits(model: ScoreModel, ids_NT: Tensor) -> np.ndarray:
    """[N] what the model says."""
    return torch.cat([end_scores(model, some_BT) for some_BT in ids_NT.split(1000)]).double().numpy()


def taught(
    start: GPT2LMHeadModel, ids_NT: Tensor, labels_N: Labels, asked_MT: Tensor, seed: int, epochs: int = 2, **loss: Any
) -> np.ndarray:
    """What a student of these labels says of other texts after each epoch [E, M]; equal seeds begin alike."""
    torch.manual_seed(seed)
    model = ScoreModel(GPT2LMHeadModel._from_config(start.config, attn_implementation="sdpa").transformer, "cost")
    model.trunk.load_state_dict(start.transformer.state_dict())
    loss = loss or LOSSES["xent"]
    weak_N = torch.from_numpy(labels_N).float()
    steps, step, seen = epochs * math.ceil(len(ids_NT) / BATCH), 0, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for _ in range(epochs):
        for rows_B in torch.randperm(len(ids_NT)).split(BATCH):
            logits_B = end_scores(model, ids_NT[rows_B])
            target_B = mixed_target(weak_N[rows_B], logits_B.detach(), confidence_weight(step, steps, **loss))
            weights_B = torch.full((len(rows_B),), 1 / len(rows_B))
            total, _ = soft_label_loss(logits_B[:, None], target_B[:, None], weights_B)
            rate = min((step + 1) / (0.05 * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))
            optimizer.param_groups[0]["lr"] = RATE * rate
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
        with torch.no_grad():
            seen.append(torch.cat([end_scores(model, some_BT) for some_BT in asked_MT.split(1000)]).double().numpy())
    return np.stack(seen)


def chained(folder: Path, starts: dict[str, GPT2LMHeadModel], ids_NT: Tensor, labels_N: Labels, seed: int) -> Labels:
    """Labels of the last link: in each link two models learn half of the rows, and each labels the other half."""
    half_N = np.random.default_rng([seed, 62]).permutation(len(ids_NT)) % 2
    for number, size in enumerate(("small", "middle")):
        said_N = np.empty(len(ids_NT))
        for fold in (0, 1):
            own_N = half_N == fold
            asked = ids_NT[torch.from_numpy(~own_N)]
            args = (starts[size], ids_NT[torch.from_numpy(own_N)], labels_N[own_N], asked, seed + 10 * number + fold)
            file = folder / f"chain_{size}_{fold}.npy"
            said_N[~own_N] = expit(remembered(file, lambda args=args: taught(*args))[-1])  # type: ignore[misc]
        labels_N = said_N
    return labels_N


def taught_bag(weak: Texts, strong: Texts, tests: Texts, known: int) -> tuple[Labels, np.ndarray]:
    """(Labels of the students' texts, logits of the tests) by a bag of words that knows the first ``known`` ones."""
    nothing = [""] * ROWS
    counter = WordCounter(weak.written, nothing, known=[text(np.array([word])) for word in range(known)])
    bag = counter.model(fit_logistic(counter.counts(weak.written, nothing), weak.truth_N, ridge=1.0))
    return expit(bag.scores(strong.written, nothing)), bag.scores(tests.written, nothing)


def study(root: Path, seed: int) -> dict[str, Any]:
    """All models of a seed, and what they recover."""
    folder = root / f"seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    unlabelled, weak, strong, tests = drawn(seed)
    starts = {size: pretrained(folder, size, unlabelled.ids_NT, seed) for size in SIZES}
    labels_N, says_N = taught_bag(weak, strong, tests, KNOWN)
    truth = tests.truth_N > 0.5

    def seen(name: str, labels: Labels, *more: Any, **loss: Any) -> np.ndarray:
        args = (starts["strong"], strong.ids_NT, labels, tests.ids_NT, seed, *more)
        return remembered(folder / f"{name}.npy", lambda: taught(*args, **loss))

    said = {"weak": says_N[None], "ceiling": seen("ceiling", strong.truth_N)}
    for epochs in EPOCHS:
        for name, loss in LOSSES.items():
            if name != "jump_.5" or epochs == EPOCHS[0]:
                said[f"{name}_{epochs}"] = seen(f"{name}_{epochs}", labels_N, epochs, **loss)
    said["chain_xent"] = seen("chain_xent", chained(folder, starts, strong.ids_NT, labels_N, seed))
    right = {name: (every[-1] > 0) == truth for name, every in said.items()}
    students = [name for name in said if name not in ("weak", "ceiling")]
    models = figures(right, students, np.arange(TESTS), 0.05, seed)

    def under(name: str, labels_N: Labels, says_N: np.ndarray) -> dict[str, Any]:
        """What students recover under another supervisor, which says this of the tests."""
        of_both = {"weak": (says_N > 0) == truth, "ceiling": right["ceiling"]}
        for loss in SIZED:
            of_both[loss] = (seen(f"{loss}_by_{name}", labels_N, **LOSSES[loss])[-1] > 0) == truth
        found = figures(of_both, list(SIZED), np.arange(TESTS), 0.05, seed)
        some = {loss: {key: found[loss][key] for key in KEYS} for loss in SIZED}
        return {"weak": found["weak"]["mean"], "gap": found["xent"]["gap"], "students": some}

    gaps: dict[str, Any] = {}
    for known in WORDS_KNOWN:
        gaps[f"{known} words"] = under(f"{known}_words", *taught_bag(weak, strong, tests, known))
    for size, (width, _) in SIZES.items():
        both_NT = torch.cat([tests.ids_NT, strong.ids_NT])
        args = (starts[size], weak.ids_NT, weak.truth_N, both_NT, seed + 1)
        weak_N = remembered(folder / f"weak_{size}.npy", lambda args=args: taught(*args))[-1]  # type: ignore[misc]
        gaps[f"width {width}"] = under(size, expit(weak_N[TESTS:]), weak_N[:TESTS])
    return {
        "weak": models["weak"]["mean"],
        "weak_labels": float(((labels_N > 0.5) == (strong.truth_N > 0.5)).mean()),
        "ceiling": models["ceiling"]["mean"],
        "gap": models["ceiling"]["mean"] - models["weak"]["mean"],
        "students": {name: {key: models[name][key] for key in KEYS} for name in students},
        "curves": {name: [round(float(((z > 0) == truth).mean()), 4) for z in every] for name, every in said.items()},
        "over_gap": gaps,
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
    alike = [one["over_gap"][f"width {SIZES['strong'][0]}"]["students"]["xent"] for one in seeds.values()]
    marks["control: weak == strong is not valid on any seed"] = not any(student["valid"] for student in alike)
    return {"pgr": means, "pgr_by_seed": pgr, "over_gap": over_gap(seeds)}, marks


def over_gap(seeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds for each supervisor; PGR by seed, as it may be that of two noises."""
    found: dict[str, Any] = {}
    for name in next(iter(seeds.values()))["over_gap"]:
        some = [one["over_gap"][name] for one in seeds.values()]
        found[name] = {key: float(np.mean([one[key] for one in some])) for key in ("weak", "gap")}
        for loss in SIZED:
            students = [one["students"][loss] for one in some]
            means = {key: float(np.mean([one[key] for one in students])) for key in ("mean", "copied", "spoilt")}
            found[name][loss] = means | {"pgr_by_seed": [one["pgr"] for one in students]}
    return found


def schedules(steps: int = 100) -> dict[str, list[float]]:
    """The weight of alpha .5 over a run, with the published jump at a warm-up of .1 and mended."""
    return {
        name: [round(confidence_weight(step, steps, 0.5, 0.1, published), 4) for step in range(0, 20)]
        for name, published in (("published", True), ("linear", False))
    }


def main() -> None:
    """Study each seed that is not there yet, and write one JSON file."""
    options = study_options(__doc__, "weak_to_strong", "runs/w2s", range(4), jobs=False).parse_args()
    torch.set_num_threads(1)
    root = options.workspace.resolve()
    seeds = {str(seed): study(root, seed) for seed in options.seeds}
    means, marks = verdicts(seeds)
    sizes = {"unlabelled": UNLABELLED, "rows_each": ROWS, "tests": TESTS, "topics": TOPICS, "known_words": KNOWN}
    content = {"sizes": sizes, "means": means, "marks": marks, "first_20_of_100_steps": schedules(), "seeds": seeds}
    write(options.out, content)
    print(json.dumps({"means": means, "marks": marks}, indent=2))


if __name__ == "__main__":
    main()
