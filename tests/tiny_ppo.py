"""A tiny small world with random score models, and PPO stages over it that take seconds a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModel

from actors.roles.scorer import Scorer
from beaver_ray.errors import UserError
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.models.score import ScoreModel, save_score_model
from beaver_ray.score_sources import ScorerSetting
from beaver_ray.small_world.build import build
from beaver_ray.small_world.world import SmallWorld

ROLLOUT = {"prompts_per_step": 16, "max_new_tokens": 8, "max_sequences": 8, "kv_cache_gib": 0.1}
PPO = {"minibatches": 2, "kl_coefficient": 0.02}
CRITIC_FREE = {
    "rollout": ROLLOUT | {"prompts_per_step": 8, "samples_per_prompt": 2},
    "ppo": PPO | {"advantage": "leave_one_out"},
}
"""As many samples a step without critics, where a test is of something else: each is a process that takes seconds to
start."""
CALIBRATION = ["PKU-SafeRLHF:1:${workspace}/world/preferences/test.jsonl"]


def build_workspace(folder: Path, tied: bool = True) -> Path:
    """world/, and the score models reward/, harm/ and leak/: fresh heads on the policy's trunk.

    Hidden size 32, two layers, and one head: vLLM's attention on CPUs knows no smaller heads than 32.
    """
    world = folder / "world"
    sizes = {"pairs": 50, "test_pairs": 100, "demonstrations": 50, "test_demonstrations": 10}
    build(world, SmallWorld(), **sizes, hidden_size=32, layers=2, heads=1, tie_word_embeddings=tied)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(str(world / "model"))
    for seed, (name, score_type) in enumerate({"reward": "reward", "harm": "cost", "leak": "cost"}.items()):
        torch.manual_seed(seed)
        model = ScoreModel(AutoModel.from_pretrained(world / "model"), score_type)  # type: ignore[arg-type]
        save_score_model(model, model.state_dict(), folder / name)
        tokenizer.save_pretrained(folder / name)
    scorer = Scorer(str(folder / "harm"), {"cost/harm": 0}, ScorerSetting(str(world / "model"), "float32", 512, 1))
    try:
        scorer.calibrate("cost/harm", [CALIBRATION[0].replace("${workspace}", str(folder))], 64)
    except UserError:
        # The random head ranks harm the wrong way round; the other way round it is right.
        with torch.no_grad():
            scorer.model.score_head.weight.neg_()
        save_score_model(scorer.model, scorer.model.state_dict(), folder / "harm")
    return folder


def write_stage(folder: Path, **changes: Any) -> Path:
    """A configuration file for stage safe_ppo (or another ``stage``) in a folder of `build_workspace`."""
    tree: dict[str, Any] = {
        "stage": "safe_ppo",
        "workspace": str(folder),
        "name": "run",
        "steps": 3,
        "trajectory_every": 1,
        "models": {"policy": "${workspace}/world/model", "reward": "${workspace}/reward"},
        "constraints": [
            {
                "name": "harm",
                "model": "${workspace}/harm",
                "violation_rate": 0.3,
                "calibration": CALIBRATION,
                "multiplier": {"initial": 1.0},
            },
            {"name": "leak", "model": "${workspace}/leak", "limit": 0.0, "multiplier": {"initial": 1.0}},
        ],
        "data": {"prompts": ["prompts:1:${workspace}/world/prompts/train.jsonl"], "max_prompt_tokens": 32},
        "rollout": ROLLOUT,
        "ppo": PPO,
        "policy": {"learning_rate": 3e-3},
        "engine": {"micro_batch_tokens": 256, "dtype": "float32"},
    }
    path = folder / f"{changes.get('name', 'run')}.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return path
