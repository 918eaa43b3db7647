"""Whether a stage can be run with a model's architecture at all, found without its weights.

Families that the tests hold from SFT to Safe PPO are known to work. Of any other a model without weights is made, and
vLLM is asked whether it knows the architecture: seconds instead of minutes into a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from beaver_ray.errors import UserError
from beaver_ray.models.folders import find_model, read_config
from beaver_ray.stage import Stage

TRIED = frozenset(
    "gemma2 gemma3_text gpt2 gpt_neox llama mistral mixtral olmo2 opt phi3 qwen2 qwen2_moe qwen3 qwen3_moe".split()  # noqa: SIM905
)
"""Model types of the families of `launch.bench.family_models`."""
TRANSPOSED = "gpt2"
HEADLESS = "gemma2"


def architecture_problem(stage: Stage) -> str | None:
    """What stands against training a language model of this architecture; None where nothing is known."""
    specs = stage.roles()
    trained = next((s for s in specs if s.training is not None and s.logits), None)
    if trained is None or trained.training is None:
        return None
    model, lora = trained.models[0].folder, trained.training.lora_rank > 0
    in_vllm = any(spec.kv_cache_gib is not None for spec in specs)
    folder = find_model(model)
    kind = read_config(folder).get("model_type") if folder else None
    if folder is None or kind is None:
        return None
    if lora and kind == TRANSPOSED:
        return f"{model}: no LoRA for a model of type {kind}; set its lora_rank to 0"
    if kind == HEADLESS and in_vllm and _has_head(folder):
        return (
            f"{model} holds lm_head.weight, a second copy of its embeddings with which vLLM refuses a model of type "
            f"{kind}; save it anew with save_pretrained"
        )
    if kind in TRIED:
        return None
    try:
        return _problem_of(str(folder), stage.trusts_code, in_vllm)
    except UserError as error:
        return str(error)


def _problem_of(folder: str, trust: bool, in_vllm: bool) -> str | None:
    from beaver_ray.models.checkpoint_names import checkpoint_names, model_skeleton

    skeleton = model_skeleton(folder, trust)
    if getattr(skeleton, "_is_stateful", False):
        return (
            f"{folder}: a model of type {skeleton.config.model_type} keeps a running state, in which packed sequences "
            f"would see each other; use a model family with plain attention"
        )
    if not in_vllm:
        return None
    checkpoint_names(folder, trust)
    if not _known_to_vllm(skeleton):
        return f"{folder}: vLLM has no model of type {skeleton.config.model_type}; debug=true runs without it"
    return None


def _has_head(folder: Path) -> bool:
    from safetensors import safe_open

    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            if "lm_head.weight" in set(tensors.keys()):
                return True
    return False


def _known_to_vllm(skeleton: Any) -> bool:
    """Whether vLLM has the architecture, or can run transformers' own code for it."""
    from vllm.model_executor.models.registry import ModelRegistry

    asked = skeleton.config.architectures or [type(skeleton).__name__]
    if set(asked) & set(ModelRegistry.get_supported_archs()):
        return True
    return any(getattr(skeleton, name, bool)() for name in ("is_backend_compatible", "_can_set_attn_implementation"))
