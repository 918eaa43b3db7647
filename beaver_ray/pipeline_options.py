"""The options of a pipeline: stages in order, each feeding the next, some of them perhaps in rounds."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import model_validator

from beaver_ray.options import Strict, option
from beaver_ray.yaml_files import ROUND_NAMES, interpolate


class RepeatedStage(Strict):
    """One stage of every round."""

    config: str = option("Configuration file, relative to the pipeline's; may hold ${round}.")
    set: dict[str, Any] = option("Dotted overrides for this stage.", default_factory=dict)


class PipelineStage(Strict):
    """One stage of a pipeline, or those that every round repeats."""

    config: str | None = option("Configuration file, relative to the pipeline's.", None)
    set: dict[str, Any] = option("Dotted overrides for this stage.", default_factory=dict)
    each_round: list[RepeatedStage] = option("Instead: the stages of a round, in order.", default_factory=list)

    @model_validator(mode="after")
    def _one_or_many(self) -> PipelineStage:
        if (self.config is None) == (not self.each_round) or (self.set and self.each_round):
            raise ValueError("an entry of stages is either config (and set) or each_round")
        return self


class StageEntry(NamedTuple):
    """One run of one stage: which file, how it is changed, in which round, and what ${NAME} stands for in both."""

    config: str
    set: dict[str, Any]
    round: int | None
    values: dict[str, Any]


class PipelineConfig(Strict):
    """Stages in order, each feeding the next; some of them perhaps in several rounds."""

    workspace: str = option("Folder that all stages write to; they refer to it as ${workspace}.")
    resume: bool = option("Go on with a stage that was broken off.", False)
    world: dict[str, Any] | None = option("Build a small world in workspace/world first, with these options.", None)
    rounds: int = option("How often the stages under each_round run.", 1, ge=1, le=100)
    by_round: dict[str, list[Any]] = option("NAME: a list of what ${NAME} is in round 1, 2, ...", default_factory=dict)
    stages: list[PipelineStage] = option("Stages in order, one block of them perhaps under each_round.", min_length=1)

    @model_validator(mode="after")
    def _rounds(self) -> PipelineConfig:
        blocks = sum(bool(entry.each_round) for entry in self.stages)
        if blocks > 1:
            raise ValueError("stages has each_round twice; put what a round does into one block")
        if not blocks and (self.rounds > 1 or self.by_round):
            raise ValueError("rounds and by_round need an entry each_round under stages, with what a round does")
        for name, values in self.by_round.items():
            if not name.isidentifier() or name in ("workspace", *ROUND_NAMES):
                raise ValueError(f"by_round: {name!r} cannot be the name of a value; choose another word")
            if len(values) < self.rounds:
                raise ValueError(f"by_round.{name} has {len(values)} values for {self.rounds} rounds")
        return self

    @property
    def entries(self) -> list[StageEntry]:
        """Every run of a stage, in order. Raises UserError for a ${NAME} in a file's name that is not known."""
        found: list[StageEntry] = []
        values: dict[str, Any]
        done = 0  # rounds
        for entry in self.stages:
            if entry.config is not None:
                values = {"previous_round": done, "rounds_so_far": [*range(1, done + 1)]} if done else {}
                found.append(StageEntry(entry.config, entry.set, None, values))
                continue
            for number in range(1, self.rounds + 1):
                values = {"round": number, "previous_round": number - 1, "rounds_so_far": [*range(1, number + 1)]}
                own = {name: each[number - 1] for name, each in self.by_round.items()}
                values |= interpolate(own, values | {"workspace": self.workspace}, "by_round")
                for stage in entry.each_round:
                    file = str(interpolate(stage.config, values, "each_round"))
                    found.append(StageEntry(file, stage.set, number, values))
            done = self.rounds
        return found
