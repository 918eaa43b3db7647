"""A cost model: which of two answers is more harmful, and whether each is harmful at all (Safe RLHF eq. 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

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
    labels: ClassVar[tuple[str, ...]] = ("safer",)

    stage: Literal["cost_model"] = option("Train a cost model.")

    @model_validator(mode="after")
    def _compares_ends(self) -> CostModel:
        if self.loss != "sequence":
            raise ValueError(f"loss {self.loss} is of rewards; leave it out, a cost model compares end scores")
        return self

    def dataset(self) -> Any:
        """Pairs that say which answer is safer, and whether each is safe."""
        from beaver_ray.data.pair_datasets import SafetyPreferenceDataset

        return SafetyPreferenceDataset

    def sequences(self, data: Any) -> tuple[Ragged, ...]:
        """The safer sequences and the more harmful ones."""
        return data.safer, data.unsafer

    def batch_loss(self, trainer: Trainer, data: Any, batch: Rows, rows: Rows, weight: float) -> LossTerms:
        """Order of the two costs, and the sign of each; a pair that is flipped keeps its signs."""
        from actors.roles.score_losses import cost_loss, dealt, score_pairs, treated_rows

        treated = treated_rows(trainer, data, rows, "safer")
        safer, unsafer = dealt(self.sequences(data), rows, treated.flipped_B)
        pairs = score_pairs(trainer, safer, unsafer, weight, len(batch), self.spoken(data, rows))
        safer_BH, unsafer_BH = pairs.ends_BH
        costs = safer_BH[:, 0], unsafer_BH[:, 0]
        loss, metrics = cost_loss(data, rows, costs, pairs.weights_B, self.regularization, treated)
        return self.terms(trainer, data, rows, pairs, loss, metrics)
