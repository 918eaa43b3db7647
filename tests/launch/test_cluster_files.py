"""launch/cluster/: manifests against their schemas, the Slurm script run for real, what the image is made of."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "cluster"
SCHEMA = yaml.safe_load(Path(__file__).with_name("rayjob_schema.yaml").read_text())
APART = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


def kuberay() -> tuple[dict[str, Any], dict[str, Any]]:
    """(the claim of the shared volume, the RayJob)."""
    claim, job = yaml.safe_load_all((FOLDER / "kuberay.yaml").read_text())
    return claim, job


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]


def test_rayjob_has_only_fields_that_kuberay_knows() -> None:
    jsonschema.validate(kuberay()[1], SCHEMA)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (["spec", "entryPoint"], "x"),
        (["spec", "backoffLimit"], "0"),
        (["spec", "rayClusterSpec", "authOptions", "mode"], "on"),
        (["spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 1, "maxReplica"], 3),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 1, "template", "spec", "containers", 0, "volumeMount"], []),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "volumes", 0, "name"], 1),
    ],
)
def test_the_schema_finds_typing_mistakes(path: list[Any], wrong: Any) -> None:
    job = node = kuberay()[1]
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, SCHEMA)


def test_rayjob_is_closed_to_strangers_and_shares_one_volume() -> None:
    claim, job = kuberay()
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP" and not cluster["headGroupSpec"]["enableIngress"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(job):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["workspace"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"
        (container,) = pod["containers"]
        paths = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert paths == {"workspace": "/workspace", "shared-memory": "/dev/shm"}
        assert container["image"].startswith("REGISTRY/beaver-ray")


def test_rollouts_scale_and_trainers_do_not() -> None:
    cluster = kuberay()[1]["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert groups["trainers"]["minReplicas"] == groups["trainers"]["maxReplicas"] == 1
    assert groups["rollouts"]["minReplicas"] == 0 < groups["rollouts"]["maxReplicas"]


def test_the_entrypoint_is_a_pipeline_that_the_image_holds() -> None:
    command, stage, config, workspace = kuberay()[1]["spec"]["entrypoint"].split()
    assert (command, stage) == ("beaver-ray", "pipeline") and workspace.startswith("workspace=/workspace/")
    copied = [line.split() for line in dockerfile() if line.startswith("COPY")]
    in_checkout = Path(config).relative_to("/opt/beaver-ray")
    assert (ROOT / in_checkout).is_file() and any(in_checkout.parts[0] in line[1:-1] for line in copied)


def test_ray_up_is_what_ray_takes() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((FOLDER / "ray-up.yaml").read_text())
    validate_config(prepare_config(config))
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert list(config["file_mounts"].values()) == ["~/.ray/auth_token"]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    with pytest.raises(jsonschema.ValidationError, match="worker_start_commands"):
        validate_config(prepare_config(config | {"worker_start_commands": []}))


def dockerfile() -> list[str]:
    """Its instructions, one a line."""
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_image_is_made_of_what_is_there() -> None:
    lines = dockerfile()
    words = [line.split()[0] for line in lines]
    assert set(words) <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER"} and words[0] == "FROM"
    sources = [source for line in lines if line.startswith("COPY") for source in line.split()[1:-1]]
    assert sources and all((ROOT / source).exists() for source in sources)
    # Whatever installs this project reads these.
    assert {"pyproject.toml", "README.md", "requirements", "beaver_ray", "actors", "launch"} <= set(sources)
    install = next(line for line in lines if "requirements/install.sh" in line)
    assert os.access(ROOT / "requirements" / "install.sh", os.X_OK) and install.endswith("install.sh cuda")
    python = re.match(r"FROM python:(\d+)\.(\d+)-slim", lines[0])
    assert python and (3, 11) <= (int(python[1]), int(python[2])) < (3, 13)


def test_slurm_is_bash_and_asks_for_a_workspace(tmp_path: Path) -> None:
    script = str(FOLDER / "slurm.sh")
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    for arguments in (["train", "x.yaml"], ["train", "x.yaml", "workspace=runs"]):
        done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: workspace=/... is missing")


@pytest.fixture
def short_folder() -> Iterator[str]:
    """For Ray, whose sockets need short paths."""
    folder = tempfile.mkdtemp(prefix="ray-")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.timeout(200)
@pytest.mark.skipif(
    subprocess.run([*APART, "true"], capture_output=True).returncode != 0,
    reason="symmetric-run ends with `ray stop`, which stops every Ray in its PID namespace; none can be made here",
)
def test_slurm_runs_a_command_on_its_own_cluster(
    tmp_path: Path, short_folder: str, stage_file: Callable[..., Path]
) -> None:
    # srun with one node: the command itself, without the options.
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    (tools / "beaver-ray").write_text(f'#!/bin/bash\nexec {sys.executable} -m launch "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    workspace = tmp_path / "shared"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "1", "SLURM_SUBMIT_DIR": str(tmp_path)}
    environment |= {"PATH": path, "PYTHONPATH": str(ROOT), "HEAD_ADDRESS": "127.0.0.1", "RAY_TMPDIR": short_folder}
    # A plan of the cluster that does not work: it shows the cluster, and the exit code of the command.
    command = ["plan", str(stage_file()), f"workspace={workspace}", "rollout.max_new_tokens=500"]
    command = [*APART, "bash", str(FOLDER / "slurm.sh"), *command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"Plan for the cluster at 127.0.0.1:{20000 + os.getpid() % 10000}" in done.stdout
    assert "error: " in done.stderr and "64 positions" in done.stderr
    assert list(workspace.iterdir()) == []  # the token is gone
