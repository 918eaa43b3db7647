"""Roles of which one process ends at a chosen moment, in a module that Ray's workers can import."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from actors.driver.evaluate import FIRST_SAMPLE_ID
from actors.roles.critic import Critic
from actors.roles.policy import PolicyTrainer
from actors.roles.scorer import Scorer


def die_once(folder: str, what: str) -> None:
    """End this process, unless one has ended of it before."""
    marker = Path(folder) / f"died in {what}"
    if not marker.exists():
        marker.touch()
        os._exit(1)


class DyingPolicy(PolicyTrainer):
    """Its second rank ends while the others wait for it: in its third log-probs, and in version 5 of the weights."""

    calls = 0

    def logprobs(self, batch: Any) -> Any:
        self.calls += 1
        if self.rank == 1 and self.calls == 3:
            die_once(self.config.workspace, "logprobs")
        return super().logprobs(batch)

    def bucket(self, version: int, index: int, direct: bool = False) -> Any:
        if self.rank == 1 and version == 5:
            die_once(self.config.workspace, "bucket")
        return super().bucket(version, index, direct)


class DyingCritic(Critic):
    """Its second rank ends in its fourth values."""

    calls = 0

    def values(self, batch: Any) -> Any:
        self.calls += 1
        if self.rank == 1 and self.calls == 4:
            die_once(self.config.workspace, "values")
        return super().values(batch)


class DyingScorer(Scorer):
    """Ends at its first held-out answer."""

    def __init__(self, model: str, *args: Any) -> None:
        super().__init__(model, *args)
        self.folder = str(Path(model).parent)

    def score(self, batch: Any) -> Any:
        if max(batch.column("sample_id").to_pylist()) >= FIRST_SAMPLE_ID:
            die_once(self.folder, "evaluation")
        return super().score(batch)
