"""Earlier answers to a prompt, kept so that the policy can go back to them when the multipliers change.

The gradient of an answer that the policy hardly ever gives is as small as its probability: once all answers to a
prompt are safe, no multiplier brings the others back, and a limit is kept from one side only. So answers that would be
the best under some multipliers are kept, and the best under those of today is imitated where it is worth more than what
the policy may be expected to answer now (self-imitation learning, https://arxiv.org/abs/1806.05635).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from beaver_ray import experience
from beaver_ray.method.history import Unit
from beaver_ray.method.objective import Objective

LARGEST = 3.0  # standard deviations of a step's advantages that one earlier answer may be ahead by


@dataclass(frozen=True)
class Earlier:
    """One answer of n tokens, with what it scored in each signal."""

    tokens: np.ndarray
    """int32 [n]."""
    loss_mask: np.ndarray
    """bool [n], which of the tokens the policy wrote."""
    reference_logprobs: np.ndarray
    """float32 [n]."""
    scores: dict[str, float]


@dataclass(frozen=True)
class Replay:
    """Answers to imitate in one step, M of them; prompts stand beside them in `sequences`."""

    sequences: pa.RecordBatch
    """``sample_id`` (their number), ``prompt_tokens``, ``response_tokens``, ``loss_mask``, ``reference_logprobs``."""
    gains_M: np.ndarray
    """What each is worth above what the policy may be expected to answer, before the KL of the policy as it is when it
    learns from the answer; in units of the combined advantage."""
    scale: float
    """What advantages are divided by: where those of the step are whitened their standard deviation, else 1."""
    largest: float
    """The highest that one may count, before the division."""


class BestAnswers:
    """Of each prompt the answers that no other one beats in every signal, as given so far in this run."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.of_prompt: dict[int, list[Earlier]] = {}

    def replay(
        self,
        batch: pa.RecordBatch,
        weights: Mapping[str, float],
        share: float,
        seed: tuple[int, ...],
        units: Mapping[str, Unit] = MappingProxyType({}),
    ) -> Replay:
        """The earlier answers to imitate beside the step's ``batch``, at most ``share`` of its answers.

        One for each of the batch's prompts that was answered in an earlier step: the best under ``weights``.
        ``seed`` chooses among them where there are more. Scores are kept as they were given; ``units`` are those that
        the step's advantages are in.
        """
        prompts_N = experience.scalars(batch, "prompt_id")
        _, first = np.unique(prompts_N, return_index=True)
        again = np.array([row for row in first if int(prompts_N[row]) in self.of_prompt], dtype=np.int64)
        again = np.sort(np.random.default_rng(seed).permutation(again)[: round(share * len(prompts_N))])
        inside = self._inside(batch, again)
        best = [self._best(int(prompts_N[row]), weights, units, inside, i) for i, row in enumerate(again)]
        ahead = {
            signal: self._scores(best, signal, units) - baselines_N[again]
            for signal, baselines_N in self._columns(batch, "baselines").items()
        }
        spread, whitened = self._spread(batch, weights), self.objective.settings.normalize
        prompts = experience.rows(batch, "prompt_tokens")
        sequences = {
            "sample_id": np.arange(len(best)),
            "prompt_tokens": [prompts[row] for row in again],
            "response_tokens": [answer.tokens for answer in best],
            "loss_mask": [answer.loss_mask for answer in best],
            "reference_logprobs": [answer.reference_logprobs for answer in best],
        }
        return Replay(
            experience.make_batch(sequences),
            self.objective.weighed(ahead, weights, inside),
            spread if whitened else 1.0,
            LARGEST * spread,
        )

    def remember(self, batch: pa.RecordBatch) -> None:
        """Take the step's answers in, and let go of those that another one beats or equals in every signal."""
        for prompt, new in self._answers(batch):
            kept = self.of_prompt.setdefault(prompt, [])
            if not any(self._at_least(old, new) for old in kept):
                self.of_prompt[prompt] = [*(old for old in kept if not self._at_least(new, old)), new]

    def to_bytes(self) -> bytearray:
        """All answers as an Arrow stream, for a checkpoint."""
        pairs = [(prompt, answer) for prompt, kept in self.of_prompt.items() for answer in kept]
        answers = [answer for _, answer in pairs]
        columns: dict[str, Any] = {
            "prompt_id": [prompt for prompt, _ in pairs],
            "response_tokens": [answer.tokens for answer in answers],
            "loss_mask": [answer.loss_mask for answer in answers],
            "reference_logprobs": [answer.reference_logprobs for answer in answers],
        }
        for signal in self.objective.signals:
            columns[f"scores/{signal}"] = [answer.scores[signal] for answer in answers]
        batch, sink = experience.make_batch(columns), pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
        return bytearray(sink.getvalue())

    def restore(self, stream: np.ndarray) -> None:
        """Hold the answers of `to_bytes`, and no others."""
        batch = pa.ipc.open_stream(pa.py_buffer(stream)).read_next_batch()
        self.of_prompt = {}
        for prompt, answer in self._answers(batch):
            self.of_prompt.setdefault(prompt, []).append(answer)

    def _answers(self, batch: pa.RecordBatch) -> Iterator[tuple[int, Earlier]]:
        """(number of its prompt, answer) of each row."""
        scores, lengths_N = self._columns(batch, "scores"), experience.lengths(batch, "response_tokens")
        masks = np.split(experience.loss_mask(batch), np.cumsum(lengths_N)[:-1])
        responses, references = (experience.rows(batch, name) for name in ("response_tokens", "reference_logprobs"))
        for row, prompt in enumerate(experience.scalars(batch, "prompt_id").tolist()):
            of_row = {signal: float(scores_N[row]) for signal, scores_N in scores.items()}
            yield prompt, Earlier(responses[row].copy(), masks[row].copy(), references[row].copy(), of_row)

    def _at_least(self, one: Earlier, other: Earlier) -> bool:
        """Whether one answer is as good as the other in every signal: rewards are to be high and costs low."""
        return all(
            sign * one.scores[signal] <= sign * other.scores[signal] for signal, sign in self.objective.signals.items()
        )

    def _best(
        self,
        prompt: int,
        weights: Mapping[str, float],
        units: Mapping[str, Unit],
        inside: Mapping[str, np.ndarray],
        place: int,
    ) -> Earlier:
        kept = self.of_prompt[prompt]
        scores = {signal: self._scores(kept, signal, units) for signal in self.objective.signals}
        here = {name: np.repeat(inside_M[place], len(kept)) for name, inside_M in inside.items()}
        return kept[int(np.argmax(self.objective.weighed(scores, weights, here)))]

    def _scores(self, answers: list[Earlier], signal: str, units: Mapping[str, Unit]) -> np.ndarray:
        scores_M = np.array([answer.scores[signal] for answer in answers])
        return self.objective.clipped(signal, units[signal].of(scores_M) if signal in units else scores_M)

    def _spread(self, batch: pa.RecordBatch, weights: Mapping[str, float]) -> float:
        """The standard deviation of the step's advantages over its tokens, before whitening."""
        signals = {signal: experience.own(batch, f"advantages/{signal}") for signal in self.objective.signals}
        lengths_N = experience.own_lengths(batch)
        inside = {n: np.repeat(i, lengths_N) for n, i in self._inside(batch, np.arange(batch.num_rows)).items()}
        return float(self.objective.weighed(signals, weights, inside).std()) + 1e-8

    def _inside(self, batch: pa.RecordBatch, rows: np.ndarray) -> dict[str, np.ndarray]:
        found = {name: experience.inside(batch, name) for name in self.objective.bounded}
        return {name: inside[rows] for name, inside in found.items() if inside is not None}

    def _columns(self, batch: pa.RecordBatch, kind: str) -> dict[str, np.ndarray]:
        return {s: experience.scalars(batch, f"{kind}/{s}").astype(np.float64) for s in self.objective.signals}
