"""Running programs of answers in tests."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from beaver_ray.rules import confinement, programs, run_program
from beaver_ray.rules.programs import passes_tests

ADD = "Here you are:\n```python\ndef add(a, b):\n    return a + b\n```\nThat adds."
ADDS = ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'", "assert add(1, 1) == 3"]


@cache
def has_namespaces() -> bool:
    """Asked of the kernel, and not of the code under test."""
    apart = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--fork", "true"]
    return shutil.which("unshare") is not None and subprocess.run(apart, capture_output=True).returncode == 0


def has_landlock() -> bool:
    """Whether the kernel refuses files to a process that asks it to."""
    return bool(ctypes.CDLL(None).syscall(confinement.SYS_LANDLOCK_CREATE, None, 0, confinement.ASK_VERSION) > 0)


def passed(program: str, *tests: str, namespaces: bool, seconds: float = 20.0, memory_mib: int = 512) -> float:
    """The share of tests that one program passes."""
    limits = {"seconds": seconds, "memory_mib": memory_mib}
    return passes_tests(["p"], [program], tests=[list(tests)], namespaces=namespaces, **limits)[0]


def tampered(checkout: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]) -> None:
    """From here on programs are confined by a copy of our code in this folder, with pieces of its text exchanged."""
    rules = checkout / "beaver_ray" / "rules"
    rules.mkdir(parents=True)
    for package in (rules, rules.parent):
        (package / "__init__.py").touch()
    for file in (run_program.__file__, confinement.__file__):
        shutil.copy(file, rules)
    source = (rules / "confinement.py").read_text()
    for text, other in changes.items():
        assert source.count(text) == 1
        source = source.replace(text, other)
    (rules / "confinement.py").write_text(source)
    monkeypatch.setattr(programs, "ROOT", checkout)
