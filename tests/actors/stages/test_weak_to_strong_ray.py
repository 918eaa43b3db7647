"""Stage weak_to_strong on a real Ray: models side by side, one of whose workers dies."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from actors.driver.train import train
from beaver_ray.json_files import write_lines
from tests.actors.stages.test_weak_to_strong import stage_of

pytestmark = pytest.mark.cluster


@pytest.mark.timeout(600)
def test_side_by_side_is_one_after_another(
    one_rank: None, tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"train": [f"PKU-SafeRLHF:80/-1:{tiny_world}/preferences/train.jsonl"], "looks": 0}
    alone = train(stage_of(tiny_world, tmp_path, **data))
    killed: list[int] = []

    def keep_and_kill(path: Path, lines: list[str]) -> None:
        write_lines(path, lines)
        if not killed:
            workers = [
                p for p in psutil.Process().children(recursive=True) if "EnsembleWorker" in " ".join(p.cmdline())
            ]
            assert len(workers) == 2
            killed.append(workers[0].pid)
            workers[0].kill()

    monkeypatch.setattr("actors.driver.ensemble.write_lines", keep_and_kill)
    placed = {"placement": {"trainer": {"workers": 2, "cpus": 0.5}}}
    together = train(stage_of(tiny_world, tmp_path, name="ray", debug=False, cluster=placed, **data))
    assert killed
    files = [(folder / "weak_to_strong.json").read_text() for folder in (alone, together)]
    assert json.loads(files[0]) == json.loads(files[1])
    assert (together / "final" / "student_confidence" / "model.safetensors").is_file()
