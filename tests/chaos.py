"""A Safe PPO run on a local Ray cluster of three nodes, whose processes are killed at random and at chosen moments.

    python -m tests.chaos --folder runs/chaos --kills 31 --seed 0    # or `make chaos`

The models that it starts from are trained first, on the small world, where --folder has none.

Every role is killed in turn, in an order and after steps, over the whole run, that the seed decides: generators,
scorers, the reference, one of the policy's two ranks under ZeRO-3, the critics, the experience builder, the driver, and
the whole node of the generators, which comes back. Some die at any moment, others in the middle of scoring, of
publishing weights or of an evaluation (what a process is at is in the title that Ray gives it), a scorer just before
the last evaluation asks it. The small world's answers are short: Ray is told to inline nothing so large as a batch of
them, so that they lie on their generator's node as long ones would; and at times the node goes before anybody has read
them.

The run must reach its end. Then every prompt must have been trained on exactly once an epoch in the steps that count
(how often the log says what became of whom is printed); with a small world the final violation rate must be within its
bar.
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
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow.parquet as pq
import ray
import yaml
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from actors.driver.evaluate import evaluate
from actors.driver.policy_stage import PolicyStage
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.runs import is_finished, read_metrics
from beaver_ray.small_world.world import SmallWorld
from launch.config_files import load_config, load_pipeline
from launch.pipeline import build_world, run_stage

ROOT = Path(__file__).parents[1]
KINDS = ("rollout", "reward", "cost", "reference", "policy", "reward_critic", "cost_critic", "experience")
LONGEST_S = 3600.0
LAST_KILL = 0.9  # share of the steps after which nobody dies any more, but for a scorer in the last evaluation
PAUSE_S = 3.0  # a kill at any moment falls anywhere into so many seconds after its step
PATIENCE_S = 90.0  # for a moment to come
INLINED = 1000  # bytes: a batch of one answer takes 2,000 and more, a generator's summary 200
PROMPTS = 128  # a step; the recipe has 256, under which nothing dies in another way and the run is longer
BAR = 0.03
"""What the violation rate, by the small world's truth and over the last fifth of training, may be above its target."""
MOMENTS = {
    "generation": {"exchange"},
    "scoring": {"score", "logprobs", "values", "gather", "assemble", "advantages", "combine"},
    "publishing": {"bucket"},
    "evaluation": {"exchange", "score"},
}
"""The methods of which a process that dies at this moment is in one."""


class Kill(NamedTuple):
    """Which role loses a process, and at what moment: one of MOMENTS, the last evaluation, or any."""

    role: str
    moment: str = "any"

    def __str__(self) -> str:
        return self.role if self.moment == "any" else f"{self.role} in {self.moment}"


LAST = Kill("reward", "last evaluation")


@dataclass
class Nodes:
    """Three raylets on this machine; generators run on the third alone. Up to ``inlined`` bytes Ray keeps an answer
    where it was asked for (by itself about 100,000)."""

    cluster: Any = None
    generators: Any = None
    inlined: int | None = None

    def start(self) -> None:
        """Start them."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # The dashboard answers the question which process is which.
        head = {"num_cpus": 4, "labels": {"kind": "training"}, "include_dashboard": True, "dashboard_port": port}
        if self.inlined is not None:
            head["_system_config"] = {"max_direct_call_object_size": self.inlined}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.cluster.add_node(num_cpus=4, labels={"kind": "training"})
        self.add()

    def add(self) -> None:
        """The generators' node."""
        self.generators = self.cluster.add_node(num_cpus=4, labels={"kind": "rollout"})

    def lose(self) -> None:
        """The generators' node disappears."""
        self.cluster.remove_node(self.generators, allow_graceful=False)

    def return_later(self) -> None:
        """After a while there is another one."""
        time.sleep(5)
        self.add()

    def stop(self) -> None:
        """End them."""
        self.cluster.shutdown()


@dataclass
class Chaos:
    """One run and its killer."""

    nodes: Nodes
    config: Path
    steps: int
    random: random.Random
    killed: Counter[Kill] = field(default_factory=Counter)
    driver: Any = None
    driver_started: float = 0.0
    processes: dict[str, int] = field(default_factory=dict)
    """The run's processes as they were last looked up."""
    looked_up: float = 0.0
    updated: int = -1
    """So many steps were done when the policy was last seen in an update: what comes next is the step's end."""

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

    def of_role(self, *roles: str) -> list[int]:
        """The process ids of these roles."""
        gone = not all(psutil.pid_exists(pid) for pid in self.processes.values())
        if gone or time.monotonic() > self.looked_up + 10:
            self.processes, self.looked_up = self.alive(), time.monotonic()
        return [pid for name, pid in sorted(self.processes.items()) if role_of(name) in roles]

    def catch(self, kill: Kill) -> int | None:
        """A process of that role at that moment; None where there is none before patience is at an end."""
        patience = time.monotonic() + (PATIENCE_S if kill != LAST else LONGEST_S)
        if kill.moment == "any":
            time.sleep(self.random.uniform(0, PAUSE_S))
            patience = time.monotonic() + 1
        while time.monotonic() < patience and self.driver.poll() is None:
            busy = {doing(pid) for pid in self.of_role("policy")} & {"update", "bucket"}
            if "update" in busy:
                self.updated = self.steps_done()
            now = {
                "evaluation": self.updated == self.steps_done() and not busy,
                "last evaluation": self.steps_done() == self.steps,
            }.get(kill.moment, True)
            pids = self.of_role(kill.role) if now else []
            at_it = [p for p in pids if kill.moment not in MOMENTS or doing(p) in MOMENTS[kill.moment]]
            if at_it:
                return self.random.choice(at_it)
            time.sleep(0.001)
        return None

    def kill(self, kill: Kill) -> bool:
        """Kill one process; False where it could not be had at that moment."""
        if kill.role == "driver":
            time.sleep(self.random.uniform(0, PAUSE_S))
            self.driver.kill()
            self.driver.wait()
            self.start_driver()
        elif kill.role == "node":
            if self.catch(kill._replace(role="rollout")) is None:
                return False
            self.lose_node(stranding=kill.moment != "any")
        else:
            pid = self.catch(kill)
            if pid is None:
                return False
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.killed[kill] += 1
        print(f"--- killed after step {self.steps_done()}: {kill}, {self.killed.total()} in all", flush=True)
        return True

    def lose_node(self, stranding: bool) -> None:
        """The generators' node goes and comes back; ``stranding``: with answers that nobody was in time to read."""
        names = [role for role in roles_of(self.config) if role.startswith("cost-")]
        readers = [psutil.Process(pid) for pid in self.of_role("reward", "reference", "experience", *names)]
        for reader in readers if stranding else []:
            reader.suspend()
        patience = time.monotonic() + (20 if stranding else 0)
        while time.monotonic() < patience and any(doing(pid) == "exchange" for pid in self.of_role("rollout")):
            time.sleep(0.01)
        self.nodes.lose()
        for reader in readers if stranding else []:
            with suppress(psutil.NoSuchProcess):
                reader.resume()
        self.nodes.return_later()

    def run(self, kills: int, choice: list[Kill]) -> None:
        """Kill so many over the whole run, the last one in its last evaluation, and let it come to its end."""
        after = [*sorted(self.random.uniform(1, LAST_KILL * self.steps) for _ in range(kills - 1)), 0.0]
        deadline = time.monotonic() + LONGEST_S
        deck: list[Kill] = []
        self.start_driver()
        while self.driver.poll() is None:
            if time.monotonic() > deadline:
                raise AssertionError(f"the run hangs: it has not ended after {LONGEST_S:g} s")
            done = self.killed.total()
            if done == kills or not self.under_way() or self.steps_done() < after[done]:
                time.sleep(0.2)
                continue
            deck = [LAST] if done == kills - 1 else deck or self.random.sample(choice, len(choice))
            # A role that is just being started anew has its turn later.
            if not self.kill(deck[-1]):
                deck.insert(0, deck.pop())
                continue
            deck.pop()
        assert self.driver.returncode == 0, f"the run ended with {self.driver.returncode}"
        assert self.killed.total() == kills, f"the run was over after {self.killed.total()} kills"


def role_of(name: str) -> str:
    """The role of a process: policy of policy-1 and of policy-1.9f0c, which has taken its place."""
    return re.split(r"-\d|-new|\.", name)[0]


def doing(pid: int) -> str:
    """The method that a process of Ray is in, as its title says; nothing where it is in none, or gone."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
    except OSError:
        return ""
    return title.strip(" \0").partition(".")[2]


def write_config(source: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """The stage of ``source`` as it is run here: on three nodes, the policy on two ranks, a checkpoint every two steps.

    Held-out answers are judged by the learned scorers, which then take part in evaluations.
    """
    tree = yaml.safe_load(source.read_text(encoding="utf-8")) | {"name": "chaos", "save_every": 2} | changes
    tree["trajectory_every"] = 1
    tree["engine"] |= {"zero_stage": 3}
    tree["evaluation"].pop("world", None)
    placement = {kind: {"cpus": 0.1, "labels": {"kind": "training"}} for kind in KINDS}
    placement["rollout"] = {"workers": 2, "cpus": 0.5, "labels": {"kind": "rollout"}}
    placement["policy"]["workers"] = 2
    tree["cluster"] = {"threads": 1, "placement": placement, "step_timeout": 300.0}
    path = folder / "chaos.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def roles_of(config: Path) -> list[str]:
    """All that can be killed in a run of this stage."""
    names = [c["name"] for c in yaml.safe_load(config.read_text(encoding="utf-8"))["constraints"]]
    scored = [f"cost-{name}" for name in names] + [f"critic-{name}" for name in names]
    return ["rollout", "reward", "reference", "policy", "critic-reward", "experience", *scored, "driver", "node"]


def kills_of(config: Path) -> list[Kill]:
    """Every role at any moment, and those that take part in a phase in the middle of it."""
    chosen = [Kill("policy", "scoring"), Kill("policy", "publishing"), Kill("critic-reward", "scoring")]
    chosen += [Kill("rollout", "evaluation"), Kill("reward", "evaluation"), Kill("node", "generation")]
    return [*map(Kill, roles_of(config)), *chosen]


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
    words = ("rolled back", "resumed", "is started anew", "is lost with", "are lost with their node")
    count = {word: sum(word in note for note in notes) for word in words}
    return f"{len(samples)} samples, each once; in the log: {count}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"), help="workspace")
    parser.add_argument("--kills", type=int, default=31)
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
    recipe = ROOT / "configs" / "local" / "safe_ppo.yaml"
    rollout = yaml.safe_load(recipe.read_text(encoding="utf-8"))["rollout"] | {"prompts_per_step": PROMPTS}
    changes = {"workspace": str(options.folder.resolve()), "steps": options.steps, "rollout": rollout}
    config = write_config(recipe, options.folder, changes)
    print(run_chaos(config, options.kills, options.seed, options.steps, kills_of(config), INLINED))
    folder = options.folder / "chaos"
    print(check(folder, options.steps))
    world = options.folder.resolve() / "world" / "world.json"
    rate = harmful(folder, SmallWorld.load(world), options.steps - options.steps // 5)
    judged = load_config(config, ["debug=true", f"evaluation.world={world}"])
    assert isinstance(judged, PolicyStage)
    summary = json.loads(evaluate(judged).read_text(encoding="utf-8"))
    final = summary["violation_rate/harm"]
    print(
        f"violation rate {rate:.4f} over the last fifth of training, on held-out prompts {final['mean']:.4f} at the "
        f"end, target {final['target']:.3f}; reward over the optimum there {summary.get('share_of_optimum')}"
    )
    assert rate <= final["target"] + BAR


def harmful(folder: Path, world: SmallWorld, after: int) -> float:
    """The share of all answers after that step that are harmful in truth."""
    tokenizer = load_tokenizer(str(folder / "final" / "policy"))
    costs: list[float] = []
    for step in range(after + 1, len(read_metrics(folder)) + 1):
        table = pq.read_table(folder / "trajectories" / f"step_{step:06d}.parquet")
        names = ("prompt_tokens", "response_tokens")
        texts = [tokenizer.batch_decode(table[name].to_pylist(), skip_special_tokens=True) for name in names]
        costs += [world.cost(prompt, answer) for prompt, answer in zip(*texts, strict=True)]
    return sum(cost > 0 for cost in costs) / len(costs)


def run_chaos(config: Path, kills: int, seed: int, steps: int, choice: list[Kill], inlined: int | None = None) -> str:
    """Run the stage of ``steps`` steps to its end under kills; what was killed, and how long it took."""
    began = time.monotonic()
    nodes = Nodes(inlined=inlined)
    nodes.start()
    try:
        chaos = Chaos(nodes, config, steps, random.Random(seed))
        chaos.run(kills, choice)
    finally:
        nodes.stop()
        if ray.is_initialized():
            ray.shutdown()
    killed = {str(kill): count for kill, count in sorted(chaos.killed.items())}
    return f"seed {seed}: killed {killed} in {time.monotonic() - began:.0f} s"


if __name__ == "__main__":
    main()
