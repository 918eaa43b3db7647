"""Sends a checkout to a Ray cluster as a job, follows its log and gives its exit code.

What travels is the checkout that CONFIG lies in, without what .gitignore and .rayignore name and without EXCLUDES. Of
this shell's variables a job sees those of PASSED and those that --env names: a secret travels only where somebody says
so.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from beaver_ray.data_options import data_paths
from beaver_ray.errors import UserError
from beaver_ray.fit import models_of
from beaver_ray.manifest import data_of
from beaver_ray.policy_options import DIRECT_WEIGHTS
from beaver_ray.score_sources import ALLOWED_HOSTS
from beaver_ray.stage import Stage
from beaver_ray.user_code import ALLOWED_CODE
from beaver_ray.yaml_files import read_yaml
from launch.config_files import load_config, load_pipeline
from launch.pipeline import texts_of

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PACKAGES = ("beaver_ray", "actors", "launch")
# As Ray reads them: lines of a .gitignore. Its own four come first, it would add them anyway.
EXCLUDES = [".git", ".venv", "venv", "__pycache__", "/runs", "/build", "*.egg-info", ".pytest_cache", ".mypy_cache"]
EXCLUDES += [".ruff_cache", ".import_linter_cache", ".hypothesis"]
PASSED = (
    *("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "WANDB_MODE"),
    *(ALLOWED_HOSTS, ALLOWED_CODE, DIRECT_WEIGHTS),
)
MIB = 2**20
MOST_BYTES = 100 * MIB  # Ray refuses packages above 512 MiB, and keeps each in the memory of the head node.
ANSWER_S = 10
POLL_S = 1.0
INTERRUPTED = 130


def submit(
    config: Path,
    overrides: Sequence[str],
    address: str,
    env: Sequence[str] = (),
    name: str | None = None,
    wait: bool = True,
) -> int:
    """Run ``beaver-ray train`` or ``pipeline`` of CONFIG as a job of the cluster whose dashboard is at ``address``.

    Returns the job's exit code (0 where nobody waits for it, 130 after Ctrl-C where it goes on). Raises UserError,
    before anything is sent, for a wrong configuration, a checkout that is too large and a cluster that does not answer.
    """
    checkout = find_checkout(config)
    command, files, stages = check_stages(config, overrides)
    sizes = shipped_files(checkout)
    for file in files:
        if file.resolve().relative_to(checkout).as_posix() not in sizes:
            raise UserError(f"{file} would not be sent ({checkout}/.gitignore leaves it out); move it to configs/")
    check_paths(checkout, sizes, stages)
    check_size(checkout, sizes)
    entrypoint = ["python", "-m", "launch", command, str(config.resolve().relative_to(checkout)), *overrides]
    environment = {"working_dir": str(checkout), "excludes": EXCLUDES, "env_vars": passed_variables(env)}
    client = connect(address)
    print(f"sending {len(sizes)} files ({sum(sizes.values()) / MIB:.1f} MiB) to {address}", flush=True)
    try:
        job = client.submit_job(entrypoint=shlex.join(entrypoint), runtime_env=environment, submission_id=name)
    except RuntimeError as error:
        raise UserError(f"the cluster at {address} does not take the job: {_last_line(error)}") from None
    except OSError as error:
        raise UserError(f"lost {address} while the job was sent ({type(error).__name__}); submit it again") from None
    print(f"job {job}: {shlex.join(entrypoint)}", flush=True)
    if not wait:
        print(how_to_look(job, address))
        return 0
    try:
        return follow(client, job, address)
    except OSError as error:
        raise UserError(f"lost {address} ({type(error).__name__}); {how_to_look(job, address)}") from None


# What is sent


def find_checkout(config: Path) -> Path:
    """The checkout of this project that CONFIG lies in; UserError where it lies in none."""
    for folder in config.resolve().parents:
        if all((folder / package / "__init__.py").is_file() for package in PACKAGES):
            return folder
    raise UserError(f"{config} lies in no checkout of Beaver on Ray, which is what a job is sent; copy it to one")


def check_stages(config: Path, overrides: Sequence[str]) -> tuple[str, list[Path], list[Stage]]:
    """(``train`` or ``pipeline``, the files that it reads, their stages); UserError for what is wrong in them."""
    files, command = [config], "train"
    if "stages" in read_yaml(config):
        command = "pipeline"
        pipeline, stages = load_pipeline(config, list(overrides))
        workspace = pipeline.workspace
        files += dict.fromkeys(config.parent / entry.config for entry in pipeline.entries)
    else:
        stages = [load_config(config, list(overrides))]
        workspace = stages[0].workspace
    for file in files:
        if find_checkout(file) != find_checkout(config):
            raise UserError(f"{file} lies in another checkout than {config}; copy it to this one")
    if not Path(workspace).is_absolute():
        raise UserError(f"workspace {workspace!r} must be an absolute folder that all nodes see; add workspace=/...")
    return command, files, stages


def check_paths(checkout: Path, sizes: Collection[str], stages: Sequence[Stage]) -> None:
    """UserError for a model, data or another file by a relative path that is here, and would not be in the job's copy.

    sizes: the files that are sent.
    """
    for stage in stages:
        paths = data_paths(data_of(stage))
        # Options that are a path (a world, people's labels, canaries, code) are many, and known by what lies there.
        texts = [part for text in texts_of(stage) for part in (text, *re.split("[:#]", text))]
        paths += [text for text in texts if "/" in text or os.path.isfile(checkout / text)]
        with suppress(UserError):  # a model that cannot be read here may be another one there
            paths += [use.folder for use in models_of(stage)]
        for path in paths:
            inside = PurePosixPath(os.path.normpath(path))
            if inside.is_absolute() or not os.path.exists(checkout / inside):
                continue
            if not any(PurePosixPath(file).is_relative_to(inside) for file in sizes):
                raise UserError(
                    f"{stage.name}: {path} would not be sent (.gitignore or .rayignore leaves it out); give "
                    f"an absolute path that all nodes see"
                )


def shipped_files(checkout: Path) -> dict[str, int]:
    """Every file that Ray would send, by its name in the checkout, with its size in bytes."""
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    sizes: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(checkout).as_posix()] = path.stat().st_size

    # Ray's own walk, so that what is measured is what is sent; a test compares the two.
    with_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    _dir_travel(checkout, [_get_excludes(checkout, EXCLUDES)], note, with_gitignore, logging.getLogger(__name__))
    return sizes


def check_size(checkout: Path, sizes: dict[str, int], most: int = MOST_BYTES) -> None:
    """Raises UserError that names the three largest files or folders where all of them are too large to send."""
    total = sum(sizes.values())
    if total <= most:
        return
    entries: Counter[str] = Counter()
    for file, size in sizes.items():
        first, slash, _ = file.partition("/")
        entries[first + slash] += size
    largest = ", ".join(f"{entry} {size / MIB:.1f} MiB" for entry, size in entries.most_common(3))
    raise UserError(
        f"{checkout} is too large to send: {total / MIB:.1f} MiB, at most {most / MIB:g}; largest: {largest}. "
        f"Move data to a folder that all nodes see, or name it in .gitignore or .rayignore"
    )


def passed_variables(names: Sequence[str]) -> dict[str, str]:
    """The job's variables: those of PASSED that are set here, and ``names``; UserError for one that is not set."""
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError(f"--env {missing[0]}: no such variable is set here; export it first")
    return {name: os.environ[name] for name in (*PASSED, *names) if name in os.environ}


# The cluster


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's job API; UserError where none answers or where it asks for another token."""
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address must be a dashboard's address like http://HOST:8265, not {address!r}")
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)
    # Ray takes the address from these two before the one that it is given.
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        # Ray's own requests know no deadline; a host that swallows packets would hold them for minutes.
        requests.get(f"{address}/api/version", timeout=ANSWER_S)
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        mend = "export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH=FILE unless the token is in ~/.ray/auth_token"
        raise UserError(f"{address} wants its cluster's token ({error.message.splitlines()[0]}); {mend}") from None
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        # A failed request's own text is a page; its kind says enough.
        reason = _last_line(error) if isinstance(error, RuntimeError) else type(error).__name__
        raise UserError(f"no Ray cluster answers at {address} (--address, RAY_API_SERVER_ADDRESS): {reason}") from None


def follow(client: JobSubmissionClient, job: str, address: str) -> int:
    """Print the job's log while it is written, and return its exit code; Ctrl-C may end both."""
    try:
        print_log(client, job)
        return exit_code(wait_ended(client, job))
    except KeyboardInterrupt:
        return interrupted(client, job, address)


def print_log(client: JobSubmissionClient, job: str) -> None:
    """Print the log from its beginning until the job ends or the connection does."""
    from aiohttp import ClientError

    async def each() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    try:
        asyncio.run(each())
    except (RuntimeError, ClientError) as error:
        print(f"the log broke off ({_last_line(error)}); waiting for the end of the job", file=sys.stderr)


def wait_ended(client: JobSubmissionClient, job: str) -> Any:
    """The job's details as soon as it has ended."""
    while not (details := client.get_job_info(job)).status.is_terminal():
        time.sleep(POLL_S)
    return details


def exit_code(details: Any) -> int:
    """0 for a job that succeeded, the driver's own code where Ray knows one, otherwise 1; says why on stderr."""
    status = details.status.value
    if status == "SUCCEEDED":
        return 0
    code = details.driver_exit_code
    reason = "" if code else f": {_last_line(details.message)}"
    print(f"job {details.submission_id} {'was stopped' if status == 'STOPPED' else 'failed'}{reason}", file=sys.stderr)
    return code if code and code > 0 else 1


def interrupted(client: JobSubmissionClient, job: str, address: str) -> int:
    """Ctrl-C: on a terminal ask whether to stop the job; otherwise it goes on."""
    answer = ""
    if sys.stdin.isatty():
        try:
            answer = input(f"\nstop job {job}? [y/N] ")
        except (EOFError, KeyboardInterrupt):
            print()
    if not answer.strip().lower().startswith("y"):
        print(f"job {job} goes on; {how_to_look(job, address)}", file=sys.stderr)
        return INTERRUPTED
    client.stop_job(job)
    print(f"stopping job {job}", file=sys.stderr)
    return exit_code(wait_ended(client, job))


def how_to_look(job: str, address: str) -> str:
    """The commands that follow and stop a job from anywhere."""
    where = f"--address {address} {job}"
    return f"follow it with `ray job logs --follow {where}`, stop it with `ray job stop {where}`"


def _last_line(error: object) -> str:
    """The last line with words in it: of a traceback the one that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if any(c.isalpha() for c in line)]
    return lines[-1] if lines else type(error).__name__
