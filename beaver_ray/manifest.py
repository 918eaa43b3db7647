"""What a stage, and a round of stages, was made from and has made: hashes of models and data, counts, seeds.

final/manifest.json of a stage that makes data, and workspace/round_N/manifest.json of a round of a pipeline. The hash
of a file is its SHA-256, that of a model the one of `beaver_ray.models.folders.fingerprint`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from beaver_ray.data_options import DataSpec
from beaver_ray.errors import UserError, first_line
from beaver_ray.json_files import write_lines
from beaver_ray.runs import read_evaluation
from beaver_ray.stage import Stage

MANIFEST = "manifest.json"


class DataFile(BaseModel):
    """A file of rows."""

    model_config = ConfigDict(extra="forbid")

    sha256: str
    rows: int


class StageManifest(BaseModel):
    """One run of one stage."""

    model_config = ConfigDict(extra="forbid")

    stage: str
    name: str
    seed: int
    parents: dict[str, str]
    """Models, by folder or name of the hub, and data, by path: their hashes. ``hub`` where the data lie there."""
    files: dict[str, DataFile] = {}
    """What it has written, by name under final/."""
    models: dict[str, str] = {}
    """Likewise the models."""
    counts: dict[str, int] = {}
    evaluation: dict[str, float] = {}
    """The means of its evaluation on held-out prompts."""


class RoundManifest(BaseModel):
    """One round of a pipeline."""

    model_config = ConfigDict(extra="forbid")

    round: int
    previous: str | None
    """SHA-256 of the manifest of the round before."""
    stages: list[StageManifest]


def file_hash(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def data_of(stage: Stage) -> list[DataSpec]:
    """All data sets that the stage reads, those that calibrate too; one may stand there for two uses."""
    bounds = [*getattr(stage, "constraints", []), *getattr(stage, "costs", [])]
    meta = getattr(stage, "meta", None)
    lists = [*stage.data_sets, *(bound.calibration for bound in bounds), [] if meta is None else meta.answers]
    return [spec for specs in lists for spec in specs]


def parents_of(stage: Stage) -> dict[str, str]:
    """The hashes of all models and data that the stage reads."""
    from beaver_ray.data.mixing import parse_mix
    from beaver_ray.data.sources import open_source
    from beaver_ray.fit import models_of
    from beaver_ray.models.folders import fingerprint

    found = {use.folder: fingerprint(use.folder) for use in models_of(stage)}
    for named in data_of(stage):
        for label, spec in parse_mix([named]).items():
            place = open_source(spec.source, spec.path)[0]
            found |= {str(file): file_hash(file) for file in place.all_files} or {label: "hub"}
    return found


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _rows_in(folder: Path) -> dict[str, DataFile]:
    """The files of rows in a folder."""
    return {file.name: DataFile(sha256=file_hash(file), rows=_lines(file)) for file in sorted(folder.glob("*.jsonl"))}


def write_stage_manifest(stage: Stage, folder: Path, counts: Mapping[str, int], more: Sequence[str] = ()) -> None:
    """Write the manifest of a stage that has put JSON lines into ``folder``.

    more: files that it was made from besides its models and data sets.
    """
    parents = parents_of(stage) | {file: file_hash(Path(file)) for file in more}
    made = StageManifest(
        stage=stage.stage,
        name=stage.name,
        seed=stage.seed,
        parents=parents,
        files=_rows_in(folder),
        counts={**counts},
    )
    (folder / MANIFEST).write_text(made.model_dump_json(indent=2) + "\n", encoding="utf-8")


def stage_manifest(stage: Stage) -> StageManifest:
    """The manifest that the finished stage has left, else one of what lies in its folder."""
    from beaver_ray.models.folders import fingerprint

    final = stage.folder / "final"
    left = final / MANIFEST
    if left.is_file():
        try:
            return StageManifest.model_validate_json(left.read_bytes())
        except (OSError, ValidationError) as error:
            raise UserError(f"{left} is no manifest ({first_line(error)}); run its stage again") from None
    models = sorted(file.parent for file in final.glob("*/config.json"))
    found = read_evaluation(stage.folder)
    # Scores of other programs stand there too (`bridges`), which have no mean.
    means = {key: value["mean"] for key, value in found.items() if isinstance(value, dict) and "mean" in value}
    return StageManifest(
        stage=stage.stage,
        name=stage.name,
        seed=stage.seed,
        parents=parents_of(stage),
        files=_rows_in(final),
        models={folder.name: fingerprint(str(folder)) for folder in models},
        evaluation=means,
    )


def write_round(workspace: Path, number: int, stages: Sequence[Stage]) -> Path:
    """Write the manifest of a round, all whose stages are complete; returns its path."""
    before = workspace / f"round_{number - 1}" / MANIFEST
    previous = file_hash(before) if before.is_file() else None
    made = RoundManifest(round=number, previous=previous, stages=[stage_manifest(stage) for stage in stages])
    path = workspace / f"round_{number}" / MANIFEST
    write_lines(path, [made.model_dump_json(indent=2) + "\n"])
    return path
