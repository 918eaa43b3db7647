"""The policy trainer: log-probs before the update, the clipped policy step with PTX, and its published weights.

With models.lora_rank an adapter is all that is trained and published; with the adapter off the policy is its own
reference.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from actors.machine.averaging import WeightMean
from actors.machine.engine import LossTerms, NotFiniteError, TrainingEngine
from actors.machine.ranks import TrainingRank
from actors.machine.waits import WeightsUnreadableError
from actors.roles.micro_batches import PackedResponses, SequenceRows, minibatches, token_column
from actors.weights.direct import put_bucket, trial_weights
from beaver_ray import experience
from beaver_ray.data.token_files import read_tokens
from beaver_ray.data.tokenized import BatchSampler, SupervisedDataset
from beaver_ray.method.history import Unit
from beaver_ray.method.losses import cross_entropy_loss, policy_loss, token_weights
from beaver_ray.models.loading import DTYPES, load_policy, load_tokenizer
from beaver_ray.models.logprobs import response_logprobs
from beaver_ray.models.lora import adapter_name, add_adapter, is_adapter
from beaver_ray.models.saving import save_language_model
from beaver_ray.packing import check_packing
from beaver_ray.policy_options import PolicyConfig
from beaver_ray.replay import BestAnswers, Replay
from beaver_ray.weights import AdapterInfo, Bucket, Layout, PublishedWeights, pack_bucket, plan_layout


class PolicyTrainer(TrainingRank):
    """One rank of the policy. Every rank is given the whole experience and takes its own share of the rows."""

    def __init__(self, config: PolicyConfig, rank: int, world: int, results_are_copied: bool = False) -> None:
        super().__init__(rank, world, config.seed, config.cluster.threads)
        self.config = config
        self.results_are_copied = results_are_copied
        """What a method returns has left this process before the next one is called, as with Ray's actors."""
        self.memory: np.ndarray | None = None

    def build(self) -> None:
        """Load the policy and the PTX data."""
        config, models = self.config, self.config.models
        model: Any = load_policy(models.policy, DTYPES[config.engine.dtype], models.trust_remote_code)
        self.adapter: AdapterInfo | None = None
        if models.lora_rank:
            self.adapter = AdapterInfo(models.lora_rank, models.lora_alpha, models.policy)
            model = add_adapter(model, models.lora_rank, models.lora_alpha, config.seed, models.lora_targets)
        steps = (config.total_steps(0) - config.ppo.critic_warmup_steps) * config.ppo.epochs * config.ppo.minibatches
        self.engine = TrainingEngine(model, "policy", config.policy, config.engine, steps)
        check_packing(self.engine.engine)
        tensors = [t for t in self.engine.full_shapes() if not self.adapter or is_adapter(t[0])]
        # What travels, by its name in the engine.
        self.names = {name: adapter_name(name) if self.adapter else name for name, _, _ in tensors}
        named = [(self.names[name], dtype, shape) for name, dtype, shape in tensors]
        self.published = plan_layout(named, adapter=self.adapter)
        self.tokenizer = load_tokenizer(config.models.policy, config.models.trust_remote_code)
        self.best = BestAnswers(config.objective()) if config.ppo.replay else None
        self.mean = WeightMean(self.engine)
        # With PTX an optimizer step descends the mean of both losses' gradients, as published.
        self.scale = 0.5 if config.data.ptx else 1.0
        self.ptx: SupervisedDataset | None = None
        if config.data.ptx:
            longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
            ptx = read_tokens(SupervisedDataset, config.data.ptx, self.tokenizer, longest, config.data.template)
            self.ptx = ptx.dataset()
            rows = config.rollout.prompts_per_step * config.rollout.samples_per_prompt // config.ppo.minibatches
            self.ptx_sampler = BatchSampler(len(self.ptx), min(rows, len(self.ptx)), config.seed)

    @torch.no_grad()
    def logprobs(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """``sample_id`` and ``logprobs`` of this rank's share, by the weights as they are now.

        Where the reference is the policy with its adapter off, ``reference_logprobs`` as well; alone where
        ppo.old_logprobs has no use for the others.
        """
        module: Any = self.engine.module.eval()
        rows = SequenceRows(batch)
        itself = self.config.models.adapter_off_is_reference
        names = ["reference_logprobs"] if itself else []
        if self.config.ppo.old_logprobs == "trainer" or not itself:
            names.insert(0, "logprobs")
        found: dict[str, list[tuple[list[int], np.ndarray]]] = {name: [] for name in names}
        for micro_batch in self._micro_batches(rows, range(batch.num_rows)):
            for name, parts in found.items():
                with module.disable_adapter() if name == "reference_logprobs" else nullcontext():
                    logprobs_T, _ = self._logprobs(micro_batch)
                if micro_batch.weight:
                    parts.append((micro_batch.rows, logprobs_T.cpu().numpy()))
        return experience.join(*(token_column(batch, name, parts) for name, parts in found.items()))

    def update(
        self,
        batch: pa.RecordBatch,
        step: int,
        weights: Mapping[str, float] = MappingProxyType({}),
        units: Mapping[str, Unit] = MappingProxyType({}),
    ) -> dict[str, float]:
        """All epochs and minibatches over one step's experience; returns metrics under ``policy/``.

        weights: those that the experience's advantages were combined under. units: what these advantages are in.
        """
        ppo, seed = self.config.ppo, self.config.seed
        rows = SequenceRows(batch)
        replay, earlier = None, 0
        if self.best is not None:
            replay = self.best.replay(batch, weights, ppo.replay, (seed, step), units)
            self.best.remember(batch)
            earlier = replay.sequences.num_rows
        figures: list[dict[str, float]] = []
        skipped = 0
        for epoch in range(ppo.epochs):
            parts = minibatches(batch.num_rows, ppo.minibatches, (seed, step, epoch))
            shares = np.array_split(np.random.default_rng((seed, step, epoch, 1)).permutation(earlier), len(parts))
            for minibatch, share in zip(parts, shares, strict=True):
                try:
                    figures.append(self._step(rows, minibatch, replay, share, len(parts)))
                except NotFiniteError:
                    skipped += 1  # and the driver says so
        if step >= self._first_averaged:
            self.mean.add(step)
        metrics = {f"policy/{name}": float(np.mean([f[name] for f in figures])) for name in (figures or [{}])[0]}
        if figures:
            metrics["policy/ratio_max_deviation"] = max(f["ratio_max_deviation"] for f in figures)
        return metrics | {"policy/skipped_updates": float(skipped)}

    def take_mean(self) -> list[int]:
        """End the training: from here on the policy is the mean of its weights over the last steps (ppo.average_last).

        Returns the steps that are in it. Of a single one there is no mean: the last one's weights stay as they are.
        """
        if len(self.mean.steps) > 1:
            self.mean.apply()
        return self.mean.steps

    @property
    def _first_averaged(self) -> int:
        """The first step whose weights are in the mean; without one there is no such step."""
        steps = self.config.total_steps(0)
        last = round(self.config.ppo.average_last * steps)
        return steps + 1 - (last if last > 1 else 0)

    def layout(self) -> Layout:
        """What lies where in every version of the weights (with LoRA the adapter's)."""
        return self.published

    def bucket(self, version: int, index: int, direct: bool = False) -> Bucket | None:
        """Bucket ``index`` of the weights as they are now, under ``version``; rank 0 returns it, the others only help
        to gather. See `actors.weights.publishing.publish` for ``direct``.
        """
        wanted = {entry.name for entry in self.published.entries_of(index)}
        state = self.engine.full_state(lambda name: self.names.get(name) in wanted)
        tensors = ((self.names[name], tensor) for name, tensor in state)
        if self.rank:
            for _ in tensors:
                continue
            return None
        if direct:
            return put_bucket(self.published, version, index, tensors, self.engine.device)
        if self.results_are_copied and self.memory is None:
            self.memory = np.empty(max(self.published.bucket_bytes), dtype=np.uint8)
        return pack_bucket(self.published, version, index, tensors, self.memory)

    def trial(self) -> PublishedWeights:
        """A version of one tensor on this rank's device, for generators to try whether they can read it there.

        Raises WeightsUnreadableError where there is no room for the real ones, or no NIXL: Ray is not asked then.
        """
        if importlib.util.find_spec("nixl") is None:
            raise WeightsUnreadableError("the package nixl is not installed at the policy")
        if self.engine.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.engine.device)
            try:
                needed = self.config.direct_room(self.published.total_bytes, total)
            except ValueError as error:
                raise WeightsUnreadableError(str(error)) from None
            if needed > free:
                left = f"the policy's GPU has {free / 2**30:.1f} GiB left"
                raise WeightsUnreadableError(f"{left}, weights to be read there take {needed / 2**30:.1f}")
        return trial_weights(self.engine.device)

    def remember(self, batch: pa.RecordBatch) -> dict[str, float]:
        """Keep a step's answers for replay, in a step without an update; no metrics."""
        if self.best is not None:
            self.best.remember(batch)
        return {}

    def position(self) -> dict[str, Any]:
        """The position in the PTX data, answers that are kept for replay, and the mean of weights, for a checkpoint."""
        position: dict[str, Any] = {} if self.ptx is None else {"ptx": self.ptx_sampler.state_dict()}
        if self.best is not None:
            position["best"] = torch.frombuffer(self.best.to_bytes(), dtype=torch.uint8)
        if self.mean.steps:
            position["mean"] = self.mean.state()
        return position

    def restore_position(self, position: dict[str, Any]) -> None:
        """Restore what `position` gave; what a run did not have until now starts from nothing."""
        if self.ptx is not None and "ptx" in position:
            size = "rollout.prompts_per_step, rollout.samples_per_prompt and ppo.minibatches"
            self.ptx_sampler.load_state_dict(position["ptx"], size)
        if self.best is not None and "best" in position:
            self.best.restore(position["best"].numpy())
        mean = position.get("mean", {})
        # A run that is to have more steps, or to average fewer, begins its mean later.
        self.mean.restore(mean if mean and mean["steps"][0] >= self._first_averaged else {})

    def save_model(self, folder: str) -> None:
        """Write the policy and its tokenizer as a Hugging Face folder; all ranks must call it.

        With LoRA that is the merged policy; peft's own folder of the adapter goes into its folder ``adapter``.
        """
        state = self.engine.full_state_on_rank_0()
        if state is None:
            return
        save_language_model(self.engine.module, state, self.adapter, Path(folder))
        self.tokenizer.save_pretrained(folder)

    def _step(
        self, rows: SequenceRows, minibatch: np.ndarray, replay: Replay | None, share: np.ndarray, parts: int
    ) -> dict[str, float]:
        ppo = self.config.ppo
        tokens = int(rows.own_lengths[minibatch].sum())
        total = len(minibatch) if ppo.loss_reduction == "sequence" else tokens
        micro_batches: list[tuple[Callable[[PackedResponses], LossTerms], PackedResponses]] = []
        rl_loss = partial(self._rl_loss, rows, total)
        micro_batches += [(rl_loss, m) for m in self._micro_batches(rows, minibatch)]
        if replay is not None and len(share):
            earlier = SequenceRows(replay.sequences)
            imitation_loss = partial(self._imitation_loss, earlier, replay, total, parts / replay.sequences.num_rows)
            micro_batches += [(imitation_loss, m) for m in self._micro_batches(earlier, share)]
        if self.ptx is not None:
            ptx_rows = SequenceRows(self._ptx_batch(self.ptx, self.ptx_sampler.next_batch()))
            answers = int(ptx_rows.response_lengths.sum())
            ptx_loss = partial(self._ptx_loss, answers)
            everything = range(len(ptx_rows.lengths))
            micro_batches += [(ptx_loss, m) for m in self._micro_batches(ptx_rows, everything)]
        return self.engine.step(micro_batches, lambda pair: pair[0](pair[1]))

    def _rl_loss(self, rows: SequenceRows, total: int, micro_batch: PackedResponses) -> LossTerms:
        ppo = self.config.ppo
        logprobs_T, entropy_T = self._logprobs(micro_batch, entropy=True)
        weights_T = self._weights_T(micro_batch, total)
        old = "logprobs" if ppo.old_logprobs == "trainer" else "rollout_logprobs"
        capped = self.config.importance_cap is not None
        loss, metrics = policy_loss(
            logprobs_T,
            rows.column_T(old, micro_batch),
            rows.column_T("advantages", micro_batch),
            weights_T,
            clip_ratio=ppo.clip_ratio,
            rollout_logprobs_T=rows.column_T("rollout_logprobs", micro_batch) if capped else None,
            importance_cap=self.config.importance_cap or 1.0,
        )
        assert entropy_T is not None
        deviation = metrics.pop("ratio_max_deviation") * micro_batch.weight
        zeros, _ = self._no_figures(loss)
        sums = {**zeros, **metrics, "entropy": (weights_T * entropy_T).sum()}
        return LossTerms(self.scale * loss, sums, {"ratio_max_deviation": deviation})

    def _imitation_loss(
        self, rows: SequenceRows, replay: Replay, total: int, one: float, micro_batch: PackedResponses
    ) -> LossTerms:
        """The log-likelihood of earlier answers, each weighted by how much more it is worth than what is expected now.

        Such an answer weighs as much as one of the step's own, of which the minibatch has ``total`` (or tokens).
        ``one`` is what it counts in the share of imitated answers.
        """
        logprobs_T, _ = self._logprobs(micro_batch)
        weights_T = self._weights_T(micro_batch, total)
        kl_T = (logprobs_T.detach() - rows.column_T("reference_logprobs", micro_batch)) * micro_batch.loss_mask_T
        ends = np.cumsum(rows.response_lengths[micro_batch.rows])[:-1].tolist()
        kl_B = torch.stack([part.sum() for part in torch.tensor_split(kl_T, ends)])
        gains_B = torch.from_numpy(replay.gains_M[micro_batch.rows]).to(kl_B) - self.config.ppo.kl_coefficient * kl_B
        ahead_B = gains_B.clamp(0.0, replay.largest) / replay.scale
        loss = -(weights_T * torch.repeat_interleave(ahead_B, micro_batch.lengths_B) * logprobs_T).sum()
        imitated = micro_batch.weight * one * (gains_B > 0).sum()
        return LossTerms(self.scale * loss, *self._no_figures(loss, imitated=imitated))

    def _ptx_loss(self, total: int, micro_batch: PackedResponses) -> LossTerms:
        logprobs_T, _ = self._logprobs(micro_batch, temperature=1.0)
        weights_T = torch.full_like(logprobs_T, micro_batch.weight / total)
        loss, _ = cross_entropy_loss(logprobs_T, weights_T)
        return LossTerms(
            self.scale * self.config.ppo.ptx_coefficient * loss, *self._no_figures(loss, ptx_loss=loss.detach())
        )

    def _no_figures(self, like: torch.Tensor, **known: torch.Tensor) -> tuple[dict[str, torch.Tensor], ...]:
        """Sums and maxima of a micro-batch that has nothing to say but what is ``known``; all must have the same."""
        names = ["clip_fraction", "kl_update", "entropy", "ptx_loss"]
        names += ["imitated"] * (self.best is not None)
        if self.config.importance_cap is not None:
            names += ["importance_weight_mean", "kl_rollout_train"]
        zero = like.detach().new_zeros(())
        return {**dict.fromkeys(names, zero), **known}, {"ratio_max_deviation": zero}

    def _weights_T(self, micro_batch: PackedResponses, total: int) -> torch.Tensor:
        """What each token counts in a loss over ``total`` answers, or tokens."""
        reduction = self.config.ppo.loss_reduction
        return micro_batch.weight * token_weights(micro_batch.lengths_B, reduction, total, micro_batch.loss_mask_T)

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
