"""The one training engine: DeepSpeed ZeRO 0 to 3, any number of ranks, gradients accumulated by tokens.

A training step is a list of micro-batches. Their losses carry weights that already add up over all micro-batches of
all ranks, so that how a batch is cut does not change its gradient.
"""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from beaver_ray.config import EngineConfig, OptimizerConfig
from beaver_ray.errors import UserError
from beaver_ray.options import rounded_up

MicroBatch = TypeVar("MicroBatch")
MAX_GRAD_NORM = 1.0  # gradients are clipped to this global norm, as published
MOST_IN_A_BUCKET = 250_000_000  # gradients that ZeRO sends at a time, in float32
PLAIN_TYPES = [ZeroStageEnum, LossScaler, fragment_address]  # what DeepSpeed's files hold besides tensors


class NotFiniteError(UserError):
    """A loss or its gradient is not finite; no weight was changed."""


@dataclass
class LossTerms:
    """What one micro-batch adds: a loss to differentiate, and figures that add up or take the maximum over all."""

    loss: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)


def meeting_place(address: str, port: int = 0, first: bool = True) -> dist.TCPStore:
    """Where the ranks of a group meet: the first one's own, at a port that the system picks, or another's way there.

    The first listens from here on: a port that is only looked up may be somebody else's by the time it is used.
    """
    return dist.TCPStore(address, port, is_master=first, wait_for_workers=False, timeout=default_pg_timeout)


def join_ranks(rank: int, world: int, place: dist.TCPStore) -> None:
    """Make this process one of ``world`` ranks that meet there (nccl on GPUs, gloo on CPUs)."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0")
    os.environ.update(MASTER_ADDR=place.host, MASTER_PORT=str(place.port))
    # On CPUs DeepSpeed would compile a shared-memory all-reduce for tensor-parallel inference, over a minute on a
    # new machine and impossible without a compiler. Training never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It would collect garbage and print what memory is used four times for each engine in bfloat16, asked or not.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
    shown = sys.excepthook
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=place, rank=rank, world_size=world, timeout=default_pg_timeout)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    # PyTorch would put "[rank0]:" before every line of an error's traceback, also where there is one process only.
    sys.excepthook = shown


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The rate of optimizer step ``step`` (0-based) of ``total_steps``."""
    warmup = rounded_up(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    falls, _, end = config.schedule.partition("_to_")
    shape = 1 - progress if falls == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    lowest = 0.1 if end == "tenth" else 0.0
    return config.learning_rate * (lowest + (1 - lowest) * shape)


class TrainingEngine:
    """A model, its optimizer and the ranks that hold them.

    dropout: steps are taken with the dropout that the model's configuration asks for. Without, a forward of a step
    computes what one in evaluation mode does.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        optimizer: OptimizerConfig,
        engine: EngineConfig,
        total_steps: int,
        max_grad_norm: float = MAX_GRAD_NORM,
        dropout: bool = False,
    ) -> None:
        self.name, self.dropout = name, dropout
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.optimizer_config, self.total_steps, self.steps_done = optimizer, total_steps, 0
        if engine.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if not dropout:
            _clear_rates(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": optimizer.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        # DeepSpeed's own Adams are compiled on first use; PyTorch's fused one is as fast and always there.
        adam = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=optimizer.learning_rate, betas=(0.9, 0.95), fused=True
        )
        self.zero_stage = engine.stage_in_use
        self.kept_as = f"zero_stage {self.zero_stage} in {engine.dtype}"
        # Before ZeRO stage 3 empties them.
        self.trained = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=adam,
            config=_deepspeed_config(engine, max_grad_norm, sum(p.numel() for p in trained)),
        )
        self.files = self.engine.checkpoint_engine = CheckpointFiles()
        self.device = self.engine.device

    @property
    def module(self) -> nn.Module:
        """The model, for forward passes (every rank must make the same number of them under ZeRO-3)."""
        return self.engine.module

    def step(self, micro_batches: Sequence[MicroBatch], loss: Callable[[MicroBatch], LossTerms]) -> dict[str, float]:
        """One optimizer step over this rank's micro-batches; every rank brings the same number of them.

        Returns the figures of all ranks together: ``loss``, the sums, the maxima, ``grad_norm``, ``learning_rate``.
        Raises NotFiniteError, and changes no weight on any rank, where the loss or its gradient is not finite.
        """
        self._enter_training()
        terms: list[LossTerms] = []
        for index, micro_batch in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            term = loss(micro_batch)
            # A loss that is not finite makes all gradients so, on every rank, and none takes the step.
            poison = torch.where(term.loss.detach().isfinite(), 1.0, math.nan)
            # DeepSpeed averages gradients over ranks, the losses are parts of a sum.
            self.engine.backward(term.loss * poison * self.world)
            terms.append(LossTerms(term.loss.detach(), term.sums, term.maxima))
        figures = self._reduce(terms)
        rate = learning_rate(self.optimizer_config, self.steps_done, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = self._unwrapped_grad_norm()
        if norm is None or math.isfinite(norm):
            # An optimizer that DeepSpeed wraps passes over a step whose gradient is not finite, without a word.
            self.engine.step()
            norm = float(self.engine.get_global_grad_norm() or 0.0) if norm is None else norm
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            what = "gradient" if math.isfinite(figures["loss"]) else "loss"
            raise NotFiniteError(
                f"the {self.name} {what} is not finite at its optimizer step {self.steps_done + 1}; no weight was "
                f"changed. Lower the learning rate, train in float32, or look at the last trajectories for odd scores"
            )
        self.steps_done += 1
        return {**figures, "grad_norm": norm, "learning_rate": rate}

    def _enter_training(self) -> None:
        self.engine.train()
        if not self.dropout:
            # All randomness asks for this flag: dropout, left-out layers, noise of routers. So does recomputing.
            for module in self.module.modules():
                module.training = bool(getattr(module, "gradient_checkpointing", False))

    def full_state(self, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model whose name is ``wanted``, by its state_dict name; tied ones under each name.

        Under ZeRO-3 each parameter is gathered as it is asked for: every rank must walk through to the end.
        """
        for name, tensor in self._state():
            if wanted(name):
                # What is not divided among the ranks passes through.
                with deepspeed.zero.GatheredParameters([tensor]):
                    yield name, tensor.data

    def full_shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of everything that `full_state` gives, in its order; gathers nothing."""
        return [(name, t.dtype, tuple(getattr(t, "ds_shape", t.shape))) for name, t in self._state()]

    def _state(self) -> list[tuple[str, Tensor]]:
        """The model's tensors by their state_dict names; under ZeRO-3 parameters are empty until they are gathered."""
        state = self.module.state_dict()
        if self.zero_stage < 3:
            return list(state.items())
        buffers = [(name, buffer) for name, buffer in self.module.named_buffers() if name in state]
        return [*self.module.named_parameters(remove_duplicate=False), *buffers]

    def full_state_on_rank_0(self) -> dict[str, Tensor] | None:
        """What `full_state` gives, in host memory of rank 0; None on the others. All ranks must call it."""
        state = {}
        for name, tensor in self.full_state():
            if self.rank == 0:
                state[name] = tensor.detach().cpu().clone()
        return state if self.rank == 0 else None

    def save_state(self, folder: str, position: dict[str, Any]) -> None:
        """Write a checkpoint, with this rank's ``position`` in its data (plain values and tensors).

        Weights, float32 copies, moments and random numbers, by DeepSpeed's own files; all ranks must call it. Raises
        UserError on every rank where any of them cannot write.
        """
        self.engine.save_checkpoint(
            folder,
            tag="state",
            client_state={"steps_done": self.steps_done},
            save_latest=False,
            exclude_frozen_parameters=True,
        )
        saved = {"position": position, "random": random_state(), "kept_as": self.kept_as, "trained": self.trained}
        self.files.save(saved, f"{folder}/rank_{self.rank}.pt")
        failed = torch.tensor([float(self.files.error is not None)], device=self.device)
        dist.all_reduce(failed)
        error, self.files.error = self.files.error, None
        if failed.item():
            reason = "another rank could not write" if error is None else str(error)
            raise UserError(f"cannot write the {self.name}'s state to {folder}: {reason}; free some space there")

    def load_state(self, folder: str) -> dict[str, Any]:
        """Restore what as many ranks saved; returns this rank's position. All ranks must call it.

        Raises UserError where another number of ranks, or an engine of another ZeRO stage or dtype, wrote it, and where
        other parameters were trained.
        """
        path = f"{folder}/rank_{self.rank}.pt"
        if not os.path.isdir(folder):
            raise UserError(f"the checkpoint has no {folder}; resume with the models that it was written with")
        if not os.path.isfile(path) or os.path.isfile(f"{folder}/rank_{self.world}.pt"):
            raise UserError(f"{folder} was not written by {self.world} rank(s); resume with as many as before")
        saved = self.files.load(path, map_location="cpu")
        # Checkpoints of before say nothing of it.
        if (before := saved.get("kept_as", self.kept_as)) != self.kept_as:
            raise UserError(f"{folder} was written with engine.{before}, not {self.kept_as}; resume with that")
        if saved.get("trained", self.trained) != self.trained:
            raise UserError(
                f"{folder} was written while other parameters were trained; resume with the same lora_rank, "
                f"lora_targets and model"
            )
        # Frozen weights are the base model's, which are loaded already.
        _, client_state = self.engine.load_checkpoint(folder, tag="state", load_module_strict=False)
        self.steps_done = int(client_state["steps_done"])
        restore_random_state(saved["random"])
        position: dict[str, Any] = saved["position"]
        return position

    def _unwrapped_grad_norm(self) -> float | None:
        """The global norm where DeepSpeed does not wrap the optimizer and so reports none (stage 0, float32)."""
        if self.zero_stage > 0:
            return None
        return float(nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None]))

    def _reduce(self, terms: list[LossTerms]) -> dict[str, float]:
        """Add up (or take the maximum of) every figure over micro-batches and ranks, in two all-reduces."""
        sums = {"loss": torch.stack([t.loss.float() for t in terms]).sum()}
        for name in dict.fromkeys(name for t in terms for name in t.sums):  # a micro-batch need not have them all
            sums[name] = torch.stack([t.sums[name].detach().float() for t in terms if name in t.sums]).sum()
        maxima = {n: torch.stack([t.maxima[n].detach().float() for t in terms]).max() for n in terms[0].maxima}
        figures: dict[str, float] = {}
        for part, operation in ((sums, dist.ReduceOp.SUM), (maxima, dist.ReduceOp.MAX)):
            if part:
                values = torch.stack(list(part.values())).to(self.device)
                dist.all_reduce(values, operation)
                figures |= dict(zip(part, values.tolist(), strict=True))
        return figures


class CheckpointFiles(TorchCheckpointEngine):  # type: ignore[misc]
    """Reads nothing but tensors and plain values, and keeps the error of a failed write until all ranks have met.

    DeepSpeed would unpickle whatever a file holds, and leave the other ranks waiting for one that failed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """torch.save, and to the disk."""
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            self.error = error

    def load(self, path: str, map_location: Any = None) -> Any:
        """torch.load with weights_only."""
        with torch.serialization.safe_globals(PLAIN_TYPES):
            return torch.load(path, map_location=map_location, weights_only=True)


def random_state() -> dict[str, Any]:
    """The state of every generator of random numbers in this process, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set every generator of random numbers to a `random_state`."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _clear_rates(model: nn.Module) -> None:
    """No dropout either in modules that have to be in training mode because they recompute their activations."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def _deepspeed_config(engine: EngineConfig, max_grad_norm: float, trained: int) -> dict[str, Any]:
    """trained: parameters that have gradients."""
    zero_stage = engine.stage_in_use
    # A bucket of gradients is allocated whole, 2 GB by DeepSpeed's default however small the model.
    zero: dict[str, Any] = {"stage": zero_stage, "reduce_bucket_size": min(trained, MOST_IN_A_BUCKET)}
    if engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if engine.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = 10_000
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": engine.dtype == "bfloat16"},
        # In bfloat16 a sum of gradients, of micro-batches or of ranks, stands still at 256 times the next one.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }
