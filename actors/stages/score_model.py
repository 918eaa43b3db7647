"""A reward model and a cost model as two heads on one trunk, which then score with one forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from actors.driver.trainer_stage import ScoreModelStage
from beaver_ray.options import option

if TYPE_CHECKING:
    from actors.machine.engine import LossTerms
    from actors.roles.trainer import Rows, Trainer
    from beaver_ray.data.tokenized import Ragged


class ScoreModel(ScoreModelStage):
    """Options of stage score_model."""

    trained: ClassVar[str] = "score_model"
    heads: ClassVar[tuple[str, ...]] = ("reward", "cost")
    labels: ClassVar[tuple[str, ...]] = ("better", "safer")

    stage: Literal["score_model"] = option("Train a reward model and a cost model as one.")

    def dataset(self) -> Any:
        """Pairs that say which answer is more helpful, which is safer, and whether each is safe."""
        from beaver_ray.data.pair_datasets import LabelledPairDataset

        return LabelledPairDataset

    def sequences(self, data: Any) -> tuple[Ragged, ...]:
        """The safer sequences and the more harmful ones."""
        return data.safer, data.unsafer

    def batch_loss(self, trainer: Trainer, data: Any, batch: Rows, rows: Rows, weight: float) -> LossTerms:
        """The sum of a reward model's and a cost model's loss."""
        import torch

        from actors.roles.score_losses import cost_loss, dealt, reward_loss, score_pairs, treated_rows

        by_reward, by_cost = (treated_rows(trainer, data, rows, label) for label in self.labels)
        # Rewards are compared better one first, costs safer one first, unless noise has it the other way.
        better_is_safer = data.safer_is_better[rows] ^ by_reward.flipped_B
        better, worse = dealt(self.sequences(data), rows, ~better_is_safer)
        pairs = score_pairs(trainer, better, worse, weight, len(batch), self.spoken(data, rows))
        better_BH, worse_BH = pairs.ends_BH
        alike_B = torch.from_numpy(better_is_safer ^ by_cost.flipped_B).to(better_BH.device)
        safer_B = torch.where(alike_B, better_BH[:, -1], worse_BH[:, -1])
        unsafer_B = torch.where(alike_B, worse_BH[:, -1], better_BH[:, -1])
        cost, metrics = cost_loss(data, rows, (safer_B, unsafer_B), pairs.weights_B, self.regularization, by_cost)
        metrics["accuracy_cost"] = metrics.pop("accuracy")
        reward, more = reward_loss(pairs, self.loss, self.regularization, by_reward)
        figures = {"loss_reward": reward.detach(), "loss_cost": cost.detach(), **more, **metrics}
        return self.terms(trainer, data, rows, pairs, reward + cost, figures)
