"""What stands in the way of a run on this machine, and how to mend it; `doctor_run` looks at a run and a cluster.

A check is a function that returns one finding. Nothing is changed and no Ray is started; a running cluster is joined
where an address is given.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import tomllib
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from beaver_ray.errors import UserError
from beaver_ray.gpus import cluster_address, on_this_machine
from launch.findings import GIB, STORE_MOST, STORE_SHARE, Check, Finding

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
STYLES = {"pass": "green", "warn": "yellow", "fail": "red"}
GCS_PORT, DASHBOARD_PORT = 6379, 8265  # where Ray listens unless it is told otherwise
DISK_FULL = 0.95  # Ray stops taking work on a node whose disk is fuller than this, unless it is told otherwise
LITTLE_DISK_GIB = 10.0


def examine(config: Path | None, overrides: Sequence[str], address: str | None) -> int:
    """Run every check that applies and print what was found; 1 where something fails, otherwise 0.

    Raises UserError for a configuration that is wrong.
    """
    from launch.doctor_run import joined, read_stages, stage_checks

    stages, made = read_stages(config, overrides) if config else ([], [])
    workspace = Path(stages[-1].workspace) if stages else Path()
    cluster = cluster_address(address)
    if cluster is None:
        stages = [on_this_machine(stage, address) for stage in stages]
    with joined(cluster) as (resources, cluster_checks):
        checks = machine_checks(workspace) + cluster_checks + stage_checks(stages, made, resources)
        findings = {name: run(check) for name, check in checks}
    show(findings)
    return int(any(finding.state == "fail" for finding in findings.values()))


def run(check: Callable[[], Finding]) -> Finding:
    """The check's finding; a user's mistake or a file that cannot be read is a failure."""
    try:
        return check()
    except (UserError, OSError) as error:
        return Finding("fail", str(error))


def show(findings: Mapping[str, Finding]) -> None:
    """A table on a terminal, otherwise a line for each finding."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    counts = {state: sum(f.state == state for f in findings.values()) for state in STYLES}
    summary = f"{counts['pass']} passed, {counts['warn']} to look at, {counts['fail']} failed"
    if not console.is_terminal:
        for name, found in findings.items():
            print(f"{found.state}  {name}: {found.line}" + (f"; mend: {found.mend}" if found.mend else ""))
        print(summary)
        return
    table = Table("check", "", "found, and how to mend it", caption=summary, caption_justify="left")
    for name, found in findings.items():
        what = Text(found.line)
        if found.mend:
            what.append(f"\n{found.mend}", style="bold")
        table.add_row(name, Text(found.state, style=STYLES[found.state]), what)
    console.print(table)


def machine_checks(workspace: Path) -> list[Check]:
    """What every run on this machine needs; ``workspace`` is where it would write."""
    from launch.resources import this_machine

    machine = this_machine()
    temporary = Path(os.environ.get("RAY_TMPDIR", "/tmp"))
    return [
        ("python", python_version),
        ("packages", packages),
        ("torch", lambda: torch_build(*_torch(), int(machine.gpus))),
        ("shared memory", lambda: shared_memory(shutil.disk_usage("/dev/shm").total / GIB, machine.memory_gib)),
        ("disk of the workspace", lambda: disk(workspace.absolute(), LITTLE_DISK_GIB)),
        ("disk of Ray", lambda: disk(temporary, LITTLE_DISK_GIB)),
        ("ports", ports),
        ("token", lambda: token(os.environ, Path.home())),
        ("dashboard", lambda: dashboard(DASHBOARD_PORT)),
    ]


def python_version() -> Finding:
    """This Python against requires-python."""
    from packaging.specifiers import SpecifierSet

    needed = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["requires-python"]
    have = platform.python_version()
    if SpecifierSet(needed).contains(have, prereleases=True):
        return Finding("pass", have)
    return Finding("fail", f"Python {have} is not {needed}", "make setup PYTHON=/path/to/python3.11")


def packages() -> Finding:
    """The installed versions against the ranges in pyproject.toml, and one vLLM, for CPUs or for CUDA."""
    from packaging.requirements import Requirement

    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    needed = [Requirement(text) for text in project["dependencies"]]
    engines = [Requirement(text) for kind in ("cpu", "cuda") for text in project["optional-dependencies"][kind]]
    installed = [engine for engine in engines if _version(engine.name)]
    wrong = []
    for requirement in [*needed, *installed]:
        have = _version(requirement.name)
        if have is None:
            wrong.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(have, prereleases=True):
            wrong.append(f"{requirement.name} {have} is not {requirement.specifier}")
    if len(installed) != 1:
        wrong.append(f"{'both' if installed else 'neither'} of {' and '.join(e.name for e in engines)} installed")
    if wrong:
        return Finding("fail", "; ".join(wrong), "make setup, in a fresh .venv where that does not help (make clean)")
    return Finding("pass", f"{len(needed) + 1} packages, {installed[0].name} {_version(installed[0].name)}")


def torch_build(version: str, cuda: str | None, seen: int, gpus: int) -> Finding:
    """Whether torch, built for ``cuda`` or for CPUs, sees (``seen``) as many GPUs as the driver says there are."""
    if not gpus:
        if cuda is None:
            return Finding("pass", f"{version} for CPUs; no GPU here")
        return Finding("warn", f"{version} is for CUDA {cuda}, but no GPU answers here", "make setup HARDWARE=cpu")
    if cuda is None:
        return Finding("fail", f"{version} is for CPUs, but there are {gpus} GPUs", "make setup HARDWARE=cuda")
    if seen == gpus:
        return Finding("pass", f"{version} for CUDA {cuda} sees all {gpus} GPUs")
    mend = f"look at nvidia-smi for a GPU with errors and for a driver that is too old for CUDA {cuda}"
    return Finding("fail", f"{version} for CUDA {cuda} sees {seen} of {gpus} GPUs", mend)


def shared_memory(shm_gib: float, memory_gib: float) -> Finding:
    """/dev/shm against what Ray's object store takes by default."""
    wanted = min(memory_gib * STORE_SHARE, STORE_MOST / GIB)
    line = f"/dev/shm has {shm_gib:.1f} GiB; Ray's object store wants {wanted:.1f}"
    if shm_gib >= wanted:
        return Finding("pass", line)
    mend = f"docker run --shm-size={wanted:.0f}g; on Kubernetes an emptyDir of medium Memory at /dev/shm"
    return Finding("warn", f"{line}, and would be smaller or lie on a disk", mend)


def disk(folder: Path, little_gib: float) -> Finding:
    """Whether ``folder`` can be written and has room; it need not exist."""
    there = next(path for path in [folder, *folder.parents] if path.exists())
    usage = shutil.disk_usage(there)
    line = f"{folder}: {usage.free / GIB:.1f} GiB free"
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Finding("fail", f"{folder} cannot be written", "set another workspace=..., or RAY_TMPDIR for Ray")
    if usage.used > DISK_FULL * (usage.used + usage.free):
        return Finding("fail", f"{line}; Ray takes a disk above 95 % for full", "free some, or set RAY_TMPDIR")
    if usage.free / GIB < little_gib:
        return Finding("warn", line, f"models and logs take a lot; have at least {little_gib:g} GiB")
    return Finding("pass", line)


def ports() -> Finding:
    """Whether Ray's ports are free, or are Ray's already."""
    import psutil

    taken = [port for port in (GCS_PORT, DASHBOARD_PORT) if _listens(port)]
    if not taken:
        return Finding("pass", f"{GCS_PORT} and {DASHBOARD_PORT} are free")
    names = {process.info["name"] for process in psutil.process_iter(["name"])}
    which = " and ".join(str(port) for port in taken)
    if "gcs_server" in names:
        return Finding("pass", f"a Ray runs here, and {which} are taken")
    mend = "ray start --head --port=... --dashboard-port=..."
    return Finding("warn", f"something that is not Ray listens on {which}", mend)


def token(environment: Mapping[str, str], home: Path) -> Finding:
    """Whether Ray keeps strangers out: its mode, and a token that only its owner can read."""
    mode = environment.get("RAY_AUTH_MODE", "").lower()
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else home / ".ray" / "auth_token"
    if mode not in ("", "token"):
        line = f"RAY_AUTH_MODE={mode}: whoever reaches Ray's ports can run code as you"
        return Finding("warn", line, "export RAY_AUTH_MODE=token")
    if environment.get("RAY_AUTH_TOKEN"):
        return Finding("pass", "in RAY_AUTH_TOKEN")
    if not file.is_file() or not file.read_text(encoding="utf-8").strip():
        make = "ray get-auth-token --generate, and the same token on every node"
        if named:
            return Finding("fail", f"RAY_AUTH_TOKEN_PATH names {file}, which is missing or empty", make)
        then = "would refuse to start" if mode else "would let everybody in"
        return Finding("warn", f"there is none yet; `ray start` {then}", make)
    if file.stat().st_mode & 0o077:
        return Finding("warn", f"other users of this machine can read {file}", f"chmod 600 {file}")
    remark = "" if mode else "; jobs are submitted with it after export RAY_AUTH_MODE=token"
    return Finding("pass", f"in {file}{remark}")


def dashboard(port: int) -> Finding:
    """Whether the network reaches a dashboard at ``port`` of this machine."""
    import psutil

    listening = [c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port]
    open_to = sorted({ip for ip in listening if not ip.startswith(("127.", "::1"))})
    if open_to:
        mend = f"--dashboard-host=127.0.0.1, and ssh -L {port}:127.0.0.1:{port} HOST from elsewhere"
        return Finding("warn", f"port {port} is open to the network on {', '.join(open_to)}", mend)
    return Finding("pass", f"port {port} is {'on this machine alone' if listening else 'closed'}")


def _torch() -> tuple[str, str | None, int]:
    import torch

    return torch.__version__, torch.version.cuda, torch.cuda.device_count()


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
