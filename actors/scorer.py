"""Frozen models that look at finished sequences: reward and cost scorers, and the reference policy."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from actors.micro_batches import SequenceRows, token_column
from beaver_ray import experience
from beaver_ray.data.mixing import load_mix
from beaver_ray.data.tokenized import SafetyPreferenceDataset, same_tokenizer
from beaver_ray.method.calibration import Calibration, fit_platt
from beaver_ray.models.loading import DTYPES, default_device, load_policy, load_tokenizer
from beaver_ray.models.logprobs import response_logprobs
from beaver_ray.models.score import ScoreType, load_score_model


class Scorer:
    """Scores of each finished sequence, all from one forward: the reward, named costs, or both.

    columns: the model's head of each column. A scorer whose tokenizer differs from the policy's reads the text again
    in its own tokens.
    """

    def __init__(
        self,
        model: str,
        columns: dict[str, int],
        policy: str,
        dtype: str,
        token_budget: int,
        threads: int,
        trust_remote_code: bool = False,
    ) -> None:
        torch.set_num_threads(threads)
        self.columns, self.token_budget = columns, token_budget
        score_type: ScoreType = "reward" if "reward" in columns else "cost"
        self.device = default_device()
        self.model = load_score_model(model, score_type, DTYPES[dtype], trust_remote_code)
        self.model.to(self.device).eval().requires_grad_(False)
        self.tokenizer = load_tokenizer(model, trust_remote_code)
        self.policy_tokenizer = load_tokenizer(policy, trust_remote_code)
        self.reads_tokens = same_tokenizer(self.tokenizer, self.policy_tokenizer)
        self.calibrations: dict[str, Calibration] = {}

    def score(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """``sample_id`` and the score columns: raw, or the calibrated probability of being unsafe."""
        if not self.reads_tokens:
            batch = self._in_own_tokens(batch)
        scores_NH = self._end_scores(SequenceRows(batch))
        found = {"sample_id": batch.column("sample_id")}
        for column, head in self.columns.items():
            scores = scores_NH[:, head]
            if column in self.calibrations:
                scores = self.calibrations[column].probability(scores)
            found[column] = scores.astype(np.float32)
        return experience.make_batch(found)

    def calibrate(self, column: str, specs: list[str], max_tokens: int, template: str) -> dict[str, float]:
        """Fit P(unsafe) on labelled pairs; from now on that probability is the cost in ``column``."""
        samples, _ = load_mix(specs)
        data = SafetyPreferenceDataset.build(samples, self.tokenizer, max_tokens, template)  # type: ignore[arg-type]
        sequences = [*data.safer, *data.unsafer]
        unsafe = np.concatenate([data.sign_safer, data.sign_unsafer]) > 0
        prompts = [s[:1] for s in sequences]
        batch = experience.make_batch(
            {
                "sample_id": np.arange(len(sequences)),
                "prompt_tokens": prompts,
                "response_tokens": [s[1:] for s in sequences],
            }
        )
        fitted = fit_platt(self._end_scores(SequenceRows(batch))[:, self.columns[column]], unsafe)
        self.calibrations[column] = fitted
        return fitted.to_dict()

    def set_calibration(self, column: str, figures: dict[str, float]) -> None:
        """Use a calibration of ``column`` that another worker has fitted."""
        self.calibrations[column] = Calibration.from_dict(figures)

    @torch.no_grad()
    def _end_scores(self, rows: SequenceRows) -> np.ndarray:
        """Scores [N, H] of every head at each sequence's last token."""
        scores_NH = np.zeros((len(rows.lengths), len(self.model.heads)), dtype=np.float64)
        everything = range(len(rows.lengths))
        for micro_batch in rows.micro_batches(everything, self.token_budget, 0, 1, self.device):
            scores_LH = self.model(micro_batch.packed.input_ids, micro_batch.packed.position_ids)[0]
            scores_NH[micro_batch.rows] = scores_LH[micro_batch.ends_B].double().cpu().numpy()
        return scores_NH

    def _in_own_tokens(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The same texts in this scorer's tokens, EOS appended only to answers that were ended."""
        own, policy = self.tokenizer, self.policy_tokenizer
        prompts, responses = [], []
        finished = batch.column("finish_reason").to_pylist()
        for prompt, response, reason in zip(
            experience.rows(batch, "prompt_tokens"),
            experience.rows(batch, "response_tokens"),
            finished,
            strict=True,
        ):
            prompts.append(own.encode(policy.decode(prompt, skip_special_tokens=True)))
            answer = own.encode(policy.decode(response, skip_special_tokens=True), add_special_tokens=False)
            responses.append([*answer, own.eos_token_id] if reason == "stop" else answer or [own.eos_token_id])
        return experience.make_batch(
            {
                "sample_id": batch.column("sample_id"),
                "prompt_tokens": prompts,
                "response_tokens": responses,
                "finish_reason": finished,
            }
        )


class Reference:
    """The frozen policy that the KL is measured against."""

    def __init__(
        self,
        model: str,
        dtype: str,
        token_budget: int,
        temperature: float,
        threads: int,
        trust_remote_code: bool = False,
    ) -> None:
        torch.set_num_threads(threads)
        self.token_budget, self.temperature = token_budget, temperature
        self.device = default_device()
        self.model = load_policy(model, DTYPES[dtype], trust_remote_code)
        self.model.to(self.device).eval().requires_grad_(False)  # type: ignore[arg-type]

    @torch.no_grad()
    def logprobs(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """``sample_id`` and ``reference_logprobs``, at the temperature that was sampled at."""
        rows = SequenceRows(batch)
        parts = []
        for micro_batch in rows.micro_batches(range(batch.num_rows), self.token_budget, 0, 1, self.device):
            logprobs_T, _ = response_logprobs(
                self.model,
                micro_batch.packed.input_ids,
                micro_batch.packed.position_ids,
                micro_batch.positions_T,
                micro_batch.targets_T,
                self.temperature,
            )
            parts.append((micro_batch.rows, logprobs_T.cpu().numpy()))
        return token_column(batch, "reference_logprobs", parts)
