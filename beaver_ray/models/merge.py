"""Two policies of one architecture to one: theta = (1 - q) theta_1 + q theta_2, tensor by tensor in float32.

P-SACPO's last step (https://arxiv.org/abs/2404.11049, section 4.3): between the policy that was aligned with the reward
and the one that was aligned with safety after it, q is a dial that needs no further training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from beaver_ray.data.tokenized import same_tokenizer
from beaver_ray.errors import UserError
from beaver_ray.json_files import write_json
from beaver_ray.models.chat import ChatFolder
from beaver_ray.models.folders import (
    MERGED_FROM,
    find_model,
    fingerprint,
    read_config,
    read_pickled,
    read_shapes,
    weight_files,
)
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.models.new_folder import check_absent, new_folder

SHARD_BYTES = 2**30
"""Tensors of more than that are written before the next are read."""
_INCIDENTAL = {MERGED_FROM, "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
"""Keys of config.json that may differ between two policies of one architecture."""


def merge(first: str, second: str, weight: float, to: Path) -> Path:
    """Write (1 - weight) first + weight second as an ordinary folder and return it.

    first, second: folders of language models, or of runs that left one. Each tensor is added in float32 and written in
    the first's dtype; the first's tokenizer and generation settings go with it, and config.json says under
    ``merged_from`` what was merged. No more than SHARD_BYTES and one tensor are in memory.
    Raises UserError for a weight outside 0 to 1, where the folder is taken, and where the two differ in configuration,
    tensors or tokens.
    """
    if not 0 <= weight <= 1:
        raise UserError(f"--weight {weight:g} must be from 0 (the first policy) to 1 (the second)")
    check_absent(to)
    one, other = _policy(first), _policy(second)
    config = _check_alike(one, other)
    config[MERGED_FROM] = {
        "policies": [{"folder": str(folder), "hash": fingerprint(str(folder))} for folder in (one, other)],
        "weights": [1 - weight, weight],
        "to": str(to),
    }
    with new_folder(to) as part:
        _write(_merged(one, other, weight), part)
        for file in [*one.glob("generation_config.json"), *one.glob("*.py")]:
            shutil.copy(file, part)
        load_tokenizer(str(one)).save_pretrained(part)
        (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return to


def _policy(text: str) -> Path:
    found = ChatFolder.find(text, "merge")
    if found.adapter is not None:
        raise UserError(f"{text} is a LoRA adapter alone; give the run, or the folder of the policy with it added")
    folder = find_model(found.model)
    if folder is None:
        raise UserError(f"{text} is not on this machine; download it first (hf download {text})")
    return folder


def _check_alike(first: Path, second: Path) -> dict[str, Any]:
    """The first's config.json; UserError where a mean of their weights would be no model."""
    both = f"{first} and {second} cannot be merged"
    configs = [read_config(folder) for folder in (first, second)]
    keys = sorted((configs[0].keys() | configs[1].keys()) - _INCIDENTAL)
    for key in keys:
        one, other = (config.get(key) for config in configs)
        if one != other:
            raise UserError(f"{both}: in config.json {key} is {one} and {other}; merge policies of one start")
    shapes = [read_shapes(folder) for folder in (first, second)]
    if not shapes[0]:
        raise UserError(f"{first} holds no weights; give the folder of a whole model")
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        one, other = (list(shape[name]) if name in shape else "missing" for shape in shapes)
        if one != other:
            raise UserError(f"{both}: {name} is {one} and {other}; merge policies of one start")
    tokenizers = [load_tokenizer(str(folder)) for folder in (first, second)]
    if not same_tokenizer(*tokenizers):
        raise UserError(f"{both}: their tokenizers have other tokens; merge policies of one start")
    if tokenizers[0].chat_template != tokenizers[1].chat_template:
        raise UserError(f"{both}: their chat templates differ; merge policies that were trained with the same one")
    return configs[0]


def _merged(first: Path, second: Path, weight: float) -> Iterator[tuple[str, Tensor]]:
    others = _readers(second)
    for name, read in _readers(first).items():
        one, other = read(), others[name]()
        if one.is_floating_point():
            yield name, torch.lerp(one.float(), other.float(), weight).to(one.dtype)
        elif torch.equal(one, other):
            yield name, one
        else:
            raise UserError(f"{first} and {second} cannot be merged: {name} holds whole numbers, and others in each")


def _readers(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """How each tensor of a folder's weights is read, when it is asked for."""
    found: dict[str, Callable[[], Tensor]] = {}
    for file in weight_files(folder):
        if file.suffix == ".bin":
            found |= {name: partial(torch.Tensor.clone, tensor) for name, tensor in read_pickled(file).items()}
        else:
            opened: Any = safe_open(file, framework="pt")
            found |= {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118
    return found


def _write(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """As transformers lays weights out: one file, or several with an index."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(held, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        held[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
        if size >= SHARD_BYTES:
            flush()
            size = 0
    if held:
        flush()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for number, name in enumerate(names):
        (folder / f"{number}.part").rename(folder / name)
    weight_map = {tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
