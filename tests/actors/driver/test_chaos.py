"""The short form of `make chaos` on three real nodes, with long answers; test_deaths_ray.py has more ways to die."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.chaos import Kill, check, role_of, run_chaos, write_config
from tests.tiny_ppo import build_workspace, write_stage

pytestmark = pytest.mark.cluster

STEPS = 7
TOKENS = 300  # of each answer: 32 of them, which a generator hands out at a time, take 120 KB and are not inlined


def build_talkative(folder: Path) -> Path:
    """A workspace whose policy hardly ever ends an answer, and 32 held-out prompts.

    Its logits spread by e to the power of 2 or so, while that of the end is always 0.
    """
    world = build_workspace(folder) / "world"
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20.0)
        model.model.embed_tokens.weight[model.generation_config.eos_token_id] = 0.0
    model.save_pretrained(world / "model")
    lines = (world / "prompts" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:32]
    (world / "prompts" / "few.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_the_role_of_a_process_is_known_when_it_was_started_anew() -> None:
    names = [
        "policy-0",
        "policy-1.9f0c",
        "reward",
        "cost-harm.f0a1",
        "critic-reward",
        "rollout-new-3",
        "experience.0abc",
    ]
    roles = ["policy", "policy", "reward", "cost-harm", "critic-reward", "rollout", "experience"]
    assert [role_of(name) for name in names] == roles


@pytest.mark.timeout(1200)
def test_a_run_survives_the_death_of_any_of_its_processes(tmp_path: Path) -> None:
    stage = write_stage(build_talkative(tmp_path), steps=STEPS)
    changes = {
        "constraints": yaml.safe_load(stage.read_text(encoding="utf-8"))["constraints"][:1],
        "rollout": {"prompts_per_step": 64, "max_new_tokens": TOKENS, "max_sequences": 128, "kv_cache_gib": 0.1},
        "engine": {"micro_batch_tokens": 2048, "dtype": "float32"},
        "evaluation": {"prompts": [f"prompts:1:{tmp_path}/world/prompts/few.jsonl"], "every": 3},
    }
    config = write_config(stage, tmp_path, changes)
    kills = [Kill("node", "generation"), Kill("cost-harm", "scoring"), Kill("driver")]
    print(run_chaos(config, len(kills) + 1, seed=1, steps=STEPS, choice=kills))
    print(check(tmp_path / "chaos", STEPS))
    notes = (tmp_path / "chaos" / "notes.log").read_text(encoding="utf-8")
    assert "resumed after step" in notes and "is lost with" in notes and "are lost with their node" in notes
    assert "rolled back to step" not in notes, "that is for the death of a rank"
    rows = [json.loads(line) for line in (tmp_path / "chaos" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["rollout/response_tokens"] > 0.9 * TOKENS for row in rows)
