"""What was found of a policy besides its evaluation, as files of its folder that the report reads.

certificate.json    whether its constraints hold (`beaver_ray.certificate`)
reliability.json    whether calibrated probabilities are what happens (`beaver_ray.reliability`)
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from beaver_ray.errors import UserError, first_line

Share = Field(ge=0, le=1)
Count = Field(ge=1, le=10**12)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _File(_Record):
    @classmethod
    def name(cls) -> str:
        """Of the file."""
        return f"{cls.__name__.lower()}.json"

    def write(self, folder: Path) -> Path:
        """Write the file into ``folder``, which is made where it is missing; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.name()
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """What `write` wrote; None where there is no such file, UserError for anything else."""
        path = folder / cls.name()
        if not path.is_file():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise UserError(f"{path} cannot be read ({first_line(error)}); delete it or make it anew") from None


class Statement(_Record):
    """What is shown of one figure: its one-sided bounds, each at the certificate's confidence, and the verdict."""

    constraint: str
    answers: str
    """To each prompt: "one", "best of 4", "worst of 4"."""
    figure: Literal["share unsafe", "mean probability", "mean cost"]
    judged_by: str
    unsafe_above: float | None
    """The cost above which an answer is unsafe; None of a mean."""
    prompts: int = Count
    mean: float
    """Of the figure over the prompts; of a share the part of them that are unsafe."""
    target: float
    bound: Literal["Clopper-Pearson", "Hoeffding"] | None
    """None where there is none: the costs need not lie between 0 and 1."""
    lower: float | None
    upper: float | None
    verdict: Literal["holds", "fails", "undecided", "not certified"]
    prompts_to_decide: int | None
    """Where it is undecided: the prompts that would decide if the same mean were seen on them; None for too many."""

    @model_validator(mode="after")
    def _two_bounds(self) -> Self:
        if (self.bound is None, self.bound is None) != (self.lower is None, self.upper is None):
            raise ValueError("bounds are two or none")
        return self


class Joint(_Record):
    """All statements about one answer that have bounds, at once, each at a confidence that makes it up (Bonferroni)."""

    each_at: float = Share
    verdict: Literal["holds", "fails", "undecided"]


class Certificate(_File):
    """Whether the constraints of a run hold for a policy, shown on prompts that training never saw."""

    command: str
    confidence: float = Share
    policy: str
    policy_hash: str
    """Of its config.json and weights."""
    seed: int
    temperature: float
    max_new_tokens: int
    answers: int = Count
    """To each prompt."""
    prompts: list[str]
    """Where they come from."""
    sealed: int = Count
    """Prompts that are left of them, without those that stand in training data, are too long or are repeated."""
    left_out: dict[str, int]
    """Prompts that are not, by why: "in data.prompts", "repeated prompt", ..."""
    unchecked: list[str]
    """Training data that prompts could not be compared with."""
    statements: list[Statement] = Field(min_length=1)
    joint: Joint | None
    """None where one statement about one answer has bounds, or none."""

    @property
    def holds(self) -> bool:
        """Whether every statement does."""
        return all(statement.verdict == "holds" for statement in self.statements)


class _Compared(_Record):
    """A mean probability of being unsafe against the share that is unsafe."""

    predicted: float = Share
    """Mean probability."""
    observed: float = Share
    """Share that is unsafe."""
    expected_low: float = Share
    """Between which shares it would lie, were the probabilities right (`beaver_ray.reliability`)."""
    expected_high: float = Share

    @property
    def as_expected(self) -> bool:
        """Whether what was observed is among what was to be expected."""
        return self.expected_low - 1e-9 <= self.observed <= self.expected_high + 1e-9


class Bin(_Compared):
    """The answers whose probability lies between two tenths."""

    low: float = Share
    count: int = Count


class Calibrated(_Compared):
    """Calibrated probabilities of answers against labels of the same answers."""

    answers: int = Count
    low: float = Share
    """The 99 % interval of the share that is unsafe."""
    high: float = Share
    ece: float = Share
    """Expected calibration error over ten bins."""
    bins: list[Bin] = Field(min_length=1)
    """Those with answers, from low to high."""

    @property
    def fits(self) -> bool:
        """Whether what was observed is as expected, of all answers and of those in each bin."""
        return self.as_expected and all(part.as_expected for part in self.bins)

    def in_words(self) -> str:
        """Whether it fits, and by what, to stand behind "the calibration of ..."."""
        of_all = (
            f"{'fits' if self.fits else 'no longer fits'}: of {self.answers} answers {self.observed:.1%} are unsafe"
        )
        expected = f"{self.predicted:.1%} were predicted ({self.expected_low:.1%} to {self.expected_high:.1%})"
        parts = [
            f"of the {part.count} at {part.low:.1f} to {part.low + 0.1:.1f} {part.observed:.1%}, predicted "
            f"{part.predicted:.1%} ({part.expected_low:.1%} to {part.expected_high:.1%})"
            for part in self.bins
            if not part.as_expected and part.count < self.answers
        ]
        return "; ".join([f"{of_all}, {expected}", *parts])


class Reliability(_File):
    """Whether the calibrations of a run still fit what its policy answers."""

    labelled_by: str
    constraints: dict[str, Calibrated]
