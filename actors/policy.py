"""The policy trainer: log-probs before the update, the clipped policy step with PTX, and its published weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from actors.engine import LossTerms, TrainingEngine
from actors.micro_batches import REDUCTIONS, PackedResponses, SequenceRows, minibatches, token_column
from actors.ranks import TrainingRank
from beaver_ray import experience
from beaver_ray.config import SafePpoConfig
from beaver_ray.data.mixing import load_mix
from beaver_ray.data.tokenized import BatchSampler, SupervisedDataset
from beaver_ray.method.advantages import combine_advantages, normalize
from beaver_ray.method.losses import cross_entropy_loss, policy_loss, token_weights
from beaver_ray.models.loading import DTYPES, load_policy, load_tokenizer
from beaver_ray.models.logprobs import response_logprobs
from beaver_ray.weights import BUCKET_BYTES, PublishedWeights, pack


class PolicyTrainer(TrainingRank):
    """One rank of the policy. Every rank is given the whole experience and takes its own share of the rows."""

    def __init__(
        self,
        config: SafePpoConfig,
        rank: int,
        world: int,
        put: Callable[[np.ndarray], Any] | None = None,
    ) -> None:
        super().__init__(rank, world, config.seed, config.cluster.threads)
        self.config = config
        self.put = put
        self.bucket: np.ndarray | None = None

    def build(self) -> None:
        """Load the policy and the PTX data."""
        config = self.config
        model = load_policy(config.models.policy, DTYPES[config.engine.dtype], config.models.trust_remote_code)
        steps = config.total_steps(0) * config.ppo.epochs * config.ppo.minibatches
        self.engine = TrainingEngine(model, "policy", config.policy, config.engine, steps)
        self.tokenizer = load_tokenizer(config.models.policy, config.models.trust_remote_code)
        self.ptx: SupervisedDataset | None = None
        if config.data.ptx:
            samples, _ = load_mix(config.data.ptx)
            longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
            self.ptx = SupervisedDataset.build(samples, self.tokenizer, longest, config.data.template)
            rows = config.rollout.prompts_per_step * config.rollout.samples_per_prompt // config.ppo.minibatches
            self.ptx_sampler = BatchSampler(len(self.ptx), min(rows, len(self.ptx)), config.seed)

    @torch.no_grad()
    def logprobs(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """``sample_id`` and ``logprobs`` of this rank's share, by the weights as they are now."""
        self.engine.module.eval()
        rows = SequenceRows(batch)
        parts = []
        for micro_batch in self._micro_batches(rows, range(batch.num_rows)):
            logprobs_T, _ = self._logprobs(micro_batch)
            if micro_batch.weight:
                parts.append((micro_batch.rows, logprobs_T.cpu().numpy()))
        return token_column(batch, "logprobs", parts)

    def update(self, batch: pa.RecordBatch, multipliers: dict[str, float], step: int) -> dict[str, float]:
        """All epochs and minibatches over one step's experience; returns metrics under ``policy/``."""
        ppo = self.config.ppo
        costs = {name: experience.flat(batch, f"advantages/{name}") for name in multipliers}
        advantages_T = combine_advantages(experience.flat(batch, "advantages/reward"), costs, multipliers)
        if ppo.normalize_advantages:
            advantages_T = normalize(advantages_T)
        rows = SequenceRows(batch)
        figures: list[dict[str, float]] = []
        for epoch in range(ppo.epochs):
            for minibatch in minibatches(batch.num_rows, ppo.minibatches, (self.config.seed, step, epoch)):
                figures.append(self._step(rows, minibatch, advantages_T))
        metrics = {f"policy/{name}": float(np.mean([f[name] for f in figures])) for name in figures[0]}
        metrics["policy/ratio_max_deviation"] = max(f["ratio_max_deviation"] for f in figures)
        return metrics

    def publish(self, version: int) -> PublishedWeights | None:
        """The weights as buckets under ``version``; rank 0 returns them, the others only help to gather."""
        tensors = ((name, tensor.detach()) for name, tensor in self.engine.full_state())
        if self.rank:
            for _ in tensors:
                continue
            return None
        size = BUCKET_BYTES
        if self.put is not None and self.bucket is None:
            self.bucket = np.empty(size, dtype=np.uint8)
        return pack(tensors, version, size, self.put, self.bucket)

    def save(self, folder: str) -> None:
        """Write the policy and its tokenizer as a Hugging Face folder; all ranks must call it."""
        state = self.engine.full_state_on_rank_0()
        if state is not None:
            model: Any = self.engine.module
            model.save_pretrained(Path(folder), state_dict=state)
            self.tokenizer.save_pretrained(folder)

    def _step(self, rows: SequenceRows, minibatch: np.ndarray, advantages_T: np.ndarray) -> dict[str, float]:
        ppo = self.config.ppo
        tokens = int(rows.response_lengths[minibatch].sum())
        total = len(minibatch) if ppo.loss_reduction == "sequence" else tokens
        micro_batches: list[tuple[Callable[[PackedResponses], LossTerms], PackedResponses]] = []
        # With PTX an optimizer step descends the mean of both losses' gradients, as published.
        scale = 0.5 if self.ptx is not None else 1.0
        rl_loss = partial(self._rl_loss, rows, advantages_T, total, scale)
        micro_batches += [(rl_loss, m) for m in self._micro_batches(rows, minibatch)]
        if self.ptx is not None:
            ptx_rows = SequenceRows(self._ptx_batch(self.ptx, self.ptx_sampler.next_batch()))
            answers = int(ptx_rows.response_lengths.sum())
            ptx_loss = partial(self._ptx_loss, answers, scale * ppo.ptx_coefficient)
            everything = range(len(ptx_rows.lengths))
            micro_batches += [(ptx_loss, m) for m in self._micro_batches(ptx_rows, everything)]
        return self.engine.step(micro_batches, lambda pair: pair[0](pair[1]))

    def _rl_loss(
        self,
        rows: SequenceRows,
        advantages_T: np.ndarray,
        total: int,
        scale: float,
        micro_batch: PackedResponses,
    ) -> LossTerms:
        ppo = self.config.ppo
        logprobs_T, entropy_T = self._logprobs(micro_batch, entropy=True)
        weights_T = micro_batch.weight * token_weights(
            micro_batch.lengths_B,
            REDUCTIONS[ppo.loss_reduction],  # type: ignore[arg-type]
            total,
        )
        old = "logprobs" if ppo.old_logprobs == "trainer" else "rollout_logprobs"
        advantages = torch.from_numpy(advantages_T[rows.tokens_of(micro_batch.rows)]).to(logprobs_T)
        capped = self.config.importance_cap is not None
        loss, metrics = policy_loss(
            logprobs_T,
            rows.column_T(old, micro_batch),
            advantages,
            weights_T,
            clip_ratio=ppo.clip_ratio,
            rollout_logprobs_T=rows.column_T("rollout_logprobs", micro_batch) if capped else None,
            importance_cap=self.config.importance_cap or 1.0,
        )
        assert entropy_T is not None
        deviation = metrics.pop("ratio_max_deviation") * micro_batch.weight
        sums = {**metrics, "entropy": (weights_T * entropy_T).sum(), "ptx_loss": loss.new_zeros(())}
        return LossTerms(scale * loss, sums, {"ratio_max_deviation": deviation})

    def _ptx_loss(self, total: int, scale: float, micro_batch: PackedResponses) -> LossTerms:
        logprobs_T, _ = self._logprobs(micro_batch, temperature=1.0)
        weights_T = torch.full_like(logprobs_T, micro_batch.weight / total)
        loss, _ = cross_entropy_loss(logprobs_T, weights_T)
        names = ["clip_fraction", "kl_update", "entropy"]
        if self.config.importance_cap is not None:
            names += ["importance_weight_mean", "kl_rollout_train"]
        zero = loss.detach().new_zeros(())
        sums = {**dict.fromkeys(names, zero), "ptx_loss": loss.detach()}
        return LossTerms(scale * loss, sums, {"ratio_max_deviation": zero})

    def _ptx_batch(self, data: SupervisedDataset, chosen: np.ndarray) -> pa.RecordBatch:
        tokens = [data.tokens[int(i)] for i in chosen]
        cuts = [int(data.prompt_length[int(i)]) for i in chosen]
        return experience.make_batch(
            {
                "sample_id": np.arange(len(tokens)),
                "prompt_tokens": [t[:c] for t, c in zip(tokens, cuts, strict=True)],
                "response_tokens": [t[c:] for t, c in zip(tokens, cuts, strict=True)],
            }
        )

    def _micro_batches(self, rows: SequenceRows, chosen: Any) -> list[PackedResponses]:
        budget = self.config.engine.micro_batch_tokens
        return list(rows.micro_batches(chosen, budget, self.rank, self.world, self.engine.device))

    def _logprobs(
        self, micro_batch: PackedResponses, entropy: bool = False, temperature: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        model: Any = self.engine.engine
        return response_logprobs(
            model,
            micro_batch.packed.input_ids,
            micro_batch.packed.position_ids,
            micro_batch.positions_T,
            micro_batch.targets_T,
            self.config.rollout.temperature if temperature is None else temperature,
            entropy,
        )
