"""Tokens/s of vLLM's own `LLMEngine` against those of the generator behind Ray, driven by the scheduler of a run.

Both engines have the same EngineArgs and live in a Ray actor of their own, so that they share nothing but the machine.
The raw side is handed all prompts at once and stepped to the end inside its process: no Arrow, no calls, no log-probs
read out. Ours is what a training step does: `actors.rollouts` hands prompts out and takes finished sequences in
chunks, with tokens and log-probs in Arrow in the object store. Where there is a GPU both share it, and take turns.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.cluster import RayHandle
from actors.generator import GeneratorSpec, VllmGenerator
from actors.handles import Group
from actors.rollouts import Rollouts
from actors.schedule import RolloutSchedule
from actors.waits import fetch
from launch.bench.measure import Figure, Goal, Outcome, interleave, local_ray, medians
from launch.bench.models import SMALLER, choose_shape, random_prompts, write_policy
from launch.bench.registry import Options
from launch.bench.rollouts import TAIL, generator_spec, prompt_batch, tailed_lengths

WAIT_S = 600.0


class RawEngine(VllmGenerator):
    """The same engine, without anything of ours between a request and its end."""

    def generate(self, prompts: list[list[int]], lengths: list[int]) -> tuple[float, int]:
        """Seconds and tokens of all answers."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        started = time.perf_counter()
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            params = SamplingParams(
                temperature=self.spec.temperature,
                max_tokens=length,
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                seed=index,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self._engine.add_request(str(index), tokens_input(prompt), params)
        tokens = 0
        while self._engine.has_unfinished_requests():
            tokens += sum(len(o.outputs[0].token_ids) for o in self._engine.step() if o.finished)
        return time.perf_counter() - started, tokens


def run(options: Options) -> Outcome:
    """Figures for 512 prompts, 64 at a time (16 and 4 where small; 1,024 and 256, longer answers, on a GPU)."""
    gpu = torch.cuda.is_available()
    count, batch, median = (16, 4, 2) if options.small else (1024, 256, 96) if gpu else (512, 64, 24)
    shape = choose_shape(options, SMALLER)
    repetitions = options.repetitions or (1 if options.small else 7)
    prompts, lengths = random_prompts(count, shape), tailed_lengths(count, median, TAIL)
    tokens, threads = int(lengths.sum()), 1
    with tempfile.TemporaryDirectory() as folder, local_ray(cpus=2, threads=threads):
        model = write_policy(Path(folder), shape, positions=32 + int(lengths.max()))
        spec = generator_spec(str(model), int(lengths.max()), batch, threads)
        spec = replace(spec, dtype=shape.dtype, gpu_memory_utilization=0.4)
        part = 0.5 if gpu else 0.0
        raw: Any = ray.remote(num_cpus=1, num_gpus=part)(RawEngine).remote(spec)
        # On one GPU the second engine measures what the first has left it.
        fetch(raw.capacity.remote(), "start of raw vLLM", WAIT_S)
        generators = start_generator(spec, part)
        seconds = interleave(
            {
                "raw": lambda: generate_raw(raw, prompts, lengths),
                "ours": lambda: generate_ours(generators, batch, prompts, lengths),
            },
            repetitions,
            timed=float,
        )
    middle = medians(seconds)
    ours, theirs = tokens / middle["ours"], tokens / middle["raw"]
    figures = [
        Figure("generator behind Ray", ours, "tokens/s", ours / theirs, "raw vLLM", Goal(0.9)),
        Figure("raw vLLM", theirs, "tokens/s"),
    ]
    settings = {"model": shape.name, "dtype": shape.dtype, "prompts": count, "sequences at a time": batch}
    settings |= {"threads": threads, "tokens": tokens, "longest answer": int(lengths.max()), "repetitions": repetitions}
    return Outcome(figures, settings, seconds)


def generate_raw(engine: Any, prompts: list[list[int]], lengths: np.ndarray) -> float:
    """Seconds of the raw side, taken inside its process."""
    seconds, tokens = fetch(engine.generate.remote(prompts, lengths.tolist()), "raw vLLM", WAIT_S)
    if tokens != lengths.sum():
        raise RuntimeError(f"raw vLLM made {tokens} tokens of {lengths.sum()}")
    return float(seconds)


def start_generator(spec: GeneratorSpec, gpus: float) -> Group:
    """One generator in an actor."""
    actor = ray.remote(num_cpus=1, num_gpus=gpus)(VllmGenerator).remote(spec)
    return Group("rollout", [RayHandle("rollout", actor)], WAIT_S)


def generate_ours(generators: Group, capacity: int, prompts: list[list[int]], lengths: np.ndarray) -> float:
    """Seconds of one synchronous step's generation, taken in the driver."""
    batch = prompt_batch(prompts, lengths)
    rollouts = Rollouts(generators, capacity, WAIT_S, RolloutSchedule(steps=1), lambda _: batch)
    collected = rollouts.take(1)
    if collected.generated_tokens != lengths.sum():
        raise RuntimeError(f"the generator made {collected.generated_tokens} tokens of {lengths.sum()}")
    return collected.seconds
