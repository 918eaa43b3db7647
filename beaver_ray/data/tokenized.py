"""Token datasets of the stages, and the order in which training goes through them.

Nothing is padded: a dataset holds ragged rows and the length of each row's prompt, so which tokens belong to
the answer is known by position, never by token id (with pad == eos a mask by id would lose the end of every
answer). A row that is too long is dropped and counted, never cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from beaver_ray.data.mixing import prompt_key
from beaver_ray.data.scopes import Where, masks
from beaver_ray.data.sources import BadRow, DropReport, RawSample
from beaver_ray.data.templates import Template, answer_form, answer_tokens, prompt_tokens, stops_inside
from beaver_ray.errors import UserError


class Ragged:
    """Rows of different lengths in one flat int32 array; `ragged[i]` is a view of row i."""

    def __init__(self, rows: Iterable[Sequence[int]]) -> None:
        arrays = [np.asarray(row, dtype=np.int32) for row in rows]
        self.offsets = np.cumsum([0, *(array.size for array in arrays)], dtype=np.int64)
        self.flat = np.concatenate([np.empty(0, dtype=np.int32), *arrays])

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


class _Encoder:
    """Encodes prompts (each distinct one once) and whole sequences, and refuses what is too long."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int, report: DropReport
    ) -> None:
        check_tokenizer(tokenizer)
        self.tokenizer, self.template, self.max_length, self.report = tokenizer, template, max_length, report
        self.form = answer_form(tokenizer, template)
        self.prompts: dict[tuple[str | None, tuple[str, ...]], list[int]] = {}

    def prompt(self, sample: RawSample) -> list[int]:
        key = (sample.system, prompt_key(sample))
        if key not in self.prompts:
            self.prompts[key] = prompt_tokens(self.tokenizer, sample.input, self.template, system=sample.system)
        return self.prompts[key]

    def sequence(self, sample: RawSample, answer: str | None) -> list[int]:
        if answer is None:
            raise BadRow("no answer")
        bare = self.form.bare(answer)
        if not bare.strip() and answer.strip():
            raise BadRow("answer that is nothing but its end")
        tokens = self.prompt(sample) + answer_tokens(self.tokenizer, bare, self.template, self.form)
        if len(tokens) > self.max_length:
            raise BadRow(f"longer than {self.max_length} tokens")
        return tokens

    def keep(self, sample: RawSample, *rows: list[int]) -> None:
        """Count what is odd about the one or two answers in these rows, which are kept."""
        start = len(self.prompt(sample))
        for answer in (sample.answer, sample.other_answer)[: len(rows)]:
            if answer is not None and self.form.ends(answer):
                self.report.remark("answers had their end token already, which they do not get twice")
            if answer is not None and self.form.spells_end(answer):
                self.report.remark("answers spell a token in their middle that would end a rollout; it stays text")
        for row in rows:
            if stops_inside(row[start:-1], self.form):
                self.report.remark("answers hold a token in their middle that would end a rollout")

    def pair(self, sample: RawSample) -> tuple[list[int], list[int]]:
        if sample.answer is None or sample.other_answer is None:
            raise BadRow("not two answers")
        first, second = self.sequence(sample, sample.answer), self.sequence(sample, sample.other_answer)
        if first == second:
            raise BadRow("identical responses")
        return first, second


def _finish(report: DropReport, kept: int, kind: str) -> DropReport:
    report.kept = kept
    if kept == 0:
        longer = "data.max_prompt_tokens" if kind == "prompt" else "max_tokens (of a PPO stage rollout.max_new_tokens)"
        raise UserError(
            f"no {kind} is left ({report.line()}): raise {longer}, or use a dataset that has what this stage needs"
        )
    return report


@dataclass(frozen=True)
class PromptDataset:
    """Distinct prompts in the order of their first appearance; the row number is the prompt's id."""

    prompts: Ragged
    report: DropReport
    inside: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    """[N] of each constraint that has a scope, by its name: which prompts it counts over."""

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

        Of a repeated prompt the first row says whether it is in a scope.
        """
        report = DropReport()
        encoder = _Encoder(tokenizer, template, max_prompt_tokens, report)
        rows: dict[tuple[int, ...], RawSample] = {}
        for sample in samples:
            tokens = tuple(encoder.prompt(sample))
            if len(tokens) > max_prompt_tokens:
                report.drop(f"prompt longer than {max_prompt_tokens} tokens")
            elif tokens in rows:
                report.drop("repeated prompt")
            else:
                rows[tokens] = sample
        return cls(Ragged(rows), _finish(report, len(rows), "prompt"), masks(scopes, list(rows.values())))


@dataclass(frozen=True)
class SupervisedDataset:
    """Row i is a prompt of `prompt_length[i]` tokens, then the answer and the token that ends it."""

    tokens: Ragged
    prompt_length: NDArray[np.int32]  # [N]
    report: DropReport

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def build(
        cls,
        samples: Sequence[RawSample],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        template: Template = "auto",
    ) -> SupervisedDataset:
        """Encode prompt + answer + its end of every sample; those over `max_length` tokens are dropped and
        counted."""
        report = DropReport()
        encoder = _Encoder(tokenizer, template, max_length, report)
        rows, prompt_lengths = [], []
        for sample in samples:
            try:
                tokens = encoder.sequence(sample, sample.answer)
            except BadRow as reason:
                report.drop(str(reason))
                continue
            encoder.keep(sample, tokens)
            rows.append(tokens)
            prompt_lengths.append(len(encoder.prompt(sample)))
        report = _finish(report, len(rows), "demonstration")
        return cls(Ragged(rows), np.array(prompt_lengths, dtype=np.int32), report)


@dataclass(frozen=True)
class PreferenceDataset:
    """Pairs of sequences on one prompt: the more helpful answer and the less helpful one."""

    label: ClassVar[Literal["better", "safer"]] = "better"
    """The label that says which answer of a sample is the better one."""

    better: Ragged
    worse: Ragged
    prompt_length: NDArray[np.int32]  # [N]
    report: DropReport

    def __len__(self) -> int:
        return len(self.better)

    @classmethod
    def build(
        cls,
        samples: Sequence[RawSample],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        template: Template = "auto",
    ) -> PreferenceDataset:
        """Encode both answers of every sample that has the label; too long pairs are dropped and counted."""
        report = DropReport()
        encoder = _Encoder(tokenizer, template, max_length, report)
        better, worse, prompt_lengths = [], [], []
        for sample in samples:
            try:
                first, second = encoder.pair(sample)
                if (preferred := getattr(sample, cls.label)) is None:
                    raise BadRow(f"no label which answer is {cls.label}")
            except BadRow as reason:
                report.drop(str(reason))
                continue
            encoder.keep(sample, first, second)
            better.append(first if preferred else second)
            worse.append(second if preferred else first)
            prompt_lengths.append(len(encoder.prompt(sample)))
        report = _finish(report, len(better), "preference pair")
        return cls(Ragged(better), Ragged(worse), np.array(prompt_lengths, dtype=np.int32), report)


@dataclass(frozen=True)
class SaferPreferenceDataset(PreferenceDataset):
    """Pairs in which the better answer is the less harmful one."""

    label: ClassVar[Literal["better", "safer"]] = "safer"


@dataclass(frozen=True)
class SafetyPreferenceDataset:
    """Pairs of sequences on one prompt: the less harmful answer and the more harmful one, each with its sign.

    A sign is +1 for an unsafe answer and -1 for a safe one (cost > 0 means unsafe); both of a pair may be
    alike.
    """

    needs_better: ClassVar[bool] = False

    safer: Ragged
    unsafer: Ragged
    sign_safer: NDArray[np.int8]  # [N]
    sign_unsafer: NDArray[np.int8]  # [N]
    safer_is_better: NDArray[np.bool_]  # [N], false where that is not known
    prompt_length: NDArray[np.int32]  # [N]
    report: DropReport

    def __len__(self) -> int:
        return len(self.safer)

    @classmethod
    def build(
        cls,
        samples: Sequence[RawSample],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        template: Template = "auto",
    ) -> SafetyPreferenceDataset:
        """Encode both answers of every sample with all safety labels; too long or inconsistent ones are
        dropped."""
        report = DropReport()
        encoder = _Encoder(tokenizer, template, max_length, report)
        safer, unsafer, signs, better, prompt_lengths = [], [], [], [], []
        for sample in samples:
            try:
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
            except BadRow as reason:
                report.drop(str(reason))
                continue
            encoder.keep(sample, first, second)
            safer.append(first)
            unsafer.append(second)
            signs.append((sign_first, sign_second))
            better.append(sample.better is not None and sample.better == sample.safer)
            prompt_lengths.append(len(encoder.prompt(sample)))
        report = _finish(report, len(safer), "safety preference pair")
        signs_N2 = np.array(signs, dtype=np.int8)
        lengths = np.array(prompt_lengths, dtype=np.int32)
        better_N = np.array(better, dtype=np.bool_)
        return cls(Ragged(safer), Ragged(unsafer), signs_N2[:, 0], signs_N2[:, 1], better_N, lengths, report)


@dataclass(frozen=True)
class LabelledPairDataset(SafetyPreferenceDataset):
    """Safety pairs of which it is also known which answer is more helpful; others are dropped and counted."""

    needs_better: ClassVar[bool] = True


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

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position from `state_dict`.

        Raises:
            UserError: the data, the batch size or the seed are not those of the checkpoint.
        """
        for name in ("size", "batch_size", "seed"):
            if state[name] != getattr(self, name):
                raise UserError(
                    f"the checkpoint was trained with {name} {state[name]} but this run has "
                    f"{getattr(self, name)}: resume with the same data, batch size and seed"
                )
        self.epoch, self.index = int(state["epoch"]), int(state["index"])
