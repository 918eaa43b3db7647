"""A reward model: which of two answers is more helpful (Bradley and Terry 1952; Safe RLHF eq. 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from actors.driver.trainer_stage import ScoreModelStage
from beaver_ray.options import option

if TYPE_CHECKING:
    from actors.machine.engine import LossTerms
    from actors.roles.trainer import Rows, Trainer
    from beaver_ray.data.tokenized import Ragged


class RewardModel(ScoreModelStage):
    """Options of stage reward_model."""

    trained: ClassVar[str] = "reward_model"
    heads: ClassVar[tuple[str, ...]] = ("reward",)
    labels: ClassVar[tuple[str, ...]] = ("better",)

    stage: Literal["reward_model"] = option("Train a reward model.")

    def dataset(self) -> Any:
        """Pairs that say which answer is more helpful."""
        from beaver_ray.data.pair_datasets import PreferenceDataset

        return PreferenceDataset

    def sequences(self, data: Any) -> tuple[Ragged, ...]:
        """The better sequences and the worse ones."""
        return data.better, data.worse

    def batch_loss(self, trainer: Trainer, data: Any, batch: Rows, rows: Rows, weight: float) -> LossTerms:
        """Minus the log-likelihood that the better answer wins."""
        from actors.roles.score_losses import dealt, reward_loss, score_pairs, treated_rows

        treated = treated_rows(trainer, data, rows, "better")
        better, worse = dealt(self.sequences(data), rows, treated.flipped_B)
        pairs = score_pairs(trainer, better, worse, weight, len(batch), self.spoken(data, rows))
        loss, metrics = reward_loss(pairs, self.loss, self.regularization, treated)
        return self.terms(trainer, data, rows, pairs, loss, metrics)
