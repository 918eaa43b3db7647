"""The benchmarks by name, and one run of some of them: table, JSON. Nothing heavy is imported at the top."""

from __future__ import annotations

import importlib
import shlex
import sys
import time
from pathlib import Path

from beaver_ray.errors import UserError
from beaver_ray.json_files import check_writable
from beaver_ray.options import near
from launch.bench.options import Options

BENCHMARKS = {
    "experience": "samples through the object store: Arrow against dicts of tensors",
    "weights": "a version of the weights to two receivers, against the memory copies it needs",
    "rollouts": "vLLM against HF generate, lengths with a long tail",
    "scoring": "score model and reference over finished sequences, against a matrix product",
    "raw-vllm": "the generator behind Ray against vLLM alone",
    "trainer": "the policy's update alone on long rows: tokens/s, MFU, memory",
    "sync": "new weights into a real generator: ways, GB/s, and whether log-probs agree",
    "iteration": "a whole Safe PPO iteration against the published loop",
    "step": "shares of a step's phases, tokens/s, training against a matrix product",
    "families": "tiny models of every family from SFT to Safe PPO, on Ray and in debug mode",
    "simulate": "the scheduler alone, with engines that sleep",
}
"""Name and what is measured; the module is the name with _ for -."""
READERS = {
    "--repetitions": tuple(name for name in BENCHMARKS if name != "families"),
    "--case": ("rollouts", "trainer", "sync", "iteration", "families", "simulate"),
    "--config": ("step",),
    "--set": ("trainer", "sync", "iteration", "step"),
    "--shape": ("scoring", "raw-vllm", "iteration", "step"),
}
"""Option and the benchmarks that read it."""


def run(names: list[str], out: Path | None, options: Options) -> None:
    """Run benchmarks in the order of BENCHMARKS (all of them without names), print a table each, write one JSON.

    The file is written anew after each, so that a failure loses nothing that was measured before. Raises UserError
    for an unknown name and for an option that none of them reads, before anything runs; at the end for a case that none
    has.
    """
    for name in names:
        if name not in BENCHMARKS:
            raise UserError(f"no benchmark is called {name!r}{near(name, BENCHMARKS)}")
    _check_read([name for name in BENCHMARKS if name in names or not names], options)
    from launch.bench.measure import Outcome, describe_machine, print_table, write_record

    if options.shape is not None:
        from launch.bench.models import SHAPES

        if options.shape not in SHAPES:
            raise UserError(f"--shape must be one of {', '.join(SHAPES)}, not {options.shape!r}")
    check_writable(out)
    record = {"command": shlex.join(["beaver-ray", *sys.argv[1:]]), "size": options.size, **describe_machine()}
    outcomes: dict[str, Outcome] = {}
    for name in BENCHMARKS:
        if name in names or not names:
            started = time.perf_counter()
            print(f"{name}: {BENCHMARKS[name]}", flush=True)
            outcome = importlib.import_module(f"launch.bench.{name.replace('-', '_')}").run(options)
            outcome.seconds = time.perf_counter() - started
            outcomes[name] = outcome
            print_table(name, outcome)
            if out is not None:
                write_record(out, record, outcomes)
    for part in options.cases:
        if not any(part in case for case in options.offered):
            raise UserError(f"--case {part}: no case is called so; there are {'; '.join(sorted(options.offered))}")


def _check_read(names: list[str], options: Options) -> None:
    """UserError for an option that none of these benchmarks reads."""
    given = {
        "--repetitions": options.repetitions,
        "--case": options.cases,
        "--config": options.config,
        "--set": options.overrides,
        "--shape": options.shape,
    }
    for option, readers in READERS.items():
        if given[option] and not set(names) & set(readers):
            raise UserError(f"{option} is for {', '.join(readers)}, not for {', '.join(names)}; leave it out")
    if options.shape and options.config and not set(names) & {*READERS["--shape"]} - {"step"}:
        raise UserError("--shape and --config: step takes the models that its configuration names; leave one out")
