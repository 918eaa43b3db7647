"""Frozen models over finished sequences: the score model and the reference, against a matrix product of their dtype.

In this process, on all of its cores or its GPU, packed as in training. The work that counts is 2 * parameters for each
token, the head's for each token of an answer.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pyarrow as pa

from actors.roles.scorer import Reference, Scorer
from beaver_ray import experience
from beaver_ray.score_sources import ScorerSetting
from launch.bench.measure import Figure, Outcome, interleave, matmul_rate, medians
from launch.bench.models import LARGER, choose_shape, matmul_parameters, random_prompts, write_workspace
from launch.bench.options import Options

BUDGET = 4096  # tokens of a micro-batch


def run(options: Options) -> Outcome:
    """Figures for 256 sequences with answers of 128 tokens (8 of 6 where small)."""
    count, answer = (8, 6) if options.small else (256, 128)
    shape = choose_shape(options, LARGER)
    repetitions = options.repetitions or (1 if options.small else 5)
    threads = os.cpu_count() or 1
    prompts = random_prompts(count, shape)
    answers = random_prompts(count, shape, (answer, answer), seed=1)
    ids = list(range(count))
    columns = {"sample_id": ids, "prompt_tokens": prompts, "response_tokens": answers}
    batch = experience.make_batch({**columns, "finish_reason": ["length"] * count})
    with tempfile.TemporaryDirectory() as folder:
        workspace = write_workspace(Path(folder), shape, count, answer)
        policy, score = workspace / "policy", workspace / "score"
        tokens, head = tokens_of(batch), shape.vocabulary * shape.hidden
        work = {
            "score model": 2.0 * matmul_parameters(score, head=False) * tokens,
            "reference": 2.0 * ((matmul_parameters(policy) - head) * tokens + head * count * answer),
        }
        scorer = Scorer(
            str(score), {"reward": 0, "cost/harm": 1}, ScorerSetting(str(policy), shape.dtype, BUDGET, threads)
        )
        reference = Reference(str(policy), shape.dtype, BUDGET, 1.0, threads, False)
        sides = {"score model": lambda: scorer.score(batch), "reference": lambda: reference.logprobs(batch)}
        seconds = interleave(sides, repetitions)
        rate, what = matmul_rate(shape.dtype, gpus=1.0)
    figures = [Figure(what, rate / 1e12, "TFLOP/s")]
    for name, middle in medians(seconds).items():
        figures.append(Figure(name, tokens / middle, "tokens/s"))
        reached = work[name] / middle
        figures.append(Figure(f"{name}: work", reached / 1e12, "TFLOP/s", reached / rate, what))
    settings = {"model": shape.name, "dtype": shape.dtype, "sequences": count, "answer": answer, "threads": threads}
    return Outcome(figures, settings | {"repetitions": repetitions}, seconds)


def tokens_of(batch: pa.RecordBatch) -> int:
    """Prompt and answer tokens of a batch."""
    return sum(len(experience.flat(batch, name)) for name in ("prompt_tokens", "response_tokens"))
