"""What a model's tensors are called in checkpoint files, and how they are cut there.

In memory transformers 5 keeps all experts of a layer in one tensor, and some modules under other names than the
published files have. Weights travel as they are in memory; vLLM reads what files have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from beaver_ray.errors import UserError, first_line
from beaver_ray.models.lora import PREFIX


@dataclass(frozen=True)
class CheckpointNames:
    """The way from a model's tensors in memory to those of its files; can be sent to other processes."""

    conversions: tuple[Any, ...]
    """transformers' own description of how files are read."""
    config: Any
    tied: dict[str, str]
    """Names in memory of tensors that only repeat another one, and whose they are."""

    def in_files(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors as files have them; what is not cut or put together shares its memory."""
        state = dict(tensors)
        if not self.conversions:
            return state
        model: Any = SimpleNamespace(_weight_conversions=list(self.conversions), config=self.config)
        return revert_weight_conversion(model, state)

    def adapter_in_files(self, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A LoRA adapter's matrices, by `lora.adapter_name`, under the names of their layers in files."""
        found = {}
        for name, tensor in adapter.items():
            layer, _, part = name.removeprefix(PREFIX).rpartition(".lora_")
            weight = self._name_in_files(f"{layer}.weight")
            found[f"{PREFIX}{weight.removesuffix('.weight')}.lora_{part}"] = tensor
        return found

    def tied_in_files(self) -> dict[str, str]:
        """The name in files of every tensor that another one repeats, and what that would be called there."""
        return {self._name_in_files(source): self._name_in_files(name) for name, source in self.tied.items()}

    def _name_in_files(self, name: str) -> str:
        (found,) = self.in_files([(name, torch.empty(1, 1, device="meta"))])
        return found


def checkpoint_names(folder: str, trust_remote_code: bool = False) -> CheckpointNames:
    """Of the model in ``folder``, from its configuration alone.

    Raises UserError where a tensor of its files is put together from several in memory: those may be in two buckets.
    """
    skeleton: Any = model_skeleton(folder, trust_remote_code)
    # Renamings that only old files need, and a prefix that a file may lack, are not what is published.
    conversions = get_model_conversion_mapping(skeleton, add_legacy=False)
    conversions = [c for c in conversions if not isinstance(c, PrefixChange)]
    names = CheckpointNames(tuple(conversions), skeleton.config, dict(skeleton.all_tied_weights_keys))
    state = skeleton.state_dict()
    together = names.in_files(state.items())
    if together.keys() != {name for item in state.items() for name in names.in_files([item])}:
        raise UserError(
            f"{folder}: new weights of a model of type {skeleton.config.model_type} cannot be taken into vLLM, whose "
            f"files join tensors that are apart in memory; use another model"
        )
    return names


def without_repeats(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's whole state without the tensors that only repeat another one, as files have it: with a head that is
    tied some models of vLLM (Gemma 2) refuse a folder.
    """
    return {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}


def model_skeleton(folder: str, trust_remote_code: bool = False, kind: Any = AutoModelForCausalLM) -> Any:
    """The language model of ``folder``, or what else ``kind`` makes of it, without weights.

    UserError where its configuration cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return kind.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # of broken files transformers raises nearly anything
        raise UserError(f"cannot read the configuration of the model in {folder}: {first_line(error)}") from None
