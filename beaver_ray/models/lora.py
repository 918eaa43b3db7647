"""LoRA (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"): every linear layer but the head, or
those of chosen names, computes W x + alpha / rank * B A x, and only A and B are trained.

B starts at zero, so that a fresh adapter changes nothing. With the adapter off the model is the one that it started
from: it is its own reference. Only the adapter travels to the generators; each of them adds it to the weights of the
same folder (`merged`), which keeps generation as fast as without one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from beaver_ray.errors import UserError
from beaver_ray.weights import AdapterInfo

if TYPE_CHECKING:
    from peft import PeftModel

OFF = "set lora_rank to 0"
PREFIX = "base_model.model."
"""What peft puts before the name of each of the wrapped model's modules."""


def add_adapter(model: Any, rank: int, alpha: float, seed: int, targets: Sequence[str] = ()) -> PeftModel:
    """Wrap a language model so that only an adapter of its `linear_layers` is trained.

    The adapter has the model's dtype and the same initial weights for the same seed.
    """
    from peft import get_peft_model

    config = _config(model, rank, alpha, targets)
    torch.manual_seed(seed)
    return get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[return-value]


def add_trunk_adapter(trunk: Any, rank: int, alpha: float, seed: int, targets: Sequence[str] = ()) -> None:
    """`add_adapter` inside a score model's trunk, which stays what it is; its heads, outside, go on being trained."""
    from peft import inject_adapter_in_model

    config = _config(trunk, rank, alpha, targets)
    torch.manual_seed(seed)
    inject_adapter_in_model(config, trunk)
    for name, parameter in trunk.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.to(trunk.dtype)


def _config(model: Any, rank: int, alpha: float, targets: Sequence[str]) -> Any:
    from peft import LoraConfig

    # Layers by their whole names: by kind peft would wrap experts and routers too, some families' twice. Its type says
    # int for alpha, its arithmetic is a float's.
    layers = linear_layers(model, targets)
    task: Any = None if model.get_output_embeddings() is None else "CAUSAL_LM"
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, task_type=task)  # type: ignore[arg-type]


def linear_layers(model: Any, targets: Sequence[str] = ()) -> list[str]:
    """Whole names of a model's linear layers but the head; with ``targets`` of those whose names end so.

    Experts that lie together in one tensor and routers are no linear layers and stay as they are. Raises UserError for
    a model whose layers keep their matrices transposed (GPT-2's), and where no layer has the name of a target.
    """
    from transformers.pytorch_utils import Conv1D

    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise UserError(f"no LoRA for a model of type {model.config.model_type}; {OFF}")
    head = model.get_output_embeddings()
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    if not layers:
        raise UserError(
            f"no LoRA for a model of type {model.config.model_type}, which has no linear layer to adapt; {OFF}"
        )
    for target in targets:
        if not any(f".{layer}".endswith(f".{target}") for layer in layers):
            known = ", ".join(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
            raise UserError(f"lora_targets: no linear layer of the model is called {target!r}; there are {known}")
    return [x for x in layers if not targets or any(f".{x}".endswith(f".{target}") for target in targets)]


def is_adapter(name: str) -> bool:
    """Whether a parameter of a wrapped model is the adapter's."""
    return ".lora_A." in name or ".lora_B." in name


def adapter_name(name: str) -> str:
    """An adapter's parameter as peft calls it in files; that is also its name on the way to generators."""
    return name.replace(".default.", ".")


def base_name(name: str) -> str:
    """Another parameter of a wrapped model, as the model calls it without an adapter."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def merged_state(state: Mapping[str, Tensor], info: AdapterInfo) -> dict[str, Tensor]:
    """All tensors of a model with an adapter, by the model's names without one and with the adapter added."""
    adapter = {PREFIX + adapter_name(n).removeprefix(PREFIX): t for n, t in state.items() if is_adapter(n)}
    return dict(merged(((base_name(n), t) for n, t in state.items() if not is_adapter(n)), adapter, info))


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
