"""A reward model that follows principles (SALMON, arXiv 2310.05910): the same answers, judged by others at any time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from actors.roles.scorer import Scorer, TextScorer
from beaver_ray import experience
from beaver_ray.data.readers import Told
from beaver_ray.errors import UserError
from beaver_ray.models.loading import context_length
from beaver_ray.principle_options import PrincipleModel
from beaver_ray.score_sources import ScorerSetting
from beaver_ray.self_align.writing import chosen, drawn, worded, written
from beaver_ray.signals import head_of


class PrincipleScorer(TextScorer):
    """Score g of an answer is the reward model's under the principles of group g, times the group's sign.

    Principles stand where the dialogue's system text does, as in the pairs that the model was trained on. A system text
    of the prompt's row stands before them; one of the run's template is for the policy, and is not read.

    groups: of `PrincipleSource`.
    """

    def __init__(
        self, groups: Sequence[tuple[PrincipleModel, int]], columns: dict[str, int], setting: ScorerSetting
    ) -> None:
        super().__init__(columns, setting)
        self.groups, self.token_budget = groups, setting.token_budget
        self.texts = [
            [worded(p, choice.negated) for p, choice in zip(chosen(m.principles, m.file), m.principles, strict=True)]
            for m, _ in groups
        ]
        self.folder = groups[0][0].folder
        # The model reads what is written for it in its own tokens, and knows no prompts of the run.
        self.model = Scorer(self.folder, {"reward": 0}, replace(setting, policy=self.folder, prompts=()))
        heads = self.model.model.heads
        self.head = 0 if len(heads) == 1 else head_of("reward", heads)
        self.positions = context_length(self.folder, setting.trust_remote_code)

    def end_scores(self, batch: pa.RecordBatch) -> np.ndarray:
        """The score [N, G] of each group of principles."""
        told = self.dialogues.told(batch)
        return np.stack([self._scores(told, group) for group in range(len(self.groups))], axis=1)

    def _scores(self, told: Sequence[Told], group: int) -> np.ndarray:
        """The scores [N] of one group."""
        scores_N = np.zeros(len(told))
        for weight, systems in self._systems(told, group):
            rows = [self._tokens(one, system) for one, system in zip(told, systems, strict=True)]
            longest = max((len(prompt) + len(answer) for prompt, answer in rows), default=0)
            if self.positions is not None and longest > self.positions:
                raise UserError(
                    f"{self.folder} has {self.positions} positions, and an answer makes {longest} tokens with its "
                    f"principles; lower data.max_prompt_tokens or rollout.max_new_tokens, or name fewer principles"
                )
            self.model.token_budget = max(self.token_budget, longest)
            scores_N += weight * self.model.end_scores(experience.finished(rows))[:, self.head]
        return self.groups[group][1] * scores_N

    def _systems(self, told: Sequence[Told], group: int) -> Iterator[tuple[float, list[str]]]:
        """(weight, the system text of each dialogue) for each reading of the group."""
        model, texts = self.groups[group][0], self.texts[group]
        if model.apart:
            total = sum(choice.weight for choice in model.principles)
            for choice, text in zip(model.principles, texts, strict=True):
                yield choice.weight / total, [written([text], one.system) for one in told]
            return
        everything = list(range(len(texts)))
        of_each = [
            everything if model.draw is None else drawn(model.principles, model.draw, one.turns, one.system)
            for one in told
        ]
        yield 1.0, [written([texts[i] for i in some], one.system) for some, one in zip(of_each, told, strict=True)]

    def _tokens(self, told: Told, system: str) -> tuple[list[int], list[int]]:
        """Prompt and answer as the model reads them."""
        return self.model.reader.prompt(told.turns, system), self.model.reader.answer(told.answer, told.ended)
