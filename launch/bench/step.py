"""One training step taken apart: the share of each phase, tokens/s, bytes/s of the sync, and how busy training is.

The run is `beaver-ray train` over --config, or over a generated world of random models without one; its first step
warms up and the figures are medians of the rest. Training is compared with a matrix product of the same dtype,
measured after the run on what the run trained on: one GPU for each GPU of the training roles, or the whole CPU. The
work that counts is 2 * parameters * tokens for a forward and twice that more for its backward (once, under a LoRA
adapter), of the policy (with PTX) and of every critic; the embedding table counts only where it is also the head.
Forwards before the update (values, log-probs) count with the time of phase score, where they are.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from actors.driver.policy_stage import PolicyStage
from beaver_ray.errors import UserError
from beaver_ray.runs import read_metrics
from beaver_ray.signals import critics
from beaver_ray.yaml_files import read_yaml
from launch.bench.iteration import PHASES, finish, on_one_gpu, our_config
from launch.bench.measure import Figure, Outcome, gpu_memory_peaks, matmul_rate, medians
from launch.bench.models import LARGER, choose_shape, matmul_parameters, write_workspace
from launch.bench.options import Options
from launch.config_files import load_config, parse_config
from launch.planning import plan

STEPS = 6
GB = 1e9
ACTORS = {
    "rollout": "VllmGenerator",
    "reward": "Scorer",
    "cost": "Scorer",
    "reference": "Reference",
    "policy": "PolicyTrainer",
    "reward_critic": "Critic",
    "cost_critic": "Critic",
}
"""Role to the class of its process, by which Ray calls it."""


def run(options: Options) -> Outcome:
    """Figures of one configuration; without --config a 10M-parameter model with 128 new tokens (tiny where small).

    The generated one runs twice, with generation a version ahead of training and without.
    """
    outcome = Outcome([], {"config": str(options.config or "generated"), "overrides": list(options.overrides)})
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        if options.config is None:
            tree = generated(workspace, options)
        else:
            given = load_config(options.config, list(options.overrides))
            if not isinstance(given, PolicyStage):
                raise UserError(f"{options.config}: bench step takes a PPO stage, not {given.stage}")
            tree = read_yaml(options.config)
        steps = (options.repetitions or (1 if options.small else STEPS - 1)) + 1
        tree |= {"steps": steps, "epochs": None, "name": "bench-step"}
        chosen = options.config is not None or any(o.startswith("rollout.staleness") for o in options.overrides)
        # Generation ahead of training needs the trainer's log-probs; both sides have them.
        pair = {f", staleness {k}": ["ppo.old_logprobs=trainer", f"rollout.staleness={k}"] for k in (0, 1)}
        runs: dict[str, list[str]] = {"": []} if chosen else pair
        for suffix, change in runs.items():
            where = str(options.config or "generated configuration")
            config = parse_config(tree, [*change, *options.overrides], where)
            assert isinstance(config, PolicyStage)
            # Models and data are read from where the configuration says, the run goes to a folder that is deleted.
            config = config.model_copy(update={"workspace": folder, "name": f"bench-step{len(outcome.samples)}"})
            path = workspace / f"{config.name}.yaml"
            path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
            with gpu_memory_peaks() as peaks:
                finish_run(path)
            outcome.figures += [replace(f, name=f"{f.name}{suffix}") for f in memory_figures(config, peaks)]
            rows = read_metrics(config.folder)[1:]
            outcome.figures += [replace(f, name=f"{f.name}{suffix}") for f in step_figures(config, rows)]
            outcome.samples[f"time/step{suffix}"] = [row["time/step"] for row in rows]
            outcome.settings |= {"steps": steps - 1, "dtype": config.engine.dtype}
            outcome.settings |= {"prompts_per_step": config.rollout.prompts_per_step}
    if not chosen:
        synchronous, ahead = medians(outcome.samples).values()
        outcome.figures.append(Figure("step ahead", ahead, "s", ahead / synchronous, "step, staleness 0"))
    return outcome


def generated(workspace: Path, options: Options) -> dict[str, Any]:
    """The configuration that bench iteration measures for its largest models; where there is a GPU, `on_one_gpu`."""
    gpu = torch.cuda.is_available()
    prompts, answer = (16, 6) if options.small else (256, 512) if gpu else (64, 128)
    shape = choose_shape(options, LARGER)
    write_workspace(workspace, shape, prompts * STEPS, answer)
    tree = our_config(workspace, prompts, answer, shape.dtype, STEPS)
    return on_one_gpu(tree, shape) if gpu else tree


def finish_run(path: Path) -> None:
    """Run the training command over a configuration file."""
    finish([sys.executable, "-m", "launch", "train", str(path)])


def memory_figures(config: PolicyStage, peaks: dict[str, float]) -> list[Figure]:
    """GPU memory by role, each against the plan's estimate; none where there is no GPU.

    peaks: GiB by actor class, of `gpu_memory_peaks`.
    """
    estimates: dict[str, float] = {}
    for role in plan(config).roles:
        kind = ACTORS.get(role.role)
        if kind:
            estimates[kind] = estimates.get(kind, 0.0) + role.gpu_gib * role.processes
    return [
        Figure(f"GPU memory, {kind}", peaks[kind], "GiB", peaks[kind] / estimate, "plan")
        for kind, estimate in estimates.items()
        if estimate and kind in peaks
    ]


def step_figures(config: PolicyStage, rows: list[dict[str, Any]]) -> list[Figure]:
    """From the metrics of the measured steps."""
    keys = sorted({key for row in rows for key, value in row.items() if isinstance(value, int | float)})
    m = medians({key: [row[key] for row in rows if row.get(key) is not None] or [0.0] for key in keys})
    step = m["time/step"]
    figures = [Figure("step", step, "s")]
    figures += [Figure(f"phase {p}", m[f"time/{p}"], "s", m[f"time/{p}"] / step, "of the step") for p in PHASES]
    figures += [
        Figure("samples", m["throughput/samples_per_second"], "samples/s"),
        Figure("generation", m["rollout/tokens_per_second"], "tokens/s"),
        Figure("whole step", m["throughput/tokens_per_second"], "tokens/s"),
    ]
    if m["time/sync"]:  # few steps may have had no time to load anything
        figures.append(Figure("sync", m["sync/bytes"] / m["time/sync"] / GB, "GB/s"))
    tokens = m["throughput/tokens_per_second"] * step
    work = training_flops(config, tokens)
    rate, what = matmul_rate(config.engine.dtype, training_gpus(config))
    figures.append(Figure(what, rate / 1e12, "TFLOP/s"))
    trained = work["update"] / m["time/train"]
    figures.append(Figure("training (MFU)", trained / 1e12, "TFLOP/s", trained / rate, what))
    scored = work["score"] / m["time/score"]
    figures.append(Figure("forwards of phase score", scored / 1e12, "TFLOP/s", scored / rate, what))
    return figures


def training_flops(config: PolicyStage, tokens: float) -> dict[str, float]:
    """Floating-point operations of phase train ("update") and of the trained models' forwards in phase score.

    tokens: prompt and answer tokens of a step. PTX is taken to be as long.
    """
    models, ppo = config.models, config.ppo
    policy = matmul_parameters(Path(models.policy))
    critic = sum(matmul_parameters(Path(plan.model), head=False) for plan in critics(config))
    passes = 6.0 * ppo.epochs
    # Under an adapter the backward makes gradients of activations, and hardly any of weights.
    policy_passes = (4.0 if models.lora_rank else 6.0) * ppo.epochs
    with_ptx = 2.0 if config.data.ptx else 1.0
    before = policy * ((ppo.old_logprobs == "trainer") + models.adapter_off_is_reference)
    return {
        "update": tokens * (policy_passes * policy * with_ptx + passes * critic),
        "score": 2.0 * tokens * (before + critic),
    }


def training_gpus(config: PolicyStage) -> float:
    """GPUs of the training roles."""
    trained = {role.kind for role in config.roles() if role.training is not None}
    gpus = sum(config.cluster.of(kind).gpus * config.cluster.of(kind).workers for kind in trained)
    return max(1.0, gpus) if gpus else 0.0  # parts of a GPU: each may have all of it for a while
