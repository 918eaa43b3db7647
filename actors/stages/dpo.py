"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7): a policy from pairs, no reward model.

The reference's log-probs of all pairs are computed once, before the first step, and kept in the workspace's folder
``reference_logprobs`` in a file whose name is a hash of the reference's weights and of the pairs' tokens.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from actors.driver.trainer_stage import TrainerStage
from beaver_ray.options import option
from beaver_ray.stage import ModelUse, RoleSpec

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from actors.machine.engine import LossTerms
    from actors.roles.trainer import Rows, Trainer
    from beaver_ray.data.tokenized import Ragged
    from beaver_ray.report.charts import Chart

DELTA = 10.0  # SafeDPO's


class Dpo(TrainerStage):
    """Options of stage dpo."""

    trained: ClassVar[str] = "policy"

    stage: Literal["dpo"] = option("Train a policy on preferences directly.")
    label: Literal["better", "safer", "safe_dpo"] = option(
        "Which preference is learned: for the more helpful answer, for the safer one, or for the more helpful one "
        "that is safe (SafeDPO).",
        "better",
    )
    beta: float = option("How dearly a departure from the reference is paid for.", 0.1, gt=0)
    delta: float | None = option(
        "safe_dpo: how much further a safe answer is to move from the reference than an unsafe one; null: 10.",
        None,
        ge=0,
    )
    reference: str | None = option("Folder of the frozen reference; null for the model's start.", None)
    dropout: bool = option("Train with the dropout of the model's configuration, which the reference has not.", False)

    @model_validator(mode="after")
    def _delta_of_safe_dpo(self) -> Dpo:
        if self.delta is not None and self.label != "safe_dpo":
            raise ValueError(f"delta belongs to label safe_dpo, not to {self.label}; leave it out, or change label")
        return self

    def roles(self) -> list[RoleSpec]:
        """The trainer, which also reads another reference than its own start where there is one."""
        (trainer,) = super().roles()
        if self.reference is None:
            return [trainer]
        use = ModelUse("reference", self.reference, tokens_of=self.model, mend="reference")
        assert trainer.training is not None
        training = replace(trainer.training, beside=(self.reference,))
        return [replace(trainer, models=(*trainer.models, use), training=training)]

    def dataset(self) -> Any:
        """Pairs that have the label."""
        from beaver_ray.data.pair_datasets import PreferenceDataset, SafeDpoDataset, SaferPreferenceDataset

        kinds = {"better": PreferenceDataset, "safer": SaferPreferenceDataset, "safe_dpo": SafeDpoDataset}
        return kinds[self.label]

    def sequences(self, data: Any) -> tuple[Ragged, ...]:
        """The better sequences and the worse ones."""
        return data.better, data.worse

    def prepare(self, trainer: Trainer) -> tuple[np.ndarray, np.ndarray]:
        """The reference's log-probs [N, 2] of the training and of the held-out pairs.

        Before its first step the model itself is the reference, also with an adapter: a fresh one changes nothing.
        """
        from beaver_ray.models.folders import fingerprint
        from beaver_ray.models.loading import DTYPES, load_policy

        model: Any = trainer.engine.engine
        trainer.engine.module.eval()
        if self.reference is not None:
            model = load_policy(
                self.reference, DTYPES[self.engine.dtype], self.trust_remote_code, trainer.engine.device
            ).eval()
        weights = fingerprint(self.reference or self.model, self.engine.dtype) if trainer.rank == 0 else ""
        return (
            self._reference_logprobs(trainer, model, trainer.train_data, weights),
            self._reference_logprobs(trainer, model, trainer.eval_data, weights),
        )

    def batch_loss(self, trainer: Trainer, data: Any, batch: Rows, rows: Rows, weight: float) -> LossTerms:
        """Minus the log-likelihood that the better answer wins, by how far each is from the reference.

        With label safe_dpo against an unsafe one only by what exceeds `delta`.
        """
        import torch

        from actors.machine.engine import LossTerms
        from beaver_ray.method.losses import dpo_loss

        logprobs_B2 = _pair_logprobs(trainer.engine.engine, trainer, data, rows)
        reference_N2 = trainer.prepared[0 if data is trainer.train_data else 1]
        reference_B2 = torch.from_numpy(reference_N2[rows]).to(logprobs_B2)
        offset_B = None
        if self.label == "safe_dpo":
            delta = DELTA if self.delta is None else self.delta
            offset_B = delta * torch.from_numpy(data.worse_is_unsafe[rows]).to(logprobs_B2)
        return LossTerms(
            *dpo_loss(
                *logprobs_B2.unbind(1),
                *reference_B2.unbind(1),
                beta=self.beta,
                offset_B=offset_B,
                weights_B=torch.full_like(logprobs_B2[:, 0], weight / len(batch)),
            )
        )

    def save(self, trainer: Trainer, state: dict[str, Tensor], folder: Path) -> None:
        """Write the policy; with LoRA the merged one, and the adapter beside it in ``adapter``."""
        from beaver_ray.models.saving import save_language_model

        save_language_model(trainer.engine.module, state, self.adapter, folder)

    def charts(self, metrics: dict[str, np.ndarray]) -> list[Chart]:
        """Those of every supervised stage, and the margin."""
        from beaver_ray.report.charts import Chart, Panel, Series, drawable

        sides = (("margin", "train"), ("eval/margin", "held out"))
        margins = [Series(label, metrics[key]) for key, label in sides if key in metrics]
        caption = "How much further the better answer has moved from the reference than the worse one, times beta."
        return [*super().charts(metrics), *drawable([Chart("Margin", caption, [Panel("margin", margins)])])]

    def _reference_logprobs(self, trainer: Trainer, model: Any, data: Any, weights: str) -> np.ndarray:
        """Log-probs [N, 2] of the better and worse answers of all pairs, from the file or worked out by all ranks.

        weights: hash of the reference's, on rank 0, which alone reads and writes the file.
        """
        import numpy as np
        import torch
        import torch.distributed as dist

        digest = hashlib.blake2b(weights.encode(), digest_size=16)
        for array in (data.prompt_length, data.better.offsets, data.better.flat, data.worse.offsets, data.worse.flat):
            digest.update(np.ascontiguousarray(array).tobytes())
        file = Path(self.workspace) / "reference_logprobs" / f"{digest.hexdigest()}.npy"
        device = trainer.engine.device
        found_N2 = torch.zeros(len(data), 2, dtype=torch.float64, device=device)
        known = torch.zeros(1, device=device)
        if trainer.rank == 0 and file.is_file():
            found_N2 += torch.from_numpy(np.load(file)).to(device)
            known += 1
        dist.broadcast(known, 0)
        if not known:
            everything = np.arange(len(data))
            with torch.no_grad():
                for rows, weight in trainer.micro_batches(data, everything):
                    found_N2[rows] += weight * _pair_logprobs(model, trainer, data, rows).double()
        dist.all_reduce(found_N2)  # each rank has its share of the rows, or the first all of them
        logprobs_N2 = found_N2.cpu().numpy()
        if trainer.rank == 0 and not known:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}.part")
            with part.open("wb") as stream:
                np.save(stream, logprobs_N2)
            part.rename(file)
        trainer.notes.append(
            f"reference: log-probs of {len(data)} pairs {'read from' if known else 'computed and kept in'} {file}"
        )
        return logprobs_N2


def _pair_logprobs(model: Any, trainer: Trainer, data: Any, rows: Rows) -> Tensor:
    """Log-probs [B, 2] of the better and the worse answer of each row, summed over the answer's tokens alone."""
    import numpy as np
    import torch

    from beaver_ray.models.logprobs import response_logprobs
    from beaver_ray.packing import pack, response_positions

    device = trainer.engine.device
    sequences = [side[int(row)] for side in (data.better, data.worse) for row in rows]
    prompts = np.tile(data.prompt_length[rows], 2)
    answers = np.array([len(sequence) for sequence in sequences]) - prompts
    packed = pack(sequences).to(device)
    positions = response_positions(prompts, answers).to(device)
    logprobs_T, _ = response_logprobs(
        model, packed.input_ids, packed.position_ids, positions, packed.input_ids[0, positions + 1]
    )
    answer_of_T = torch.repeat_interleave(torch.arange(len(answers)), torch.from_numpy(answers)).to(device)
    sums = torch.zeros(len(answers), dtype=logprobs_T.dtype, device=device).index_add(0, answer_of_T, logprobs_T)
    return sums.view(2, -1).T
