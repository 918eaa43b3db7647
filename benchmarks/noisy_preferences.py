"""What the losses for wrong labels are worth where the truth is known: experiment E1 of docs/reward-models.md.

    python benchmarks/noisy_preferences.py --seeds 0 1 2 --workspace runs/noisy --out benchmarks/noisy_preferences.json

The world of preference_world.py: 2,000 pairs a quarter of whose labels are turned round, and 2,000 other pairs with
true labels that judge. Five models for each half of the pairs (cut by prompt), two epochs each, say how strong the
other half's labels are; then one model is trained for eight epochs with each way of treating labels. Single tenths of
the pairs, from the weakest, show what is in them. Negative controls: smoothing all pairs alike, and flipping a fifth
of the pairs when no label is wrong, neither of which should help. A seed takes about 100 CPU seconds, and is kept in
the workspace. Losses, strength and treatment are the project's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import study_options, write
from preference_world import Floats, Pairs, PreferenceWorld, differences, score_model, train

from beaver_ray.method.noise import detection, quantiles, strength
from beaver_ray.noise_options import NoiseConfig

PAIRS, TESTS, NOISE, MEMBERS, EPOCHS = 2000, 2000, 0.25, 5, 8
ARMS = {
    "baseline": NoiseConfig(),
    "smoothing .1 on all": NoiseConfig(smoothing=0.1),
    "margin": NoiseConfig(margin=1.0),
    "flip .1": NoiseConfig(flip=0.1),
    "flip .1, margin": NoiseConfig(flip=0.1, margin=1.0),
    "smoothing .1 below 0, margin": NoiseConfig(smoothing=0.1, smooth="negative", margin=1.0),
    "flip .2": NoiseConfig(flip=0.2),
    "flip .2, margin": NoiseConfig(flip=0.2, margin=1.0),
    "smoothing .5 below 0, margin": NoiseConfig(smoothing=0.5, smooth="negative", margin=1.0),
}
DENOISED = ("flip .2", "flip .1, margin", "flip .2, margin", "smoothing .5 below 0, margin")
TENTHS = (0, 4, 7, 9)


def strengths(pairs: Pairs, seed: int) -> tuple[Floats, Floats]:
    """(mu [N], sigma [N]) of an ensemble, each pair judged by models trained on the other half of the prompts."""
    prompts, prompt_N = np.unique(pairs.prompts_NP, axis=0, return_inverse=True)
    half_N = (np.random.default_rng([seed, 3]).permutation(len(prompts)) % 2)[prompt_N.ravel()]
    found_MN = np.empty((MEMBERS, len(pairs)))
    for member in range(MEMBERS):
        for half in range(2):
            number = 1000 + 10 * member + half
            model = score_model(100 * seed + number)
            train(model, pairs.take(half_N != half), seed=number, epochs=2)
            found_MN[member, half_N == half] = differences(model, pairs.take(half_N == half))
    return strength(found_MN)


def arm(
    pairs: Pairs, tests: Pairs, seed: int, noise: NoiseConfig | None = None, strength_N: Floats | None = None
) -> dict[str, float]:
    """Accuracy on true labels at the end, at its best, and what was lost in between."""
    curve = train(score_model(seed), pairs, seed=seed, epochs=EPOCHS, noise=noise, strength_N=strength_N, tests=[tests])
    final, best = curve[-1][0], max(of_epoch[0] for of_epoch in curve)
    return {"final": round(final, 4), "best": round(best, 4), "decay": round(best - final, 4)}


def study(seed: int) -> dict[str, Any]:
    """All figures of one seed."""
    world = PreferenceWorld(seed)
    pairs = world.pairs(PAIRS, np.random.default_rng([seed, 1]), NOISE)
    tests = world.pairs(TESTS, np.random.default_rng([seed, 2]))
    clean = pairs.take(np.ones(PAIRS, dtype=np.bool_))
    clean.answers_N2L[clean.wrong_N] = clean.answers_N2L[clean.wrong_N, ::-1]
    clean.wrong_N[:] = False

    mean_N, deviation_N = strengths(pairs, seed)
    arms = {name: arm(pairs, tests, seed, noise, mean_N) for name, noise in ARMS.items()}
    arms["clean labels"] = arm(clean, tests, seed)
    arms["clean labels, flip .2"] = arm(clean, tests, seed, ARMS["flip .2"], strengths(clean, seed)[0])
    tenths = np.array_split(np.argsort(mean_N, kind="stable"), 10)
    single = {f"tenth {n}": arm(pairs.take(tenths[n]), tests, seed)["final"] for n in TENTHS}
    single["tenth 0 flipped"] = arm(pairs.take(tenths[0]).turned(), tests, seed)["final"]
    parts = quantiles(mean_N, deviation_N, pairs.wrong_N, 10)
    return {
        "arms": arms,
        "auc": round(detection(mean_N, pairs.wrong_N) or 0.0, 4),
        "below_0": round(float((mean_N < 0).mean()), 4),
        "wrong_by_tenth": [round(part.flipped or 0.0, 3) for part in parts],
        "sigma_by_tenth": [round(part.deviation, 3) for part in parts],
        "single": single,
    }


def verdicts(seeds: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, bool]]:
    """Means over the seeds, and which marks they pass."""
    found = list(seeds.values())

    def mean(*path: str) -> float:
        values = found
        for name in path:
            values = [value[name] for value in values]
        return round(float(np.mean(values)), 4)

    arms = {name: {key: mean("arms", name, key) for key in ("final", "best", "decay")} for name in found[0]["arms"]}
    single = {name: mean("single", name) for name in found[0]["single"]}
    wrong = np.mean([of_seed["wrong_by_tenth"] for of_seed in found], axis=0).round(3).tolist()
    base, uniform = arms["baseline"], arms["smoothing .1 on all"]
    marks = {
        f"{name}: final at least .03 above the baseline's": arms[name]["final"] >= base["final"] + 0.03
        for name in DENOISED
    }
    marks |= {
        "the baseline decays by at least .02": base["decay"] >= 0.02,
        "every one of these decays less": all(arms[name]["decay"] < base["decay"] for name in DENOISED),
        "the weakest tenth alone is below .45": single["tenth 0"] < 0.45,
        "the weakest tenth flipped is above .55": single["tenth 0 flipped"] > 0.55,
        "control: smoothing all alike moves the final by less than .02": abs(uniform["final"] - base["final"]) < 0.02,
        "control: without wrong labels flipping a fifth does not win": arms["clean labels, flip .2"]["final"]
        <= arms["clean labels"]["final"],
    }
    means = {"arms": arms, "auc": mean("auc"), "below_0": mean("below_0"), "wrong_by_tenth": wrong, "single": single}
    return means, marks


def main() -> None:
    """Study each seed that is not there yet, and write one JSON file."""
    options = study_options(__doc__, "noisy_preferences", "runs/noisy", range(3), jobs=False).parse_args()
    torch.set_num_threads(1)
    options.workspace.mkdir(parents=True, exist_ok=True)

    def kept(seed: int) -> dict[str, Any]:
        file = Path(options.workspace) / f"seed_{seed}.json"
        if not file.is_file():
            file.write_text(json.dumps(study(seed)), encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    seeds = {str(seed): kept(seed) for seed in options.seeds}
    means, marks = verdicts(seeds)
    sizes = {"pairs": PAIRS, "tests": TESTS, "noise": NOISE, "members": MEMBERS, "folds": 2, "epochs": EPOCHS}
    write(options.out, {"sizes": sizes, "means": means, "marks": marks, "seeds": seeds})
    print(json.dumps({"means": means, "marks": marks}, indent=2))


if __name__ == "__main__":
    main()
