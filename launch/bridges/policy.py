"""A policy that another program asks, and the scores that it is left with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beaver_ray.data.templates import Template
from beaver_ray.errors import UserError
from beaver_ray.json_files import read_json, write_json
from beaver_ray.models.chat import ChatFolder, ChatModel, Sampling
from beaver_ray.models.folders import fingerprint
from beaver_ray.origins import run_of, template_of
from beaver_ray.runs import read_evaluation

TaskScores = dict[str, Any]
"""version and n of a task, and its `scores`: {"value", "stderr"} by figure; stderr is None where there is none."""


class Policy:
    """A policy in its folder: a run's final one, a model, or a LoRA adapter on its base."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError where no policy lies in ``folder``, or where its evaluation.json is broken."""
        if not folder.is_dir():
            raise UserError(f"no folder {folder}: give that of a run or of a model, where the scores are to lie")
        self.folder = folder
        self.where = ChatFolder.find(str(folder), "bridge")
        self.template: Template = template_of(run_of(str(folder)))
        read_evaluation(folder)  # hours of work are not to end at a file that cannot be added to

    def load(self, sampling: Sampling) -> ChatModel:
        """The model, asked by the run's template."""
        return ChatModel(self.folder.name, self.where, sampling, self.template)

    def keep(self, program: str, tasks: Mapping[str, TaskScores]) -> Path:
        """Add a program's scores to evaluation.json, in place of those of the same tasks, and print them."""
        path = self.folder / "evaluation.json"
        known = read_json(path) or {}
        asked = {"policy": self.where.model, "policy_hash": fingerprint(self.where.model)}
        if self.where.adapter is not None:
            asked["adapter"] = str(self.where.adapter)
        bridges = known.setdefault("bridges", {})
        bridges[program] = bridges.get(program, {}) | {name: scores | asked for name, scores in tasks.items()}
        write_json(path, known)
        for name, found in tasks.items():
            figures = ", ".join(f"{figure} {_figure(score)}" for figure, score in found["scores"].items())
            print(f"{name} (version {found['version']}, {found['n']} samples): {figures or 'no figures'}")
        print(f"evaluation: {path}")
        return path


def _figure(score: Mapping[str, float | None]) -> str:
    error = "" if score["stderr"] is None else f" +- {score['stderr']:.4g}"
    return f"{score['value']:.4g}{error}"
