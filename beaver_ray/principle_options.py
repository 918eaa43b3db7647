"""A reward model that follows principles, as a source of scores (SALMON, arXiv 2310.05910).

Nothing heavy is imported here: the command line reads this module first.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, model_validator

from beaver_ray.options import Strict, option

NOT = "not "


class ChosenPrinciple(Strict):
    """One of the principles of a file, as a run uses it."""

    name: str = option("Its name in the file.", min_length=1)
    negated: bool = option("Judge by its opposite.", False)
    weight: float = option("Its weight beside the others.", 1.0, gt=0)

    @property
    def called(self) -> str:
        """Its name; with "not" before it where its opposite is meant."""
        return f"{NOT}{self.name}" if self.negated else self.name


def _of_a_word(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    return {"name": given.removeprefix(NOT), "negated": given.startswith(NOT)}


Choice = Annotated[ChosenPrinciple, BeforeValidator(_of_a_word)]
"""An entry of a list of principles: NAME, "not NAME", or a mapping."""


class PrincipleModel(Strict):
    """A reward model trained on pairs of stage principle_labels, and the principles that it is to judge by."""

    folder: str = option("Folder of the reward model, or its name on the hub.")
    principles: list[Choice] = option(
        "Principles that it judges by: NAME, not NAME, or {name, negated, weight}.", min_length=1
    )
    file: str | None = option("Principles' file that it was trained with; null for ours.", None)
    draw: int | None = option("Principles drawn for each prompt, by weight; null for all of them.", None, ge=1)
    apart: bool = option("Judge by each principle alone, and take the mean by weight.", False)

    @model_validator(mode="after")
    def _fits_together(self) -> PrincipleModel:
        names = [one.name for one in self.principles]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"principle {twice[0]!r} is named twice; leave one out")
        if self.draw is not None and self.apart:
            raise ValueError("draw writes some principles together and apart none; leave one of them out")
        if self.draw is not None and self.draw > len(names):
            raise ValueError(f"draw is {self.draw}, and there are {len(names)} principles; lower it")
        if len({one.weight for one in self.principles}) > 1 and self.draw is None and not self.apart:
            raise ValueError("weights are for draw or apart; one text of all principles has none: set apart: true")
        return self
