"""`ray job submit --working-dir .` of a checkout to a cluster of two nodes that asks for a token."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from beaver_ray.runs import read_metrics
from tests.tiny_ppo import build_workspace, write_stage

ROOT = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


class TwoNodes:
    """Two raylets with two CPUs each on this machine, with ports, folder and token of their own."""

    def __init__(self) -> None:
        # Ray puts sockets into it, whose paths must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "OMP_NUM_THREADS": "1"}
        self.environment |= {"RAY_DISABLE_IMPORT_WARNING": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start both nodes and wait until each sees the other."""
        gcs, dashboard, client = free_ports(3)
        self.gcs, self.dashboard = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
        temp = ["--temp-dir", str(self.folder / "t")]
        ports = ["--port", str(gcs), "--dashboard-port", str(dashboard), "--ray-client-server-port", str(client)]
        self._start("--head", *ports, "--include-dashboard", "true", *temp)
        wait_for_port(gcs)
        wait_for_port(dashboard)
        self._start("--address", self.gcs)
        deadline = time.monotonic() + 60
        while len([n for n in self.state("nodes") if n["state"] == "ALIVE"]) < 2:
            assert time.monotonic() < deadline, "the second node did not join"
            time.sleep(1)

    def _start(self, *arguments: str) -> None:
        listen, grpc, runtime_env, metrics = (str(port) for port in free_ports(4))
        options = ["--dashboard-agent-listen-port", listen, "--dashboard-agent-grpc-port", grpc]
        options += ["--runtime-env-agent-port", runtime_env, "--metrics-export-port", metrics]
        options += ["--num-cpus", "2", "--node-ip-address", "127.0.0.1", "--object-store-memory", str(200 * 2**20)]
        with (self.folder / f"start-{len(self.processes)}.log").open("wb") as log:
            command = [*RAY, "start", *arguments, *options, "--disable-usage-stats", "--block"]
            self.processes.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def run(self, *arguments: str, timeout: float = 60, cwd: Path = ROOT, **changes: str) -> Any:
        """A command of `ray`, without a check of its exit code."""
        environment = self.environment | changes
        return subprocess.run(
            [*RAY, *arguments], env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout
        )

    def state(self, kind: str) -> list[dict[str, Any]]:
        """`ray list KIND`."""
        arguments = ["list", kind, "--address", self.dashboard, "--format", "json", "--detail", "--limit", "1000"]
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        if done.stdout.startswith("No resource"):  # what a cluster without any says in place of []
            return []
        return json.loads(done.stdout)

    def close(self) -> None:
        """End both nodes and everything that they have started."""
        everything = [p for node in self.processes for p in psutil.Process(node.pid).children(recursive=True)]
        for node in reversed(self.processes):
            node.terminate()
            node.wait(30)
        for process in psutil.wait_procs(everything, timeout=10)[1]:
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for_port(port: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nobody listens on port {port}"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    cluster = TwoNodes()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user's checkout holds: the files that git knows or would add."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "beaver_ray", "actors", "launch"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def test_a_stranger_without_the_token_is_turned_away(nodes: TwoNodes) -> None:
    other = nodes.folder / "other"
    other.write_text("0" * 64)
    done = nodes.run("job", "list", "--address", nodes.dashboard, RAY_AUTH_TOKEN_PATH=str(other))
    assert done.returncode != 0 and "token" in done.stderr.lower()


@pytest.mark.timeout(500)
def test_a_submitted_job_trains_on_both_nodes(nodes: TwoNodes, checkout: Path, tmp_path: Path) -> None:
    workspace = build_workspace(tmp_path)
    half = {"cpus": 0.5, "strategy": "SPREAD"}
    # Three CPUs of bundles on nodes of two; the ranks of the policy are spread and must meet across nodes.
    placement: dict[str, Any] = dict.fromkeys(("rollout", "reward", "reference", "reward_critic"), half)
    placement |= {"policy": half | {"workers": 2, "strategy": "STRICT_SPREAD"}, "experience": {"cpus": 0.25}}
    config = write_stage(
        workspace, stage="ppo", constraints=[], steps=2, cluster={"placement": placement, "start_timeout": 240}
    )
    command = ["job", "submit", "--address", nodes.dashboard, "--working-dir", ".", "--submission-id", "tiny"]
    command += ["--", sys.executable, "-m", "launch", "train", str(config)]
    done = nodes.run(*command, timeout=400, cwd=checkout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "starting 7 processes on 2 nodes" in done.stdout

    jobs = {job["submission_id"]: job for job in nodes.state("jobs") if job["submission_id"]}
    assert jobs["tiny"]["status"] == "SUCCEEDED"
    actors = {a["name"].split(":")[0]: a for a in nodes.state("actors") if a["class_name"] != "JobSupervisor"}
    names = ["control", "critic-reward", "experience", "policy-0", "policy-1", "reference", "reward", "rollout"]
    assert sorted(actors) == names and all(actor["state"] == "DEAD" for actor in actors.values())
    node_ids = {node["node_id"] for node in nodes.state("nodes")}
    assert {actor["node_id"] for actor in actors.values()} == node_ids and len(node_ids) == 2
    assert actors["policy-0"]["node_id"] != actors["policy-1"]["node_id"]

    folder = workspace / "run"
    assert [row["step"] for row in read_metrics(folder)] == [1, 2]
    assert all(abs(row["kl/rollout_train"]) < 1e-4 for row in read_metrics(folder))
    kept = {
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "final/policy/config.json",
        "final/reward_critic/config.json",
    }
    assert {name for name in kept if not (folder / name).is_file()} == set()
    assert len(list((folder / "trajectories").glob("*.parquet"))) == 2


def test_a_users_mistake_fails_the_job_in_one_line(nodes: TwoNodes, checkout: Path, tmp_path: Path) -> None:
    config = write_stage(tmp_path, models={"policy": "/nowhere/model", "reward": "/nowhere/model"})
    command = ["job", "submit", "--address", nodes.dashboard, "--working-dir", ".", "--submission-id", "mistake"]
    command += ["--", sys.executable, "-m", "launch", "train", str(config)]
    done = nodes.run(*command, timeout=120, cwd=checkout)
    assert done.returncode == 1
    jobs = {job["submission_id"]: job for job in nodes.state("jobs")}
    assert jobs["mistake"]["status"] == "FAILED"
    assert "error: " in done.stdout and "/nowhere/model" in done.stdout and "Traceback" not in done.stdout
