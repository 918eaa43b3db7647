"""A run that fails on the way, for tests of resuming."""

from __future__ import annotations

import pytest

from actors.driver.policy_stage import PolicyStage
from actors.driver.train import train
from beaver_ray.runs import RunFolder


def break_off(stage: PolicyStage, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until ``step`` is to be logged, and fail there."""
    log = RunFolder.log

    def fail(self: RunFolder, now: int, metrics: dict[str, float]) -> None:
        if now == step:
            raise RuntimeError("broken off")
        log(self, now, metrics)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "log", fail)
        with pytest.raises(RuntimeError, match="broken off"):
            train(stage)
