"""Options of stage weak_to_strong that are groups of their own. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from beaver_ray.options import Strict, option

Task = Literal["preference", "cost", "moderation", "classification"]
QUESTIONS: dict[str, dict[str, list[int]]] = {
    "preference": {"order": [0]},
    "cost": {"sign": [1, 2], "order": [0]},
    "moderation": {"label": [0]},
    "classification": {"label": [0]},
}
"""Columns of a row's questions that are of one kind, and share a threshold; figures are of the first kind.

Of a preference: whether the first answer is better. Of a cost pair: whether the first is safer, whether each is unsafe.
"""
HEADS: dict[str, tuple[str, ...]] = {"preference": ("reward",), "cost": ("cost",)}
"""Heads of the tasks whose rows are pairs; the others' models are classifiers."""
OF_LOSSES = {
    "alpha": ("confidence", "product"),
    "beta": ("product",),
    "warmup": ("confidence",),
    "schedule": ("confidence",),
}
"""Losses that an option of a student is of."""
STUDENT = "student_"
"""What the folders of students begin with."""


class WeakConfig(Strict):
    """The supervisor: a model like any other, or a bag of words."""

    model: str | None = option("Folder of the model to start from; null for a bag of words.", None)
    rows: int | None = option("Train it on this many rows of its half at most; null for all.", None, gt=0)
    known: list[str] = option("Words that a bag of words knows; empty for all that it meets.", default_factory=list)
    unknown: list[str] = option("Words that a bag of words does not know.", default_factory=list)
    ridge: float = option("Weight of a bag of words' squared weights, times 1/2, beside summed losses.", 1.0, gt=0)
    epochs: float | None = option(
        "Passes over its half, of a model; null for those of the students.", None, gt=0, le=1e6
    )

    @model_validator(mode="after")
    def _fits_together(self) -> WeakConfig:
        is_bag = self.model is None
        for name in ("epochs",) if is_bag else ("known", "unknown", "ridge"):
            if self.asks_for(name):
                kind, mend = ("model", "give its folder as model") if is_bag else ("bag of words", "set model to null")
                raise ValueError(f"{name} is of a {kind}; leave it out, or {mend}")
        if self.known and self.unknown:
            raise ValueError("known and unknown exclude each other: give one of them")
        return self


class StudentConfig(Strict):
    """One way for the strong model to learn from weak labels."""

    name: str = option("Its folder is final/student_NAME.", min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    loss: Literal["xent", "confidence", "product"] = option("What it learns; see docs/weak-to-strong.md.", "xent")
    alpha: float = option("Weight of its own decisions; of product, the power of the weak label.", 0.5, ge=0, le=1)
    beta: float = option("Of product: the power of its own probability.", 1.0, ge=0)
    warmup: float = option("Of confidence: share of the steps over which alpha rises from 0.", 0.2, ge=0, le=1)
    schedule: Literal["linear", "published"] = option(
        "How alpha rises; published jumps at the end of the warm-up.", "linear"
    )
    epochs: float | None = option("Passes over the weak labels; null for epochs of the stage.", None, gt=0, le=1e6)
    stop: Literal["none", "agreement", "loss"] = option(
        "Keep the model of the best agreement with held-out weak labels, or the least loss by them.", "none"
    )
    chain: bool = option("Learn from the last model of the chain, and not from the weak one.", False)

    @model_validator(mode="after")
    def _fits_its_loss(self) -> StudentConfig:
        for name, losses in OF_LOSSES.items():
            if self.loss not in losses and self.asks_for(name):
                raise ValueError(f"{name} is of loss {' and '.join(losses)}; leave it out for {self.loss}")
        if self.loss == "product" and self.alpha == 0:
            raise ValueError("loss product with alpha 0 does without the weak labels; set alpha above 0")
        return self
