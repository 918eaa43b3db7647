"""Trained language models to Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from beaver_ray.models.checkpoint_names import without_repeats
from beaver_ray.models.lora import is_adapter, merged_state
from beaver_ray.weights import AdapterInfo


def save_language_model(model: Any, state: dict[str, Tensor], adapter: AdapterInfo | None, folder: Path) -> None:
    """Write a language model as a Hugging Face folder; with an adapter, with that added to its weights.

    state: all its tensors; with an adapter by the names of `add_adapter`'s model. peft's own folder of the adapter then
    goes into ``adapter`` there.
    """
    if adapter is not None:
        for lora in model.peft_config.values():
            if isinstance(lora.target_modules, set):  # whose order is another in each process
                lora.target_modules = sorted(lora.target_modules)
        parts = {name: tensor for name, tensor in state.items() if is_adapter(name)}
        model.save_pretrained(folder / "adapter", state_dict=parts, save_embedding_layers=False)
        model, state = model.get_base_model(), merged_state(state, adapter)
    model.save_pretrained(folder, state_dict=without_repeats(model, state))
