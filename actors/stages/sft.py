"""Supervised fine-tuning: the language model learns to answer as demonstrations do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from actors.driver.trainer_stage import TrainerStage
from beaver_ray.options import option, without

if TYPE_CHECKING:
    from torch import Tensor

    from actors.machine.engine import LossTerms
    from actors.roles.trainer import Rows, Trainer
    from beaver_ray.data.tokenized import Ragged


class Sft(TrainerStage):
    """Options of stage sft."""

    trained: ClassVar[str] = "policy"
    pairs: ClassVar[bool] = False

    stage: Literal["sft"] = option("Train a language model on demonstrations.")

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_gone(cls, given: Any) -> Any:
        given = without(given, "loss", "sequence", "it compares scores, of which there are none")
        return without(given, "regularization", 0.001, "it is of scores, of which there are none")

    def dataset(self) -> Any:
        """Prompts with an answer."""
        from beaver_ray.data.tokenized import SupervisedDataset

        return SupervisedDataset

    def sequences(self, data: Any) -> tuple[Ragged, ...]:
        """Prompt, answer and end."""
        return (data.tokens,)

    def batch_loss(self, trainer: Trainer, data: Any, batch: Rows, rows: Rows, weight: float) -> LossTerms:
        """Cross-entropy over the answers' tokens, each of the batch's with the same weight."""
        import torch

        from actors.machine.engine import LossTerms
        from beaver_ray.method.losses import cross_entropy_loss
        from beaver_ray.models.logprobs import response_logprobs
        from beaver_ray.packing import pack, response_positions

        packed = pack([data.tokens[int(row)] for row in rows]).to(trainer.engine.device)
        prompts = data.prompt_length[rows]
        answers = data.tokens.lengths[rows] - prompts
        positions = response_positions(prompts, answers).to(trainer.engine.device)
        model: Any = trainer.engine.engine
        logprobs_T, _ = response_logprobs(
            model, packed.input_ids, packed.position_ids, positions, packed.input_ids[0, positions + 1]
        )
        total = float((data.tokens.lengths[batch] - data.prompt_length[batch]).sum())
        loss, _ = cross_entropy_loss(logprobs_T, torch.full_like(logprobs_T, weight / total))
        return LossTerms(loss)

    def save(self, trainer: Trainer, state: dict[str, Tensor], folder: Path) -> None:
        """Write the language model, which ends its answers as the demonstrations do."""
        from beaver_ray.data.templates import answer_form
        from beaver_ray.models.loading import end_generation
        from beaver_ray.models.saving import save_language_model

        model: Any = trainer.engine.module
        end_generation(model, answer_form(trainer.tokenizer, self.template).end)
        save_language_model(model, state, self.adapter, folder)
