"""What a weak and a strong model are both asked: pairs of answers, or single texts, with the truth kept apart.

The files that models are trained on hold no truth: a row's labels stand beside them, in the order of the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beaver_ray.data.mixing import hold_out, prompt_hash
from beaver_ray.data.moderation import LabelledAnswer, check_labelled, labelled_answers
from beaver_ray.data.sources import BadRow, RawSample
from beaver_ray.data.tokenized import Encoder
from beaver_ray.errors import UserError
from beaver_ray.moderation_options import Reads
from beaver_ray.weak_to_strong_options import HEADS, Task


@dataclass(frozen=True)
class Questions:
    """N rows, each with K questions."""

    rows: Sequence[Mapping[str, Any]]
    """As files have them, without labels that mean anything."""
    truth_NK: NDArray[np.float64]
    """0 or 1."""
    key_N: NDArray[np.uint64]
    """Equal for rows of one prompt."""
    fields: Sequence[Mapping[str, Any]]
    """What else the data say of each row."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen_N: NDArray[np.bool_] | NDArray[np.integer[Any]]) -> Questions:
        """Some of the rows, by a mask or by number."""
        numbers = np.arange(len(self))[chosen_N]
        return Questions(
            [self.rows[n] for n in numbers],
            self.truth_NK[numbers],
            self.key_N[numbers],
            [self.fields[n] for n in numbers],
        )

    def split(self, share: float, seed: int) -> tuple[Questions, Questions]:
        """(The others, a ``share`` of the prompts); no prompt is on both sides."""
        held_N = hold_out(self.key_N, share, seed)
        return self.take(~held_N), self.take(held_N)

    def texts(self) -> tuple[list[str], list[str], list[str]]:
        """(The last thing asked, first answer, second answer) of each row; an answer that is not there is empty."""
        asked = [turns if isinstance(turns, str) else turns[-1] for turns in (row["prompt"] for row in self.rows)]
        first, second = (
            [str(row.get(name) or "") for row in self.rows]
            for name in (("response_0", "response_1") if "response_0" in self.rows[0] else ("response", "none"))
        )
        return asked, first, second


def pair_question(task: Task, sample: RawSample, swapped: bool) -> tuple[dict[str, Any], list[float]]:
    """A pair as a row, in its order or swapped, and the truth: of a preference whether the first answer is better.

    Of a cost pair: whether the first answer is safer, whether the first is unsafe, whether the second is. Raises BadRow
    for a sample without these labels.
    """
    answers = [sample.answer, sample.other_answer]
    if task == "preference":
        if sample.better is None:
            raise BadRow("no label which answer is better")
        truth = [float(sample.better != swapped)]
    else:
        if sample.safer is None or sample.is_safe is None or sample.is_other_safe is None:
            raise BadRow("no safety labels")
        unsafe = [float(not sample.is_safe), float(not sample.is_other_safe)]
        truth = [float(sample.safer != swapped), *(unsafe[::-1] if swapped else unsafe)]
    first, second = answers[::-1] if swapped else answers
    texts = {"prompt": sample.input, **sample.system_row, "response_0": first, "response_1": second}
    return texts | {"better_response_id": 0}, truth


def text_question(answer: LabelledAnswer, label: str, reads: Reads) -> tuple[dict[str, Any], list[float]]:
    """A single text as a row, and whether it has the label. Raises BadRow where that is not known."""
    truth = answer.truth((label,))
    check_labelled(answer, truth, reads)
    turns: Any = answer.turns[0] if len(answer.turns) == 1 else list(answer.turns)
    said = {} if answer.answer is None or reads == "question" else {"response": answer.answer}
    return {"prompt": turns, **answer.system_row, **said, "labels": {label: False}}, [float(truth[0])]


def read_questions(
    task: Task,
    samples: Sequence[RawSample],
    seed: int,
    encoders: Sequence[Encoder],
    label: str = "",
    reads: Reads = "qa",
    field_names: Sequence[str] = (),
) -> tuple[Questions, Counter[str]]:
    """The rows of these samples that all models can read, and how many were left out for which reason.

    Which answer of a pair comes first is drawn by ``seed``: where the better one always did, half of a batch would be
    no threshold. Raises UserError where nothing is left, and for a field that no row has.
    """
    rng = np.random.default_rng([seed, 50])
    rows: list[dict[str, Any]] = []
    truths: list[list[float]] = []
    keys: list[int] = []
    fields: list[Mapping[str, Any]] = []
    left_out: Counter[str] = Counter()

    def add(sample: RawSample, more: Mapping[str, Any], make: Callable[[], tuple[dict[str, Any], list[float]]]) -> None:
        try:
            row, truth = make()
        except BadRow as reason:
            left_out[str(reason)] += 1
            return
        rows.append(row)
        truths.append(truth)
        keys.append(prompt_hash(sample))
        fields.append(more)

    for sample in samples:
        if task in HEADS:
            swapped = bool(rng.random() < 0.5)

            def of_pair(sample: RawSample = sample, swapped: bool = swapped) -> tuple[dict[str, Any], list[float]]:
                for encoder in encoders:
                    encoder.pair(sample)
                return pair_question(task, sample, swapped)

            add(sample, sample.fields, of_pair)
            continue
        for answer in labelled_answers(sample):
            add(sample, answer.fields, lambda answer=answer: text_question(answer, label, reads))  # type: ignore[misc]
    if not rows:
        raise UserError(f"no row has what task {task} needs ({dict(left_out)}); give other data, or another task")
    for name in field_names:
        if not any(one.get(name) is not None for one in fields):
            known = sorted({key for one in fields[:100] for key in one})
            raise UserError(f"by: no row has a field {name!r}; known: {', '.join(known) or 'none'}")
    found = Questions(rows, np.array(truths, dtype=np.float64), np.array(keys, dtype=np.uint64), fields)
    return found, left_out
