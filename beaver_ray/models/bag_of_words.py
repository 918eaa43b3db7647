"""A logistic regression on counted words: the weakest supervisor that still learns.

The words of a question and of an answer count apart. Its score is the sum of their weights and a bias: a reward, a
cost, or the log-odds of a label. It is one JSON file, ``bag_of_words.json``, in a folder of its own, which a run reads
as a function: python:beaver_ray/rules/bag_of_words.py:score(model='FOLDER').
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import expit

from beaver_ray.errors import UserError, first_line
from beaver_ray.json_files import write_json

FILE = "bag_of_words.json"
_WORD = re.compile(r"\w+|[^\w\s]")
_SIDES = ("question", "answer")


def words_of(text: str) -> list[str]:
    """What is counted: words in lower case, and signs."""
    return _WORD.findall(text.lower())


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    question: dict[str, float]
    answer: dict[str, float]
    bias: float


@dataclass(frozen=True)
class BagOfWords:
    """Weights of words."""

    question: Mapping[str, float]
    answer: Mapping[str, float]
    bias: float

    def scores(self, questions: Sequence[str], answers: Sequence[str]) -> NDArray[np.float64]:
        """The score [N] of each answer to its question."""
        found = np.full(len(questions), self.bias, dtype=np.float64)
        for weights, texts in ((self.question, questions), (self.answer, answers)):
            found += [sum(weights.get(word, 0.0) for word in words_of(text)) for text in texts]
        return found

    def write(self, folder: Path) -> None:
        """Write bag_of_words.json."""
        content = {"question": dict(self.question), "answer": dict(self.answer), "bias": self.bias}
        write_json(folder / FILE, content)

    @classmethod
    def read(cls, folder: Path) -> BagOfWords:
        """The bag of words in a folder. Raises UserError where there is none."""
        try:
            found = _File.model_validate_json((folder / FILE).read_bytes())
        except (OSError, ValidationError) as error:
            raise UserError(
                f"{folder} holds no bag of words ({first_line(error)}); give final/weak of a run of stage "
                f"weak_to_strong whose weak model is one"
            ) from None
        return cls(found.question, found.answer, found.bias)


class WordCounter:
    """Counts the words of texts that it was made of; ``known`` ones alone where some are named, no ``unknown`` ones."""

    def __init__(
        self,
        questions: Sequence[str],
        answers: Sequence[str],
        known: Collection[str] = (),
        unknown: Collection[str] = (),
    ) -> None:
        words = [
            (side, word)
            for side, texts in zip(_SIDES, (questions, answers), strict=True)
            for word in sorted({word for text in texts for word in words_of(text)})
        ]
        some, none = ({word.lower() for word in named} for named in (known, unknown))
        kept = [(side, word) for side, word in words if (not some or word in some) and word not in none]
        self.columns = {key: number for number, key in enumerate(kept)}

    def counts(self, questions: Sequence[str], answers: Sequence[str]) -> csr_matrix:
        """How often each word stands in each text [N, F]; the last column is 1, for the bias."""
        rows: list[int] = []
        columns: list[int] = []
        values: list[float] = []
        for row, texts in enumerate(zip(questions, answers, strict=True)):
            found = Counter((side, word) for side, text in zip(_SIDES, texts, strict=True) for word in words_of(text))
            known = [(self.columns[key], count) for key, count in found.items() if key in self.columns]
            for column, count in (*known, (len(self.columns), 1)):
                rows.append(row)
                columns.append(column)
                values.append(float(count))
        return csr_matrix((values, (rows, columns)), (len(questions), len(self.columns) + 1))

    def model(self, weights_F: NDArray[np.float64]) -> BagOfWords:
        """The bag of words with these weights, in the order of `counts`."""
        sides: dict[str, dict[str, float]] = {side: {} for side in _SIDES}
        for (side, word), column in self.columns.items():
            sides[side][word] = float(weights_F[column])
        return BagOfWords(sides["question"], sides["answer"], float(weights_F[-1]))


def fit_logistic(features_NF: csr_matrix, labels_N: NDArray[np.floating], ridge: float) -> NDArray[np.float64]:
    """Weights [F] of least cross-entropy, summed over the rows, and ridge/2 times their squares; labels may be soft."""

    def objective(weights_F: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logits_N = features_NF @ weights_F
        loss = float(np.sum(np.logaddexp(0.0, logits_N) - labels_N * logits_N)) + 0.5 * ridge * float(
            weights_F @ weights_F
        )
        return loss, features_NF.T @ (expit(logits_N) - labels_N) + ridge * weights_F

    found = minimize(objective, np.zeros(features_NF.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    return np.asarray(found.x, dtype=np.float64)
