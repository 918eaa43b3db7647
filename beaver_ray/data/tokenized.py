"""Token datasets of the stages, and the order in which training goes through them.

Nothing is padded: a dataset holds ragged rows and the length of each row's prompt, so which tokens belong to
the answer is known by position, never by token id (with pad == eos a mask by id would lose the end of every
answer). A row that is too long is dropped and counted, never cut.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from beaver_ray.data.mixing import prompt_key
from beaver_ray.data.scopes import Where, masks
from beaver_ray.data.sources import STRENGTHS, BadRow, DropReport, RawSample, number_field
from beaver_ray.data.templates import Template, answer_form, answer_tokens, prompt_tokens, stops_inside
from beaver_ray.errors import UserError


class Ragged:
    """Rows of different lengths in one flat int32 array; `ragged[i]` is a view of row i."""

    def __init__(self, rows: Iterable[Sequence[int]]) -> None:
        arrays = [np.asarray(row, dtype=np.int32) for row in rows]
        self.offsets = np.cumsum([0, *(array.size for array in arrays)], dtype=np.int64)
        self.flat = np.concatenate([np.empty(0, dtype=np.int32), *arrays])

    @classmethod
    def of(cls, flat: NDArray[np.int32], lengths: NDArray[np.integer[Any]]) -> Ragged:
        """Rows of these lengths, which stand one behind another in ``flat``."""
        ragged = cls([])
        ragged.flat, ragged.offsets = flat, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return ragged

    def __len__(self) -> int:
        return self.offsets.size - 1

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[NDArray[np.int32]]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[N] tokens in each row."""
        return np.diff(self.offsets)


# ---------------------------------------------------------------- tokenizers


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a user should know about a tokenizer, one line each; often nothing.

    Raises:
        UserError: it has no EOS token, so no answer could end.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {tokenizer.name_or_path!r} has no EOS token: set its eos_token")
    notes = []
    if tokenizer.pad_token_id is None:
        notes.append("the tokenizer has no pad token; none is needed, training packs and masks by position")
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        notes.append("the pad token is the EOS token; masks go by position, so the end of an answer counts")
    if tokenizer.unk_token_id == tokenizer.eos_token_id and _has_unknown_words(tokenizer):
        notes.append("the unknown token is the EOS token; a text ends where its first unknown word stands")
    return notes


def _has_unknown_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether some text has no tokens of its own; never so where a tokenizer falls back on bytes."""
    strange = tokenizer.encode("zq \u00fe\u4e00\u1f9b\U0001f9ab\U0010fffd", add_special_tokens=False)
    return tokenizer.unk_token_id in strange


def same_tokenizer(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether the two give every token the same id and the same BOS and EOS, whatever their classes.

    The pad token is left out: nothing is padded.
    """
    return (
        first.get_vocab() == second.get_vocab()
        and first.bos_token_id == second.bos_token_id
        and first.eos_token_id == second.eos_token_id
    )


# ---------------------------------------------------------------- datasets


KEPT_PROMPTS = 4096  # of which an encoder knows the tokens


ODD = {
    "ended": "answers had their end token already, which they do not get twice",
    "spell_end": "answers spell a token in their middle that would end a rollout; it stays text",
    "stop_inside": "answers hold a token in their middle that would end a rollout",
    "cut": "dialogues were cut at their beginning",
}
"""What may be odd about answers that are kept: a column's name, and words that follow a number."""


class EncodedRow(NamedTuple):
    """One sample in tokens."""

    sequences: tuple[list[int], ...]
    prompt_length: int
    labels: tuple[int, ...] = ()
    odd: tuple[int, ...] = (0,) * len(ODD)
    """Answers of which each of `ODD` is true."""
    strengths: tuple[float, ...] = (math.nan,) * len(STRENGTHS)
    """Of each of `STRENGTHS`; nan where it is not known."""
    remarks: tuple[str, ...] = ()
    """What else is odd about it, in words that follow a number; told with the file's rows (`read_tokens`)."""


class Encoder:
    """Encodes prompts (a repeated one once) and whole sequences, and refuses what is too long."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int) -> None:
        check_tokenizer(tokenizer)
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self.form = answer_form(tokenizer, template)
        self.prompts: dict[tuple[str | None, tuple[str, ...]], list[int]] = {}

    def prompt(self, sample: RawSample) -> list[int]:
        """The tokens of a sample's prompt."""
        key = (sample.system, prompt_key(sample))
        if key not in self.prompts:
            if len(self.prompts) >= KEPT_PROMPTS:
                self.prompts.clear()
            self.prompts[key] = prompt_tokens(self.tokenizer, sample.input, self.template, system=sample.system)
        return self.prompts[key]

    def sequence(self, sample: RawSample, answer: str | None) -> list[int]:
        """Prompt, answer and its end. Raises BadRow."""
        if answer is None:
            raise BadRow("no answer")
        bare = self.form.bare(answer)
        if not bare.strip() and answer.strip():
            raise BadRow("answer that is nothing but its end")
        tokens = self.prompt(sample) + answer_tokens(self.tokenizer, bare, self.template, self.form)
        if len(tokens) > self.max_length:
            raise BadRow(f"longer than {self.max_length} tokens")
        return tokens

    def pair(self, sample: RawSample) -> tuple[list[int], list[int]]:
        """Both answers behind the prompt. Raises BadRow."""
        if sample.answer is None or sample.other_answer is None:
            raise BadRow("not two answers")
        first, second = self.sequence(sample, sample.answer), self.sequence(sample, sample.other_answer)
        if first == second:
            raise BadRow("identical responses")
        return first, second

    def row(self, sample: RawSample, sequences: tuple[list[int], ...], labels: tuple[int, ...] = ()) -> EncodedRow:
        """A row of these sequences, with what is odd about the one or two answers in them."""
        start = len(self.prompt(sample))
        answers = (sample.answer, sample.other_answer)[: len(sequences)]
        ended = sum(answer is not None and self.form.ends(answer) for answer in answers)
        spelled = sum(answer is not None and self.form.spells_end(answer) for answer in answers)
        inside = sum(stops_inside(tokens[start:-1], self.form) for tokens in sequences)
        strengths = tuple(_strength(sample, name) for name in STRENGTHS.values())
        return EncodedRow(sequences, start, labels, (ended, spelled, inside, 0), strengths)


def _strength(sample: RawSample, name: str) -> float:
    found = number_field(sample.fields, name)
    if found is not None and abs(found) > np.finfo(np.float32).max:
        raise BadRow(f"'{name}' is too large a number")
    return math.nan if found is None else found


def _finish(report: DropReport, kept: int, kind: str) -> DropReport:
    report.kept = kept
    if kept == 0:
        longer = "data.max_prompt_tokens" if kind == "prompt" else "max_tokens (of a PPO stage rollout.max_new_tokens)"
        raise UserError(
            f"no {kind} is left ({report.line()}): raise {longer}, or use a dataset that has what this stage needs"
        )
    return report


@dataclass(frozen=True)
class Columns:
    """What a data set of sequences is made of."""

    sequences: tuple[Ragged, ...]
    prompt_length: NDArray[np.int32]  # [N]
    labels: NDArray[np.int8]  # [N, L]
    odd: NDArray[np.int64]  # of each of ODD
    dropped: Counter[str]
    strengths: NDArray[np.float32]  # [N, len(STRENGTHS)], nan where not known
    samples: Sequence[RawSample] = ()  # [N], none where tokens were kept without them

    def report(self, kept: int, kind: str) -> DropReport:
        """What became of the rows, ``kept`` of this ``kind``. Raises UserError where none is."""
        counts = zip(ODD.values(), self.odd.tolist(), strict=True)
        remarks = Counter({what: count for what, count in counts if count})
        return _finish(DropReport(dropped=self.dropped, remarks=remarks), kept, kind)


D = TypeVar("D", covariant=True)


class RowKind(Protocol[D]):
    """From samples to rows of tokens, and from those to a data set: the class of a data set, or whatever has these."""

    @property
    def width(self) -> int:
        """Sequences in a row."""
        ...

    @property
    def label_count(self) -> int:
        """Labels of a row, at most."""
        ...

    def encode(self, encoder: Encoder, sample: RawSample) -> EncodedRow:
        """One sample in tokens. Raises BadRow for one that the data set has no use for."""
        ...

    def of_columns(self, columns: Columns) -> D:
        """The data set of these columns. Raises UserError where they are empty."""
        ...


class SequenceDataset:
    """What data sets of whole sequences share: how they are built of samples, or of tokens that were kept."""

    what: ClassVar[str]
    """What a row is called."""
    width: ClassVar[int] = 2
    """Sequences in a row."""
    label_count: ClassVar[int] = 3
    """Labels of a row, at most."""

    @classmethod
    def encode(cls, encoder: Encoder, sample: RawSample) -> EncodedRow:
        """One sample in tokens. Raises BadRow for one that the data set has no use for."""
        raise NotImplementedError

    @classmethod
    def assemble(cls, columns: Columns, report: DropReport) -> Self:
        """The data set of these columns."""
        raise NotImplementedError

    @classmethod
    def of_columns(cls, columns: Columns) -> Self:
        """The data set of these columns. Raises UserError where they are empty."""
        return cls.assemble(columns, columns.report(len(columns.prompt_length), cls.what))

    @classmethod
    def build(
        cls,
        samples: Sequence[RawSample],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        template: Template = "auto",
    ) -> Self:
        """Encode every sample that has what is needed; what is over `max_length` tokens, or unfit, is dropped and
        counted."""
        encoder = Encoder(tokenizer, template, max_length)
        rows: list[EncodedRow] = []
        kept: list[RawSample] = []
        dropped: Counter[str] = Counter()
        for sample in samples:
            try:
                rows.append(cls.encode(encoder, sample))
                kept.append(sample)
            except BadRow as reason:
                dropped[str(reason)] += 1
        return cls.of_columns(
            Columns(
                tuple(Ragged(row.sequences[side] for row in rows) for side in range(cls.width)),
                np.array([row.prompt_length for row in rows], dtype=np.int32),
                np.array([row.labels for row in rows], dtype=np.int8),
                np.array([row.odd for row in rows], dtype=np.int64).reshape(-1, len(ODD)).sum(axis=0),
                dropped,
                np.array([row.strengths for row in rows], dtype=np.float32).reshape(-1, len(STRENGTHS)),
                kept,
            )
        )


@dataclass(frozen=True)
class PromptDataset:
    """Distinct prompts in the order of their first appearance; the row number is the prompt's id."""

    prompts: Ragged
    report: DropReport
    inside: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    """[N] of each constraint that has a scope, by its name: which prompts it counts over."""
    samples: Sequence[RawSample] = ()
    """[N] the row that each prompt came first in."""

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def build(
        cls,
        samples: Sequence[RawSample],
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int,
        template: Template = "auto",
        scopes: Mapping[str, Where] = MappingProxyType({}),
    ) -> PromptDataset:
        """Encode the prompts; repeated ones and those over `max_prompt_tokens` are dropped and counted.

        Of a repeated prompt the first row says whether it is in a scope, and what functions and environments are given.
        """
        report = DropReport()
        encoder = Encoder(tokenizer, template, max_prompt_tokens)
        rows: dict[tuple[int, ...], RawSample] = {}
        for sample in samples:
            tokens = tuple(encoder.prompt(sample))
            if len(tokens) > max_prompt_tokens:
                report.drop(f"prompt longer than {max_prompt_tokens} tokens")
            elif tokens in rows:
                others = sample.fields != rows[tokens].fields
                report.drop("repeated prompt" + others * ", its row's other fields passed over")
            else:
                rows[tokens] = sample
        first = list(rows.values())
        return cls(Ragged(rows), _finish(report, len(rows), "prompt"), masks(scopes, first), first)


@dataclass(frozen=True)
class SupervisedDataset(SequenceDataset):
    """Row i is a prompt of `prompt_length[i]` tokens, then the answer and the token that ends it."""

    what: ClassVar[str] = "demonstration"
    width: ClassVar[int] = 1

    tokens: Ragged
    prompt_length: NDArray[np.int32]  # [N]
    report: DropReport

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def encode(cls, encoder: Encoder, sample: RawSample) -> EncodedRow:
        """Prompt + answer + its end."""
        return encoder.row(sample, (encoder.sequence(sample, sample.answer),))

    @classmethod
    def assemble(cls, columns: Columns, report: DropReport) -> Self:
        """The data set of these columns."""
        return cls(columns.sequences[0], columns.prompt_length, report)


# ---------------------------------------------------------------- order


class BatchSampler:
    """Endless global batches of row numbers, shuffled anew in every epoch.

    The order depends on `seed` and the epoch alone, so it is the same on any number of ranks and after a
    restart. The last batch of an epoch is smaller when `batch_size` does not divide `size`; no batch spans
    two epochs.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        if size < 1 or batch_size < 1:
            raise ValueError("size and batch_size must be at least 1")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.epoch = 0
        self.index = 0  # the next batch of this epoch
        self._shuffled_epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    @property
    def batches_per_epoch(self) -> int:
        """Batches in one epoch, the smaller last one included."""
        return -(-self.size // self.batch_size)

    def next_batch(self) -> NDArray[np.int64]:
        """Row numbers of the next global batch; moves on to the next epoch by itself."""
        if self._shuffled_epoch != self.epoch:
            seeds = np.random.SeedSequence((self.seed, self.epoch))
            self._order = np.random.default_rng(seeds).permutation(self.size)
            self._shuffled_epoch = self.epoch
        batch = self._order[self.index * self.batch_size : (self.index + 1) * self.batch_size]
        self.index += 1
        if self.index == self.batches_per_epoch:
            self.epoch, self.index = self.epoch + 1, 0
        return batch.copy()

    def state_dict(self) -> dict[str, int]:
        """Where the sampler stands, and what it must be given back with."""
        return {
            "epoch": self.epoch,
            "index": self.index,
            "size": self.size,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any], of_batch: str = "batch_size") -> None:
        """Restore the position from `state_dict`. of_batch: the options that the size of a batch comes from.

        Raises:
            UserError: the data, the batch size or the seed are not those of the checkpoint.
        """
        for name in ("size", "batch_size", "seed"):
            if state[name] != getattr(self, name):
                what = f"a batch ({of_batch}) of" if name == "batch_size" else name
                raise UserError(
                    f"the checkpoint was trained with {what} {state[name]} but this run has "
                    f"{getattr(self, name)}: resume with the same data, {of_batch} and seed"
                )
        self.epoch, self.index = int(state["epoch"]), int(state["index"])
