"""Every tensor of a model's weights has its place in the model, and every place its tensor.

transformers fills what is missing with random numbers, passes over what is left over, and goes on. Here such a model
is refused in one line, before anything starts (`check_folder`, from the files' headers alone) and again as it is
loaded (`check_loaded`). What may be absent or left over is known by name: transformers itself knows tied heads, and
masks and frequencies that older files carry as tensors; a trunk leaves over the heads of the model that it comes from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from beaver_ray.errors import UserError, first_line
from beaver_ray.models.folders import read_shapes

SHOWN = 4
# A number that GPT-2's older files carry; other masks and frequencies transformers knows itself.
_OLD_BUFFERS = re.compile(r"\.attn\.masked_bias$")


def check_loaded(path: str, model: PreTrainedModel, info: Mapping[str, Any], heads: Collection[str] = ()) -> None:
    """UserError, naming them, where tensors are missing, left over or of another shape.

    info: what ``from_pretrained`` says with output_loading_info. heads: tensors that may be left over, those of a
    score model's head; where ``model`` is a trunk, those of a language model's head may be so too.
    """
    missing, unlike = set(info["missing_keys"]), list(info["mismatched_keys"])
    left = {name for name in info["unexpected_keys"] if name not in heads and not _OLD_BUFFERS.search(name)}
    if left and model.get_output_embeddings() is None:
        left -= _language_head(model)
    missing -= {name for name, *_ in unlike}
    if not (missing or left or unlike):
        return
    found = []
    if missing:
        found.append(f"{_counted(missing)} missing ({_named(missing)})")
    if left:
        found.append(f"{_counted(left)} left over ({_named(left)})")
    if unlike:
        shapes = [f"{name} {list(there)} in place of {list(wanted)}" for name, there, wanted in sorted(unlike)]
        found.append(f"{_counted(unlike)} of another shape ({_named(shapes)})")
    what = "; ".join([*found, _mend(missing, left)])
    raise UserError(f"{path}: the weights do not fit config.json ({type(model).__name__}): {what}")


def check_folder(
    kind: Any,
    folder: Path,
    path: str,
    trust_remote_code: bool,
    heads: Collection[str] = (),
    check: Callable[..., None] = check_loaded,
) -> None:
    """`check_loaded`, or another ``check``, of a folder for one of transformers' Auto classes, reading no weights.

    The model is built without memory. Where that needs a folder's own code, or weights are quantized, it is left to
    loading.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if getattr(config, "auto_map", None) or getattr(config, "quantization_config", None):
            return
        state = {name: torch.empty(shape, device="meta") for name, shape in read_shapes(folder).items()}
        if not state:
            raise UserError(f"{path} has a config.json and no weights; put model.safetensors there, or save it again")
        with torch.device("meta"):
            architecture: Any = type(kind.from_config(config))
        model, info = architecture.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except UserError:
        raise
    except Exception as error:  # of broken files transformers raises nearly anything
        raise UserError(f"cannot load the model in {path}: {first_line(error)}") from None
    check(path, model, info, heads)


def check_encoder(path: str, model: PreTrainedModel, info: Mapping[str, Any], heads: Collection[str] = ()) -> None:
    """`check_loaded` of an encoder whose classification head is yet to be trained: that may be missing, or another's,
    and the head that it was pre-trained with left over."""
    prefix = f"{model.base_model_prefix}."

    def of_trunk(name: str) -> bool:
        return name.startswith(prefix) and not name.startswith(f"{prefix}pooler.")

    found = {key: {name for name in info[key] if of_trunk(name)} for key in ("missing_keys", "unexpected_keys")}
    unlike = [entry for entry in info["mismatched_keys"] if of_trunk(entry[0])]
    check_loaded(path, model, {**found, "mismatched_keys": unlike}, heads)


def _language_head(trunk: PreTrainedModel) -> set[str]:
    """Names of the tensors that a language model has beside this trunk, as the model and as its files call them."""
    try:
        with torch.device("meta"):
            whole: Any = AutoModelForCausalLM.from_config(trunk.config)
    except Exception:  # a family without language models has no such head
        return set()
    prefix = f"{whole.base_model_prefix}."
    head = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith(prefix)}
    return head.keys() | revert_weight_conversion(whole, head).keys()


def _mend(missing: Collection[str], left: Collection[str]) -> str:
    """What to do, in a few words; where a wrapper's prefix alone is in the way, that is said."""
    parts = [name.split(".") for name in sorted(left)]
    for one in parts:
        start = next((start for start in range(1, len(one)) if ".".join(one[start:]) in missing), 0)
        while start and any(other[:start] != one[:start] for other in parts):
            start -= 1
        if start:
            prefix = "".join(f"{part}." for part in one[:start])
            return f"names begin with {prefix!r}: save the model from inside its wrapper, or rename its tensors"
    return "give the config.json that belongs to these weights, or save the model again"


def _counted(names: Collection[Any]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


def _named(names: Collection[str]) -> str:
    """The first names in their natural order, and how many more there are."""
    ordered = sorted(names, key=lambda name: [(p.isdigit(), int(p) if p.isdigit() else p) for p in name.split(".")])
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more
