"""What a manifest says of a stage: what it read and wrote, and of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import datasets

from actors.stages.arena import Arena
from actors.stages.label import Label
from beaver_ray.json_files import write_rows
from beaver_ray.manifest import DataFile, file_hash, parents_of, stage_manifest


def test_scores_of_other_programs_are_no_means(tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "p", "response_0": "a", "response_1": "b"}])
    stage = Label(stage="label", name="l", workspace=str(tmp_path), pairs=str(tmp_path / "pairs.jsonl"), world="w")
    figure = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 4}
    task = {"version": 1, "n": 3, "scores": {"acc": {"value": 1.0, "stderr": None}}}
    found = {"prompts": 4, "samples": 4, "reward": figure, "bridges": {"lm-eval": {"tiny": task}}}
    stage.folder.mkdir()
    (stage.folder / "evaluation.json").write_text(json.dumps(found))
    assert stage_manifest(stage).evaluation == {"reward": 0.5}


def test_a_round_names_all_that_its_stages_read_and_wrote(tmp_path: Path) -> None:
    """A saved data set, an arena's calibration, and the answers of a stage that leaves no manifest of its own."""
    labelled, saved = tmp_path / "labelled.jsonl", tmp_path / "saved"
    write_rows(labelled, [{"prompt": "p", "response_0": "a", "response_1": "b"}])
    datasets.Dataset.from_list([{"prompt": "p"}]).save_to_disk(str(saved))
    stage = Arena(
        stage="arena",
        name="a",
        workspace=str(tmp_path),
        policies={"one": "a.jsonl", "two": "b.jsonl"},
        prompts=[f"prompts:1:{saved}"],
        costs=[{"name": "harm", "model": "of/the-hub", "calibration": [f"PKU-SafeRLHF:1:{labelled}"]}],
    )
    found = parents_of(stage)
    assert found[str(labelled)] == file_hash(labelled) and "hub" not in found.values()
    assert {name for name in found if name.startswith(str(saved))} == {str(file) for file in saved.iterdir()}
    write_rows(stage.folder / "final" / "answers.jsonl", [{"prompt": "p"}, {"prompt": "q"}])
    assert stage_manifest(stage).files == {
        "answers.jsonl": DataFile(sha256=file_hash(stage.folder / "final" / "answers.jsonl"), rows=2)
    }
