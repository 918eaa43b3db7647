"""Labelled answers for moderation: which of K labels each has, and how a moderation model reads it.

A label is true (1), false (0) or unknown (-1). What is read is the question, the answer, both of the last turn (qa), or
the whole dialogue, by the model's template. What is too long is cut on the left, behind any first token that texts
begin with: the answer and its end stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from beaver_ray.data.mixing import prompt_hash, prompt_key
from beaver_ray.data.sources import REST, BadRow, DropReport, RawSample
from beaver_ray.data.templates import AnswerForm, Template, answer_form, answer_tokens, prompt_tokens, with_bos
from beaver_ray.data.tokenized import ODD, Columns, EncodedRow, Encoder, Ragged
from beaver_ray.errors import UserError
from beaver_ray.moderation_options import UNSAFE, Reads
from beaver_ray.options import meant

UNKNOWN = -1
Dialogue = tuple[Sequence[str], str | None, str | None]
"""Turns user, assistant, ..., user; the answer, or None; the system text, or None."""


class ModerationReader:
    """How a moderation model reads a dialogue: tokenizer, template, which part of it, at most how many tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        reads: Reads,
        max_tokens: int,
        form: AnswerForm | None = None,
    ) -> None:
        """form: `answer_form`, for whoever has it already."""
        self.tokenizer, self.template, self.reads, self.max_tokens = tokenizer, template, reads, max_tokens
        self.form = form or answer_form(tokenizer, template)

    def row(
        self, turns: Sequence[str], answer: str | None, ended: bool = True, system: str | None = None
    ) -> tuple[list[int], bool]:
        """(Tokens, whether they were cut) of an answer to turns user, assistant, ..., user.

        Of a dialogue without an answer the question stands before an empty one. ended: false for an answer that was
        cut, which has no end.
        """
        text = "" if answer is None or self.reads == "question" else answer
        tail = answer_tokens(self.tokenizer, text, self.template, self.form, ended or self.reads == "question")
        if self.reads == "answer":
            tokens = with_bos(self.tokenizer, tail or [self.form.end])
        elif self.reads == "dialogue":
            tokens = prompt_tokens(self.tokenizer, list(turns), self.template, system) + tail
        else:
            tokens = prompt_tokens(self.tokenizer, turns[-1], self.template) + tail
        first = [tokens[0]] if tokens[0] == self.tokenizer.bos_token_id else []
        room = self.max_tokens - len(first)
        return (first + tokens[-room:], True) if len(tokens) > self.max_tokens else (tokens, False)


@dataclass(frozen=True)
class LabelledAnswer:
    """One answer of a sample, or a prompt without one, and what is known of it."""

    turns: tuple[str, ...]
    answer: str | None
    system: str | None
    labels: Mapping[str, bool]
    safe: bool | None
    fields: Mapping[str, Any]
    """What else the row says; of response_0_X and response_1_X the answer's own, as X."""

    @property
    def system_row(self) -> dict[str, str]:
        """The system text as a row has it: under ``system``, or nothing where there is none."""
        return {} if self.system is None else {"system": self.system}

    @property
    def dialogue(self) -> Dialogue:
        """What is judged."""
        return self.turns, self.answer, self.system

    def truth(self, labels: Sequence[str]) -> list[int]:
        """1, 0 or UNKNOWN for each label. An answer that is said to be safe has none of those that are not named."""
        found = []
        for name in labels:
            known = self.labels.get(name)
            if known is None and name == UNSAFE and self.safe is not None:
                known = not self.safe
            if known is None:
                known = self.labels.get(REST)
            if known is None and self.safe:
                known = False
            found.append(UNKNOWN if known is None else int(known))
        return found

    def unasked(self, labels: Sequence[str]) -> list[str]:
        """Labels that are named and not asked for: data may have more, or one is misspelled."""
        return [name for name in self.labels if name not in labels and name != REST]


@lru_cache
def _unasked(name: str, labels: tuple[str, ...]) -> str:
    """A remark in words that follow a number."""
    return f"answers name label {name!r}, which is not asked for{meant(name, labels)}"


def labelled_answers(sample: RawSample) -> Iterator[LabelledAnswer]:
    """The one or two answers of a sample; its prompt where it has none."""
    turns = prompt_key(sample)
    yield LabelledAnswer(
        turns, sample.answer, sample.system, sample.labels, sample.is_safe, _fields_of(sample.fields, 0)
    )
    if sample.other_answer is not None:
        labels, safe = sample.other_labels, sample.is_other_safe
        yield LabelledAnswer(turns, sample.other_answer, sample.system, labels, safe, _fields_of(sample.fields, 1))


def answers_of(samples: Iterable[RawSample]) -> tuple[list[LabelledAnswer], NDArray[np.uint64]]:
    """(All answers of these samples, what is equal of answers to one prompt [N])."""
    answers: list[LabelledAnswer] = []
    keys: list[int] = []
    for sample in samples:
        found = list(labelled_answers(sample))
        answers += found
        keys += [prompt_hash(sample)] * len(found)
    return answers, np.array(keys, dtype=np.uint64)


def _fields_of(fields: Mapping[str, Any], number: int) -> dict[str, Any]:
    own, other = f"response_{number}_", f"response_{1 - number}_"
    return {name.removeprefix(own): value for name, value in fields.items() if not name.startswith(other)}


def check_answered(answers: Sequence[LabelledAnswer], reads: Reads, where: str) -> None:
    """UserError where answers alone are read and some rows of ``where`` have none: all of these would read alike."""
    if reads == "answer" and (without := sum(answer.answer is None for answer in answers)):
        raise UserError(
            f"{where}: {without} of {len(answers)} rows have no answer, which is all that input: answer reads; leave "
            "them out, or take input: qa"
        )


def check_labelled(answer: LabelledAnswer, truth: Sequence[int], reads: Reads) -> None:
    """BadRow for an answer that nothing is known of, or without the part that is read."""
    if answer.answer is None and reads != "question":
        raise BadRow("no answer")
    if all(known == UNKNOWN for known in truth):
        raise BadRow("no label that is asked for")


@dataclass(frozen=True)
class ModerationRows:
    """From samples to a `ModerationDataset`; a sample with two answers gives two rows of it."""

    labels: tuple[str, ...]
    reads: Reads

    width = 2

    @property
    def label_count(self) -> int:
        """Those of two answers."""
        return 2 * len(self.labels)

    def encode(self, encoder: Encoder, sample: RawSample) -> EncodedRow:
        """The answers of a sample that something is known of. Raises BadRow where there is none."""
        reader = ModerationReader(encoder.tokenizer, encoder.template, self.reads, encoder.max_length, encoder.form)
        sequences: list[list[int]] = []
        truths: list[int] = []
        cut = 0
        remarks: list[str] = []
        for answer in labelled_answers(sample):
            truth = answer.truth(self.labels)
            unasked = [_unasked(name, self.labels) for name in answer.unasked(self.labels)]
            try:
                check_labelled(answer, truth, self.reads)
            except BadRow as reason:
                why = BadRow(f"{reason}: {unasked[0]}") if unasked and max(truth) == UNKNOWN else reason
                continue
            remarks += unasked
            tokens, was_cut = reader.row(answer.turns, answer.answer, system=answer.system)
            sequences.append(tokens)
            truths += truth
            cut += was_cut
        if not sequences:
            raise why
        nothing = 2 - len(sequences)
        truths += [UNKNOWN] * (nothing * len(self.labels))
        odd = tuple(cut if name == "cut" else 0 for name in ODD)
        sides = (*sequences, *[[] for _ in range(nothing)])
        return EncodedRow(sides, 0, tuple(truths), odd, remarks=tuple(remarks))

    def of_columns(self, columns: Columns) -> ModerationDataset:
        """The data set of these columns. Raises UserError where they are empty."""
        first, second = columns.sequences
        there = second.lengths > 0
        tokens = Ragged.of(
            np.concatenate([first.flat, second.flat]), np.concatenate([first.lengths, second.lengths[there]])
        )
        both_N2K = columns.labels.reshape(len(first), 2, len(self.labels))
        labels = np.concatenate([both_N2K[:, 0], both_N2K[there, 1]])
        return ModerationDataset(tokens, labels, columns.report(len(tokens), "labelled answer"))


@dataclass(frozen=True)
class ModerationDataset:
    """Row i is one answer as the model reads it, and its labels: 1, 0 or UNKNOWN."""

    tokens: Ragged
    labels_NK: NDArray[np.int8]
    report: DropReport

    def __len__(self) -> int:
        return len(self.tokens)
