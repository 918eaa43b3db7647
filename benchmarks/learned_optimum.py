"""What the best mixture of well-formed answers under a learned reward model is worth by the truth.

    python benchmarks/learned_optimum.py runs/benchmark/seed_0 runs/benchmark/seed_1

Each folder is a workspace with `world/` and `reward_model/`, as benchmarks/small_world.py leaves. The best policy is
the solution of the linear program of the world (violation rate 0.1 by the truth) with learned rewards, of answers that
have a safe or a dangerous word at every step; it is then judged by the true rewards. `share` is that over the
constrained optimum. Refusals, shorter answers and words out of place, which a policy may find and a learned reward
overrate, are not among the answers.
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
from beaver_ray.small_world.world import Prompt, SmallWorld

TARGET, ASKED = 0.1, 6  # violation rate; prompts of each group whose learned rewards are averaged


def menu(world: SmallWorld, prompt: Prompt) -> list[list[str]]:
    """Every answer of full length whose words belong where they stand."""
    safe, bad = world.facts[prompt.topic]
    return [list(words) for words in itertools.product(*(safe[i : i + 1] + bad[i : i + 1] for i in range(len(safe))))]


def figures(workspace: Path) -> dict[str, float | str]:
    """The optimum, what the best policy under the learned reward is worth by the truth, and their ratio."""
    world = SmallWorld.load(workspace / "world" / "world.json")
    folder = str(workspace / "reward_model" / "final" / "reward_model")
    tokenizer = load_tokenizer(folder)
    model = load_score_model(folder, "reward", torch.float32).eval()
    groups: dict[tuple[str, str], list[Prompt]] = {}
    for prompt in world.prompts("train"):
        groups.setdefault((prompt.kind, prompt.topic), []).append(prompt)
    menus, true_A = [], []
    for prompts in groups.values():
        offered = []
        for words in menu(world, prompts[0]):
            answer = " ".join(words)
            scores = []
            for prompt in prompts[:ASKED]:
                row = [*prompt_tokens(tokenizer, prompt.text, "auto"), *answer_tokens(tokenizer, answer)]
                with torch.no_grad():
                    scores.append(float(model(torch.tensor([row]), torch.arange(len(row))[None])[0, -1, 0]))
            offered.append((float(np.mean(scores)), [float(world.cost(prompts[0].text, answer) > 0)]))
            true_A.append(world.reward(prompts[0].text, answer))
        menus.append(Group(len(prompts), offered, [True]))
    reached = float(best_mixture(menus, [TARGET]) @ true_A)
    best = world.optimum([prompt.text for prompt in world.prompts("train")], violation_rates={"harm": TARGET})
    return {
        "workspace": workspace.name,
        "optimum": best,
        "reached": round(reached, 4),
        "share": round(reached / best, 3),
    }


def main() -> None:
    """Figures of every workspace, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspaces", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "learned_optimum.json")
    options = parser.parse_args()
    result = {"target_violation_rate": TARGET, "runs": [figures(workspace) for workspace in options.workspaces]}
    write(options.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
