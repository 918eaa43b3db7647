"""What the studies on small worlds share: command lines of the project, their options, and files of figures."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from beaver_ray.yaml_files import other_settings
from launch.config_files import load_config

CONFIGS = Path(__file__).parent.parent / "configs" / "local"
SPENT = "spent.json"
TARGET = 0.1
"""Violation rate that the recipes have as their limit."""
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"config": str(CONFIGS / "sft.yaml")},
    "reward_model": {"config": str(CONFIGS / "reward_model.yaml"), "set": {"epochs": 4}},
    "cost_model": {"config": str(CONFIGS / "cost_model.yaml")},
}
"""What a run of Safe PPO builds on, as entries of a pipeline."""


def study_options(
    doc: str | None, name: str, workspace: str, seeds: Sequence[int] | None, jobs: bool = True
) -> argparse.ArgumentParser:
    """The options that every study has; ``seeds`` are the default ones, None where a study has none.

    jobs: whether seeds may run side by side. Threads share torch's random numbers, so that a study which trains in its
    own process goes through them one by one.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if seeds is not None:
        parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    if jobs:
        parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--workspace", type=Path, default=Path(workspace))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / f"{name}.json")
    return parser


def launch(*arguments: str) -> dict[str, float]:
    """One command line of the project, in a process of its own; its error ends the benchmark.

    Returns its CPU seconds, which other runs beside it hardly change, and the most memory that it had, in MiB.
    """
    command = [sys.executable, "-m", "launch", *arguments]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=CONFIGS.parent.parent)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    return {"cpu_seconds": round(used.ru_utime + used.ru_stime, 1), "memory_mib": used.ru_maxrss // 1024}


def prepare(workspace: Path, seed: int, stages: Mapping[str, dict[str, Any]] = STAGES, **world: Any) -> None:
    """A world with these options, and the models of ``stages`` (name -> entry of a pipeline), for one seed."""
    workspace.mkdir(parents=True, exist_ok=True)
    pipeline = workspace / "pipeline.yaml"
    content = {"workspace": str(workspace), "world": {"seed": seed, **world}, "stages": list(stages.values())}
    pipeline.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    files = dict.fromkeys(Path(entry["config"]).stem for entry in stages.values())
    settings = [f"{file}.{s}" for file in files for s in ("debug=true", "cluster.threads=1", f"seed={seed}")]
    launch("pipeline", str(pipeline), *settings)


def last_fifth(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The evaluations among a run's metrics that lie in the last fifth of its steps."""
    return [line for line in lines if line["step"] > 0.8 * lines[-1]["step"] and "eval/reward" in line]


def trained(workspace: Path, name: str, seed: int, recipe: Path, settings: Sequence[str]) -> dict[str, float]:
    """Run ``recipe`` in debug mode, unless the run is there already; what it took, as `launch` says it.

    Ends the study where what is there is a run of other settings.
    """
    folder = workspace / name
    settings = [f"workspace={workspace}", f"name={name}", f"seed={seed}", "debug=true", *settings]
    if (folder / "final").is_dir():
        if other := other_settings(folder / "config.yaml", load_config(recipe, list(settings))):
            raise SystemExit(f"{folder} has other settings ({', '.join(other)}): delete it, or set another --workspace")
    else:
        spent = launch("train", str(recipe), *settings)
        (folder / SPENT).write_text(json.dumps(spent), encoding="utf-8")
    found: dict[str, float] = json.loads((folder / SPENT).read_text(encoding="utf-8"))
    return found


def command() -> str:
    """The command line of this study, less where its files lie and how many runs go side by side."""
    elsewhere = argparse.ArgumentParser(add_help=False)
    for option in ("--workspace", "--out", "--picture", "--jobs"):
        elsewhere.add_argument(option)
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *elsewhere.parse_known_args()[1]])


def described() -> dict[str, Any]:
    """What a file of figures opens with: how they were made, and on what."""
    packages = ("torch", "transformers", "deepspeed", "ray")
    hardware = f"{os.cpu_count()} CPU cores, {platform.machine()}, no GPU"
    return {"command": command(), "hardware": hardware, "versions": {name: version(name) for name in packages}}


def write(out: Path, figures: Mapping[str, Any]) -> None:
    """Write a file of figures."""
    out.write_text(json.dumps(described() | dict(figures), indent=2) + "\n", encoding="utf-8")
