"""A whole Safe PPO iteration: this system on Ray against the published loop, on the same models and prompts.

Both sides start from the same random Llama folders, make answers of up to the same length (random weights end few of
them early), use PTX, and make an optimizer step for each micro-batch of 16 prompts (the published loop) or each of four
minibatches (ours): four each in an iteration of 64 prompts. Ours is `beaver-ray train` with real actors; its steps are
read from metrics.jsonl. The two sides run in turns, never at once, each in processes of its own; the first iteration
of each turn warms up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from beaver_ray.errors import UserError
from beaver_ray.runs import read_metrics
from launch.bench.measure import Figure, Outcome, medians
from launch.bench.models import LARGER, SEVEN_B, SHAPES, SMALLER, TINY, Shape, write_workspace
from launch.bench.options import Options
from launch.config_files import parse_config

CASES: list[tuple[Shape, int, str]] = [
    (SMALLER, 32, "float32"),
    (SMALLER, 32, "bfloat16"),
    (LARGER, 128, "float32"),
    (LARGER, 128, "bfloat16"),
]
PHASES = ("generate", "score", "train", "publish")
PLACEMENT = {
    "rollout": {"workers": 2, "cpus": 0.5},
    "reward": {"cpus": 0.1},
    "cost": {"cpus": 0.1},
    "reference": {"cpus": 0.1},
    "policy": {"cpus": 0.5},
    "reward_critic": {"cpus": 0.25},
    "cost_critic": {"cpus": 0.25},
    "experience": {"cpus": 0.1},
}
GPU_PARTS = {
    "rollout": 0.3,
    "reward": 0.05,
    "cost": 0.05,
    "reference": 0.1,
    "policy": 0.3,
    "reward_critic": 0.15,
    "cost_critic": 0.05,
}
"""Of one GPU that all roles share; they settle the memory of vLLM, the others take what they need."""
Times = dict[str, list[float]]


def run(options: Options) -> Outcome:
    """Samples/s of both sides for 1M parameters with 32 new tokens and 10M with 128, in float32 and bfloat16.

    With --shape, for that shape with 256 new tokens, where there is a GPU on it. The published loop works through its
    prompts 16 at a time, whatever their number: there it is given fewer.
    """
    cases = [(TINY, 6, "float32")] if options.small else CASES
    prompts, turns, steps = (16, 1, 2) if options.small else (64, 2, 5)
    theirs = prompts
    if options.shape:
        shape = SHAPES[options.shape]
        cases = [(shape, 6 if options.small else 256, shape.dtype)]
    gpu = torch.cuda.is_available()
    if gpu and not options.small:
        prompts, theirs, turns, steps = 256, 32, 1, 3
    turns = options.repetitions or turns
    outcome = Outcome([], {"prompts": prompts, "turns": turns, "steps in a turn": steps})
    outcome.settings |= {"prompts of the published loop": theirs, "our overrides": list(options.overrides)}
    for shape, answer, dtype in cases:
        name = f"{shape.name}, {answer} tokens, {dtype}"
        if not options.wants(name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            workspace = write_workspace(Path(folder), shape, prompts * steps, answer)
            tree = our_config(workspace, prompts, answer, dtype, steps)
            tree = on_one_gpu(tree, shape) if gpu else tree
            parse_config(tree, list(options.overrides), "bench iteration")  # a mistake in --set, before anything runs
            sides: dict[str, Times] = {"ours": {}, "published": {}}
            for turn in range(turns):
                collect(sides["published"], run_published(workspace, theirs, answer, dtype, steps))
                collect(sides["ours"], run_ours({**tree, "name": f"turn-{turn}"}, list(options.overrides)))
        outcome.figures += case_figures(name, {"ours": prompts, "published": theirs}, sides)
        outcome.samples |= {f"{name}, {side}": times["time/step"] for side, times in sides.items()}
    return outcome


def our_config(workspace: Path, prompts: int, answer: int, dtype: str, steps: int) -> dict[str, Any]:
    """Our side: the published constants, one thread a process, two generators, and three forwards for six models.

    Reward and cost are two heads of one score model, the critics two heads of another, and the generators' log-probs
    stand for the policy's own. `--set models.reward=${workspace}/reward` and the like take that back.
    """
    # The policy, with PTX, has twice the critic's work: two ranks, where it is enough for their exchange to be little.
    placement = {**PLACEMENT, "policy": {"workers": 2, "cpus": 0.5}} if answer > 32 else PLACEMENT
    return {
        "stage": "safe_ppo",
        "workspace": str(workspace),
        "name": "ours",
        "steps": steps,
        "models": {"policy": "${workspace}/policy", "reward": "${workspace}/score", "shared_critic": True},
        "constraints": [
            {
                "name": "harm",
                "model": "${workspace}/score",
                "limit": 0.0,
                "multiplier": {"rule": "log_sgd", "initial": 1.0, "learning_rate": 0.1, "max": 5.0, "window": 128},
            }
        ],
        "data": {
            "prompts": ["prompts:1:${workspace}/prompts.jsonl"],
            "ptx": ["demonstrations:1:${workspace}/ptx.jsonl"],
            "max_prompt_tokens": 24,
        },
        "rollout": {
            "prompts_per_step": prompts,
            "max_new_tokens": answer,
            "max_sequences": prompts,
            "kv_cache_gib": 0.25,
        },
        "ppo": {"minibatches": 4, "kl_coefficient": 0.01, "ptx_coefficient": 16.0, "old_logprobs": "generator"},
        "policy": {"learning_rate": 1e-5, "schedule": "constant", "warmup_fraction": 0.0},
        "critic": {"learning_rate": 5e-6, "schedule": "constant", "warmup_fraction": 0.0},
        "engine": {"dtype": dtype, "micro_batch_tokens": 2560},
        "cluster": {"threads": 1, "placement": placement},
    }


def on_one_gpu(tree: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """All roles of a configuration on one GPU, in bfloat16.

    A policy of 7B trains an adapter and computes activations anew in the backward pass, which leaves it room.
    """
    large = shape is SEVEN_B
    models = {**tree["models"], **({"lora_rank": 64, "lora_alpha": 64} if large else {})}
    engine = {"dtype": "bfloat16", "micro_batch_tokens": 16384 if large else 8192, "gradient_checkpointing": large}
    placement = {role: {"cpus": 1, "gpus": part, "group": "gpu"} for role, part in GPU_PARTS.items()}
    cluster = {"threads": 1, "placement": {**placement, "experience": {"cpus": 1}}}
    return {**tree, "models": models, "engine": engine, "cluster": cluster}


def run_ours(tree: dict[str, Any], overrides: list[str]) -> list[dict[str, Any]]:
    """The steps of `beaver-ray train`, the first one left out."""
    path = Path(tree["workspace"]) / f"{tree['name']}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    finish([sys.executable, "-m", "launch", "train", str(path), *overrides])
    return read_metrics(Path(tree["workspace"]) / tree["name"])[1:]


def run_published(workspace: Path, prompts: int, answer: int, dtype: str, steps: int) -> list[dict[str, Any]]:
    """The iterations of the published loop in a process of its own, the first one left out."""
    command = [sys.executable, "-m", "launch.bench.published_loop", str(workspace), "--dtype", dtype]
    command += ["--prompts", str(prompts), "--iterations", str(steps), "--max-new-tokens", str(answer)]
    command += ["--micro-batch", str(min(16, prompts // 2)), "--threads", str(os.cpu_count() or 1)]
    return [json.loads(line) for line in finish(command).splitlines()][1:]


def finish(command: list[str]) -> str:
    """What a command prints; UserError where it says that the user erred, RuntimeError for any other failure."""
    # The number of threads is each side's own business.
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 2 and done.stderr.startswith("error: "):
        raise UserError(done.stderr.removeprefix("error: ").strip())
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def collect(times: Times, steps: list[dict[str, Any]]) -> None:
    """Add the seconds of these steps."""
    for step in steps:
        for key, value in step.items():
            if key.startswith("time/") and key != "time/elapsed":
                times.setdefault(key, []).append(value)


def case_figures(name: str, prompts: dict[str, int], sides: dict[str, Times]) -> list[Figure]:
    """Samples/s of both sides, their ratio, and where each side's time goes."""
    middle = {side: medians(times) for side, times in sides.items()}
    rates = {side: prompts[side] / m["time/step"] for side, m in middle.items()}
    figures = [
        Figure(f"{name}: ours", rates["ours"], "samples/s", rates["ours"] / rates["published"], "published loop"),
        Figure(f"{name}: published loop", rates["published"], "samples/s"),
    ]
    for side, m in middle.items():
        figures += [
            Figure(f"{name}: {side}, {p}", m[f"time/{p}"], "s", m[f"time/{p}"] / m["time/step"], "of the iteration")
            for p in PHASES
            if f"time/{p}" in m
        ]
    return figures
