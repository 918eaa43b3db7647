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

        from actors.machine.engine import LossTerms
        from actors.roles.score_losses import reward_loss, score_pairs
        from beaver_ray.method.losses import cost_model_loss

        # Rewards are compared better one first, costs safer one first.
        better_is_safer = data.safer_is_better[rows]
        chosen = list(zip(rows.tolist(), better_is_safer.tolist(), strict=True))
        better = [(data.safer if alike else data.unsafer)[row] for row, alike in chosen]
        worse = [(data.unsafer if alike else data.safer)[row] for row, alike in chosen]
        pairs = score_pairs(trainer, better, worse, weight, len(batch))
        better_BH, worse_BH = pairs.ends_BH
        alike_B = torch.from_numpy(better_is_safer).to(better_BH.device)
        safer_B = torch.where(alike_B, better_BH[:, -1], worse_BH[:, -1])
        unsafer_B = torch.where(alike_B, worse_BH[:, -1], better_BH[:, -1])
        signs = [torch.from_numpy(s[rows]).to(safer_B) for s in (data.sign_unsafer, data.sign_safer)]
        cost, metrics = cost_model_loss(
            unsafer_B, safer_B, *signs, regularization=self.regularization, weights_B=pairs.weights_B
        )
        metrics["accuracy_cost"] = metrics.pop("accuracy")
        reward, more = reward_loss(pairs, self.loss, self.regularization)
        return LossTerms(reward + cost, {"loss_reward": reward.detach(), "loss_cost": cost.detach(), **more, **metrics})
