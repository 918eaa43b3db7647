"""New weights of every family that the README names, into vLLM: the tests of families.py, in a process of their own.

A closed vLLM engine on a CPU keeps two GB of address space, all families together more than the machine has memory, and
Linux then lets the process fork no more: Ray could not be started in it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(900)
def test_every_family() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name("families.py")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
