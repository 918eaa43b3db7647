"""The mean of a model's weights after several steps (tail averaging: Ruppert 1988, Polyak and Juditsky 1992; of neural
networks' weights Izmailov et al. 2018, https://arxiv.org/abs/1803.05407).
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from actors.machine.engine import TrainingEngine


class WeightMean:
    """A running mean in float32 of what an engine trains, in host memory; each rank keeps its part of every tensor.

    All ranks must call `add` and `apply` at the same time.
    """

    def __init__(self, engine: TrainingEngine) -> None:
        self.engine = engine
        self.steps: list[int] = []
        """The steps whose weights are in it."""
        self.parts: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take the weights in as they are after ``step``."""
        self.steps.append(step)
        for name, parameter in self._trained():
            with deepspeed.zero.GatheredParameters([parameter]):
                part = self._cut(parameter.data)[self.engine.rank].to("cpu", torch.float32, copy=True)
            mean = self.parts.setdefault(name, part)
            mean += (part - mean) / len(self.steps)

    @torch.no_grad()
    def apply(self) -> None:
        """Make it the model's weights. The optimizer's own copies stay as they are: nothing can be trained after it."""
        for name, parameter in self._trained():
            # Whoever enters as rank 0 deals the tensor out again, where ZeRO-3 has divided it.
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parts = self._cut(parameter.data)
                parts[self.engine.rank].copy_(self.parts[name])
                for rank, part in enumerate(parts):
                    if self.engine.world > 1 and part.numel():
                        dist.broadcast(part, rank)

    def state(self) -> dict[str, Any]:
        """For a checkpoint of this rank."""
        return {"steps": list(self.steps), "parts": dict(self.parts)}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave; without its entries the mean is empty."""
        self.steps, self.parts = list(state.get("steps", [])), dict(state.get("parts", {}))

    def _trained(self) -> list[tuple[str, Any]]:
        return [(name, p) for name, p in self.engine.module.named_parameters() if p.requires_grad]

    def _cut(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """A whole tensor in as many parts as there are ranks."""
        return tensor.view(-1).tensor_split(self.engine.world)
