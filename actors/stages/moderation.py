"""A moderation model: which of several labels a question, an answer or both together have (BeaverTails, 2307.04657).

One sigmoid for each label on any decoder or encoder. After training a threshold is chosen for each label on held-out
answers; it is saved with the model, with the figures that were measured on them.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from actors.driver.trainer_stage import TrainerStage
from beaver_ray.data_options import DataSpec
from beaver_ray.errors import UserError
from beaver_ray.moderation_options import LabelSchema, Reads, ThresholdRule, label_names
from beaver_ray.options import near, option
from beaver_ray.stage import RoleSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from actors.machine.engine import LossTerms
    from actors.roles.trainer import Rows, Trainer
    from beaver_ray.data.tokenized import Ragged
    from beaver_ray.report.charts import Card
    from beaver_ray.runs import RunFolder

MOST_WEIGHT = 20.0
"""Of a label's true rows, where the data decide."""


class Moderation(TrainerStage):
    """Options of stage moderation."""

    trained: ClassVar[str] = "moderation"
    pairs: ClassVar[bool] = False

    stage: Literal["moderation"] = option("Train a classifier of harm with several labels.")
    labels: LabelSchema = option("beavertails, pku_saferlhf, openai, or a list of names.", "beavertails")
    input: Reads = option("What is read: question, answer, qa (the last turn's both), or the whole dialogue.", "qa")
    max_tokens: int = option("Longer examples are cut at their beginning: the answer's end stays.", 512, gt=1)
    pos_weight: Literal["none", "auto"] | dict[str, float] = option(
        "Weight of a label's true rows: none, auto (false to true rows, at most 20), or label: weight.", "auto"
    )
    threshold: ThresholdRule = option("Of each label, on held-out data: f1, or precision:0.9 for a target.", "f1")
    look_alikes: list[DataSpec] = option("Benign prompts or answers that look harmful.", default_factory=list)
    by: list[str] = option("Fields of held-out rows by whose values flagged answers are counted.", default_factory=list)

    @model_validator(mode="after")
    def _weights_of_labels(self) -> Moderation:
        given = self.pos_weight if isinstance(self.pos_weight, dict) else {}
        for name, weight in given.items():
            if name not in self.names:
                raise ValueError(f"pos_weight: no label is called {name!r}{near(name, self.names)}")
            if not weight > 0:
                raise ValueError(f"pos_weight of {name} must be above 0, not {weight:g}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The labels."""
        return label_names(self.labels)

    def roles(self) -> list[RoleSpec]:
        """The trainer, whose model is a classifier."""
        (trainer,) = super().roles()
        uses = tuple(replace(use, signals=self.names, classifier=True) for use in trainer.models)
        return [replace(trainer, models=uses, logits=False)]

    def run(self, run: RunFolder) -> None:
        """Train, choose thresholds, save, and put what was measured beside the run's figures."""
        from beaver_ray.models.folders import MODERATION

        self._check_what_is_read_last()
        super().run(run)
        shutil.copyfile(run.folder / "final.part" / self.trained / MODERATION, run.folder / MODERATION)

    def _check_what_is_read_last(self) -> None:
        """UserError, before the training and not after it, for look-alikes that cannot be read or hold nothing that
        is, and for a field of ``by`` that no held-out row has."""
        from actors.roles.moderation_figures import held_out
        from beaver_ray.data.mixing import load_mix
        from beaver_ray.data.moderation import answers_of, check_answered

        if self.look_alikes:
            check_answered(answers_of(load_mix(self.look_alikes)[0])[0], self.input, "look_alikes")
        if self.by:
            known = {name for answer in answers_of(held_out(self))[0] for name in answer.fields}
            if strange := [name for name in self.by if name not in known]:
                raise UserError(f"by: no held-out row has field {strange[0]!r}{near(strange[0], known)}")

    @property
    def packed(self) -> bool:
        """Whether the model is a decoder."""
        from beaver_ray.models.classifier import is_encoder

        return not is_encoder(self.model, self.trust_remote_code)

    def dataset(self) -> Any:
        """Answers of which some label is known."""
        from beaver_ray.data.moderation import ModerationRows

        return ModerationRows(self.names, self.input)

    def sequences(self, data: Any) -> tuple[Ragged, ...]:
        """Each answer as it is read."""
        return (data.tokens,)

    def load(self, dtype: torch.dtype) -> torch.nn.Module:
        """The classifier; with a fresh adapter where it has one, beside which its head is trained."""
        from beaver_ray.models.classifier import load_classifier
        from beaver_ray.models.lora import add_trunk_adapter

        model = load_classifier(self.model, self.names, dtype, self.trust_remote_code, fresh=True)
        if self.lora_rank:
            add_trunk_adapter(model.trunk, self.lora_rank, self.lora_alpha, self.seed, self.lora_targets)
        return model

    def prepare(self, trainer: Trainer) -> np.ndarray:
        """The weight [K] of each label's true rows."""
        import numpy as np

        labels_NK = trainer.train_data.labels_NK
        true, false = (labels_NK > 0).sum(axis=0), (labels_NK == 0).sum(axis=0)
        heard = true + false > 0
        for said, those in (("has", heard & (true == 0)), ("says anything of", ~heard)):
            if names := [name for name, so in zip(self.names, those, strict=True) if so]:
                trainer.notes.append(f"no training row {said} {', '.join(names)}")
        if self.pos_weight == "auto":
            return np.clip(false / np.maximum(true, 1), 1 / MOST_WEIGHT, MOST_WEIGHT)
        given = self.pos_weight if isinstance(self.pos_weight, dict) else {}
        return np.array([given.get(name, 1.0) for name in self.names])

    def learned(self, trainer: Trainer) -> np.ndarray:
        """Which labels [K] the model knows anything of: from training rows, or from the classifier it started as."""
        import numpy as np

        from beaver_ray.models.classifier import labels_there
        from beaver_ray.models.folders import find_model

        start = find_model(self.model)
        before = labels_there(start, self.trust_remote_code) if start else []
        heard: np.ndarray = (trainer.train_data.labels_NK >= 0).any(axis=0)
        return heard | np.array([name in before for name in self.names])

    def batch_loss(self, trainer: Trainer, data: Any, batch: Rows, rows: Rows, weight: float) -> LossTerms:
        """Mean cross-entropy of the labels that are known."""
        import torch

        from actors.machine.engine import LossTerms
        from beaver_ray.method.losses import masked_label_loss
        from beaver_ray.models.classifier import classify

        model: Any = trainer.engine.module
        device = trainer.engine.device
        logits_BK = classify(model, trainer.engine.engine, [data.tokens[int(row)] for row in rows], device)
        weights_K = torch.as_tensor(trainer.prepared, dtype=logits_BK.dtype, device=device)
        known = max(1, int((data.labels_NK[batch] >= 0).sum()))
        labels_BK = torch.from_numpy(data.labels_NK[rows]).to(device)
        loss, metrics = masked_label_loss(logits_BK, labels_BK, positive_weight_K=weights_K, total=float(known))
        return LossTerms(loss * weight, {name: value * weight for name, value in metrics.items()})

    def conclude(self, trainer: Trainer) -> Any:
        """`beaver_ray.models.moderator.Settings`: thresholds, and figures on held-out answers."""
        from actors.roles.moderation_figures import conclude

        return conclude(self, trainer)

    def save(self, trainer: Trainer, state: dict[str, Tensor], folder: Path) -> None:
        """Write the classifier, with any adapter added, and moderation.json."""
        from beaver_ray.models.classifier import save_classifier
        from beaver_ray.models.provenance import trained_with

        model: Any = trainer.engine.module
        save_classifier(model, state, folder, trained_with(trainer.tokenizer, self.template), self.adapter)
        trainer.concluded.write(folder)

    def cards(self, metrics: dict[str, np.ndarray], evaluation: dict[str, Any]) -> list[Card]:
        """How well the held-out answers were flagged, then what every supervised stage has."""
        from beaver_ray.report.charts import Card

        found = [Card(f"Flagged: {title}", text, "held out", "") for title, text in self._headings()]
        return [*found, *super().cards(metrics, evaluation)]

    def headlines(self) -> list[str]:
        """How well held-out answers were flagged."""
        line = "flagged: " + ", ".join(f"{title} {text}" for title, text in self._headings())
        return [line, *self._figures().get("notes", [])]

    def _figures(self) -> dict[str, Any]:
        """What moderation.json says of held-out answers; nothing before the run has ended."""
        from beaver_ray.models.folders import MODERATION
        from beaver_ray.models.moderator import Settings

        file = self.folder / MODERATION
        return Settings.read(file).figures if file.is_file() else {}

    def _headings(self) -> list[tuple[str, str]]:
        """(What, how much) of these figures."""
        figures = self._figures()
        if not figures:
            return []
        flagged = figures["flagged"]
        found = [("F1", flagged["f1"]), ("AUROC", flagged["auroc"]), ("macro-F1 of labels", figures["macro_f1"])]
        if "over_block" in figures:
            found.append(("look-alikes", figures["over_block"]["mean"]))
        return [(name, "unknown" if value is None else f"{value:.3f}") for name, value in found]

    @property
    def data_sets(self) -> tuple[list[DataSpec], list[DataSpec]]:
        """``train``, and ``eval`` with the look-alikes."""
        return self.train, [*self.eval, *self.look_alikes]
