"""A reward model: which of two answers is more helpful (Bradley and Terry 1952; Safe RLHF eq. 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from actors.driver.trainer_stage import ScoreModelStage
from beaver_ray.meta_options import MetaConfig
from beaver_ray.options import option
from beaver_ray.stage import RoleSpec

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
    meta: MetaConfig | None = option("Unlabelled answers of a policy that it is to tell apart; null for none.", None)

    @model_validator(mode="after")
    def _can_be_shifted(self) -> RewardModel:
        workers = 1 if self.debug else self.cluster.of("trainer").workers
        whole = self.engine.zero_stage == 0 and self.engine.dtype == "float32" and workers == 1
        if self.meta is not None and self.meta.order != "joint" and not whole:
            raise ValueError(
                f"meta.order {self.meta.order} shifts the weights whole, in one process: set engine.zero_stage to 0, "
                "engine.dtype to float32 and cluster.placement.trainer.workers to 1, or meta.order to joint"
            )
        if self.meta is not None and self.meta.order != "joint" and self.contrastive is not None:
            raise ValueError(f"meta.order {self.meta.order} does not go with contrastive: take meta.order joint")
        return self

    def roles(self) -> list[RoleSpec]:
        """The trainer, with what shifted weights take: see `beaver_ray.method.meta.meta_gradient`."""
        (trainer,) = super().roles()
        if self.meta is None or self.meta.order == "joint":
            return [trainer]
        assert trainer.training is not None
        # A derivative that is to be differentiated again holds its own intermediate results beside the activations.
        passes = 3 if self.meta.order == "second" else 1
        return [replace(trainer, training=replace(trainer.training, passes=passes, copies=4))]

    def dataset(self) -> Any:
        """Pairs that say which answer is more helpful."""
        from beaver_ray.data.pair_datasets import PreferenceDataset

        return PreferenceDataset

    def sequences(self, data: Any) -> tuple[Ragged, ...]:
        """The better sequences and the worse ones."""
        return data.better, data.worse

    def prepare(self, trainer: Trainer) -> Any:
        """What is done with each training pair, and the unlabelled answers."""
        from actors.roles.meta_step import META, read_answers

        prepared = super().prepare(trainer)
        return prepared if self.meta is None else prepared | {META: read_answers(trainer, self.meta)}

    def work(self, trainer: Trainer, batch: Rows) -> tuple[Sequence[Any], Callable[[Any], LossTerms]]:
        """The micro-batches of pairs; where there are unlabelled answers, what a step makes of both."""
        from actors.roles.meta_step import meta_work

        pairs = super().work(trainer, batch)
        return pairs if self.meta is None else meta_work(trainer, self.meta, *pairs)

    def batch_loss(self, trainer: Trainer, data: Any, batch: Rows, rows: Rows, weight: float) -> LossTerms:
        """Minus the log-likelihood that the better answer wins."""
        from actors.roles.score_losses import dealt, reward_loss, score_pairs, treated_rows

        treated = treated_rows(trainer, data, rows, "better")
        better, worse = dealt(self.sequences(data), rows, treated.flipped_B)
        pairs = score_pairs(trainer, better, worse, weight, len(batch), self.spoken(data, rows))
        loss, metrics = reward_loss(pairs, self.loss, self.regularization, treated)
        return self.terms(trainer, data, rows, pairs, loss, metrics)

    def headlines(self) -> list[str]:
        """Held-out accuracy, and whether the rewards of the unlabelled answers have become all alike."""
        from beaver_ray.method.meta import collapse
        from beaver_ray.runs import read_metrics

        found = super().headlines()
        if self.meta is not None:
            rows = [row for row in read_metrics(self.folder) if "meta/spread" in row]
            steps, spreads = [int(row["step"]) for row in rows], [float(row["meta/spread"]) for row in rows]
            said = collapse(steps, spreads, self.meta.spread_floor)
            found += [] if said is None else [said]
        return found
