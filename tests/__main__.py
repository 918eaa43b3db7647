"""All tests, or those that pytest's arguments name: first what needs no cluster, a file to each core, then the rest.

    python -m tests [PYTEST ARGUMENTS]    # `make test`

Most tests compute in one thread. Those marked `cluster` start processes of Ray, which run at low priority and starve
beside others; they have the machine for themselves.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

# In the order of the files: by itself xdist begins with those of many tests, and the longest test, the only one of its
# file, would keep one core waiting at the end.
ON_ALL_CORES = ("-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder")
PARTS = (("-m", "not cluster", *ON_ALL_CORES), ("-m", "cluster"))


def main() -> int:
    """0 where all tests passed, and there were some in either part; else the first part's code that says otherwise."""
    codes = [subprocess.call([sys.executable, "-m", "pytest", *sys.argv[1:], *part]) for part in PARTS]
    failed = [code for code in codes if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)]
    return failed[0] if failed else min(codes)


if __name__ == "__main__":
    sys.exit(main())
