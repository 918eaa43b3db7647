"""vLLM against HF `generate`: the same prompts, the same lengths of answers, 64 sequences at a time, two threads.

Every answer is given its length, so that both sides make exactly the same number of tokens whatever the weights are.
HF's side is transformers' own `model.generate` on left-padded batches, as the published loop and its relatives use it:
a batch lasts as long as its longest answer, and only the tokens that were asked for are counted. vLLM takes a new
sequence in as soon as one ends. With equal lengths there is nothing to gain from that; that row says what the
engines themselves are worth.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from actors.roles.exchange import PROMPT_SCHEMA, Exchange
from actors.roles.generator import GeneratorSpec, VllmGenerator
from launch.bench.measure import Figure, Goal, Outcome, interleave, medians
from launch.bench.models import EOS, PAD, SMALLER, TINY, random_prompts, write_policy
from launch.bench.options import Options

TAIL = 20.0  # longest answer over the median one


def run(options: Options) -> Outcome:
    """Figures for 256 prompts, 64 at a time (8 and 4 where small)."""
    shape, count, batch, median = (TINY, 8, 4, 2) if options.small else (SMALLER, 256, 64, 24)
    repetitions = options.repetitions or (1 if options.small else 5)
    threads = 1 if options.small else 2
    prompts = random_prompts(count, shape)
    lengths = {
        "long tail": tailed_lengths(count, median, TAIL),
        "equal": np.full(count, 2 * median),
    }
    cases = {name: length for name, length in lengths.items() if options.wants(name)}
    longest = max(int(length.max()) for length in lengths.values())
    figures: list[Figure] = []
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = write_policy(Path(folder), shape, positions=32 + longest)
        vllm = VllmGenerator(generator_spec(str(model), longest, batch, threads))
        hf = load_hf(model, threads)
        for name, length in cases.items():
            tokens = int(length.sum())
            batches = batch_prompts(prompts, length, batch)
            seconds = interleave(
                {
                    f"vLLM, {name}": partial(generate_vllm, vllm, prompts, length),
                    f"HF, {name}": partial(generate_hf, hf, batches),
                },
                repetitions,
            )
            samples |= seconds
            middle = medians(seconds)
            ours, theirs = tokens / middle[f"vLLM, {name}"], tokens / middle[f"HF, {name}"]
            goal = Goal(2) if name == "long tail" else None
            figures.append(Figure(f"vLLM, {name}", ours, "tokens/s", ours / theirs, "HF generate", goal))
            figures.append(Figure(f"HF generate, {name}", theirs, "tokens/s"))
            # What a batch that ends together cannot avoid, whatever its engine.
            wasted = sum(len(p) * int(n.max()) for p, n in batches) / tokens
            figures.append(Figure(f"HF generate, {name}: positions computed for one token", wasted, ""))
        vllm.close()
    settings = {
        "model": shape.name,
        "prompts": count,
        "sequences at a time": batch,
        "threads": threads,
        "dtype": "float32",
        "lengths": {n: {"median": float(np.median(v)), "max": int(v.max())} for n, v in lengths.items()},
        "repetitions": repetitions,
    }
    return Outcome(figures, settings, samples)


def tailed_lengths(count: int, median: int, tail: float) -> np.ndarray:
    """Log-normal lengths [count], shuffled: their median is `median`, their longest `tail` times that.

    They are the distribution's quantiles, so that the tail does not depend on luck.
    """
    ranks = np.random.default_rng(0).permutation(count)
    normal = torch.distributions.Normal(0.0, 1.0).icdf(torch.from_numpy((ranks + 0.5) / count)).numpy()
    lengths = np.round(median * np.exp(normal * np.log(tail) / normal.max()))
    return np.maximum(lengths, 1).astype(np.int32)


def generator_spec(model: str, longest: int, sequences: int, threads: int) -> GeneratorSpec:
    """Of a generator whose answers have the length that each prompt asks for."""
    return GeneratorSpec(
        model,
        dtype="float32",
        max_model_len=32 + longest,
        max_new_tokens=longest,
        max_sequences=sequences,
        eos_token_ids=(),  # no answer ends by itself
        kv_cache_gib=0.5,
        threads=threads,
    )


def prompt_batch(prompts: list[list[int]], lengths: np.ndarray, first_id: int = 0) -> pa.RecordBatch:
    """Prompts as a generator takes them, each with the length of its answer."""
    ids = np.arange(first_id, first_id + len(prompts))
    batch = pa.RecordBatch.from_pydict(
        {"sample_id": ids, "prompt_id": ids, "prompt_tokens": prompts}, schema=PROMPT_SCHEMA
    )
    return batch.append_column("max_new_tokens", pa.array(lengths, pa.int32()))


def generate_vllm(generator: VllmGenerator, prompts: list[list[int]], lengths: np.ndarray) -> None:
    """All answers, the sequences in flight refilled as they end."""
    _, finished = generator.exchange(prompt_batch(prompts, lengths), Exchange(min_finished=len(prompts)))
    made = sum(len(row) for row in finished.column("response_tokens"))
    if made != lengths.sum():
        raise RuntimeError(f"vLLM made {made} tokens of {lengths.sum()}")


def load_hf(model: Path, threads: int) -> Any:
    """transformers' model on the same device, in the same dtype."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, use_safetensors=True).eval()


def batch_prompts(prompts: list[list[int]], lengths: np.ndarray, size: int) -> list[tuple[list[list[int]], np.ndarray]]:
    """Micro-batches in the order of the data: prompts and the lengths of their answers."""
    return [(prompts[i : i + size], lengths[i : i + size]) for i in range(0, len(prompts), size)]


@torch.inference_mode()
def generate_hf(model: Any, batches: list[tuple[list[list[int]], np.ndarray]]) -> None:
    """`generate` on one left-padded micro-batch after another, each to the end of its longest answer."""
    for prompts, lengths in batches:
        longest = max(len(p) for p in prompts)
        ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        new = int(lengths.max())
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
