"""SFT, reward and cost models: one rank of a supervised trainer, and the loop that drives the ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.machine.engine import LossTerms, TrainingEngine
from actors.machine.handles import Group
from actors.machine.ranks import TrainingRank
from beaver_ray.config import SupervisedConfig
from beaver_ray.data.mixing import held_out_too, load_mix, split
from beaver_ray.data.templates import answer_form
from beaver_ray.data.tokenized import (
    BatchSampler,
    LabelledPairDataset,
    PreferenceDataset,
    SafetyPreferenceDataset,
    SupervisedDataset,
)
from beaver_ray.method.losses import (
    aligned_positions,
    cost_model_loss,
    cross_entropy_loss,
    reward_model_loss,
    token_wise_reward_model_loss,
)
from beaver_ray.models.checkpoint_names import without_repeats
from beaver_ray.models.loading import DTYPES, load_policy, load_tokenizer
from beaver_ray.models.logprobs import response_logprobs
from beaver_ray.models.provenance import trained_with
from beaver_ray.models.score import load_score_model, save_score_model
from beaver_ray.packing import PackedBatch, check_packing, pack, plan_micro_batches, response_positions
from beaver_ray.runs import RunFolder
from beaver_ray.signals import HEADS_OF_STAGE

DATASETS: dict[str, type[SupervisedDataset] | type[PreferenceDataset] | type[SafetyPreferenceDataset]] = {
    "sft": SupervisedDataset,
    "reward_model": PreferenceDataset,
    "cost_model": SafetyPreferenceDataset,
    "score_model": LabelledPairDataset,
}


class SupervisedTrainer(TrainingRank):
    """One rank. All ranks read the same data and draw the same batches, and each takes its share of them."""

    def __init__(self, config: SupervisedConfig, rank: int, world: int) -> None:
        super().__init__(rank, world, config.seed, config.cluster.threads)
        self.config = config

    def build(self) -> None:
        """Load model and data."""
        config = self.config
        self.tokenizer = load_tokenizer(config.model, config.trust_remote_code)
        samples, reports = load_mix(config.train)
        if config.eval:
            held_out, more = load_mix(config.eval)
            reports = reports | more
            both = held_out_too(samples, held_out)
        else:
            samples, held_out = split(samples, config.eval_fraction, config.seed)
            both = None
        make: Any = DATASETS[config.stage].build
        self.train_data = make(samples, self.tokenizer, config.max_tokens, config.template)
        self.eval_data = make(held_out, self.tokenizer, config.max_tokens, config.template)
        self.notes = [f"{spec}: {report.line()}" for spec, report in reports.items()]
        self.notes += [
            f"{name} data: {len(data)} kept; {data.report.line()}"
            for name, data in (("training", self.train_data), ("held-out", self.eval_data))
        ]
        self.notes += [both] if both else []
        self.sampler = BatchSampler(len(self.train_data), config.batch_size, config.seed)
        self.steps = max(1, math.ceil(config.epochs * self.sampler.batches_per_epoch))
        dtype = DTYPES[config.engine.dtype]
        if config.stage == "sft":
            model: Any = load_policy(config.model, dtype, config.trust_remote_code)
        else:
            heads: Any = HEADS_OF_STAGE[config.stage]
            model = load_score_model(config.model, heads[0], dtype, config.trust_remote_code, heads)
        self.engine = TrainingEngine(
            model, config.stage, config.optimizer, config.engine, self.steps, dropout=config.dropout
        )
        check_packing(self.engine.engine)

    def describe(self) -> tuple[int, list[str]]:
        """Optimizer steps in all, and what became of the data in one line each."""
        return self.steps, self.notes

    def train_step(self) -> dict[str, float]:
        """One optimizer step on the next global batch."""
        batch = self.sampler.next_batch()
        bins = self._bins(self.train_data, batch)
        figures = self.engine.step(bins, partial(self._loss, self.train_data, batch))
        return {**figures, "tokens": float(self._lengths(self.train_data, batch).sum())}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and metrics on the held-out data, over this rank's share; weights add up over ranks."""
        self.engine.module.eval()
        everything = np.arange(len(self.eval_data))
        totals: dict[str, float] = {}
        for members in self._bins(self.eval_data, everything):
            term = self._loss(self.eval_data, everything, members)
            for name, value in {"loss": term.loss, **term.sums}.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    def position(self) -> dict[str, Any]:
        """The position in the training data, for a checkpoint."""
        return {"train": self.sampler.state_dict()}

    def restore_position(self, position: dict[str, Any]) -> None:
        """Restore the position in the training data."""
        self.sampler.load_state_dict(position["train"])

    def save_model(self, folder: str) -> None:
        """Write model and tokenizer as a Hugging Face folder; all ranks must call it."""
        state = self.engine.full_state_on_rank_0()
        if state is None:
            return
        model: Any = self.engine.module
        if self.config.stage == "sft":
            _end_generation(model, answer_form(self.tokenizer, self.config.template).end)
            model.save_pretrained(Path(folder), state_dict=without_repeats(model, state))
        else:
            read_with = trained_with(self.tokenizer, self.config.template)
            save_score_model(model, state, Path(folder), read_with)
        self.tokenizer.save_pretrained(folder)

    def _sides(self, data: Any) -> tuple[Any, ...]:
        """The sequences of each row: one, or the two of a pair with the favoured one first."""
        if isinstance(data, SupervisedDataset):
            return (data.tokens,)
        return (data.better, data.worse) if isinstance(data, PreferenceDataset) else (data.safer, data.unsafer)

    def _lengths(self, data: Any, rows: np.ndarray) -> np.ndarray:
        """Tokens of each row, both sides of a pair together."""
        return np.sum([side.lengths[rows] for side in self._sides(data)], axis=0)

    def _bins(self, data: Any, rows: np.ndarray) -> list[tuple[np.ndarray, float]]:
        """This rank's micro-batches of ``rows`` with their weight: 0 where one only keeps ranks in step."""
        budget = self.config.engine.micro_batch_tokens
        plan = plan_micro_batches(self._lengths(data, rows).tolist(), budget, self.world)[self.rank]
        return [(rows[members], 1.0) if members else (rows[:1], 0.0) for members in plan]

    def _loss(self, data: Any, batch: np.ndarray, members: tuple[np.ndarray, float]) -> LossTerms:
        rows, weight = members
        if isinstance(data, SupervisedDataset):
            return self._sft_loss(data, batch, rows, weight)
        first, second = self._sides(data)
        # Where both heads are trained, pairs are safer one first; rewards are compared better one first.
        swap = ~data.safer_is_better[rows] if isinstance(data, LabelledPairDataset) else np.zeros(len(rows), dtype=bool)
        chosen = list(zip(rows.tolist(), swap.tolist(), strict=True))
        sequences = [(second if s else first)[r] for r, s in chosen] + [(first if s else second)[r] for r, s in chosen]
        packed = pack(sequences).to(self.engine.device)
        scores_LH = self.engine.engine(packed.input_ids, packed.position_ids)[0]
        ends = packed.cu_seqlens[1:].long() - 1
        first_BH, second_BH = scores_LH[ends].chunk(2)
        weights_B = torch.full_like(first_BH[:, 0], weight / len(batch))
        if isinstance(data, PreferenceDataset):
            return LossTerms(*self._reward_loss(packed, scores_LH[:, 0], len(rows), weights_B))
        swap_B = torch.from_numpy(swap).to(scores_LH.device)
        safer_B = torch.where(swap_B, second_BH[:, -1], first_BH[:, -1])
        unsafer_B = torch.where(swap_B, first_BH[:, -1], second_BH[:, -1])
        signs = [torch.from_numpy(s[rows]).to(safer_B) for s in (data.sign_unsafer, data.sign_safer)]
        eta = self.config.regularization
        cost, metrics = cost_model_loss(unsafer_B, safer_B, *signs, regularization=eta, weights_B=weights_B)
        if not isinstance(data, LabelledPairDataset):
            return LossTerms(cost, metrics)
        metrics["accuracy_cost"] = metrics.pop("accuracy")
        reward, more = self._reward_loss(packed, scores_LH[:, 0], len(rows), weights_B)
        return LossTerms(reward + cost, {"loss_reward": reward.detach(), "loss_cost": cost.detach(), **more, **metrics})

    def _reward_loss(
        self, packed: PackedBatch, scores_L: torch.Tensor, pairs: int, weights_B: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and metrics of packed pairs, all better ones first."""
        better_B, worse_B = scores_L[packed.cu_seqlens[1:].long() - 1].chunk(2)
        eta = self.config.regularization
        loss, metrics = reward_model_loss(better_B, worse_B, regularization=eta, weights_B=weights_B)
        if self.config.loss == "token":
            loss, _ = self._token_wise_loss(packed, scores_L, pairs, weights_B)
        return loss, metrics

    def _token_wise_loss(
        self, packed: PackedBatch, scores_L: torch.Tensor, pairs: int, weights_B: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        lengths = torch.diff(packed.cu_seqlens).long().cpu()
        cut = int(packed.cu_seqlens[pairs])
        tokens = packed.input_ids[0].cpu()
        better, worse, weights = aligned_positions(tokens[:cut], lengths[:pairs], tokens[cut:], lengths[pairs:])
        # aligned_positions averages over the pairs it is given; these are a part of the step's.
        weights = weights.to(scores_L) * weights_B.sum()
        better, worse = better.to(scores_L.device), worse.to(scores_L.device)
        return token_wise_reward_model_loss(
            scores_L[:cut][better], scores_L[cut:][worse], weights, regularization=self.config.regularization
        )

    def _sft_loss(self, data: SupervisedDataset, batch: np.ndarray, rows: np.ndarray, weight: float) -> LossTerms:
        sequences = [data.tokens[int(r)] for r in rows]
        packed = pack(sequences).to(self.engine.device)
        prompts = data.prompt_length[rows]
        answers = data.tokens.lengths[rows] - prompts
        positions = response_positions(prompts, answers).to(self.engine.device)
        model: Any = self.engine.engine
        logprobs_T, _ = response_logprobs(
            model, packed.input_ids, packed.position_ids, positions, packed.input_ids[0, positions + 1]
        )
        total = float((data.tokens.lengths[batch] - data.prompt_length[batch]).sum())
        loss, _ = cross_entropy_loss(logprobs_T, torch.full_like(logprobs_T, weight / total))
        return LossTerms(loss)


def train_supervised(config: SupervisedConfig, trainer: Group, run: RunFolder, resume: bool) -> None:
    """All steps, an evaluation after each epoch and at the end, and the saved model.

    With ``resume`` it goes on from the newest checkpoint, where there is one.
    """
    steps, notes = trainer.run("describe")[0]
    for note in notes:
        run.note(note)
    began = time.perf_counter()
    epoch_steps = max(1, math.ceil(steps / config.epochs))
    done, began = _resume(trainer, run, began) if resume else (0, began)
    with run.progress(config.stage, steps) as progress:
        progress.done = done
        for step in range(done + 1, steps + 1):
            started = time.perf_counter()
            figures = trainer.run("train_step")[0]
            seconds = time.perf_counter() - started
            tokens = figures.pop("tokens")
            metrics = {_rename(name): value for name, value in figures.items()}
            if step % epoch_steps == 0 or step == steps:
                metrics |= _evaluation(trainer)
            metrics |= {
                "time/elapsed": time.perf_counter() - began,
                "time/step": seconds,
                "throughput/tokens_per_second": tokens / seconds,
            }
            run.log(step, metrics)
            if config.save_every and step % config.save_every == 0 and step < steps:
                state = {"step": step, "elapsed": metrics["time/elapsed"], "metrics_bytes": run.metrics_bytes()}
                with run.checkpoints.writing(step, state) as folder:
                    trainer.run("save_state", str(folder / "training"))
            progress.advance(loss=metrics["loss"])
    trainer.run("save", str(run.folder / "final.part" / final_name(config)))
    run.note(", ".join(f"{k} {v:.3f}" for k, v in metrics.items() if k.startswith("eval/")))


def _resume(trainer: Group, run: RunFolder, began: float) -> tuple[int, float]:
    """Restore the newest checkpoint; returns its step, and the start time that makes elapsed time go on."""
    checkpoint = run.last_checkpoint()
    if checkpoint is None:
        return 0, began
    state = checkpoint.state()
    trainer.run("load_state", str(checkpoint.folder / "training"))
    run.rewind(state["metrics_bytes"])
    return checkpoint.step, began - state["elapsed"]


def final_name(config: SupervisedConfig) -> str:
    """Folder of the trained model under final/."""
    return "policy" if config.stage == "sft" else config.stage


def _end_generation(model: Any, end: int) -> None:
    """Let whoever generates with a saved model stop where its answers were taught to end."""
    config = getattr(model, "generation_config", None)
    if config is not None:
        known = config.eos_token_id
        ends = known if isinstance(known, list) else [] if known is None else [known]
        config.eos_token_id = known if end in ends else [*ends, end] if ends else end


def _evaluation(trainer: Group) -> dict[str, float]:
    shares: Sequence[dict[str, float]] = trainer.run("evaluate")
    return {f"eval/{_rename(name)}": sum(s[name] for s in shares) for name in shares[0]}


def _rename(name: str) -> str:
    return "accuracy_sign" if name == "sign_accuracy" else name
