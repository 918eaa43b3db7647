"""A checkout as a job of a cluster of two nodes that asks for a token, and `beaver-ray doctor` on it."""

from __future__ import annotations

import json
import os
import pty
import secrets
import shutil
import signal
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
import yaml

from beaver_ray.runs import read_metrics
from tests.tiny_ppo import build_workspace, write_stage

pytestmark = pytest.mark.cluster

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
        # Jobs call this Python by its name, as on a node whose environment is on the path.
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
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
        # A folder of its own, as on another machine: nodes that share one delete a job's files under each other's feet.
        self._start("--address", self.gcs, "--temp-dir", str(self.folder / "u"))
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

    def beaver_ray(self, *arguments: object, cwd: Path, **changes: str) -> dict[str, Any]:
        """How to start our own command line, from a folder that is no checkout."""
        environment = self.environment | {"PYTHONPATH": str(ROOT)} | changes
        return {"args": [sys.executable, "-m", "launch", *map(str, arguments)], "cwd": cwd, "env": environment}

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
        workspace, stage="ppo", constraints=[], steps=2, cluster={"placement": placement, "step_timeout": 240}
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
    del actors["control"]  # nobody waits for it, and a run of two steps may be over before it has a node
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


@pytest.fixture
def stage_in_checkout(checkout: Path, tiny_world: Path) -> Iterator[Path]:
    """A stage of the checkout's own, that trains for seconds in one process."""
    tree = {
        "stage": "sft",
        "workspace": "runs",
        "name": "tiny",
        "model": str(tiny_world / "model"),
        "train": [f"demonstrations:1:{tiny_world}/demonstrations/train.jsonl"],
        "epochs": 1,
        "max_tokens": 64,
        "debug": True,
    }
    path = checkout / "configs" / "tiny.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    yield path
    path.unlink()


@pytest.mark.timeout(200)
def test_submit_from_another_directory(nodes: TwoNodes, stage_in_checkout: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "shared"
    options = ["--address", nodes.dashboard, "--name", "from-afar", "--env", "WANDB_API_KEY"]
    command = nodes.beaver_ray("submit", stage_in_checkout, *options, f"workspace={workspace}", cwd=tmp_path)
    command["env"]["WANDB_API_KEY"] = "a secret that was asked for"
    done = subprocess.run(**command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    said = f"job from-afar: python -m launch train configs/tiny.yaml workspace={workspace}"
    assert said in done.stdout and f"report: {workspace}/tiny/report.html" in done.stdout  # ours, and the job's own
    assert "WARNING" not in done.stderr and "INFO" not in done.stderr
    assert (workspace / "tiny" / "final" / "policy" / "config.json").is_file()

    again = subprocess.run(**command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "from-afar already exists" in again.stderr


@pytest.mark.timeout(120)
def test_submit_ends_as_the_job_does(nodes: TwoNodes, stage_in_checkout: Path, tmp_path: Path) -> None:
    arguments = [stage_in_checkout, "--address", nodes.dashboard, f"workspace={tmp_path}", "model=/nowhere/model"]
    command = nodes.beaver_ray("submit", *arguments, cwd=tmp_path)
    done = subprocess.run(**command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: " in done.stdout and "/nowhere/model" in done.stdout and "Traceback" not in done.stdout
    assert " failed\n" in done.stderr
    assert [job["status"] for job in nodes.state("jobs") if "model=/nowhere/model" in job["entrypoint"]] == ["FAILED"]


def test_submit_with_another_token(nodes: TwoNodes, stage_in_checkout: Path, tmp_path: Path) -> None:
    other = tmp_path / "token"
    other.write_text("0" * 64)
    arguments = ["submit", stage_in_checkout, "--address", nodes.dashboard, "workspace=/tmp"]
    for changes in ({"RAY_AUTH_TOKEN_PATH": str(other)}, {"RAY_AUTH_MODE": "disabled"}):
        command = nodes.beaver_ray(*arguments, cwd=tmp_path, **changes)
        done = subprocess.run(**command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"error: {nodes.dashboard} wants its cluster's token" in done.stderr


@pytest.mark.timeout(200)
def test_ctrl_c_leaves_the_job_or_stops_it(nodes: TwoNodes, stage_in_checkout: Path, tmp_path: Path) -> None:
    terminal, terminal_of_process = pty.openpty()
    for name, stdin, code, status in (
        ("left", subprocess.DEVNULL, 130, {"PENDING", "RUNNING"}),
        ("stopped", terminal_of_process, 1, {"STOPPED"}),
    ):
        options = ["--address", nodes.dashboard, "--name", name]
        overrides = [f"workspace={tmp_path}", f"name={name}", "epochs=1000"]
        command = nodes.beaver_ray("submit", stage_in_checkout, *options, *overrides, cwd=tmp_path)
        process = subprocess.Popen(**command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout and process.stderr
        while "Running entrypoint" not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        process.send_signal(signal.SIGINT)
        os.write(terminal, b"y\n")
        assert process.wait(60) == code
        said = process.stdout.read() + process.stderr.read()
        assert {j["submission_id"]: j["status"] for j in nodes.state("jobs")}[name] in status
        if name == "left":
            look = f"`ray job logs --follow --address {nodes.dashboard} left`"
            assert f"job left goes on; follow it with {look}" in said and "Traceback" not in said
            os.read(terminal, 100)  # what was typed for nobody
            assert nodes.run("job", "stop", "--address", nodes.dashboard, name).returncode == 0
        else:
            assert "stop job stopped? [y/N]" in said and "job stopped was stopped" in said
    os.close(terminal)
    os.close(terminal_of_process)


@pytest.mark.timeout(120)
def test_doctor_tries_the_network_between_nodes(nodes: TwoNodes, tmp_path: Path) -> None:
    command = nodes.beaver_ray("doctor", "--address", nodes.gcs, cwd=tmp_path)
    done = subprocess.run(**command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line.split(": ")[0].split("  ")[1]: line for line in done.stdout.splitlines()[:-1]}
    assert found["nodes"].startswith("pass  nodes: 2 alive, 4 CPUs, 0 GPUs, Ray ")
    assert found["network"].startswith("pass  network: 2 connections between 2 nodes, the slowest in ")
    assert found["token"].startswith("warn  token: other users")  # the fixture's file has the usual permissions
