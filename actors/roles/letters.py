"""A language model that is asked for a letter: the log-probs of all letters at one place, and nothing is generated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from beaver_ray import experience
from beaver_ray.errors import UserError
from beaver_ray.models.loading import DTYPES, context_length, default_device, load_policy
from beaver_ray.packing import pack, plan_micro_batches


class LetterScorer:
    """Log-probs of some tokens behind each text.

    letters: the tokens (`beaver_ray.models.letters`). Rows are packed up to ``token_budget`` tokens, or to the longest.
    """

    def __init__(
        self,
        model: str,
        letters: Sequence[int],
        dtype: str,
        token_budget: int,
        threads: int,
        trust_remote_code: bool = False,
    ) -> None:
        torch.set_num_threads(threads)
        self.folder, self.letters, self.token_budget = model, list(letters), token_budget
        self.positions = context_length(model, trust_remote_code)
        self.device = default_device()
        self.model = load_policy(model, DTYPES[dtype], trust_remote_code, self.device)
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def logprobs(self, batch: pa.RecordBatch) -> np.ndarray:
        """The log-prob [N, L] of every letter as the next token behind each row's ``prompt_tokens``."""
        rows = experience.rows(batch, "prompt_tokens")
        lengths = [len(row) for row in rows]
        if self.positions is not None and max(lengths) > self.positions:
            raise UserError(
                f"the model in {self.folder} has {self.positions} positions, and a question makes {max(lengths)} "
                f"tokens; leave long pairs out, or take a model that reads more"
            )
        found_NL = np.zeros((len(rows), len(self.letters)))
        for members in plan_micro_batches(lengths, max([self.token_budget, *lengths]), 1)[0]:
            packed = pack([rows[number] for number in members]).to(self.device)
            logits_BV = self.model(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                logits_to_keep=packed.cu_seqlens[1:].long().to(self.device) - 1,
                use_cache=False,
            ).logits[0]
            logprobs_BV = torch.log_softmax(logits_BV.double(), dim=-1)
            found_NL[members] = logprobs_BV[:, self.letters].cpu().numpy()
        return found_NL
