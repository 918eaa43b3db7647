"""A moderation model that scores: the log-odds of groups of its labels, all from one forward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from actors.roles.scorer import TextScorer
from beaver_ray.method.multilabel import group_odds
from beaver_ray.models.loading import DTYPES
from beaver_ray.models.moderator import Moderator
from beaver_ray.moderation_options import ModerationModel
from beaver_ray.score_sources import ScorerSetting


class ModerationScorer(TextScorer):
    """Score g of an answer is `group_odds` of the labels of group g, and above 0 means unsafe; times the group's sign.

    groups: of `ModerationSource`. The model reads the run's texts as moderation.json beside it says.
    """

    def __init__(
        self, groups: Sequence[tuple[ModerationModel, int]], columns: dict[str, int], setting: ScorerSetting
    ) -> None:
        torch.set_num_threads(setting.threads)
        super().__init__(columns, setting)
        self.moderator = Moderator(
            groups[0][0].folder, DTYPES[setting.dtype], setting.token_budget, setting.trust_remote_code
        )
        labels = self.moderator.labels
        self.groups = [
            ([labels.index(name) for name in (labels if model.labels == "all" else model.labels)], model.combine, sign)
            for model, sign in groups
        ]

    def end_scores(self, batch: pa.RecordBatch) -> np.ndarray:
        """The score [N, G] of each group of labels."""
        told = self.dialogues.told(batch)
        rows = [self.moderator.reader.row(one.turns, one.answer, one.ended, one.system)[0] for one in told]
        odds_NK, above_K = self.moderator.odds(rows), self.moderator.thresholds_K
        scores = [sign * group_odds(odds_NK, above_K, chosen, combine) for chosen, combine, sign in self.groups]
        return np.stack(scores, axis=1)
