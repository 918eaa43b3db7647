"""Models of stage weak_to_strong, each a stage that an ensemble's worker trains: on soft labels, or on texts alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from actors.driver.trainer_stage import TrainerStage
from beaver_ray.moderation_options import Reads
from beaver_ray.options import option
from beaver_ray.weak_to_strong_options import HEADS, Task

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from actors.machine.engine import LossTerms
    from actors.roles.trainer import Rows, Trainer
    from beaver_ray.data.tokenized import Ragged


class TextArm(TrainerStage):
    """What models of all tasks share: their texts, pairs of answers or single ones."""

    stage: str = option("Not a stage of its own.", "weak_to_strong")
    task: Task = option("What is judged.")
    label: str = option("The label of single texts.", "unsafe")
    input: Reads = option("What is read of single texts.", "qa")
    save_to: str = option("The model's folder; empty where it is not kept.", "")
    places: ClassVar[tuple[str, ...]] = ("save_to", "labels", "watched_labels", "resume", "tracker")

    @property
    def model_folders(self) -> tuple[str, ...]:
        """What is there once it is trained."""
        return (self.save_to,) if self.save_to else ()

    @property
    def of_pairs(self) -> bool:
        """Whether a row is two answers."""
        return self.task in HEADS

    @property
    def packed(self) -> bool:
        """Whether the model reads packed rows."""
        from beaver_ray.models.classifier import is_encoder

        return self.of_pairs or not is_encoder(self.model, self.trust_remote_code)

    def dataset(self) -> Any:
        """Pairs as they stand in their file, or single texts; their labels are read beside them."""
        from beaver_ray.data.moderation import ModerationRows
        from beaver_ray.data.pair_datasets import PreferenceDataset

        return PreferenceDataset if self.of_pairs else ModerationRows((self.label,), self.input)

    def sequences(self, data: Any) -> tuple[Ragged, ...]:
        """The two sequences of a pair, or the one."""
        return (data.better, data.worse) if self.of_pairs else (data.tokens,)


class LanguageArm(TextArm):
    """Generative fine-tuning: the language model reads the texts, both answers of a pair, and no label."""

    def batch_loss(self, trainer: Trainer, data: Any, batch: Rows, rows: Rows, weight: float) -> LossTerms:
        """Cross-entropy over all tokens behind the first, each of the batch's with the same weight."""
        from actors.roles.soft_training import language_loss

        return language_loss(self, trainer, data, batch, rows, weight)

    def held_out_scores(self, trainer: Trainer) -> np.ndarray:
        """The mean loss of a token of the held-out texts [1]; the model is saved besides."""
        import numpy as np

        trainer.save(self.save_to)
        return np.array([trainer.evaluate()["loss"]])

    def save(self, trainer: Trainer, state: dict[str, Tensor], folder: Path) -> None:
        """Write the language model."""
        from beaver_ray.models.saving import save_language_model

        model: Any = trainer.engine.module
        save_language_model(model, state, self.adapter, folder)


class SoftArm(TextArm):
    """A model that learns soft labels: row i of the training file has row i of ``labels``, an array [N, K]."""

    labels: str = option("File of the training rows' labels, probabilities [N, K].")
    loss: Literal["xent", "confidence", "product"] = option("The loss.", "xent")
    alpha: float = option("Of the loss.", 0.5)
    beta: float = option("Of the loss.", 1.0)
    warmup: float = option("Of alpha.", 0.2)
    schedule: Literal["linear", "published"] = option("Of alpha.", "linear")
    regularization: float = option("Weight of the mean squared score of a pair.", 0.001, ge=0)
    stop: Literal["none", "agreement", "loss"] = option("What chooses the model.", "none")
    patience: int = option("Looks without anything better after which training ends; 0: never.", 0)
    looks: float = option("Looks at the held-out rows in an epoch; 0: none.", 0.0)
    watched: tuple[int, int] = option("Which held-out rows agreement is measured on: from, to.", (0, 0))
    watched_labels: str = option("File of those rows' weak labels.", "")
    tested: int = option("The held-out row that tests begin with.", 0)

    @property
    def label_files(self) -> tuple[str, ...]:
        """What it is made of besides texts."""
        return tuple(filter(None, (self.labels, self.watched_labels)))

    def load(self, dtype: torch.dtype) -> torch.nn.Module:
        """A score model with its task's head, or a classifier with one label."""
        from beaver_ray.models.classifier import load_classifier
        from beaver_ray.models.lora import add_trunk_adapter
        from beaver_ray.models.score import load_score_model

        if self.of_pairs:
            kind: Any = HEADS[self.task][0]
            model: Any = load_score_model(self.model, kind, dtype, self.trust_remote_code, HEADS[self.task])
        else:
            model = load_classifier(self.model, (self.label,), dtype, self.trust_remote_code, fresh=True)
        if self.lora_rank:
            add_trunk_adapter(model.trunk, self.lora_rank, self.lora_alpha, self.seed, self.lora_targets)
        return model

    def prepare(self, trainer: Trainer) -> Any:
        """The labels, and what is found out while it learns."""
        from actors.roles.soft_training import SoftState

        return SoftState.of(self, trainer)

    def work(self, trainer: Trainer, batch: Rows) -> tuple[Sequence[Any], Callable[[Any], LossTerms]]:
        """Fix the targets of the whole batch, whose threshold they share; then its micro-batches."""
        from actors.roles.soft_training import set_targets

        set_targets(self, trainer, batch)
        return super().work(trainer, batch)

    def batch_loss(self, trainer: Trainer, data: Any, batch: Rows, rows: Rows, weight: float) -> LossTerms:
        """Cross-entropy against the targets."""
        from actors.roles.soft_training import soft_loss

        return soft_loss(self, trainer, data, batch, rows, weight)

    def ends_after(self, trainer: Trainer, done: int) -> bool:
        """Look at the held-out rows, as often as is asked for; whether enough has been seen."""
        from actors.roles.soft_training import look

        return look(self, trainer, done)

    def held_out_scores(self, trainer: Trainer) -> np.ndarray:
        """Logits [N, K] of the held-out rows by the model that is kept; it is saved besides."""
        from actors.roles.soft_training import finish

        return finish(self, trainer)

    def told(self, trainer: Trainer) -> dict[str, Any]:
        """What the looks have seen, which of them was the best, and how much was trained on how many rows."""
        told: dict[str, Any] = trainer.prepared.told()
        return told | {"sizes": trainer.sizes()}

    def save(self, trainer: Trainer, state: dict[str, Tensor], folder: Path) -> None:
        """Write an ordinary score model, or an ordinary moderation model."""
        from actors.roles.soft_training import save

        save(self, trainer, state, folder)
