"""A run under ZeRO-3 whose ranks die in the middle of an exchange, and whose scorer dies in the last evaluation.

Its policy has a head of its own; all other runs on Ray that are tested have tied ones.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from actors.driver.train import train
from beaver_ray.models.score import load_score_model
from beaver_ray.runs import read_metrics
from launch.config_files import load_config
from tests.actors.dying_roles import DyingCritic, DyingPolicy, DyingScorer
from tests.actors.support import largest_gap
from tests.tiny_ppo import build_workspace, write_stage

pytestmark = pytest.mark.cluster

STEPS = 6


@pytest.mark.timeout(600)
def test_whoever_dies_in_an_exchange_is_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for role in (DyingPolicy, DyingCritic, DyingScorer):
        monkeypatch.setattr(f"{role.__base__.__module__}.{role.__base__.__name__}", role)  # type: ignore[union-attr]
    placement = {kind: {"cpus": 0.1} for kind in ("rollout", "reward", "reference", "experience")}
    placement |= {kind: {"cpus": 0.1, "workers": 2} for kind in ("policy", "reward_critic")}
    path = write_stage(
        build_workspace(tmp_path, tied=False),
        stage="ppo",
        constraints=[],
        steps=STEPS,
        save_every=2,
        cluster={"placement": placement, "threads": 1, "step_timeout": 300.0},
        engine={"micro_batch_tokens": 256, "dtype": "float32", "zero_stage": 3},
        evaluation={"prompts": ["prompts:1:${workspace}/world/prompts/test.jsonl"]},
    )
    folder = train(load_config(path))
    assert sorted(marker.name for marker in tmp_path.glob("died in *")) == [
        f"died in {what}" for what in ("bucket", "evaluation", "logprobs", "values")
    ]
    notes = (folder / "notes.log").read_text(encoding="utf-8").splitlines()
    rolled_back = [note for note in notes if "rolled back to step" in note]
    # What comes out first is another rank's error, or that of a generator that waits for weights.
    assert len(rolled_back) == 3, "a rank's death does so, a scorer's does not"
    for note, steps, who in zip(
        rolled_back, ("3 to 3", "3 to 3", "5 to 6"), ("policy", "critic", "policy"), strict=True
    ):
        assert f"steps {steps} are trained again" in note and who in note.lower()
    assert sum("reward is started anew" in note for note in notes) == 1
    metrics = read_metrics(folder)
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert all(abs(row["kl/rollout_train"]) < 1e-4 for row in metrics)
    tables = [pq.read_table(file) for file in sorted((folder / "trajectories").glob("*.parquet"))]
    samples = [sample for table in tables for sample in table["sample_id"].to_pylist()]
    assert sorted(samples) == list(range(16 * STEPS))
    # The generator has every update, those that were published again too.
    for step, table in enumerate(tables, start=1):
        assert set(table["weight_version"].to_pylist()) == {step - 1}
        assert largest_gap(table, "rollout_logprobs", "logprobs") < 1e-4
    assert largest_gap(tables[-1], "rollout_logprobs", "reference_logprobs") > 1e-2
    assert largest_gap(tables[0], "rollout_logprobs", "reference_logprobs") < 1e-4
    assert (folder / "evaluation.json").is_file()
    AutoModelForCausalLM.from_pretrained(folder / "final" / "policy")
    critic = load_score_model(str(folder / "final" / "reward_critic"), "critic", "auto")  # type: ignore[arg-type]
    assert all(bool(p.isfinite().all()) for p in critic.parameters())
