"""A tiny small world on disk, a process group of one rank, and two ranks in processes of their own."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Machines that run other things too make any deadline fail at times.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


def _write_model(folder: Path, shapes: dict[str, list[int]] | None = None, **config: Any) -> Path:
    """A model folder: config.json, and safetensors of zeros where shapes are given."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 100, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(shape | config))
    if shapes:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dims in shapes.items():
            start, size = end, 4
            for dim in dims:
                size *= dim
            end += size
            header[name] = {"dtype": "F32", "shape": dims, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return folder


@pytest.fixture
def write_model() -> Callable[..., Path]:
    """``write_model(folder, shapes, **config)``: see above."""
    return _write_model


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small world with ``model`` (far from uniform), ``reward_model`` and ``cost_model`` beside it."""
    from beaver_ray.small_world.build import build
    from beaver_ray.small_world.world import SmallWorld
    from tests.actors.support import disturb_folder, write_score_folder

    folder = tmp_path_factory.mktemp("tiny_world")
    world = SmallWorld(seed=3, train_prompts=48, test_prompts=16)
    sizes = {"pairs": 240, "test_pairs": 60, "demonstrations": 160, "test_demonstrations": 40}
    sizes |= {"labelled": 240, "test_labelled": 80}
    build(folder, world, hidden_size=32, layers=2, **sizes)
    disturb_folder(folder / "model")
    write_score_folder(folder / "reward_model", folder / "model", seed=1, score_type="reward")
    write_score_folder(folder / "cost_model", folder / "model", seed=2, score_type="cost")
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_group_outlives_its_module() -> Iterator[None]:
    """A run in this process leaves it as the only rank of a group; the next module starts its own."""
    yield
    # Looked up instead of imported: most modules need neither, and both are slow to import.
    if (deepspeed := sys.modules.get("deepspeed")) and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def no_setting_outlives_its_module() -> Iterator[None]:
    """Engines and groups set variables of the environment, and vLLM's on a CPU takes torch.set_num_threads away."""
    before, torch = dict(os.environ), sys.modules.get("torch")
    set_num_threads = torch and torch.set_num_threads
    yield
    # Ray goes by what it found when it first started, for as long as this process lives.
    changed = [name for name in os.environ if os.environ[name] != before.get(name) and not name.startswith("RAY_")]
    for name in changed:
        del os.environ[name]
    os.environ.update({name: text for name, text in before.items() if name not in os.environ})
    if torch:
        torch.set_num_threads = set_num_threads  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def one_rank() -> None:
    """This process as the only rank of a group."""
    from actors.machine.engine import join_ranks, meeting_place

    join_ranks(0, 1, meeting_place("127.0.0.1"))


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[object]:
    """`Ranks` of two processes that have met; started once a session."""
    from tests.actors.support import Ranks

    ranks = Ranks(2)
    yield ranks
    ranks.close()
