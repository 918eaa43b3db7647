"""Tokens/s of vLLM's own `LLMEngine` against those of the generator behind Ray, driven by the scheduler of a run.

Both engines have the same EngineArgs and live in a Ray actor of their own, so that they share nothing but the machine.
The raw side is handed all prompts at once and stepped to the end inside its process: no Arrow, no calls, no log-probs
read out. Ours is what a training step does: `actors.driver.rollouts` hands prompts out and takes finished sequences in
chunks, with tokens and log-probs in Arrow in the object store. Where there is a GPU both share it, and take turns.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.driver.rollouts import Rollouts
from actors.driver.schedule import RolloutSchedule
from actors.machine.cluster import RayHandle
from actors.machine.handles import Group
from actors.machine.waits import fetch
from actors.roles.exchange import Exchange, Generator
from actors.roles.generator import GeneratorSpec, VllmGenerator, start_engine
from launch.bench.measure import Figure, Goal, Outcome, interleave, local_ray, medians
from launch.bench.models import SEVEN_B, SMALLER, choose_shape, random_prompts, write_policy
from launch.bench.options import Options
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
                seed=index if self._seeded else None,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self._engine.add_request(str(index), tokens_input(prompt), params)
        tokens = 0
        while self._engine.has_unfinished_requests():
            tokens += sum(len(o.outputs[0].token_ids) for o in self._engine.step() if o.finished)
        return time.perf_counter() - started, tokens

    def at_once(self, sequences: int) -> None:
        """At most so many sequences in flight from now on; no more than the engine was started for."""
        self._engine.engine_core.engine_core.scheduler.max_num_running_reqs = sequences


class RawAsyncEngine(RawEngine):
    """With vLLM's asynchronous scheduling, which a run leaves off: weights change between two of its steps."""

    def _start(self) -> Any:
        return start_engine(self.spec, self._seeded, async_scheduling=True)


def run(options: Options) -> Outcome:
    """Figures for 512 prompts, 64 at a time (16 and 4 where small; on a GPU 1,024, 128 and 512 at a time)."""
    gpu = torch.cuda.is_available()
    count, median = (16, 2) if options.small else (1024, 96) if gpu else (512, 24)
    sweep = (4,) if options.small else (128, 512) if gpu else (64,)
    shape = choose_shape(options, SMALLER)
    repetitions = options.repetitions or (1 if options.small else 2 if gpu else 7)
    prompts, lengths = random_prompts(count, shape), tailed_lengths(count, median, TAIL)
    tokens, threads = int(lengths.sum()), 1
    # Three engines of 7B would leave no room for their caches.
    kinds: dict[str, type] = {"raw": RawEngine}
    kinds |= {"raw, asynchronous": RawAsyncEngine} if gpu and shape is not SEVEN_B else {}
    outcome = Outcome([])
    with tempfile.TemporaryDirectory() as folder, local_ray(cpus=3, threads=threads):
        model = write_policy(Path(folder), shape, positions=32 + int(lengths.max()))
        spec = generator_spec(str(model), int(lengths.max()), max(sweep), threads)
        part = round(1.0 / (1 + len(kinds)), 4) if gpu else 0.0
        spec = replace(spec, dtype=shape.dtype)
        if gpu:
            spec = replace(spec, gpu_memory_utilization=0.9 * part, shares_gpu=True)
        raw: dict[str, Any] = {n: ray.remote(num_cpus=1, num_gpus=part)(kind).remote(spec) for n, kind in kinds.items()}
        generators = start_generator(spec, part)
        for name, actor in raw.items():
            fetch(actor.at_once.remote(max(sweep)), f"start of {name}", WAIT_S)
        generators.run(Generator.exchange, None, Exchange())  # they have started
        for sequences in sweep:
            sides: dict[str, Callable[[], float]] = {}
            for name, actor in raw.items():
                fetch(actor.at_once.remote(sequences), name, WAIT_S)
                sides[name] = partial(generate_raw, actor, prompts, lengths)
            sides["ours"] = partial(generate_ours, generators, sequences, prompts, lengths)
            seconds = interleave(sides, repetitions, timed=float)
            suffix = f", {sequences} at a time" if len(sweep) > 1 else ""
            outcome.samples |= {f"{name}{suffix}": values for name, values in seconds.items()}
            rates = {name: tokens / middle for name, middle in medians(seconds).items()}
            ours, against = rates.pop("ours"), rates["raw"]
            goal = Goal(0.97 if gpu else 0.9)
            outcome.figures.append(
                Figure(f"generator behind Ray{suffix}", ours, "tokens/s", ours / against, "raw vLLM", goal)
            )
            for name, rate in rates.items():
                named = f"raw vLLM{name.removeprefix('raw')}{suffix}"
                outcome.figures.append(Figure(named, rate, "tokens/s", rate / against, "raw vLLM"))
    outcome.settings |= {"model": shape.name, "dtype": shape.dtype, "prompts": count, "sequences at a time": sweep}
    outcome.settings |= {"threads": threads, "tokens": tokens, "longest answer": int(lengths.max())}
    outcome.settings |= {"repetitions": repetitions}
    return outcome


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
    collected = rollouts.gather(1)
    if collected.generated_tokens != lengths.sum():
        raise RuntimeError(f"the generator made {collected.generated_tokens} tokens of {lengths.sum()}")
    return collected.seconds
