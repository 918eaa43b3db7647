"""A Safe PPO run on a local Ray cluster of three nodes, whose processes are killed at random moments.

    python -m tests.chaos --folder runs/chaos --kills 30 --seed 0    # or `make chaos`

The models that it starts from are trained first, on the small world, where --folder has none.

Every role is killed in turn, in an order and at moments, over the whole run, that the seed decides: generators,
scorers, the reference, the policy, the critics, the experience builder, the driver, and the whole node of the
generators, which comes back. The run must reach its end. Then every prompt must have been trained on exactly once an
epoch in the steps that count, and the log must name every rollback; with a small world the final violation rate must be
within its bar.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import ray
import yaml
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from beaver_ray.config_files import load_pipeline
from beaver_ray.runs import is_finished, read_metrics
from launch.pipeline import build_world, run_stage

ROOT = Path(__file__).parents[1]
KINDS = ("rollout", "reward", "cost", "reference", "policy", "reward_critic", "cost_critic", "experience")
LONGEST_S = 3600.0
LAST_KILL = 0.95  # share of the steps after which nobody dies any more
PAUSE_S = 3.0  # a kill falls anywhere into so many seconds after its step, about as long as a step takes
BAR = 0.03
"""What the violation rate on held-out prompts, over the last fifth of training, may be above its target."""


@dataclass
class Nodes:
    """Three raylets on this machine; generators run on the third alone."""

    cluster: Any = None
    generators: Any = None
    losses: int = 0

    def start(self) -> None:
        """Start them."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # The dashboard answers the question which process is which.
        head = {"num_cpus": 4, "labels": {"kind": "training"}, "include_dashboard": True, "dashboard_port": port}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.cluster.add_node(num_cpus=4, labels={"kind": "training"})
        self.add()

    def add(self) -> None:
        """The generators' node."""
        self.generators = self.cluster.add_node(num_cpus=4, labels={"kind": "rollout"})

    def lose(self) -> None:
        """The generators' node disappears, and comes back after a while."""
        self.cluster.remove_node(self.generators, allow_graceful=False)
        time.sleep(5)
        self.add()
        self.losses += 1

    def stop(self) -> None:
        """End them."""
        self.cluster.shutdown()


@dataclass
class Chaos:
    """One run and its killer."""

    nodes: Nodes
    config: Path
    random: random.Random
    killed: Counter[str] = field(default_factory=Counter)
    driver: Any = None
    driver_started: float = 0.0

    def start_driver(self) -> None:
        """`beaver-ray train`, which goes on where an earlier one ended."""
        environment = os.environ | {"RAY_ADDRESS": self.nodes.cluster.address, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "launch", "train", str(self.config), "resume=true"]
        self.driver, self.driver_started = subprocess.Popen(command, cwd=ROOT, env=environment), time.time()

    def under_way(self) -> bool:
        """Whether a step has ended since the driver was started."""
        metrics = self.config.parent / "chaos" / "metrics.jsonl"
        return metrics.is_file() and metrics.stat().st_size > 0 and metrics.stat().st_mtime > self.driver_started + 1

    def steps_done(self) -> int:
        """Steps that count, so far."""
        metrics = self.config.parent / "chaos" / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    def alive(self) -> dict[str, int]:
        """The run's actors: name without the run's tag, and process id."""
        address = self.nodes.cluster.head_node.gcs_address
        actors = list_actors(address=address, filters=[("state", "=", "ALIVE")], detail=True)
        return {actor.name.split(":")[0]: actor.pid for actor in actors if ":" in actor.name}

    def kill(self, role: str) -> bool:
        """Kill one process of a role; False where none is alive."""
        if role == "driver":
            self.driver.kill()
            self.driver.wait()
            self.start_driver()
        elif role == "node":
            self.nodes.lose()
        else:
            candidates = sorted((n, pid) for n, pid in self.alive().items() if re.split(r"[-.]\d|-new", n)[0] == role)
            pid = self.random.choice(candidates)[1] if candidates else None
            if pid is None or not psutil.pid_exists(pid):
                return False
            os.kill(pid, signal.SIGKILL)
        self.killed[role] += 1
        print(f"--- killed after step {self.steps_done()}: {role}, {self.killed.total()} in all", flush=True)
        return True

    def run(self, kills: int, roles: list[str], steps: int) -> None:
        """Kill so many at random moments of a run of ``steps`` steps, and let it come to its end."""
        moments = sorted(self.random.uniform(1, LAST_KILL * steps) for _ in range(kills))
        deadline = time.monotonic() + LONGEST_S
        deck: list[str] = []
        self.start_driver()
        while self.driver.poll() is None:
            if time.monotonic() > deadline:
                raise AssertionError(f"the run hangs: it has not ended after {LONGEST_S:g} s")
            over = self.killed.total() == kills
            if over or not self.under_way() or self.steps_done() < moments[self.killed.total()]:
                time.sleep(0.2)
                continue
            deck = deck or self.random.sample(roles, len(roles))
            time.sleep(self.random.uniform(0, PAUSE_S))
            # A role that is just being started anew has its turn later.
            if self.driver.poll() is None and not self.kill(deck[-1]):
                deck.insert(0, deck.pop())
                continue
            deck.pop()
        assert self.driver.returncode == 0, f"the run ended with {self.driver.returncode}"
        assert self.killed.total() == kills, f"the run was over after {self.killed.total()} kills"


def write_config(source: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """The stage of ``source`` as it is run here: on three nodes, with a checkpoint every other step."""
    tree = yaml.safe_load(source.read_text(encoding="utf-8")) | {"name": "chaos", "save_every": 2} | changes
    tree["trajectory_every"] = 1
    placement = {kind: {"cpus": 0.1, "labels": {"kind": "training"}} for kind in KINDS}
    placement["rollout"] = {"workers": 2, "cpus": 0.5, "labels": {"kind": "rollout"}}
    tree["cluster"] = {"threads": 1, "placement": placement, "step_timeout": 300.0, "start_timeout": 300.0}
    path = folder / "chaos.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def roles_of(config: Path) -> list[str]:
    """All that can be killed in a run of this stage."""
    names = [c["name"] for c in yaml.safe_load(config.read_text(encoding="utf-8"))["constraints"]]
    scored = [f"cost-{name}" for name in names] + [f"critic-{name}" for name in names]
    return ["rollout", "reward", "reference", "policy", "critic-reward", "experience", *scored, "driver", "node"]


def check(folder: Path, steps: int) -> str:
    """Nothing was lost and nothing trained twice in the steps that count; AssertionError otherwise."""
    assert [row["step"] for row in read_metrics(folder)] == list(range(1, steps + 1))
    files = sorted((folder / "trajectories").glob("*.parquet"))
    tables = [pq.read_table(file, columns=["sample_id", "prompt_id"]) for file in files]
    assert len(tables) == steps
    samples = [sample for table in tables for sample in table["sample_id"].to_pylist()]
    assert sorted(samples) == list(range(len(samples))), "a sample is missing or was trained on twice"
    prompts = [p for _, p in sorted(zip(samples, (p for t in tables for p in t["prompt_id"].to_pylist()), strict=True))]
    size = max(prompts) + 1
    for epoch in range(len(prompts) // size):
        assert sorted(prompts[epoch * size : (epoch + 1) * size]) == list(range(size)), f"epoch {epoch + 1}"
    notes = (folder / "notes.log").read_text(encoding="utf-8").splitlines()
    count = {word: sum(word in note for note in notes) for word in ("rolled back", "resumed", "anew", "is lost")}
    return f"{len(samples)} samples, each once; in the log: {count}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"), help="workspace")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=80)
    options = parser.parse_args()
    pipeline, stages = load_pipeline(
        ROOT / "configs" / "local" / "pipeline.yaml", [f"workspace={options.folder.resolve()}"]
    )
    build_world(options.folder / "world", pipeline.world or {})
    for stage in stages[:-1]:
        run_stage(stage, is_finished(stage.folder))
    shutil.rmtree(options.folder / "chaos", ignore_errors=True)
    changes = {"workspace": str(options.folder.resolve()), "steps": options.steps}
    config = write_config(ROOT / "configs" / "local" / "safe_ppo.yaml", options.folder, changes)
    print(run_chaos(config, options.kills, options.seed, options.steps))
    folder = options.folder / "chaos"
    print(check(folder, options.steps))
    final = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["violation_rate/harm"]
    rows = [row["eval/violation_rate/harm"] for row in read_metrics(folder) if "eval/violation_rate/harm" in row]
    last = rows[-max(1, len(rows) // 5) :]
    rate = sum(last) / len(last)
    print(
        f"violation rate {rate:.3f} over the last fifth, {final['mean']:.3f} at the end, target {final['target']:.3f}"
    )
    assert rate <= final["target"] + BAR


def run_chaos(config: Path, kills: int, seed: int, steps: int, roles: list[str] | None = None) -> str:
    """Run the stage of ``steps`` steps to its end under kills; what was killed, and how long it took."""
    began = time.monotonic()
    nodes = Nodes()
    nodes.start()
    try:
        chaos = Chaos(nodes, config, random.Random(seed))
        chaos.run(kills, roles or roles_of(config), steps)
    finally:
        nodes.stop()
        if ray.is_initialized():
            ray.shutdown()
    return f"seed {seed}: killed {dict(sorted(chaos.killed.items()))} in {time.monotonic() - began:.0f} s"


if __name__ == "__main__":
    main()
