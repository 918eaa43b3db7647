"""Whether a stage can be run with a model's architecture at all, found without its weights.

Families that the tests hold from SFT to Safe PPO are known to work. Of any other a model without weights is made, and
vLLM is asked whether it knows the architecture: seconds instead of minutes into a run.
"""

from __future__ import annotations

from typing import Any

from beaver_ray.errors import UserError
from beaver_ray.models.folders import find_model, read_config, read_shapes
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
    for spec in specs:
        if spec.training is None or not spec.training.lora_rank:
            continue
        model = spec.models[0].folder
        folder = find_model(model)
        if folder and read_config(folder).get("model_type") == TRANSPOSED:
            return f"{model}: no LoRA for a model of type {TRANSPOSED}; set its lora_rank to 0"
    trained = next((s for s in specs if s.training is not None and s.logits), None)
    if trained is None:
        return None
    model = trained.models[0].folder
    in_vllm = any(spec.kv_cache_gib is not None for spec in specs)
    folder = find_model(model)
    kind = read_config(folder).get("model_type") if folder else None
    if folder is None or kind is None:
        return None
    if kind == HEADLESS and in_vllm and "lm_head.weight" in read_shapes(folder):
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


def _known_to_vllm(skeleton: Any) -> bool:
    """Whether vLLM has the architecture, or can run transformers' own code for it."""
    from vllm.model_executor.models.registry import ModelRegistry

    asked = skeleton.config.architectures or [type(skeleton).__name__]
    if set(asked) & set(ModelRegistry.get_supported_archs()):
        return True
    return any(getattr(skeleton, name, bool)() for name in ("is_backend_compatible", "_can_set_attn_implementation"))
