"""The short form of `make chaos`: one kill of each kind that matters, on three real nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import check, run_chaos, write_config
from tests.tiny_ppo import build_workspace, write_stage

STEPS = 40


@pytest.mark.timeout(1200)
def test_a_run_survives_the_death_of_any_of_its_processes(tmp_path: Path) -> None:
    roles = ["rollout", "cost-harm", "policy", "critic-reward", "driver", "node"]
    stage = write_stage(build_workspace(tmp_path), steps=STEPS)
    config = write_config(stage, tmp_path, {})
    print(run_chaos(config, len(roles), seed=1, steps=STEPS, roles=roles))
    print(check(tmp_path / "chaos", STEPS))
    notes = (tmp_path / "chaos" / "notes.log").read_text(encoding="utf-8")
    assert "rolled back to step" in notes and "resumed after step" in notes and "is lost with" in notes
