"""A generator that loses sight of weights on the policy's device, in a module of its own: vLLM is slow to import."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa

from actors.roles.exchange import Exchange
from actors.roles.generator import GeneratorSpec, VllmGenerator
from tests.actors.light_roles import hide_nixl

LAST_READ = 1
"""The last version that is read on the policy's device."""


class BlindedGenerator(VllmGenerator):
    """Its process ends as the next version comes, and those that take its place find no NIXL."""

    def __init__(self, spec: GeneratorSpec, *args: Any) -> None:
        super().__init__(spec, *args)
        self.without = Path(spec.model).parent / "without NIXL"
        if self.without.exists():
            hide_nixl()

    def exchange(self, prompts: pa.RecordBatch | None, request: Exchange) -> tuple[dict[str, Any], pa.RecordBatch]:
        if request.weights and request.weights.version > LAST_READ and not self.without.exists():
            self.without.touch()
            os._exit(1)
        return super().exchange(prompts, request)
