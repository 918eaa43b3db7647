"""What stages share that train one model on a data set: the trainer's role, the run, the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from beaver_ray.config import RankingConfig, TrainerConfig
from beaver_ray.contrastive_options import ContrastiveConfig
from beaver_ray.data_options import DataSpec
from beaver_ray.noise_options import NoiseConfig
from beaver_ray.options import option
from beaver_ray.stage import Lengths, ModelUse, RoleSpec, TemplatedStage, Training

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from actors.machine.engine import LossTerms
    from actors.roles.score_losses import ScoredPairs
    from actors.roles.trainer import Rows, Trainer
    from beaver_ray.data.tokenized import Ragged
    from beaver_ray.report.charts import Card, Chart
    from beaver_ray.runs import RunFolder
    from beaver_ray.weights import AdapterInfo


class TrainerStage(TrainerConfig, TemplatedStage):
    """One model trained on a data set. Its methods from `dataset` on are called in the trainer's process."""

    kinds: ClassVar[tuple[str, ...]] = ("trainer",)
    trained: ClassVar[str]
    """Name of the trained model's folder under final/."""
    heads: ClassVar[tuple[str, ...]] = ()
    """Of a score model; none of a language model."""
    pairs: ClassVar[bool] = True
    """Whether a row is two sequences, which are read in one forward pass."""

    def roles(self) -> list[RoleSpec]:
        """The trainer alone."""
        batch = f"a batch of {self.batch_size} (batch_size)"
        training = Training(self.trained, self.batch_size, batch, self.lora_rank, tuple(self.lora_targets))
        return [
            RoleSpec(
                "trainer",
                "trainer",
                "actors.roles.trainer:Trainer",
                lambda rank, world: (self, rank, world),
                (ModelUse("model", self.model, self.heads),),
                training,
                logits=not self.heads,
            )
        ]

    @property
    def adapter(self) -> AdapterInfo | None:
        """The LoRA adapter that is trained alone, and any score heads with it; None where all parameters are."""
        from beaver_ray.weights import AdapterInfo

        return AdapterInfo(self.lora_rank, self.lora_alpha, self.model) if self.lora_rank else None

    def run(self, run: RunFolder) -> None:
        """Train, evaluate after each epoch and at the end, and save the model."""
        from actors.driver.train_on_data import train_on_data

        train_on_data(self, run)

    def lengths(self) -> Lengths:
        """Of an example."""
        return Lengths(self.max_tokens, f"max_tokens {self.max_tokens}", "lower it", 2 if self.pairs else 1)

    @property
    def data_sets(self) -> tuple[list[DataSpec], list[DataSpec]]:
        """``train`` and ``eval``."""
        return self.train, self.eval

    def charts(self, metrics: dict[str, np.ndarray]) -> list[Chart]:
        """Losses, accuracies, learning rate, throughput."""
        from beaver_ray.report.supervised import supervised_charts

        return supervised_charts(metrics)

    def cards(self, metrics: dict[str, np.ndarray], evaluation: dict[str, Any]) -> list[Card]:
        """The held-out figures of the model that is kept, else recent ones of the training."""
        from beaver_ray.report.supervised import supervised_cards
        from beaver_ray.runs import kept_step

        return supervised_cards(metrics, kept_step(self.folder))

    @property
    def selects(self) -> bool:
        """Whether the model of the best held-out accuracy is kept, and not the last."""
        return False

    @property
    def packed(self) -> bool:
        """Whether the model reads packed rows, and not padded batches."""
        return True

    def dataset(self) -> Any:
        """The class of its data sets (`beaver_ray.data.tokenized`), or another `RowKind`."""
        raise NotImplementedError

    def sequences(self, data: Any) -> tuple[Ragged, ...]:
        """The sequences of each row: one, or the two of a pair."""
        raise NotImplementedError

    def load(self, dtype: torch.dtype) -> torch.nn.Module:
        """The model to train, a language model or a score model with `heads`; with a fresh adapter where it has one."""
        from beaver_ray.models.lora import add_adapter, add_trunk_adapter

        adapter = (self.lora_rank, self.lora_alpha, self.seed, self.lora_targets)
        if not self.heads:
            from beaver_ray.models.loading import load_policy

            policy = load_policy(self.model, dtype, self.trust_remote_code)
            return add_adapter(policy, *adapter) if self.lora_rank else policy
        from beaver_ray.models.score import load_score_model

        first: Any = self.heads[0]
        model = load_score_model(self.model, first, dtype, self.trust_remote_code, self.heads)
        if self.lora_rank:
            add_trunk_adapter(model.trunk, *adapter)
        return model

    def prepare(self, trainer: Trainer) -> Any:
        """Whatever must be known before the first step, kept as `Trainer.prepared`; called once on all ranks."""
        return None

    def work(self, trainer: Trainer, batch: Rows) -> tuple[Sequence[Any], Callable[[Any], LossTerms]]:
        """What a step differentiates: its micro-batches, and what says the loss of each."""
        return trainer.micro_batches(trainer.train_data, batch), partial(trainer.loss, trainer.train_data, batch)

    def batch_loss(self, trainer: Trainer, data: Any, batch: Rows, rows: Rows, weight: float) -> LossTerms:
        """Loss and metrics of ``rows``, a micro-batch of ``batch``; see `actors.roles.trainer.TrainerTask`."""
        raise NotImplementedError

    def conclude(self, trainer: Trainer) -> Any:
        """Whatever is found out about the trained model, kept as `Trainer.concluded`; called on all ranks."""
        return None

    def save(self, trainer: Trainer, state: dict[str, Tensor], folder: Path) -> None:
        """Write the model as a Hugging Face folder."""
        raise NotImplementedError

    # Of a model that is trained beside others (`actors.driver.ensemble`); its trainer is alone.

    places: ClassVar[tuple[str, ...]] = ()
    """Options that say where something lies, and not what is trained."""

    @property
    def label_files(self) -> tuple[str, ...]:
        """Files that it learns from besides its data."""
        return ()

    @property
    def model_folders(self) -> tuple[str, ...]:
        """Folders of models that are there once it is trained."""
        return ()

    def ends_after(self, trainer: Trainer, done: int) -> bool:
        """Whether training ends here, after ``done`` steps; asked after each."""
        return False

    def held_out_scores(self, trainer: Trainer) -> np.ndarray:
        """What the trained model says of each held-out row."""
        raise NotImplementedError

    def told(self, trainer: Trainer) -> dict[str, Any]:
        """What else is to be known of its training, as JSON can hold it."""
        return {}


class ScoreModelStage(RankingConfig, TrainerStage):
    """A score model trained on pairs of answers."""

    labels: ClassVar[tuple[str, ...]]
    """The labels that its pairs are put in order by: "better", "safer"."""

    noise: NoiseConfig = option("What is done about wrong labels.", default_factory=NoiseConfig)
    lm_loss: float = option("Weight of the language model's loss on the preferred answer; 0 for none.", 0.0, ge=0)
    contrastive: ContrastiveConfig | None = option("A contrastive loss of the features; null for none.", None)
    select: Literal["last", "accuracy"] = option(
        "The model that is kept: the last, or that of the best held-out accuracy after an epoch.", "last"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> ScoreModelStage:
        if self.loss == "token" and (self.noise.margin or self.noise.smoothing or self.noise.soft):
            raise ValueError("noise.margin, smoothing and soft are of end scores; set loss: sequence")
        if self.lm_loss and self.engine.zero_stage == 3:
            raise ValueError("lm_loss needs the whole head in every process; set engine.zero_stage to 2 at most")
        return self

    def roles(self) -> list[RoleSpec]:
        """The trainer, whose contrastive loss takes two passes more, and a language model's loss logits."""
        (trainer,) = super().roles()
        assert trainer.training is not None
        training = replace(trainer.training, passes=3 if self.contrastive else 1)
        return [replace(trainer, training=training, logits=self.lm_loss > 0)]

    def load(self, dtype: torch.dtype) -> torch.nn.Module:
        """The score model, with what it has while it is trained: a language model's head, prototypes."""
        from beaver_ray.models.score import Prototypes, add_language_head

        model: Any = super().load(dtype)
        if self.contrastive and self.contrastive.kind == "swav":
            model.prototypes = Prototypes(self.contrastive.prototypes, model.score_head.in_features, dtype)
        if self.lm_loss:
            add_language_head(model, self.model, dtype, self.trust_remote_code, train=not self.lora_rank)
        return model

    def run(self, run: RunFolder) -> None:
        """Train, say whether held-out accuracy has decayed, and what became of the features."""
        super().run(run)
        if self.contrastive:
            from actors.driver.evaluate import write
            from actors.roles.score_losses import FEATURES

            file = run.folder / "final.part" / self.trained / FEATURES
            write(run.folder, json.loads(file.read_text(encoding="utf-8")))
        run.note(*self.headlines())

    def prepare(self, trainer: Trainer) -> Any:
        """What is done with each training pair, by label."""
        from actors.roles.score_losses import treatments

        if self.contrastive:
            from actors.roles.contrast import negatives

            trainer.notes.append(negatives(trainer, self.contrastive))
        return treatments(trainer, self.noise, self.labels)

    def spoken(self, data: Any, rows: Rows) -> np.ndarray | None:
        """Tokens of the prompts of these rows, where their answers' log-probs are needed."""
        prompts: np.ndarray | None = data.prompt_length[rows] if self.lm_loss else None
        return prompts

    def terms(
        self, trainer: Trainer, data: Any, rows: Rows, pairs: ScoredPairs, loss: Tensor, metrics: dict[str, Tensor]
    ) -> LossTerms:
        """The ranking loss of these rows and, of training data, whatever is learnt beside it."""
        from actors.machine.engine import LossTerms
        from actors.roles.score_losses import with_language

        learning = data is trainer.train_data
        loss, metrics = with_language(pairs, loss, metrics, self.lm_loss if learning else 0.0)
        if self.contrastive and learning:
            from actors.roles.contrast import contrastive_loss

            apart = contrastive_loss(trainer, data, rows, pairs, self.contrastive)
            loss, metrics = loss + self.contrastive.weight * apart, {**metrics, "loss_contrastive": apart.detach()}
        return LossTerms(loss, metrics)

    def conclude(self, trainer: Trainer) -> Any:
        """How far apart held-out features are, where a loss was to bring that about."""
        if self.contrastive is None:
            return None
        from actors.roles.contrast import held_out_overlap

        return held_out_overlap(trainer, self.heads)

    def held_out_scores(self, trainer: Trainer) -> np.ndarray:
        """End score of the first head of each pair's preferred answer less that of the other."""
        from actors.roles.ensemble import score_differences

        return score_differences(trainer)

    @property
    def selects(self) -> bool:
        """Whether the model of the best held-out accuracy is kept."""
        return self.select == "accuracy"

    def headlines(self) -> list[str]:
        """Held-out accuracy, and whether it has decayed."""
        from beaver_ray.method.noise import decay
        from beaver_ray.runs import kept_step, read_metrics

        rows = [row for row in read_metrics(self.folder) if row.get("eval/pairs")]
        if not rows:
            return []
        found = []
        step = kept_step(self.folder)
        kept = next((row for row in rows if row["step"] == step), rows[-1])
        for head, name in zip(self.heads, ("accuracy", "accuracy_cost"), strict=False):
            values = [float(row[f"eval/{name}"]) for row in rows]
            fallen = decay([int(row["step"]) for row in rows], values, int(rows[-1]["eval/pairs"]))
            said = f"held-out accuracy {kept[f'eval/{name}']:.3f}" if fallen is None else fallen.in_words()
            found.append(f"{head}: {said}" + ("" if step is None else f"; the model of step {step} is kept"))
        return found

    def save(self, trainer: Trainer, state: dict[str, Tensor], folder: Path) -> None:
        """Write the score model, and what it was trained to read with."""
        from actors.roles.score_losses import save_scores

        save_scores(trainer, state, folder)
