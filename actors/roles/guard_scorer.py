"""A guard that scores: a language model that was taught to say whether an answer is safe; it generates nothing."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from actors.roles.scorer import TextScorer
from beaver_ray.errors import UserError
from beaver_ray.guard_options import GuardModel
from beaver_ray.models.guard_reader import GuardReader, Question
from beaver_ray.models.loading import DTYPES, context_length, default_device, load_policy
from beaver_ray.packing import pack, plan_micro_batches
from beaver_ray.score_sources import ScorerSetting


class GuardScorer(TextScorer):
    """The log-odds of a guard's own words, one forward for all of them.

    Score h of its F questions is log P(yes) - log P(no), and score F + h the opposite, which is a reward. An answer in
    between (Controversial) counts as yes with weight w: log(P(yes) + w P(middle)) - log(P(no) + (1 - w) P(middle)).

    guard: its options. Rows are packed up to the setting's ``token_budget`` tokens, or to the longest one, since
    guards' templates are long.
    """

    def __init__(self, guard: GuardModel, columns: dict[str, int], setting: ScorerSetting) -> None:
        torch.set_num_threads(setting.threads)
        super().__init__(columns, setting)
        trust = setting.trust_remote_code
        self.guard, self.token_budget = guard, setting.token_budget
        self.guard_reader = GuardReader(guard, trust)
        self.positions = context_length(guard.folder, trust)
        self.device = default_device()
        self.model = load_policy(guard.folder, DTYPES[setting.dtype], trust, self.device)
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def end_scores(self, batch: pa.RecordBatch) -> np.ndarray:
        """Every score [N, 2F] of each answer; those that no column asks for are 0."""
        questions = self.guard_reader.questions
        # What stands behind the last question that is asked for need not be read.
        asked = sorted({head % len(questions) for head in self.columns.values()})
        rows, starts = self._rows(batch, asked[-1])
        lengths = [len(row) for row in rows]
        odds_NF = np.zeros((len(rows), len(questions)))
        for micro_batch in plan_micro_batches(lengths, max([self.token_budget, *lengths]), 1)[0]:
            packed = pack([rows[number] for number in micro_batch]).to(self.device)
            begins = packed.cu_seqlens[:-1].tolist()
            # The answer to a question is predicted at the last token before it.
            places = [
                begin + starts[number] + questions[head].behind - 1
                for begin, number in zip(begins, micro_batch, strict=True)
                for head in asked
            ]
            logits_PV = self.model(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                logits_to_keep=torch.tensor(places, device=self.device),
                use_cache=False,
            ).logits[0]
            logits_BFV = logits_PV.reshape(len(micro_batch), len(asked), -1)
            for place, head in enumerate(asked):
                odds_NF[micro_batch, head] = _log_odds(logits_BFV[:, place], questions[head], self.guard.controversial)
        return np.concatenate([odds_NF, -odds_NF], axis=1)

    def _rows(self, batch: pa.RecordBatch, upto: int) -> tuple[list[list[int]], list[int]]:
        """The tokens of each answer as the guard reads them, and how many stand before what is forced."""
        rows = [self.guard_reader.row(told.turns, told.answer, upto) for told in self.dialogues.told(batch)]
        longest = max((len(row) for row, _ in rows), default=0)
        if self.positions is not None and longest > self.positions:
            raise UserError(
                f"the guard in {self.guard.folder} has {self.positions} positions, and an answer makes {longest} "
                f"tokens in its template; lower max_prompt_tokens or rollout.max_new_tokens"
            )
        return [row for row, _ in rows], [start for _, start in rows]


def _log_odds(logits_BV: Tensor, question: Question, weight: float) -> np.ndarray:
    """Log-odds [B] of a question's yes; ``weight`` of the answer in between counts as yes."""
    logits = logits_BV.double().cpu().numpy()
    yes, no = logits[:, question.yes], logits[:, question.no]
    if question.middle is not None:
        middle = logits[:, question.middle]
        with np.errstate(divide="ignore"):  # log 0 is a share that there is none of
            yes, no = np.logaddexp(yes, middle + np.log(weight)), np.logaddexp(no, middle + np.log(1.0 - weight))
    odds: np.ndarray = yes - no
    return odds
