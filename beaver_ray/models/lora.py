"""LoRA (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"): every linear layer but the head
computes W x + alpha / rank * B A x, and only A and B are trained.

B starts at zero, so that a fresh adapter changes nothing. With the adapter off the model is the one that it started
from: it is its own reference. Only the adapter travels to the generators; each of them adds it to the weights of the
same folder (`merged`), which keeps generation as fast as without one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from beaver_ray.errors import UserError
from beaver_ray.weights import AdapterInfo

if TYPE_CHECKING:
    from peft import PeftModel

PREFIX = "base_model.model."
"""What peft puts before the name of each of the wrapped model's modules."""


def add_adapter(model: Any, rank: int, alpha: float, seed: int) -> PeftModel:
    """Wrap a model so that only an adapter of all its linear layers but the head is trained.

    Experts that lie together in one tensor and routers are no linear layers and stay as they are. The adapter has the
    model's dtype and the same initial weights for the same seed. Raises UserError for a model whose layers keep their
    matrices transposed (GPT-2's).
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]

    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise UserError(f"no LoRA for a model of type {model.config.model_type}; set lora_rank to 0")
    torch.manual_seed(seed)
    # Layers by their whole names: by kind peft would wrap experts and routers too, some families' twice. Its type says
    # int for alpha, its arithmetic is a float's.
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    return get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[return-value]


def is_adapter(name: str) -> bool:
    """Whether a parameter of a wrapped model is the adapter's."""
    return ".lora_A." in name or ".lora_B." in name


def adapter_name(name: str) -> str:
    """An adapter's parameter as peft calls it in files; that is also its name on the way to generators."""
    return name.replace(".default.", ".")


def base_name(name: str) -> str:
    """Another parameter of a wrapped model, as the model calls it without an adapter."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def merged(
    weights: Iterable[tuple[str, Tensor]],
    adapter: Mapping[str, Tensor],
    info: AdapterInfo,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """``weights`` by the names of a model without an adapter, with ``adapter`` added where it has matrices.

    adapter: A [rank, in] and B [out, rank] of each layer, by `adapter_name`. Sums are taken in float32 on the
    adapter's device and rounded once, to ``dtype`` or the weight's own; weights without an adapter come as they are.
    Raises ValueError, at the end, where a layer of the adapter has no weight.
    """
    left = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in adapter}
    for name, weight in weights:
        layer = name.removesuffix(".weight")
        if layer not in left:
            yield name, weight
            continue
        left.remove(layer)
        a, b = (adapter[f"{PREFIX}{layer}.lora_{part}.weight"].float() for part in "AB")
        whole = torch.addmm(weight.to(a.device, torch.float32), b, a, alpha=info.alpha / info.rank)
        yield name, whole.to(dtype or weight.dtype)
    if left:
        raise ValueError(f"no weights for {len(left)} layers of the adapter: {', '.join(sorted(left)[:5])}")
