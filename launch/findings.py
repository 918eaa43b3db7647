"""What a check of the doctor gives, and what Ray takes of a machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

GIB = 2.0**30
# Ray's defaults: its object store takes this share of the memory, at most so many bytes.
STORE_SHARE, STORE_MOST = 0.3, 200e9


@dataclass(frozen=True)
class Finding:
    """What a check found, in one line, and how to mend it where it did not pass."""

    state: Literal["pass", "warn", "fail"]
    line: str
    mend: str = ""


Check = tuple[str, Callable[[], Finding]]
