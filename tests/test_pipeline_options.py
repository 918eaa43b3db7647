"""Pipelines: their stages, what goes to which of them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.driver.policy_stage import PolicyStage
from actors.driver.trainer_stage import TrainerStage
from beaver_ray.errors import UserError
from launch.config_files import load_config, load_pipeline
from tests.configs import SAFE_PPO, safe_ppo


def write_pipeline(folder: Path, **more: Any) -> Path:
    (folder / "safe_ppo.yaml").write_text(yaml.safe_dump(SAFE_PPO))
    sft = {"name": "sft", "stage": "sft", "model": "${workspace}/world/model", "train": ["d"]}
    (folder / "sft.yaml").write_text(yaml.safe_dump(sft))
    stages = [{"config": "sft.yaml", "set": {"epochs": 1}}, {"config": "safe_ppo.yaml"}]
    tree = {"workspace": "w", "world": {"seed": 1}, "stages": stages, **more}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(tree))
    return folder / "pipeline.yaml"


def test_pipeline(tmp_path: Path) -> None:
    path = write_pipeline(tmp_path)
    pipeline, stages = load_pipeline(path, ["safe_ppo.steps=20", "workspace=v", "world.seed=2", "sft.name=warm"])
    assert pipeline.world == {"seed": 2}
    sft, ppo = stages
    assert isinstance(sft, TrainerStage) and isinstance(ppo, PolicyStage)
    assert (sft.epochs, sft.model, sft.folder) == (1, "v/world/model", Path("v/warm"))
    assert (ppo.steps, ppo.models.policy) == (20, "v/sft/final/policy")


def test_pipelines_that_share_a_run_configure_it_alike() -> None:
    """A finished run of other settings would be refused: `make train` leaves what the others of its workspace begin
    with."""
    made: dict[Path, tuple[Path, Any]] = {}
    shared = 0
    for file in sorted(Path("configs").rglob("*.yaml")):
        if "\nstages:" in file.read_text(encoding="utf-8"):
            for stage in load_pipeline(file, [])[1]:
                first, of = made.setdefault(stage.folder, (file, stage))
                shared += first != file
                assert of == stage, f"{stage.folder} of {first} and of {file}"
    assert shared >= 6


def test_a_workspace_is_written_in_one_way(tmp_path: Path) -> None:
    for workspace in ("/tmp/w/", "/tmp//w", "/tmp/./w"):
        pipeline, (sft, ppo) = load_pipeline(write_pipeline(tmp_path), [f"workspace={workspace}"])
        assert pipeline.workspace == sft.workspace == "/tmp/w"
        assert isinstance(ppo, PolicyStage) and ppo.models.policy == "/tmp/w/sft/final/policy"
    assert safe_ppo("workspace=/tmp/w/").models.policy == safe_ppo("workspace=/tmp/w").models.policy


def test_overrides_of_stages_whose_names_have_dots(tmp_path: Path) -> None:
    path = write_pipeline(
        tmp_path, stages=[{"config": "sft.yaml"}, {"config": "sft.v2.yaml"}, {"config": "world.yaml"}]
    )
    for name in ("sft.v2", "world"):
        (tmp_path / f"{name}.yaml").write_text(
            (tmp_path / "sft.yaml").read_text().replace("name: sft", f"name: {name}")
        )
    pipeline, stages = load_pipeline(path, ["sft.v2.epochs=3", "sft.epochs=5", "world.epochs=7"])
    assert [stage.epochs for stage in stages] == [5, 3, 7]  # type: ignore[attr-defined]
    assert pipeline.world == {"seed": 1}
    # A file that is another in each round may be called anything, but not what the pipeline has itself.
    rounds = [{"each_round": [{"config": "${which}.yaml"}]}]
    path = write_pipeline(tmp_path, stages=rounds, by_round={"which": ["sft"]})
    pipeline, (stage,) = load_pipeline(path, ["world.seed=2", "sft.epochs=4"])
    assert pipeline.world == {"seed": 2} and stage.epochs == 4  # type: ignore[attr-defined]


def test_a_section_and_a_part_of_it_under_set(tmp_path: Path) -> None:
    stages = [{"config": "sft.yaml", "set": {"optimizer.learning_rate": 1e-4}}]
    with pytest.raises(
        UserError, match=r"sft.yaml has optimizer.learning_rate, and all of optimizer besides; write opt"
    ):
        load_pipeline(write_pipeline(tmp_path, stages=stages), ["stages.0.set.optimizer.schedule=linear"])


def test_bad_pipelines(tmp_path: Path) -> None:
    path = write_pipeline(tmp_path)
    with pytest.raises(UserError, match="unknown key workspce; did you mean 'workspace'"):
        load_pipeline(path, ["workspce=v"])
    with pytest.raises(UserError, match=r"key debug; .* options of a stage begin with its file's name: sft, safe_ppo$"):
        load_pipeline(path, ["debug=true"])
    with pytest.raises(UserError, match=r"is a pipeline, .*; give the file of one of its stages"):
        load_config(path)
    with pytest.raises(UserError, match=r"sft.yaml: unknown key epoch; did you mean 'epochs'"):
        load_pipeline(path, ["sft.epoch=v"])
    with pytest.raises(UserError, match=r"cannot read .*no\.yaml"):
        load_pipeline(write_pipeline(tmp_path, stages=[{"config": "no.yaml"}]))
    with pytest.raises(UserError, match="stages"):
        load_pipeline(write_pipeline(tmp_path, stages="sft.yaml"))
    with pytest.raises(UserError, match="stages"):
        load_pipeline(write_pipeline(tmp_path, stages=[]))
    (tmp_path / "other.yaml").write_text((tmp_path / "sft.yaml").read_text())
    _, stages = load_pipeline(write_pipeline(tmp_path), ["stages.0.config=other.yaml"])
    assert stages[0].stage == "sft"
