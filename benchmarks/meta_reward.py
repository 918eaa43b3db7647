"""MetaRM on the world of known preferences: is a moved policy judged better by a model that saw no label of it?

    python benchmarks/meta_reward.py --seeds 0 1 2 3 --out benchmarks/meta_reward.json

4,000 pairs of the first policy are labelled, without error. The policy then moves: its answers are drawn with a
probability that grows with their utility (tilt 0.8; 2 is the severe shift). Reward models are trained on the pairs
alone, with 1,000 prompts and four unlabelled answers each as the meta set; then each is asked about new answers of the
moved policy. After that the policy moves three times (tilt 0.4, 0.8, 1.2), and the reward model is refreshed in each
round, or not. A case that is in the workspace already is not computed again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import study_options, write
from preference_world import (
    ANSWER,
    PROMPT,
    Pairs,
    PreferenceWorld,
    accuracy,
    end_scores,
    pair_loss,
    pair_sequences,
    score_model,
    scores,
    sequences,
)
from scipy.stats import spearmanr
from torch import Tensor

from beaver_ray.method.meta import gradient, meta_gradient, spread
from beaver_ray.models.score import ScoreModel

PAIRS, TESTED, META, ANSWERS = 4000, 2000, 1000, 4
EPOCHS, BATCH, META_BATCH, RATE = 2, 64, 32, 1e-3
LONGER = 8  # epochs, as the world's own `train` has them; added when rewards after two were found to be small still
SAM_RADIUS = 0.05
MODERATE, SEVERE = 0.8, 2.0
ARMS = {
    MODERATE: ("vanilla", "second", "first", "second_unshifted", "sam", "joint"),
    SEVERE: ("vanilla", "second", "joint"),
}
LONGER_ARMS = ("vanilla", "second")
FEW = 2
"""Seeds of the severe shift, of the longer training and of the rounds."""
REFRESHES = ("none", "again", "vanilla", "metarm", "joint")
"""again: one more epoch on the first pairs, as metarm and joint have, and nothing else."""
TILTS = (0.4, 0.8, 1.2)
NEW_LABELS = 1000


@dataclass(frozen=True)
class MetaSet:
    """Unlabelled answers to P prompts, in tokens [P, ANSWERS, T]."""

    ids_PKT: Tensor

    @classmethod
    def drawn(cls, world: PreferenceWorld, rng: np.random.Generator, tilt: float) -> MetaSet:
        """Answers of a policy of this tilt to prompts of their own."""
        prompts_NP = np.repeat(world.prompts(META, rng), ANSWERS, axis=0)
        ids_NT = sequences(prompts_NP, world.answers(prompts_NP, rng, tilt))
        return cls(ids_NT.view(META, ANSWERS, -1))

    def objective(self, model: ScoreModel, rows_B: Tensor) -> Tensor:
        """J, the mean over these prompts."""
        return spread(end_scores(model, self.ids_PKT[rows_B].flatten(0, 1)).view(-1, ANSWERS)).mean()


def fit(model: ScoreModel, pairs: Pairs, arm: str, meta: MetaSet, seed: int, epochs: int = EPOCHS) -> None:
    """Train with AdamW at a constant rate; all arms go through the same batches."""
    ids_N2T, parameters = pair_sequences(pairs), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    of_pairs, of_meta = (torch.Generator().manual_seed(n) for n in (seed, seed + 1))
    model.eval()  # it has no dropout
    for _ in range(epochs):
        for rows_B in torch.randperm(len(pairs), generator=of_pairs).split(BATCH):
            asked_B = torch.randperm(META, generator=of_meta)[:META_BATCH]

            def loss(rows_B: Tensor = rows_B) -> Tensor:
                return pair_loss(model, ids_N2T[rows_B])[0]

            def objective(asked_B: Tensor = asked_B) -> Tensor:
                return meta.objective(model, asked_B)

            slopes = step(parameters, arm, loss, objective)
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.grad = slope
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()


def step(parameters: list[Any], arm: str, loss: Callable[[], Tensor], objective: Callable[[], Tensor]) -> list[Tensor]:
    """The derivative that an arm steps along."""
    if arm == "vanilla":
        return gradient([loss], parameters)
    if arm == "joint":
        return gradient([loss, lambda: -objective()], parameters)
    if arm == "sam":  # https://arxiv.org/abs/2010.01412: up along the loss itself, a step of fixed length
        length = float(torch.nn.utils.get_total_norm(gradient([loss], parameters)))
        return meta_gradient(parameters, [loss], [loss], SAM_RADIUS / max(length, 1e-12), second=False)
    return meta_gradient(parameters, [objective], [loss], 1.0, second=arm != "first")


@dataclass(frozen=True)
class Tests:
    """What a model is asked about: labelled pairs of the first policy and of the moved one, and answers of both."""

    original: Pairs
    shifted: Pairs
    prompts_NP: np.ndarray
    answers_NL: np.ndarray
    unmoved_NL: np.ndarray
    """Answers of the first policy to the same prompts."""
    utility_N: np.ndarray

    @classmethod
    def drawn(cls, world: PreferenceWorld, rng: np.random.Generator, tilt: float) -> Tests:
        """For a policy of this tilt."""
        original, shifted = world.pairs(TESTED, rng), world.pairs(TESTED, rng, tilt=tilt)
        prompts_NP = np.repeat(world.prompts(TESTED // ANSWERS, rng), ANSWERS, axis=0)
        answers_NL, unmoved_NL = world.answers(prompts_NP, rng, tilt), world.answers(prompts_NP, rng)
        return cls(original, shifted, prompts_NP, answers_NL, unmoved_NL, world.utility(prompts_NP, answers_NL))

    def figures(self, model: ScoreModel) -> dict[str, float]:
        """Accuracies, rank correlation with the truth over all moved answers, the spread among those to a prompt."""
        rewards_N, unmoved_N = (scores(model, self.prompts_NP, some) for some in (self.answers_NL, self.unmoved_NL))
        rewards_PK = torch.from_numpy(rewards_N.reshape(-1, ANSWERS))
        deviation = float(rewards_PK.std(dim=1, correction=0).mean())
        unmoved = float(unmoved_N.reshape(-1, ANSWERS).std(axis=1).mean())
        found = {
            "accuracy_original": accuracy(model, self.original),
            "accuracy_shifted": accuracy(model, self.shifted),
            "spearman_shifted": float(spearmanr(rewards_N, self.utility_N).statistic),
            "spread_shifted": deviation,
            "spread_shifted_over_original": deviation / unmoved,
            "objective_shifted": float(spread(rewards_PK).mean()),
        }
        return {name: round(value, 4) for name, value in found.items()}


def shifted_case(seed: int, tilt: float, arm: str, epochs: int = EPOCHS) -> list[dict[str, Any]]:
    """An arm against a shift."""
    world = PreferenceWorld(seed)
    pairs = world.pairs(PAIRS, np.random.default_rng([seed, 1]))
    meta = MetaSet.drawn(world, np.random.default_rng([seed, 2]), 0.0 if arm == "second_unshifted" else tilt)
    tests = Tests.drawn(world, np.random.default_rng([seed, 3]), tilt)
    model = score_model(seed, attention="eager")
    fit(model, pairs, arm, meta, seed, epochs)
    return [{"seed": seed, "tilt": tilt, "arm": arm, **tests.figures(model)}]


def rounds_case(seed: int, refresh: str) -> list[dict[str, Any]]:
    """Three rounds of a policy that moves on, and what a way to refresh the reward model makes of them."""
    world = PreferenceWorld(seed)
    pairs = world.pairs(PAIRS, np.random.default_rng([seed, 1]))
    draws = [np.random.default_rng([seed, 4, number]) for number in range(len(TILTS))]
    tests = [Tests.drawn(world, rng, tilt) for rng, tilt in zip(draws, TILTS, strict=True)]
    meta = [MetaSet.drawn(world, rng, tilt) for rng, tilt in zip(draws, TILTS, strict=True)]
    new = [world.pairs(NEW_LABELS, rng, tilt=tilt) for rng, tilt in zip(draws, TILTS, strict=True)]
    model, known = score_model(seed, attention="eager"), pairs
    fit(model, pairs, "vanilla", meta[0], seed)
    rows = []
    for number, tilt in enumerate(TILTS):
        if refresh == "vanilla":  # anew, on the labels of all rounds
            model, known = score_model(seed, attention="eager"), joined(known, new[number])
            fit(model, known, "vanilla", meta[number], seed)
        elif refresh != "none":  # the model of the round before goes on, once over the first pairs
            arm = {"again": "vanilla", "metarm": "second", "joint": "joint"}[refresh]
            fit(model, pairs, arm, meta[number], seed + number, epochs=1)
        at = {"seed": seed, "round": number + 1, "tilt": tilt, "rm_refresh": refresh, "labels": len(known)}
        rows.append({**at, **tests[number].figures(model)})
    return rows


def joined(first: Pairs, second: Pairs) -> Pairs:
    """Both, one behind the other."""
    columns = ("prompts_NP", "answers_N2L", "wrong_N")
    return Pairs(*(np.concatenate([getattr(first, name), getattr(second, name)]) for name in columns))


def whole_seeds(by: Mapping[tuple[str, int], Any], arms: Sequence[str]) -> list[int]:
    """The seeds that have all of these arms, where only what is there is written."""
    return sorted(seed for seed in {seed for _, seed in by} if all((arm, seed) in by for arm in arms))


def gains_over_vanilla(rows: list[dict[str, Any]], key: str, arms: Sequence[str]) -> dict[str, list[float]]:
    """By how much a figure of each arm exceeds vanilla's on the moderate shift, seed by seed."""
    by = {(row["arm"], row["seed"]): row[key] for row in rows if row["tilt"] == MODERATE}
    seeds = whole_seeds(by, arms)
    return {arm: [round(by[arm, s] - by["vanilla", s], 4) for s in seeds] for arm in arms if arm != "vanilla"}


def verdicts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The pass marks, on the moderate shift."""
    by = {(row["arm"], row["seed"]): row for row in rows if row["tilt"] == MODERATE}
    seeds = whole_seeds(by, ARMS[MODERATE])
    if not seeds:
        return {}
    gains = gains_over_vanilla(rows, "accuracy_shifted", ARMS[MODERATE])
    mean = {arm: float(np.mean(found)) for arm, found in gains.items()}
    wide = [by["joint", s]["spread_shifted"] / by["vanilla", s]["spread_shifted"] for s in seeds]
    positive = sum(gain > 0 for gain in gains["second"])
    return {
        "second order gains 0.01 on average": {"value": round(mean["second"], 4), "pass": mean["second"] >= 0.01},
        "second order gains in three quarters of the seeds": {
            "value": f"{positive} of {len(seeds)}",
            "pass": positive >= 0.75 * len(seeds),
        },
        "an unshifted meta set gains 0.01 at most": {
            "value": round(mean["second_unshifted"], 4),
            "pass": mean["second_unshifted"] <= 0.01,
        },
        "joint has 1.5 times vanilla's spread": {
            "value": round(float(np.mean(wide)), 3),
            "pass": float(np.mean(wide)) >= 1.5,
        },
    }


def kept(path: Path, compute: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What an earlier start has left there, else computed and left there."""
    if not path.is_file():
        found = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
        print(json.dumps(found), flush=True)
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def main() -> None:
    """Run everything and write one JSON file."""
    parser = study_options(__doc__, "meta_reward", "runs/meta_reward", range(4))
    parser.add_argument("--report", action="store_true", help="write what the workspace has, and compute nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases: dict[str, list[tuple[str, Callable[[], list[dict[str, Any]]]]]] = {
        "shifted": [
            (f"seed_{seed}_tilt_{tilt}_{arm}", partial(shifted_case, seed, tilt, arm))
            for tilt, arms in ARMS.items()
            for seed in options.seeds[: FEW if tilt == SEVERE else None]
            for arm in arms
        ],
        "rounds": [
            (f"seed_{seed}_rounds_{refresh}", partial(rounds_case, seed, refresh))
            for seed in options.seeds[:FEW]
            for refresh in REFRESHES
        ],
        "longer": [
            (f"seed_{seed}_longer_{arm}", partial(shifted_case, seed, MODERATE, arm, LONGER))
            for seed in options.seeds[:FEW]
            for arm in LONGER_ARMS
        ],
    }
    found: dict[str, list[dict[str, Any]]] = {what: [] for what in cases}
    missing = []
    for what, listed in cases.items():
        for name, compute in listed:
            path = options.workspace / f"{name}.json"
            if options.report and not path.is_file():
                missing.append(name)
                continue
            found[what] += kept(path, compute)
    sizes = {"pairs": PAIRS, "meta_prompts": META, "answers": ANSWERS, "epochs": EPOCHS, "batch": BATCH}
    world = {"words_of_prompt": PROMPT, "words_of_answer": ANSWER, **sizes, "meta_batch": META_BATCH}
    marks, compared = verdicts(found["shifted"]), {}
    for key in ("accuracy_shifted", "spearman_shifted", "accuracy_original"):
        of_long = gains_over_vanilla(found["longer"], key, LONGER_ARMS)
        of_short = gains_over_vanilla(found["shifted"], key, ARMS[MODERATE])
        compared[key] = {**of_short, **{f"{arm}, {LONGER} epochs": gains for arm, gains in of_long.items()}}
    write(options.out, {"world": world, "marks": marks, "gains": compared, "missing": missing, **found})
    print(json.dumps({**marks, **compared}, indent=2))


if __name__ == "__main__":
    main()
