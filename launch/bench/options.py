"""The options of `beaver-ray bench`, which every benchmark is run with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Size = Literal["small", "full"]


@dataclass(frozen=True)
class Options:
    """What a user may say to any benchmark."""

    size: Size = "full"
    repetitions: int | None = None
    """Measured repetitions of each side; None for the benchmark's own number."""
    cases: tuple[str, ...] = ()
    """Of a benchmark with several cases, those whose name contains one of these; empty for all."""
    config: Path | None = None
    """step: the configuration to run instead of a generated one."""
    overrides: tuple[str, ...] = field(default=())
    """trainer, sync, iteration, step: key=value changes of our side's configuration."""
    shape: str | None = None
    """scoring, raw-vllm, iteration, step: model of a shape of `launch.bench.models.SHAPES`, not the benchmark's own."""
    offered: set[str] = field(default_factory=set, compare=False)
    """Names of the cases that were asked about."""

    @property
    def small(self) -> bool:
        """Whether this run only shows that the benchmark works."""
        return self.size == "small"

    def wants(self, case: str) -> bool:
        """Whether a case was asked for."""
        self.offered.add(case)
        return not self.cases or any(part in case for part in self.cases)
