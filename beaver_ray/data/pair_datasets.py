"""Token datasets of pairs of answers to one prompt, as score models and DPO learn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from beaver_ray.data.sources import BadRow, DropReport, RawSample
from beaver_ray.data.tokenized import Columns, EncodedRow, Encoder, Ragged, SequenceDataset


@dataclass(frozen=True)
class PreferenceDataset(SequenceDataset):
    """Pairs of sequences on one prompt: the more helpful answer and the less helpful one."""

    what: ClassVar[str] = "preference pair"
    label: ClassVar[Literal["better", "safer"]] = "better"
    """The label that says which answer of a sample is the better one."""

    better: Ragged
    worse: Ragged
    prompt_length: NDArray[np.int32]  # [N]
    strengths: NDArray[np.float32]  # [N, len(STRENGTHS)]
    report: DropReport

    def __len__(self) -> int:
        return len(self.better)

    @classmethod
    def encode(cls, encoder: Encoder, sample: RawSample) -> EncodedRow:
        """Both answers of a sample that has the label, the better one first."""
        first, second = encoder.pair(sample)
        if (preferred := getattr(sample, cls.label)) is None:
            raise BadRow(f"no label which answer is {cls.label}")
        return encoder.row(sample, (first, second) if preferred else (second, first))

    @classmethod
    def assemble(cls, columns: Columns, report: DropReport) -> Self:
        """The data set of these columns."""
        better, worse = columns.sequences
        return cls(better, worse, columns.prompt_length, columns.strengths, report)


@dataclass(frozen=True)
class SaferPreferenceDataset(PreferenceDataset):
    """Pairs in which the better answer is the less harmful one."""

    label: ClassVar[Literal["better", "safer"]] = "safer"


@dataclass(frozen=True)
class SafeDpoDataset(PreferenceDataset):
    """Pairs as SafeDPO learns them (https://arxiv.org/abs/2505.20065): by helpfulness, but a safe answer before an
    unsafe one. Where both are unsafe there is nothing to prefer, and the pair is dropped and counted.
    """

    worse_is_unsafe: NDArray[np.bool_]  # [N]; the better one never is

    @classmethod
    def encode(cls, encoder: Encoder, sample: RawSample) -> EncodedRow:
        """Both answers of a sample with all labels; swapped where only the more helpful one is unsafe."""
        pair = encoder.pair(sample)
        if sample.better is None:
            raise BadRow("no label which answer is better")
        if sample.is_safe is None or sample.is_other_safe is None:
            raise BadRow("no safety labels")
        safe = (sample.is_safe, sample.is_other_safe)
        if not any(safe):
            raise BadRow("both answers unsafe")
        winner = 0 if sample.better else 1
        swapped = not safe[winner]
        better = 1 - winner if swapped else winner
        return encoder.row(sample, (pair[better], pair[1 - better]), (not safe[1 - better], swapped))

    @classmethod
    def assemble(cls, columns: Columns, report: DropReport) -> Self:
        """The data set of these columns, and how many pairs were swapped."""
        worse_is_unsafe_N, swapped_N = columns.labels[:, :2].astype(np.bool_).T
        if swapped := int(swapped_N.sum()):
            report.remarks["pairs were swapped, as only the more helpful answer was unsafe"] = swapped
        better, worse = columns.sequences
        return cls(better, worse, columns.prompt_length, columns.strengths, report, worse_is_unsafe_N)


@dataclass(frozen=True)
class SafetyPreferenceDataset(SequenceDataset):
    """Pairs of sequences on one prompt: the less harmful answer and the more harmful one, each with its sign.

    A sign is +1 for an unsafe answer and -1 for a safe one (cost > 0 means unsafe); both of a pair may be
    alike.
    """

    what: ClassVar[str] = "safety preference pair"
    needs_better: ClassVar[bool] = False

    safer: Ragged
    unsafer: Ragged
    sign_safer: NDArray[np.int8]  # [N]
    sign_unsafer: NDArray[np.int8]  # [N]
    safer_is_better: NDArray[np.bool_]  # [N], false where that is not known
    prompt_length: NDArray[np.int32]  # [N]
    strengths: NDArray[np.float32]  # [N, len(STRENGTHS)]
    report: DropReport
    samples: Sequence[RawSample] = ()
    """[N] the rows that the pairs are of, where they were encoded from these."""

    def __len__(self) -> int:
        return len(self.safer)

    @classmethod
    def encode(cls, encoder: Encoder, sample: RawSample) -> EncodedRow:
        """Both answers of a sample with all safety labels, the safer one first; labels that contradict one another
        are refused."""
        first, second = encoder.pair(sample)
        if sample.safer is None or sample.is_safe is None or sample.is_other_safe is None:
            raise BadRow("no safety labels")
        if cls.needs_better and sample.better is None:
            raise BadRow("no label which answer is better")
        sign_first, sign_second = 1 - 2 * sample.is_safe, 1 - 2 * sample.is_other_safe
        if not sample.safer:
            first, second, sign_first, sign_second = second, first, sign_second, sign_first
        if sign_first > sign_second:
            raise BadRow("safer answer is not safer")
        better = sample.better is not None and sample.better == sample.safer
        return encoder.row(sample, (first, second), (sign_first, sign_second, better))

    @classmethod
    def assemble(cls, columns: Columns, report: DropReport) -> Self:
        """The data set of these columns."""
        signs_N2, better_N = columns.labels[:, :2], columns.labels[:, 2].astype(np.bool_)
        safer, unsafer = columns.sequences
        known = (columns.prompt_length, columns.strengths, report, columns.samples)
        return cls(safer, unsafer, signs_N2[:, 0], signs_N2[:, 1], better_N, *known)


@dataclass(frozen=True)
class LabelledPairDataset(SafetyPreferenceDataset):
    """Safety pairs of which it is also known which answer is more helpful; others are dropped and counted."""

    needs_better: ClassVar[bool] = True
