"""A cost model: which of two answers is more harmful, and whether each is harmful at all (Safe RLHF eq. 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from actors.driver.trainer_stage import ScoreModelStage
from beaver_ray.options import option

if TYPE_CHECKING:
    from actors.machine.engine import LossTerms
    from actors.roles.trainer import Rows, Trainer
    from beaver_ray.data.tokenized import Ragged


class CostModel(ScoreModelStage):
    """Options of stage cost_model."""

    trained: ClassVar[str] = "cost_model"
    heads: ClassVar[tuple[str, ...]] = ("cost",)

    stage: Literal["cost_model"] = option("Train a cost model.")

    def dataset(self) -> Any:
        """Pairs that say which answer is safer, and whether each is safe."""
        from beaver_ray.data.pair_datasets import SafetyPreferenceDataset

        return SafetyPreferenceDataset

    def sequences(self, data: Any) -> tuple[Ragged, ...]:
        """The safer sequences and the more harmful ones."""
        return data.safer, data.unsafer

    def batch_loss(self, trainer: Trainer, data: Any, batch: Rows, rows: Rows, weight: float) -> LossTerms:
        """Order of the two costs, and the sign of each."""
        import torch

        from actors.machine.engine import LossTerms
        from actors.roles.score_losses import score_pairs
        from beaver_ray.method.losses import cost_model_loss

        safer, unsafer = ([side[int(row)] for row in rows] for side in self.sequences(data))
        pairs = score_pairs(trainer, safer, unsafer, weight, len(batch))
        safer_BH, unsafer_BH = pairs.ends_BH
        signs = [torch.from_numpy(s[rows]).to(safer_BH) for s in (data.sign_unsafer, data.sign_safer)]
        return LossTerms(
            *cost_model_loss(
                unsafer_BH[:, 0],
                safer_BH[:, 0],
                *signs,
                regularization=self.regularization,
                weights_B=pairs.weights_B,
            )
        )
