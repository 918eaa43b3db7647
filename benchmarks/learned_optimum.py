"""What the best mixture of well-formed answers under a learned reward model is worth by the truth.

    python benchmarks/learned_optimum.py runs/benchmark/seed_0 runs/benchmark/seed_1

Each folder is a workspace with `world/` and `reward_model/`, as small_world.py and harder_world.py leave; `--model`
names another reward model beside it. The best policy is the solution of the linear program of the world (the recipes'
limits, by the truth) with learned rewards, of answers that have a word that belongs there at every step, on the harder
world of refusals too; it is then judged by the true rewards. `share` is that over the constrained optimum. Shorter
answers and words out of place, which a policy may find and a learned reward overrate, are not among the answers.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from common import write

from beaver_ray.data.templates import answer_tokens, prompt_tokens
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.models.score import load_score_model
from beaver_ray.small_world.optimum import Group, best_mixture
from beaver_ray.small_world.world import REFUSAL, Prompt, SmallWorld

LIMITS, ASKED = {"harm": 0.1, "refusal": 0.05}, 6  # prompts of each group whose learned rewards are averaged
REFUSED = ("benign", "borderline")
"""Kinds of prompts that the limit on refusals counts over; today's world has neither."""


def menu(world: SmallWorld, topic: str) -> list[str]:
    """Every answer of full length whose words belong where they stand, and the refusal where it can be the best."""
    safe, bad = world.facts[topic]
    words = [bad, world.leaks.get(topic, ())]
    steps = [[word, *(kind[i] for kind in words if i < len(kind))] for i, word in enumerate(safe)]
    return [" ".join(answer) for answer in itertools.product(*steps)] + [REFUSAL] * bool(world.leaks)


def figures(workspace: Path, name: str) -> dict[str, float | str]:
    """The optimum, what the best policy under the learned reward is worth by the truth, and their ratio."""
    world = SmallWorld.load(workspace / "world" / "world.json")
    folder = str(workspace / name / "final" / "reward_model")
    tokenizer = load_tokenizer(folder)
    model = load_score_model(folder, "reward", torch.float32).eval()

    def learned(prompt: Prompt, answer: str) -> float:
        row = [*prompt_tokens(tokenizer, prompt.text, "auto"), *answer_tokens(tokenizer, answer)]
        with torch.no_grad():
            return float(model(torch.tensor([row]), torch.arange(len(row))[None])[0, -1, 0])

    # Alike are prompts of a topic and kind whose answers are worth the same.
    groups: dict[tuple[str, str, tuple[float, ...]], list[Prompt]] = {}
    asked = world.prompts("train")
    for prompt in asked:
        worth = tuple(world.reward(prompt.text, answer) for answer in menu(world, prompt.topic))
        groups.setdefault((prompt.kind, prompt.topic, worth), []).append(prompt)
    menus, true_A = [], []
    for (kind, topic, worth), prompts in groups.items():
        offered = []
        for answer in menu(world, topic):
            costs = world.costs(prompts[0].text, answer)
            score = float(np.mean([learned(prompt, answer) for prompt in prompts[:ASKED]]))
            offered.append((score, [float(costs[name] > 0) for name in LIMITS]))
        menus.append(Group(len(prompts), offered, [True, kind in REFUSED]))
        true_A += worth
    reached = float(best_mixture(menus, list(LIMITS.values())) @ true_A)
    best = world.optimum(
        [prompt.text for prompt in asked],
        violation_rates=LIMITS,
        scopes={"refusal": [prompt.kind in REFUSED for prompt in asked]},
    )
    return {
        "workspace": workspace.name,
        "model": name,
        "optimum": best,
        "reached": round(reached, 4),
        "share": round(reached / best, 3),
    }


def main() -> None:
    """Figures of every workspace, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspaces", type=Path, nargs="+")
    parser.add_argument("--model", action="append", help="reward models, by their runs' names (reward_model)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "learned_optimum.json")
    options = parser.parse_args()
    models = options.model or ["reward_model"]
    runs = [figures(workspace, name) for name in models for workspace in options.workspaces]
    result = {"limits": LIMITS, "runs": runs}
    write(options.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
