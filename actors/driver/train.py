"""Runs one stage from its configuration: its folder, its seeds, and whatever the stage does in between."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import torch

from beaver_ray.errors import UserError
from beaver_ray.gpus import on_this_machine
from beaver_ray.runs import RunFolder, is_finished
from beaver_ray.stage import Stage
from beaver_ray.yaml_files import few_of, other_settings

CHANGE_NOTHING = ("tracker", "save_every", "keep_checkpoints", "cluster")
"""Options that a finished run may be asked for again with, set otherwise."""


def train(stage: Stage, placed: Stage | None = None) -> Path:
    """Run the stage and return its folder; ``final/`` is there exactly when all went well.

    With ``resume`` it goes on from the newest checkpoint; a finished one of these settings is left as it is.
    ``placed`` is the stage as it runs here, where that is known; else this machine is looked at.

    Raises UserError, before any process is started where that can be seen, for anything the user can mend.
    """
    if stage.resume and is_finished(stage.folder):
        if other := other_settings(stage.folder / "config.yaml", stage, CHANGE_NOTHING):
            raise UserError(
                f"{stage.folder} holds a finished run with other settings ({few_of(other)}): set another name, or "
                f"delete {stage.folder / 'final'} to go on from what else is there"
            )
        print(f"{stage.folder} is complete", flush=True)
        return stage.folder
    seed_everything(stage.seed, stage.cluster.threads)
    with RunFolder(stage) as run:
        (placed or on_this_machine(stage)).run(run)
        (run.folder / "final.part").rename(run.final)
    return run.folder


def seed_everything(seed: int, threads: int) -> None:
    """Seeds of this process; the roles seed their own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
