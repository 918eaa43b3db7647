"""A Safe PPO run on the GPU of this machine whose processes are killed at random moments; `make chaos` in short.

    python benchmarks/gpu_chaos.py runs/small-world --kills 10 --steps 40 --out chaos.json

WORKSPACE is one that `make train` has left: the run starts from its models. All roles share one GPU, so that what a
killed process held there must come free for the one that takes its place. Every class of process is killed in turn, at
moments that the seed decides. The run must reach its end, with every prompt trained on exactly once an epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from beaver_ray.runs import read_metrics  # noqa: E402
from tests.chaos import check  # noqa: E402

CLASSES = ("VllmGenerator", "Scorer", "Reference", "PolicyTrainer", "Critic", "ExperienceBuilder")
LONGEST_S = 570.0


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path, metavar="WORKSPACE")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = options.workspace / "gpu-chaos"
    shutil.rmtree(folder, ignore_errors=True)
    tree = yaml.safe_load((ROOT / "configs" / "local" / "safe_ppo.yaml").read_text(encoding="utf-8"))
    tree |= {"workspace": str(options.workspace), "name": folder.name, "steps": options.steps}
    tree |= {"save_every": 2, "trajectory_every": 1}
    config = options.workspace / "gpu-chaos.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    began = time.monotonic()
    driver = subprocess.Popen([sys.executable, "-m", "launch", "train", str(config)], cwd=ROOT)
    killed = kill_all(driver, folder, options.kills, options.steps, random.Random(options.seed))
    seconds = time.monotonic() - began
    found = {
        "killed": dict(sorted(killed.items())),
        "seconds": round(seconds),
        "steps": options.steps,
        "result": check(folder, options.steps),
        "held out": json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["violation_rate/harm"],
    }
    print(json.dumps(found, indent=2))
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def kill_all(driver: subprocess.Popen[bytes], folder: Path, kills: int, steps: int, rng: random.Random) -> Counter[str]:
    """Kill so many at random moments before the last tenth of the run, and let it come to its end."""
    killed: Counter[str] = Counter()
    moments = sorted(rng.uniform(1, 0.9 * steps) for _ in range(kills))
    deck: list[str] = []
    deadline = time.monotonic() + LONGEST_S
    while driver.poll() is None:
        if time.monotonic() > deadline:
            driver.kill()
            raise AssertionError(f"the run hangs, or is too slow: it has not ended after {LONGEST_S:g} s")
        time.sleep(0.1)
        done = len(read_metrics(folder)) if (folder / "metrics.jsonl").is_file() else 0
        if killed.total() == kills or done < moments[killed.total()]:
            continue
        deck = deck or rng.sample(CLASSES, len(CLASSES))
        alive = processes(driver.pid, deck[-1])
        if alive:
            os.kill(rng.choice(alive), signal.SIGKILL)
            killed[deck.pop()] += 1
            print(f"--- killed after step {done}: {killed.total()} in all, {dict(killed)}", flush=True)
            time.sleep(rng.uniform(0, 2))
        else:  # it is being started anew; its turn comes later
            deck.insert(0, deck.pop())
    assert driver.returncode == 0, f"the run ended with {driver.returncode}"
    assert killed.total() == kills, f"the run was over after {killed.total()} kills"
    return killed


def processes(parent: int, name: str) -> list[int]:
    """Processes of an actor class that belong to this run."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            title = process.cmdline()[0]
        except (psutil.NoSuchProcess, psutil.ZombieProcess, IndexError):
            continue
        if title.removeprefix("ray::").partition(".")[0] == name:
            found.append(process.pid)
    return sorted(found)


if __name__ == "__main__":
    main()
