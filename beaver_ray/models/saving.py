"""Trained models to Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from beaver_ray.models.checkpoint_names import without_repeats
from beaver_ray.models.lora import adapter_name, base_name, is_adapter, merged
from beaver_ray.weights import AdapterInfo


def save_merged(model: Any, state: dict[str, Tensor], info: AdapterInfo, folder: Path) -> None:
    """Write a wrapped model with its adapter added to its weights as a Hugging Face folder.

    state: all its tensors by the names of `add_adapter`'s model. peft's own folder of the adapter goes into ``adapter``
    there.
    """
    adapter = {name: tensor for name, tensor in state.items() if is_adapter(name)}
    model.save_pretrained(folder / "adapter", state_dict=adapter, save_embedding_layers=False)
    base = ((base_name(name), tensor) for name, tensor in state.items() if not is_adapter(name))
    whole = dict(merged(base, {adapter_name(name): tensor for name, tensor in adapter.items()}, info))
    plain = model.get_base_model()
    plain.save_pretrained(folder, state_dict=without_repeats(plain, whole))
