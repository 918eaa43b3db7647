"""A language model that chooses: the log-probs of letters at one place, or of whole answers; it generates nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from actors.roles.micro_batches import SequenceRows
from actors.roles.scorer import FrozenPolicy
from beaver_ray import experience
from beaver_ray.errors import UserError
from beaver_ray.models.loading import context_length
from beaver_ray.packing import pack, plan_micro_batches


class ChoiceScorer(FrozenPolicy):
    """A frozen language model. Rows are packed up to ``token_budget`` tokens, or to the longest."""

    def __init__(
        self, model: str, dtype: str, token_budget: int, threads: int, trust_remote_code: bool = False
    ) -> None:
        self.folder = model
        self.positions = context_length(model, trust_remote_code)
        super().__init__(model, dtype, token_budget, threads, trust_remote_code)

    @torch.no_grad()
    def letters(self, batch: pa.RecordBatch, letters: Sequence[int]) -> np.ndarray:
        """The log-prob [N, L] of each of these tokens as the next one behind each row's ``prompt_tokens``."""
        rows = experience.rows(batch, "prompt_tokens")
        lengths = self._checked([len(row) for row in rows])
        found_NL = np.zeros((len(rows), len(letters)))
        for members in plan_micro_batches(lengths, max([self.token_budget, *lengths]), 1)[0]:
            packed = pack([rows[number] for number in members]).to(self.device)
            logits_BV = self.model(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                logits_to_keep=packed.cu_seqlens[1:].long().to(self.device) - 1,
                use_cache=False,
            ).logits[0]
            logprobs_BV = torch.log_softmax(logits_BV.double(), dim=-1)
            found_NL[members] = logprobs_BV[:, list(letters)].cpu().numpy()
        return found_NL

    @torch.no_grad()
    def answers(self, batch: pa.RecordBatch) -> np.ndarray:
        """The log-prob [N] of each row's ``response_tokens`` behind its ``prompt_tokens``, the sum of its tokens'."""
        rows = SequenceRows(batch)
        budget = max([self.token_budget, *self._checked(rows.lengths.tolist())])
        found_N = np.zeros(len(rows.lengths))
        for micro_batch, logprobs_T in self.token_logprobs(rows, budget, 1.0):
            lengths_B = rows.response_lengths[micro_batch.rows]
            found_N[micro_batch.rows] = np.add.reduceat(logprobs_T.astype(np.float64), np.cumsum(lengths_B) - lengths_B)
        return found_N

    def _checked(self, lengths: list[int]) -> list[int]:
        if self.positions is not None and max(lengths, default=0) > self.positions:
            raise UserError(
                f"the model in {self.folder} has {self.positions} positions, and what it is to read makes "
                f"{max(lengths)} tokens; leave long rows out, or take a model that reads more"
            )
        return lengths
