"""Wrong labels among real pairs: are they found, and is anything gained, with a model that takes seconds.

    python benchmarks/noisy_real.py hh-rlhf:1:hh/harmless-base/test.jsonl.gz --out benchmarks/noisy_real.json

Names data sets as a recipe does. A quarter of the pairs, by the dialogue's first turn, is held out with the labels that
it has; of the others a quarter of the labels is turned round. The score is linear in the words and neighbouring words
of an answer (hashed to 65,536 places, each weighing 1 over the root of the answer's length), trained by AdamW for eight
epochs; an ensemble of five for each half of the pairs, by first turn, two epochs each, tells how strong the labels are.
Losses, strength, treatment and intervals are the project's own. Where the ensemble's area under the ROC curve is below
0.6 the verdict is that no effect is to be expected, as stage strength says it.
"""

from __future__ import annotations

import itertools
import json
import re
import zlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import study_options, write
from numpy.typing import NDArray
from torch import Tensor

from beaver_ray.data.mixing import load_mix, prompt_key
from beaver_ray.data.sources import RawSample
from beaver_ray.evaluation import mean_interval, share_interval
from beaver_ray.method.losses import reward_model_loss
from beaver_ray.method.noise import detection, strength, treat
from beaver_ray.noise_options import NoiseConfig
from beaver_ray.report.strength import NO_EFFECT

PLACES, NOISE, MEMBERS, EPOCHS, DRAWS = 2**16, 0.25, 5, 8, 500
ARMS = {
    "baseline": NoiseConfig(),
    "margin": NoiseConfig(margin=1.0),
    "smoothing .1 below 0, margin": NoiseConfig(smoothing=0.1, smooth="negative", margin=1.0),
    "flip .2": NoiseConfig(flip=0.2),
    "flip .2, margin": NoiseConfig(flip=0.2, margin=1.0),
}


class Differences:
    """N pairs as what the preferred answer has and the other has not: places and weights, ragged."""

    def __init__(self, samples: list[RawSample]) -> None:
        self.rows = [self._row(sample) for sample in samples]

    @staticmethod
    def _row(sample: RawSample) -> tuple[Tensor, Tensor]:
        places, weights = [], []
        for text, sign in ((sample.answer, 1.0), (sample.other_answer, -1.0)):
            words = re.findall(r"\w+|[^\w\s]", (text or "").lower())
            grams = [*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))]
            places += [zlib.crc32(gram.encode()) % PLACES for gram in grams]
            weights += [(sign if sample.better else -sign) / max(1, len(words)) ** 0.5] * len(grams)
        return torch.tensor(places), torch.tensor(weights)

    def scores(self, weight_G1: Tensor, rows: NDArray[np.integer[Any]]) -> Tensor:
        """[B] score of the preferred answer less the other's."""
        chosen = [self.rows[row] for row in rows.tolist()]
        starts = torch.tensor([0, *(len(places) for places, _ in chosen[:-1])]).cumsum(0)
        places, weights = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        return F.embedding_bag(places, weight_G1, starts, mode="sum", per_sample_weights=weights)[:, 0]


def train(
    data: Differences,
    rows: NDArray[np.integer[Any]],
    sign_N: NDArray[np.float32],
    seed: int,
    epochs: int,
    noise: NoiseConfig | None = None,
    strength_N: NDArray[np.float64] | None = None,
) -> Tensor:
    """A model's weights [G, 1], trained on these rows, whose labels are turned round where the sign is -1."""
    rng = np.random.default_rng(seed)
    weight_G1 = torch.tensor(rng.normal(0.0, 0.01, (PLACES, 1)), dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.AdamW([weight_G1], lr=0.003, weight_decay=0.01)
    none_N = np.zeros(len(rows))
    treated = treat(none_N if strength_N is None else strength_N, **(noise or NoiseConfig()).model_dump())
    sign_B = np.where(treated.flipped_N, -1, 1).astype(np.float32) * sign_N[rows]
    for _ in range(epochs):
        for batch in np.array_split(rng.permutation(len(rows)), max(1, len(rows) // 32)):
            differences_B = torch.from_numpy(sign_B[batch]) * data.scores(weight_G1, rows[batch])
            loss, _ = reward_model_loss(
                differences_B,
                torch.zeros_like(differences_B),
                margin_B=torch.from_numpy(treated.margin_N[batch]),
                smoothing_B=torch.from_numpy(treated.smoothing_N[batch]),
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return weight_G1.detach()


def study(data: Differences, turn_N: NDArray[np.int64], seed: int) -> dict[str, Any]:
    """Right or wrong [held-out pairs] of every arm, and how well wrong labels are found."""
    rng = np.random.default_rng([seed, 17])
    part = (rng.permutation(turn_N.max() + 1) % 4)[turn_N]
    half_N = rng.integers(0, 2, turn_N.max() + 1)[turn_N]
    tests, rows = np.flatnonzero(part == 0), np.flatnonzero(part != 0)
    wrong_N = np.zeros(len(turn_N), dtype=np.bool_)
    wrong_N[rng.choice(rows, round(NOISE * len(rows)), replace=False)] = True
    sign_N = np.where(wrong_N, -1, 1).astype(np.float32)
    found_MN = np.empty((MEMBERS, len(turn_N)))
    for member in range(MEMBERS):
        for half in range(2):
            weight = train(data, rows[half_N[rows] != half], sign_N, 1000 + 10 * member + half, 2)
            judged = rows[half_N[rows] == half]
            found_MN[member, judged] = sign_N[judged] * data.scores(weight, judged).numpy()
    mean_N, _ = strength(found_MN[:, rows])
    arms = {name: train(data, rows, sign_N, seed, EPOCHS, noise, mean_N) for name, noise in ARMS.items()}
    arms["clean labels"] = train(data, rows, np.ones_like(sign_N), seed, EPOCHS)
    drawn = [rng.integers(0, len(rows), len(rows)) for _ in range(DRAWS)]
    aucs = [detection(mean_N[some], wrong_N[rows][some]) for some in drawn]
    lowest = np.argsort(mean_N, kind="stable")[: len(rows) // 5]
    return {
        "train": len(rows),
        "tests": tests,
        "right": {name: data.scores(weight, tests).numpy() > 0 for name, weight in arms.items()},
        "auc": {
            "mean": detection(mean_N, wrong_N[rows]),
            "low": np.quantile(aucs, 0.025),
            "high": np.quantile(aucs, 0.975),
        },
        "wrong_in_lowest_fifth": float(wrong_N[rows][lowest].mean()),
    }


def main() -> None:
    """Study every seed, and write one JSON file."""
    parser = study_options(__doc__, "noisy_real", "runs/noisy-real", range(3))
    parser.add_argument("data", nargs="+", help="data sets of pairs, NAME:PROPORTION:PATH")
    options = parser.parse_args()
    torch.set_num_threads(1)
    samples = [sample for sample in load_mix(options.data)[0] if sample.better is not None]
    _, turn_N = np.unique([prompt_key(sample)[0] for sample in samples], return_inverse=True)
    data = Differences(samples)
    found = [study(data, turn_N, seed) for seed in options.seeds]
    cluster = turn_N[np.concatenate([of_seed["tests"] for of_seed in found])]
    right = {name: np.concatenate([of_seed["right"][name] for of_seed in found]) for name in found[0]["right"]}
    seeds = [
        {
            **{name: of_seed[name] for name in ("train", "auc", "wrong_in_lowest_fifth")},
            "tests": len(of_seed["tests"]),
            "accuracy": {name: float(flags.mean()) for name, flags in of_seed["right"].items()},
        }
        for of_seed in found
    ]
    auc = float(np.mean([of_seed["auc"]["mean"] for of_seed in found]))
    figures = {
        "pairs": len(samples),
        "auc": auc,
        "verdict": "no effect expected" if auc < NO_EFFECT else "wrong labels are told well enough to try",
        "accuracy": {name: share_interval(flags, cluster) for name, flags in right.items()},
        "gain_over_baseline": {
            name: mean_interval(flags.astype(float) - right["baseline"], cluster)
            for name, flags in right.items()
            if name != "baseline"
        },
        "seeds": seeds,
    }
    write(options.out, figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
