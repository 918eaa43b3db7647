"""What a model's folder says of the model, read without loading it: config.json and the headers of its weights.

Whatever is broken in these files is the user's to mend and gets one line. Nothing heavy is imported here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beaver_ray.errors import UserError, first_line

LARGEST_SIZE = 10**9
MODERATION = "moderation.json"
"""Beside a moderation model: how it reads, and its thresholds (`beaver_ray.models.moderator`)."""
MERGED_FROM = "merged_from"
"""In a merge's config.json: what was merged (`beaver_ray.models.merge`)."""
_BESIDE = (
    *(MODERATION, "generation_config.json", "chat_template*", "additional_chat_templates/*"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model"),
)
"""Thresholds, what ends an answer, templates, and the files of a tokenizer."""
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
"""Weights in one file; in several they have an index of that name and ``.index.json``. The first there is counts."""
_BEHIND_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")
# Where families write how many positions there are. Where several are there, the smallest counts.
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# Kinds of rope scaling with which there are factor times as many positions as before. With others (longrope, llama3)
# config.json says the scaled number, and so it does in the families of _SCALED_ALREADY.
_LENGTHENING = ("yarn", "linear", "dynamic")
_SCALED_ALREADY = ("gemma3", "gemma3_text")
# Families that number positions from behind their padding token on.
_BEHIND_PADDING = (
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "xmod",
    "longformer",
)


@dataclass(frozen=True)
class ModelFacts:
    """A model's size, as far as its folder tells; None for what it does not."""

    parameters: int | None = None
    hidden: int | None = None
    layers: int | None = None
    vocabulary: int | None = None
    positions: int | None = None
    linear: int | None = None
    """Inputs and outputs of all linear layers but the head: as many parameters has a LoRA adapter of rank 1."""
    plain_logits: bool = True
    """Whether logits are what the head gives, and not capped or scaled behind it (Gemma 2, Cohere, Granite)."""
    heads: int | None = None
    """Attention heads."""
    quantized: bool = False
    """Weights are of fewer bytes than the dtype that they are computed in."""


def find_model(model: str) -> Path | None:
    """The folder of a model, in the Hugging Face cache where ``model`` is a name of its hub; None if it is not there.

    Raises UserError for what is neither a folder with a config.json nor the name of a hub.
    """
    # os.path finds nothing under names that cannot be, where Path raises.
    if os.path.isfile(os.path.join(model, "config.json")):
        return Path(model)
    found = Path(model).glob("final/*/config.json") if os.path.isdir(model) else ()
    inside = sorted(str(file.parent) for file in found)
    mend = f"it is a run's folder, give {' or '.join(inside)}" if inside else "train it first, or give another folder"
    missing = f"no model in {model!r} (no config.json there); {mend}"
    if os.path.exists(model) or model.count("/") != 1 or os.path.exists(model.split("/")[0] or "/"):
        raise UserError(missing)
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(model, "config.json")
    except ValueError:  # no name that a hub could have
        raise UserError(missing) from None
    return Path(cached).parent if isinstance(cached, str) else None


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json; UserError where it is no JSON object."""
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({first_line(error)}); save the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object; save the model again")
    return content


def merged_from(folder: str) -> list[tuple[str, str]]:
    """(folder, `fingerprint`) of each policy that a merge was made of; none of a folder that holds no merge."""
    config = read_config(Path(folder)) if os.path.isfile(os.path.join(folder, "config.json")) else {}
    merge = config.get(MERGED_FROM, {})
    then = merge.get("to", folder)  # which earlier versions did not write down
    return [(moved(one["folder"], then, folder), one["hash"]) for one in merge.get("policies", [])]


def moved(place: str, then: str, now: str) -> str:
    """Where ``place`` lies now that ``then`` has become ``now``, if both have moved together; else ``place``."""
    if os.path.exists(place):
        return place
    found = os.path.normpath(os.path.join(now, os.path.relpath(place, then)))
    return found if os.path.exists(found) else place


def read_model(model: str) -> ModelFacts:
    """A model's size from its folder, or from the Hugging Face cache where ``model`` is a name of its hub.

    Raises UserError for a folder that is not there. A hub name that is not in the cache has unknown facts.
    """
    folder = find_model(model)
    if folder is None:
        return ModelFacts()
    config = read_config(folder)
    shape = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    parameters, linear = _sizes_of_shape(shape, folder)
    return ModelFacts(
        parameters=count_parameters(folder) or parameters,
        hidden=_size(shape, folder, "hidden_size", "n_embd"),
        layers=_size(shape, folder, "num_hidden_layers", "n_layer"),
        vocabulary=_size(shape, folder, "vocab_size"),
        positions=positions_of(shape, folder),
        linear=linear,
        plain_logits=all(shape.get(name) in (None, 1) for name in _BEHIND_THE_HEAD),
        heads=_size(shape, folder, "num_attention_heads", "n_head"),
        quantized="quantization_config" in config,
    )


def count_parameters(folder: Path) -> int:
    """Numbers in all tensors of a folder's weights, from their headers; 0 where there are none."""
    return sum(math.prod(shape) for shape in read_shapes(folder).values())


def fingerprint(model: str, dtype: str = "") -> str:
    """A hash of all in a model's folder that decides what it reads and says, and of its run's dtype."""
    folder = find_model(model)
    digest = hashlib.blake2b(dtype.encode(), digest_size=16)
    files = [folder / "config.json", *weight_files(folder)] if folder else []
    files += [file for name in _BESIDE for file in sorted(folder.glob(name)) if file.is_file()] if folder else []
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest() if folder else f"{model} {dtype}"


def weight_files(folder: Path) -> list[Path]:
    """The files that a model is loaded from, safetensors before pickles; another copy beside them is none of them.

    Raises UserError where one of the shards that the index names is not there.
    """
    for whole in WHOLE_FILES:
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / f"{whole}.index.json").is_file():
            return _shards(folder, f"{whole}.index.json")
    return sorted(folder.glob("*.safetensors"))


def _shards(folder: Path, index: str) -> list[Path]:
    try:
        weight_map = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder / index} names no files of weights ({first_line(error)}); save the model again"
        ) from None
    missing = [name for name in names if not os.path.isfile(folder / name)]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}, which its {index} names; copy or save the model again")
    return [folder / name for name in names]


def is_pickled(folder: Path) -> bool:
    """Whether a folder's weights are PyTorch's own files (``pytorch_model.bin``), with no safetensors beside them."""
    return any(file.suffix == ".bin" for file in weight_files(folder))


def read_pickled(file: Path) -> dict[str, Any]:
    """The tensors of a file that torch.save wrote, by name; they stay in the file until they are used, if it is a zip.

    Raises UserError for a pickle that holds anything but tensors and plain containers: none of that is unpickled.
    """
    import torch

    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # of broken files torch raises nearly anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise UserError(f"{file} is not a whole file of tensors; copy or save it again") from None
        raise UserError(
            f"{file} holds {code[1]}, which is no tensor and may run code where it is unpickled, so it is not read; "
            f"have the model saved as safetensors"
        ) from None
    if not isinstance(tensors, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise UserError(f"{file} holds no tensors by name, as weights do; save the model again")
    return dict(tensors)


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor of a folder's weights and its shape, from the files' headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        if file.suffix == ".bin":
            shapes |= {name: tuple(tensor.shape) for name, tensor in read_pickled(file).items()}
            continue
        try:
            with file.open("rb") as stream:
                length = struct.unpack("<Q", stream.read(8))[0]
                if length > file.stat().st_size:
                    raise ValueError
                header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            shapes |= {name: tuple(int(size) for size in entry["shape"]) for name, entry in header.items()}
            ends = [int(entry["data_offsets"][1]) for entry in header.values()]
            if 8 + length + max(ends, default=0) > file.stat().st_size:  # cut off, by a full disk say
                raise ValueError
        except (OSError, struct.error, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise UserError(f"{file} is not a whole safetensors file; copy or save it again") from None
    return shapes


def adapter_numbers(model: str, facts: ModelFacts, targets: Sequence[str] = ()) -> int:
    """Parameters of a LoRA adapter of rank 1 on a model's linear layers, or on those called ``targets`` alone.

    0 where the folder does not tell.
    """
    folder = find_model(model) if targets else None
    shapes = read_shapes(folder) if folder else {}
    named = [
        sum(shape)
        for name, shape in shapes.items()
        if len(shape) == 2 and any(f".{name}".endswith(f".{target}.weight") for target in targets)
    ]
    return sum(named) or facts.linear or 0


def positions_of(shape: Mapping[str, Any], folder: Path) -> int | None:
    """Most tokens of a sequence, by the configuration of a language model; None where it does not say.

    With YaRN, and where rope scaling is linear or dynamic, that is the scaled length.
    """
    counts = [_size(shape, folder, name) for name in _POSITIONS]
    positions = min((count for count in counts if count is not None), default=None)
    if positions is not None and shape.get("model_type") in _BEHIND_PADDING:
        positions -= int(shape.get("pad_token_id") or 0) + 1
    rope = shape.get("rope_parameters") or shape.get("rope_scaling")
    if positions is None or not isinstance(rope, Mapping):
        return positions
    # Where kinds of layers differ, those with full attention see the whole sequence.
    inner = rope.get("full_attention")
    rope = inner if isinstance(inner, Mapping) else rope
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if not isinstance(factor, int | float) or not 1 <= factor <= LARGEST_SIZE:
        return positions
    if kind not in _LENGTHENING or shape.get("model_type") in _SCALED_ALREADY:
        return positions
    # A folder that names the original length may have written the scaled one into the other place, or not.
    original = _size(rope, folder, "original_max_position_embeddings") or positions
    return max(positions, int(original * factor))


def _size(shape: Mapping[str, Any], folder: Path, *names: str) -> int | None:
    """The value of the first of these keys that the configuration has."""
    found = next(((name, shape[name]) for name in names if shape.get(name) is not None), None)
    if found is None:
        return None
    name, value = found
    if type(value) is not int or not 0 < value <= LARGEST_SIZE:
        raise UserError(f"{folder / 'config.json'}: {name} must be a whole number above 0; save the model again")
    return value


def _sizes_of_shape(shape: dict[str, Any], folder: Path) -> tuple[int | None, int | None]:
    """(`ModelFacts.parameters`, `ModelFacts.linear`) of a dense Llama-like model from its config.json; None where it
    says too little.
    """
    hidden, layers, vocabulary, heads, inner = (
        _size(shape, folder, name)
        for name in ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "intermediate_size")
    )
    if hidden is None or layers is None or vocabulary is None or heads is None or inner is None:
        return None, None
    head_dim = _size(shape, folder, "head_dim") or hidden // heads
    kv_heads = _size(shape, folder, "num_key_value_heads") or heads
    heads_dim = head_dim * (2 * heads + 2 * kv_heads)  # queries, keys, values and the output's input
    linear = layers * (4 * hidden + heads_dim + 3 * (hidden + inner))
    embeddings = vocabulary * hidden * (1 if shape.get("tie_word_embeddings") else 2)
    return embeddings + layers * (hidden * heads_dim + 3 * hidden * inner + 2 * hidden) + hidden, linear
