"""Stage weak_to_strong in one process: who learns from whom, what is written, a resumed run, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actors.driver.train import train
from actors.stages.weak_to_strong import WeakToStrong
from beaver_ray.errors import UserError
from beaver_ray.manifest import read_rows
from beaver_ray.models.score import load_score_model
from beaver_ray.report.page import write_report


def stage_of(world: Path, workspace: Path, **changes: Any) -> WeakToStrong:
    tree = {
        "stage": "weak_to_strong",
        "name": "w2s",
        "workspace": str(workspace),
        "task": "cost",
        "model": str(world / "model"),
        "train": [f"PKU-SafeRLHF:1:{world}/preferences/train.jsonl"],
        "eval": [f"PKU-SafeRLHF:1:{world}/preferences/test.jsonl"],
        "epochs": 1,
        "batch_size": 24,
        "max_tokens": 64,
        "debug": True,
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.0},
        "engine": {"micro_batch_tokens": 1024},
    }
    return WeakToStrong.model_validate(tree | changes)


def test_a_cost_model_learns_from_a_bag_of_words(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    folder = train(stage_of(tiny_world, tmp_path))
    print((folder / "notes.log").read_text())
    write_report(stage_of(tiny_world, tmp_path), folder)
