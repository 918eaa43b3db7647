"""A whole Safe PPO iteration: this system on Ray against the published loop, on the same models and prompts.

Both sides start from the same random Llama folders, make answers of up to the same length (random weights end few of
them early), use PTX, and make four optimizer steps in an iteration of 64 prompts: the published loop one for each
micro-batch of 16, ours one for each of four minibatches. Ours is `beaver-ray train` with real actors; its steps are
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

import yaml

from beaver_ray.errors import UserError
from beaver_ray.runs import read_metrics
from launch.bench.measure import Figure, Outcome, medians
from launch.bench.models import LARGER, SMALLER, TINY, Shape, write_workspace
from launch.bench.registry import Options

CASES: list[tuple[Shape, int, str]] = [
    (SMALLER, 32, "float32"),
    (SMALLER, 32, "bfloat16"),
    (LARGER, 128, "float32"),
    (LARGER, 128, "bfloat16"),
]
PHASES = ("generate", "score", "train", "sync")
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
Times = dict[str, list[float]]


def run(options: Options) -> Outcome:
    """Samples/s of both sides for 1M parameters with 32 new tokens and 10M with 128, in float32 and bfloat16."""
    cases = [(TINY, 6, "float32")] if options.small else CASES
    prompts, turns, steps = (16, 1, 2) if options.small else (64, 2, 5)
    turns = options.repetitions or turns
    outcome = Outcome([], {"prompts": prompts, "turns": turns, "steps in a turn": steps})
    outcome.settings["our overrides"] = list(options.overrides)
    for shape, answer, dtype in cases:
        name = f"{shape.name}, {answer} tokens, {dtype}"
        if not options.wants(name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            workspace = write_workspace(Path(folder), shape, prompts * steps, answer)
            tree = our_config(workspace, prompts, answer, dtype, steps)
            sides: dict[str, Times] = {"ours": {}, "published": {}}
            for turn in range(turns):
                collect(sides["published"], run_published(workspace, prompts, answer, dtype, steps))
                collect(sides["ours"], run_ours({**tree, "name": f"turn-{turn}"}, list(options.overrides)))
        outcome.figures += case_figures(name, prompts, sides)
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
    command += ["--micro-batch", str(min(16, prompts // 4)), "--threads", str(os.cpu_count() or 1)]
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


def case_figures(name: str, prompts: int, sides: dict[str, Times]) -> list[Figure]:
    """Samples/s of both sides, their ratio, and where each side's time goes."""
    middle = {side: medians(times) for side, times in sides.items()}
    rates = {side: prompts / m["time/step"] for side, m in middle.items()}
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
