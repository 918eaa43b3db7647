"""The options of a constraint and its multiplier.

Nothing heavy is imported here: the command line reads this module first.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import model_validator

from beaver_ray.data_options import DataSpec, Scalar
from beaver_ray.guard_options import ModelOfScores, PerhapsModelOfScores
from beaver_ray.options import Strict, option
from beaver_ray.score_sources import score_source

SIGNAL_NAME = re.compile(r"[a-z][a-z0-9_]*")
TAKEN = ("reward", "reward_mean", "reward_clipped")
"""The reward's own names among metrics of signals, which no cost may have."""
FORM = re.compile(r"mean|hinge|worst_of_k|cvar:0?\.\d*[1-9]\d*")
FEWEST = 32
"""Costs that a step needs for pid to compare their own mean; with fewer it takes the last so many. It cuts errors at
LARGEST_ERROR, and where the sampling error of a step is larger than that, skewed costs come to rest at their median."""


class MultiplierConfig(Strict):
    """How one constraint's Lagrange multiplier moves."""

    rule: Literal["log_sgd", "pid", "projected"] = option(
        "pid finds its gains itself; log_sgd is the published rule; projected is gradient ascent.", "pid"
    )
    initial: float | Literal["auto"] | None = option(
        "Start value; null: 0, or 1 with log_sgd and reward_shaping; auto: where the dual on answers of the policy's "
        "start has it (beaver-ray feasibility).",
        None,
    )
    time_constant: float = option("pid: steps in which a lasting violation is answered.", 10.0, ge=1)
    learning_rate: float = option("Step size of log_sgd and projected.", 0.1, gt=0)
    max: float | None = option("Upper bound; null for none, or with pid one far out of the way.", None, gt=0)
    window: int | None = option(
        "Answers whose mean cost is compared with the limit; null for the step's (pid: for 32 at least).",
        None,
        gt=0,
    )
    delay_steps: int = option("Steps before the first change.", 0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _without_gains(cls, given: Any) -> Any:
        gone = [key for key in ("kp", "ki", "kd") if isinstance(given, dict) and key in given]
        if gone:
            raise ValueError(f"{gone[0]} is gone: pid finds its gains itself, time_constant (in steps) says how fast")
        return given

    @model_validator(mode="after")
    def _bounded(self) -> MultiplierConfig:
        if isinstance(self.initial, float):
            if self.initial < 0:
                raise ValueError(f"initial {self.initial} is below 0")
            if self.rule == "log_sgd" and self.initial == 0:
                raise ValueError("log_sgd moves the logarithm and cannot start at 0; set initial above 0")
            if self.max is not None and self.initial > self.max:
                raise ValueError(f"initial {self.initial} is above max {self.max}")
        if self.rule == "pid" and self.asks_for("learning_rate"):  # a recipe's time_constant may stand in other rules
            raise ValueError("learning_rate is of rule log_sgd and projected; leave it out for pid, or set rule")
        return self


class ConstraintConfig(Strict):
    """One bounded cost: its scorer, critic, limit and multiplier."""

    name: str = option("Name in metrics and columns, for example harm.")
    model: ModelOfScores = option(
        "Folder of the cost model (above 0 means unsafe), a guard (docs/guards.md), labels of a moderation model "
        "(docs/moderation.md), a reward model with principles (docs/principles.md), a service's address, or "
        "python:FILE.py:FUNCTION(key=value)."
    )
    critic: str | None = option("Folder that the cost critic starts from; null for the cost model.", None)
    limit: float | None = option("Highest mean cost, in units of the cost model's score.", None)
    violation_rate: float | None = option(
        "Highest share of unsafe answers; the cost becomes a calibrated probability.", None, gt=0, lt=1
    )
    calibration: list[DataSpec] = option("Held-out labelled pairs, for violation_rate.", default_factory=list)
    judge: PerhapsModelOfScores = option(
        "Says which held-out answers are unsafe (above 0), where nobody knows the truth: the calibration of "
        "violation_rate is held against it. Any source that model may be; nothing is trained on it.",
        None,
    )
    confidence: float | None = option(
        "Probability with which the mean cost is to be within the bound, sampling errors counted.", None, gt=0.5, lt=1
    )
    where: dict[str, Scalar | list[Scalar]] = option(
        "Field of the prompts' rows: value, or list of values; it counts over matching prompts alone.",
        default_factory=dict,
    )
    form: str = option(
        "What is bounded: mean, hinge (mean of max(0, cost)), cvar:0.9 (mean of the worst tenth), or worst_of_k.",
        "mean",
    )
    multiplier: MultiplierConfig = option(
        "Multiplier rule; with reward_shaping its initial value stays.", default_factory=MultiplierConfig
    )

    @property
    def tail(self) -> float:
        """The share of answers that cvar is the mean of; 1 of the other forms."""
        return 1.0 - float(self.form.removeprefix("cvar:")) if self.form.startswith("cvar:") else 1.0

    @property
    def of_several(self) -> bool:
        """Whether what is bounded is a figure of several answers together, and no mean of what each has by itself."""
        return self.form == "worst_of_k" or self.tail < 1

    @property
    def bound(self) -> float:
        """What the mean cost, or another form of it, may be at most: the limit, or the violation rate as a mean
        probability."""
        bound = self.limit if self.violation_rate is None else self.violation_rate
        assert bound is not None
        return bound

    @model_validator(mode="after")
    def _one_limit(self) -> ConstraintConfig:
        if not SIGNAL_NAME.fullmatch(self.name) or self.name in TAKEN:
            taken = ", ".join(TAKEN)
            raise ValueError(f"name {self.name!r} must be lower-case letters, digits and _, and none of {taken}")
        if (self.limit is None) == (self.violation_rate is None):
            raise ValueError(f"constraint {self.name} needs either limit or violation_rate, not both or neither")
        if self.violation_rate is not None and not self.calibration:
            raise ValueError(f"constraint {self.name}: violation_rate needs calibration data (labelled pairs)")
        if self.violation_rate is None and self.judge is not None:
            raise ValueError(
                f"constraint {self.name}: judge is what calibrated probabilities are held against, and there are none "
                f"without violation_rate"
            )
        if empty := [field for field, wanted in self.where.items() if wanted == []]:
            raise ValueError(f"constraint {self.name}: where.{empty[0]} has no value, and would match no prompt")
        if not FORM.fullmatch(self.form):
            raise ValueError(
                f"constraint {self.name}: form is {self.form!r}; choose mean, hinge, worst_of_k, or cvar:LEVEL with a "
                f"level between 0 and 1 (cvar:0.9)"
            )
        if self.form == "hinge" and self.limit is None:
            raise ValueError(
                f"constraint {self.name}: form hinge counts costs above 0 alone, and those of a violation_rate are "
                f"probabilities, never below 0; leave form out, or give a limit"
            )
        if self.form == "hinge" and self.bound < 0:
            raise ValueError(
                f"constraint {self.name}: form hinge bounds the mean of max(0, cost), which is never below 0, and "
                f"limit is {self.bound:g}; raise it"
            )
        score_source(self.model)
        return self
