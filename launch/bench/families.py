"""Tiny random models of every family that the README names, through every stage: SFT, DPO, reward, cost and two-headed
score models, Safe PPO with critics and without.

Each family goes it twice, once on Ray with vLLM and once in debug mode. A stage is passed when it has left its final/.
The other figure is what new weights must not change: the largest difference between a token's log-prob by the
generator that sampled it and by the policy, over all steps after the first, from the trajectories.
"""

from __future__ import annotations

import json
import random
import string
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

from beaver_ray import experience
from beaver_ray.runs import is_finished
from launch.bench.family_models import FAMILIES, write_family
from launch.bench.iteration import finish
from launch.bench.measure import Figure, Goal, Outcome
from launch.bench.options import Options

STAGES = ("sft", "dpo", "reward_model", "cost_model", "score_model", "safe_ppo", "critic_free")
MODES = {"on Ray": False, "debug": True}
AGREEMENT = 1e-4
ROWS = 32
STEPS = 4
RATE = {"learning_rate": 3e-3, "schedule": "constant", "warmup_fraction": 0.0}
PLACEMENT = {
    role: {"cpus": 0.1}
    for role in ("rollout", "reward", "cost", "reference", "policy", "reward_critic", "cost_critic", "experience")
}


def run(options: Options) -> Outcome:
    """Stages passed and agreement of log-probs for every family (for the first one where small)."""
    outcome = Outcome(
        [], {"steps": STEPS, "dtype": "float32", "stages": list(STAGES), "parameters": "two layers of 64"}
    )
    names = [name for name in FAMILIES if options.wants(name)]
    for name in names[:1] if options.small else names:
        with tempfile.TemporaryDirectory() as folder:
            workspace = Path(folder)
            write_family(workspace / "model", name)
            write_data(workspace)
            for mode, debug in MODES.items():
                finish([sys.executable, "-m", "launch", "pipeline", str(write_pipeline(workspace, mode, debug))])
                outcome.figures += figures(f"{name}, {mode}", workspace / mode)
    return outcome


def write_data(folder: Path) -> None:
    """Prompts, demonstrations and pairs of random letters; one marks the better and another the unsafe answer."""
    rng = random.Random(0)
    better, unsafe, others = "a", "b", string.ascii_lowercase[2:]

    def words(count: int) -> str:
        return " ".join(rng.choice(others) for _ in range(count))

    prompts, demonstrations, pairs = [], [], []
    for _ in range(ROWS):
        prompt = words(rng.randint(3, 8))
        prompts.append({"prompt": prompt})
        demonstrations.append({"prompt": prompt, "response": words(6)})
        good, safe = rng.randrange(2), rng.randrange(2)
        answers = [f"{words(4)} {better if i == good else ''} {unsafe if i != safe else ''}" for i in (0, 1)]
        marks = {f"is_response_{i}_safe": i == safe for i in (0, 1)}
        choices = {"better_response_id": good, "safer_response_id": safe}
        pairs.append({"prompt": prompt, "response_0": answers[0], "response_1": answers[1], **choices, **marks})
    for name, rows in (("prompts", prompts), ("demonstrations", demonstrations), ("pairs", pairs)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def write_pipeline(folder: Path, mode: str, debug: bool) -> Path:
    """The stages in ``mode``, each a file, and the pipeline over them."""
    workspace = folder / mode
    workspace.mkdir()
    common = {"workspace": str(workspace), "debug": debug, "save_every": 0, "engine": {"micro_batch_tokens": 256}}
    model, pairs = str(folder / "model"), f"PKU-SafeRLHF:1:{folder}/pairs.jsonl"
    supervised = {"epochs": 1, "batch_size": 8, "max_tokens": 64, "optimizer": RATE}
    supervised |= {"cluster": {"threads": 1, "placement": {"trainer": {"cpus": 0.5}}}}
    trained = {name: f"{workspace}/{name}/final/{name}" for name in ("reward_model", "cost_model")}
    policy = f"{workspace}/sft/final/policy"
    ppo: dict[str, Any] = {
        "stage": "safe_ppo",
        "steps": STEPS,
        "models": {"policy": policy, "reward": trained["reward_model"]},
        "constraints": [{"name": "harm", "model": trained["cost_model"], "limit": 0.0}],
        "data": {"prompts": [f"prompts:1:{folder}/prompts.jsonl"], "max_prompt_tokens": 24},
        "rollout": {"prompts_per_step": 8, "max_new_tokens": 12, "max_sequences": 8, "kv_cache_gib": 0.05},
        "policy": RATE,
        "trajectory_every": 1,
        "cluster": {"threads": 1, "placement": PLACEMENT},
    }
    both = f"{workspace}/score_model/final/score_model"
    own: dict[str, dict[str, Any]] = {
        "sft": {**supervised, "model": model, "train": [f"demonstrations:1:{folder}/demonstrations.jsonl"]},
        "reward_model": {**supervised, "model": policy, "train": [pairs]},
        "cost_model": {**supervised, "model": policy, "train": [pairs]},
        "dpo": {**supervised, "model": policy, "train": [pairs]},
        "score_model": {**supervised, "model": policy, "train": [pairs]},
        "safe_ppo": {**ppo, "ppo": {"minibatches": 2}, "critic": RATE},
        # Both scores from one model, and answers to a prompt compared with one another.
        "critic_free": {
            **ppo,
            "models": {"policy": policy, "reward": both},
            "constraints": [{"name": "harm", "model": both, "limit": 0.0}],
            "rollout": {**ppo["rollout"], "prompts_per_step": 4, "samples_per_prompt": 2},
            "ppo": {"minibatches": 2, "advantage": "leave_one_out"},
            "cluster": {"threads": 1, "placement": {r: p for r, p in PLACEMENT.items() if "critic" not in r}},
        },
    }
    for stage in STAGES:
        tree = {**common, "stage": stage, **own[stage], "name": stage}
        (workspace / f"{stage}.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    path = workspace / "pipeline.yaml"
    tree = {"workspace": str(workspace), "stages": [{"config": f"{stage}.yaml"} for stage in STAGES]}
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def figures(name: str, workspace: Path) -> list[Figure]:
    """What a family came to in one mode."""
    passed = sum(is_finished(workspace / stage) for stage in STAGES)
    found = [Figure(f"{name}: stages passed", float(passed), "", passed / len(STAGES), "all of them", Goal(1))]
    worst = max(largest_difference(workspace / stage / "trajectories") for stage in ("safe_ppo", "critic_free"))
    goal = Goal(1, at_most=True)
    return [*found, Figure(f"{name}: log-probs", worst, "", worst / AGREEMENT, f"{AGREEMENT:g}", goal)]


def largest_difference(trajectories: Path) -> float:
    """Between a token's log-probs by generator and by policy, over all samples of weights that were updated."""
    worst = 0.0
    for file in sorted(trajectories.glob("step_*.parquet")):
        for batch in pq.read_table(file).to_batches():
            if min(batch.column("weight_version").to_pylist()) < 1:
                continue
            apart = experience.flat(batch, "rollout_logprobs") - experience.flat(batch, "logprobs")
            worst = max(worst, float(np.abs(apart).max()))
    if not worst:
        raise RuntimeError(f"no sample of updated weights in {trajectories}")
    return worst
