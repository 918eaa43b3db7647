"""The policy trainer alone: tokens/s, MFU and memory of its update on long packed rows, with nothing else on the GPU.

Shapes and lengths are those that prime-rl publishes for its trainer on one H100 (benchmarks/baselines of its
repository, autumn 2026); its figures stand beside ours. An update is one optimizer step over TOKENS tokens, of
sequences as long as a row: PPO's clipped loss, or the cross-entropy of SFT. Gradients are checkpointed. The models have
the sizes of Qwen3 in Llama's architecture, with random weights.

The work that counts for MFU is 6 for each parameter and token (4 where LoRA makes no gradients of them) and
6 * layers * heads * head size * length for causal attention, over the 989 TFLOP/s that an H100's data sheet names for
bfloat16. With that formula prime-rl's own tokens/s give the MFU that it publishes for full training.
"""

from __future__ import annotations

import gc
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.machine.engine import LossTerms
from actors.roles.micro_batches import PackedResponses, SequenceRows
from actors.roles.policy import PolicyTrainer
from beaver_ray import experience
from beaver_ray.method.losses import cross_entropy_loss
from beaver_ray.models.folders import count_parameters
from beaver_ray.models.logprobs import response_logprobs
from beaver_ray.policy_options import PolicyConfig
from launch.bench.measure import Figure, Outcome, matmul_rate
from launch.bench.models import FOUR_B, SIX_TENTHS_B, TINY, Shape, random_prompts, write_policy
from launch.bench.options import Options
from launch.config_files import parse_config

TOKENS = 65_536
PEAK = 989e12
PROMPT = 16


@dataclass(frozen=True)
class Case:
    """One row of the table; `published` are tokens/s of prime-rl's trainer on one H100."""

    shape: Shape
    loss: str
    length: int
    lora_rank: int = 0
    published: float | None = None

    @property
    def name(self) -> str:
        """How the table calls it."""
        return f"{self.shape.name}, {self.loss}{f', LoRA {self.lora_rank}' if self.lora_rank else ''}, {self.length}"


CASES = (
    Case(SIX_TENTHS_B, "PPO", 16_384, published=11_896),
    Case(SIX_TENTHS_B, "SFT", 8_192, published=26_005),
    Case(FOUR_B, "PPO", 16_384, lora_rank=16, published=6_229),
    Case(SIX_TENTHS_B, "PPO", 65_536, published=10_147),
    Case(FOUR_B, "PPO", 65_536, lora_rank=16, published=4_164),
)


def run(options: Options) -> Outcome:
    """Figures of every case (one of 64 tokens where small)."""
    cases = (Case(TINY, "PPO", 64), Case(TINY, "SFT", 64, lora_rank=2)) if options.small else CASES
    outcome = Outcome([])
    rate, what = matmul_rate("bfloat16" if not options.small else "float32", gpus=1.0)
    outcome.figures.append(Figure(what, rate / 1e12, "TFLOP/s"))
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            if options.wants(case.name):
                measure(case, Path(folder), options, outcome)
    return outcome


def measure(case: Case, folder: Path, options: Options, outcome: Outcome) -> None:
    """Add the figures of one case."""
    shape = case.shape
    model = folder / shape.name
    if not model.is_dir():
        write_policy(model, shape, positions=TOKENS)
    trainer = PolicyTrainer(trainer_config(case, model, options), 0, 1)
    trainer.setup(*trainer.rendezvous())
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    rows = max(1, (2 * case.length if options.small else TOKENS) // case.length)
    update = partial(ppo_update if case.loss == "PPO" else sft_update, trainer, made_up(shape, rows, case.length))
    seconds = []
    for _ in range(1 + (options.repetitions or (1 if options.small else 2))):
        started = time.perf_counter()
        figures = update()
        if not np.isfinite(figures):
            raise RuntimeError(f"{case.name}: the update's figures are not finite")
        seconds.append(time.perf_counter() - started)
    outcome.samples[case.name] = seconds[1:]
    tokens = rows * case.length / float(np.median(seconds[1:]))
    ratio = (tokens / case.published, "prime-rl on an H100, as published") if case.published else ()
    outcome.figures.append(Figure(case.name, tokens, "tokens/s", *ratio))
    print(f"{case.name}: {tokens:,.0f} tokens/s", flush=True)
    reached = tokens * work_per_token(case, count_parameters(model))
    mfu = (reached / PEAK, "an H100's peak (MFU)")
    outcome.figures.append(Figure(f"{case.name}: work", reached / 1e12, "TFLOP/s", *mfu))
    if torch.cuda.is_available():
        outcome.figures.append(Figure(f"{case.name}: memory", torch.cuda.max_memory_allocated() / 2**30, "GiB"))
    del trainer, update
    gc.collect()
    torch.cuda.empty_cache()


def trainer_config(case: Case, model: Path, options: Options) -> PolicyConfig:
    """Of a trainer with one row in a forward."""
    dtype = case.shape.dtype
    tree: dict[str, Any] = {
        "stage": "ppo",
        "name": "trainer",
        "steps": 100,
        "models": {"policy": str(model), "reward": str(model), "lora_rank": case.lora_rank, "lora_alpha": 32},
        "data": {"prompts": ["none"], "max_prompt_tokens": PROMPT},
        "rollout": {"max_new_tokens": case.length - PROMPT},
        "engine": {"dtype": dtype, "micro_batch_tokens": case.length, "gradient_checkpointing": True},
    }
    config = parse_config(tree, list(options.overrides), "bench trainer")
    assert isinstance(config, PolicyConfig)
    return config


def made_up(shape: Shape, rows: int, length: int, seed: int = 0) -> Any:
    """Experience of so many sequences of random tokens, with random advantages."""
    rng = np.random.default_rng(seed)
    responses = random_prompts(rows, shape, (length - PROMPT, length - PROMPT), seed=seed)
    logprobs = [np.full(len(r), -np.log(shape.vocabulary), dtype=np.float32) for r in responses]
    return experience.make_batch(
        {
            "sample_id": np.arange(rows),
            "prompt_tokens": random_prompts(rows, shape, (PROMPT, PROMPT), seed=seed + 1),
            "response_tokens": responses,
            "rollout_logprobs": logprobs,
            "logprobs": logprobs,
            "advantages": [rng.standard_normal(len(r)).astype(np.float32) for r in responses],
        }
    )


def ppo_update(trainer: PolicyTrainer, batch: Any) -> float:
    """One step of PPO; its loss, which waits for the device."""
    return trainer.update(batch, 1)["policy/loss"]


def sft_update(trainer: PolicyTrainer, batch: Any) -> float:
    """One step of cross-entropy over the answers."""
    rows = SequenceRows(batch)
    budget = trainer.config.engine.micro_batch_tokens
    micro_batches = list(rows.micro_batches(range(batch.num_rows), budget, 0, 1, trainer.engine.device))
    tokens = int(rows.response_lengths.sum())

    def loss(micro_batch: PackedResponses) -> LossTerms:
        packed, targets_T = micro_batch.packed, micro_batch.targets_T
        model = trainer.engine.engine
        logprobs_T, _ = response_logprobs(
            model, packed.input_ids, packed.position_ids, micro_batch.positions_T, targets_T
        )
        return LossTerms(cross_entropy_loss(logprobs_T, torch.full_like(logprobs_T, 1 / tokens))[0])

    return trainer.engine.step(micro_batches, loss)["loss"]


def work_per_token(case: Case, parameters: int) -> float:
    """Floating-point operations of training on one token."""
    shape = case.shape
    attention = shape.layers * shape.heads * (shape.head_size or shape.hidden // shape.heads) * case.length
    return (4 if case.lora_rank else 6) * parameters + 6 * attention
