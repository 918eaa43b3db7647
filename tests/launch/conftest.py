from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stage_file(tmp_path: Path, write_model: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a safe_ppo stage (or ``stage``) over a tiny model; keys given replace the file's."""
    model = str(write_model(tmp_path / "model", {"embedding": [100, 8], "layer": [200]}))

    def write(stage: str = "safe_ppo", **more: Any) -> Path:
        common = {"workspace": str(tmp_path / "runs"), "name": "one", "stage": stage}
        lengths = {"engine": {"micro_batch_tokens": 1024}}
        if stage in ("sft", "reward_model", "cost_model", "score_model", "dpo", "strength"):
            own: dict[str, Any] = {"model": model, "train": ["d"], "max_tokens": 64, "batch_size": 4}
        else:
            own = {
                "steps": 2,
                "models": {"policy": model, "reward": model},
                "constraints": [{"name": "harm", "model": model, "limit": 0.0}],
                "data": {"prompts": ["p"], "max_prompt_tokens": 32},
                "rollout": {"prompts_per_step": 8, "max_new_tokens": 32},
            }
        path = tmp_path / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(common | lengths | own | more))
        return path

    return write


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user's checkout holds: the files that git knows or would add."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "beaver_ray", "actors", "launch"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder
