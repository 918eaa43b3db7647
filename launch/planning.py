"""What a run takes of a machine or cluster, worked out before anything starts.

Every role gets its processes, CPUs, GPUs and an estimate of memory; what cannot fit is refused with one
line. Weights are counted from safetensors headers (or estimated from config.json) without loading anything.
Estimates leave out memory fragmentation and what a data set takes; a small share of a machine should stay
free.

For P parameters on R ranks (Rajbhandari et al. 2020, "ZeRO", section 3): weights 2 or 4 bytes, gradients 4
(they add up in float32; in bfloat16 below ZeRO 2 one micro-batch's take 2 more), AdamW's moments 8, and a float32
master copy 4 where weights are bfloat16 or ZeRO partitions them; with LoRA gradients, moments and master copy are the
adapter's alone.
ZeRO 1 divides moments and master copy by R, ZeRO 2 gradients too, ZeRO 3 weights too. Activations of a
transformer layer are 17 numbers for each token and hidden unit (Korthikanti et al. 2022, equation 2, with
attention computed in blocks).
"""

from __future__ import annotations

from contextlib import suppress

from beaver_ray.config import DTYPE_BYTES, GPU_SHARE, EngineConfig
from beaver_ray.fit import length_problems
from beaver_ray.gpus import on_this_machine
from beaver_ray.models.chunks import DENSE_LOGITS, chunk_rows
from beaver_ray.models.folders import ModelFacts, adapter_numbers, read_model
from beaver_ray.stage import RoleSpec, Stage
from launch.compatibility import architecture_problem
from launch.plans import Plan, RolePlan
from launch.resources import GIB, Resources, find_resources
from launch.room import (
    device_problems,
    gpu_memory_problems,
    memory_notes,
    placing_problems,
    rank_problems,
    sum_problems,
)

# Measured: a process that has imported torch, transformers and Ray; one with vLLM besides.
BASE_GIB, VLLM_BASE_GIB = 0.6, 1.5
ACTIVATIONS_PER_LAYER = 17
LOGIT_COPIES = 3  # where all are made at once: logits, their log-softmax and its gradient, in float32


def plan(stage: Stage, resources: Resources | None = None) -> Plan:
    """What the run takes; ``check`` of the result refuses what cannot fit.

    resources: what to compare with; None looks at this machine, or at the Ray cluster that the
    configuration joins. Raises UserError where a model's folder is missing.
    """
    if resources is None:
        stage, resources = on_this_machine(stage), find_resources(stage)
    specs = stage.roles()
    models = {use.folder: read_model(use.folder) for spec in specs for use in spec.models}
    roles = [_role_plan(stage, spec, models, resources, number == 0) for number, spec in enumerate(specs)]
    made = Plan(roles, resources)
    problems = [*length_problems(stage, models), *rank_problems(stage, specs, made)]
    problems += device_problems(stage, specs, models, made)
    short = [*sum_problems(made), *gpu_memory_problems(made)]
    notes = memory_notes(made)
    if not short and not stage.debug:
        short, waits = placing_problems(stage, specs, made)
        notes += waits
    if impossible := architecture_problem(stage):
        problems.insert(0, impossible)
    return Plan(roles, resources, [*problems, *short], notes)


def _role_plan(
    stage: Stage, spec: RoleSpec, models: dict[str, ModelFacts], resources: Resources, first: bool
) -> RolePlan:
    """The plan of one role; in debug mode all are in one process, which the ``first`` accounts for."""
    placement = stage.cluster.of(spec.kind)
    model = spec.models[0].folder if spec.models else None
    facts = models[model] if model is not None else ModelFacts(0, 0, 0, 0)
    on_gpu = placement.gpus > 0 and not stage.debug
    weights = (facts.parameters or 0) * DTYPE_BYTES[stage.engine.dtype] / GIB
    needs, host = 0.0, BASE_GIB
    if spec.training is not None:
        needs, offloaded = _training_gib(stage, spec, facts, placement.workers, on_gpu, resources)
        host += offloaded
    elif spec.kv_cache_gib is not None:
        host = VLLM_BASE_GIB + 0.5  # buckets of weights on their way in
        needs = GPU_SHARE * resources.gpu_gib * placement.gpus if on_gpu else weights + spec.kv_cache_gib
    elif model is not None:
        needs = weights + activation_gib(facts, stage.engine, trained=False)
        if spec.logits:
            needs += logit_gib(facts, stage.engine, on_gpu, trained=False, head=False)
    if stage.debug:
        host = BASE_GIB if first else 0.0
    return RolePlan(
        role=spec.kind,
        name=spec.name,
        processes=1 if stage.debug else placement.workers,
        group="this process" if stage.debug else placement.group or spec.name,
        cpus=0.0 if stage.debug else placement.cpus,
        gpus=0.0 if stage.debug else placement.gpus,
        model=model,
        parameters=facts.parameters if model is not None else None,
        host_gib=host + (0.0 if on_gpu else needs),
        gpu_gib=needs if on_gpu else 0.0,
    )


def _training_gib(
    stage: Stage, spec: RoleSpec, facts: ModelFacts, ranks: int, on_gpu: bool, resources: Resources
) -> tuple[float, float]:
    """What one rank of a trained role needs in GiB: (on the device, kept on the host)."""
    training, parameters, adapter = spec.training, facts.parameters or 0, None
    assert training is not None
    if training.lora_rank:
        adapter = training.lora_rank * adapter_numbers(spec.models[0].folder, facts, training.lora_targets)
        parameters += adapter
    states, offloaded = training_state_gib(parameters, stage.engine, 1 if training.alone else ranks, adapter)
    frozen = sum(read_model(folder).parameters or 0 for folder in training.beside)
    needs = states + frozen * DTYPE_BYTES[stage.engine.dtype] / GIB
    needs += training.passes * activation_gib(facts, stage.engine, trained=True)
    trained = parameters if adapter is None else adapter
    needs += training.copies * 4 * trained / GIB
    offloaded += training.host_copies * 4 * trained / ranks / GIB
    if spec.logits:
        needs += logit_gib(facts, stage.engine, on_gpu, trained=True, head=adapter is None)
    if training.publishes is not None:
        published = trained * DTYPE_BYTES[stage.engine.dtype]
        with suppress(ValueError):  # without room there they go through the object store
            needs += training.publishes(published, resources.gpu_gib * GIB) / GIB
    return needs, offloaded


# Estimates


def training_state_gib(
    parameters: int, engine: EngineConfig, ranks: int, trained: int | None = None
) -> tuple[float, float]:
    """Weights, gradients and optimizer of one rank in GiB: (on the device, offloaded to the host).

    ``trained`` of the parameters have gradients and an optimizer; None for all of them.
    """
    size = DTYPE_BYTES[engine.dtype]
    zero = engine.stage_in_use
    trained = parameters if trained is None else trained
    weights = parameters * size / (ranks if zero == 3 else 1)
    gradients = trained * (4 / ranks if zero >= 2 else 4 if size == 4 else 6)
    master = 4 if size < 4 or zero > 0 else 0
    optimizer = trained * (master + 8) / (ranks if zero >= 1 else 1)
    beside, host = weights + gradients + optimizer, 0.0
    if engine.offload != "none":
        beside, host = beside - optimizer, host + optimizer
    if engine.offload == "all":
        beside, host = beside - weights, host + weights
    return beside / GIB, host / GIB


def activation_gib(facts: ModelFacts, engine: EngineConfig, *, trained: bool) -> float:
    """Activations of one micro-batch in GiB, logits apart; 0 where the model's shape is unknown."""
    if not facts.hidden or not facts.layers:
        return 0.0
    per_layer = ACTIVATIONS_PER_LAYER * facts.hidden
    if not trained:
        numbers = per_layer
    elif engine.gradient_checkpointing:
        numbers = facts.layers * facts.hidden + per_layer
    else:
        numbers = facts.layers * per_layer
    return engine.micro_batch_tokens * numbers * DTYPE_BYTES[engine.dtype] / GIB


def logit_gib(facts: ModelFacts, engine: EngineConfig, on_gpu: bool, *, trained: bool, head: bool) -> float:
    """Logits of one micro-batch and what is derived of them in GiB, made as `beaver_ray.models.logprobs` makes them.

    head: whether the head is trained too. 0 where the vocabulary is unknown.
    """
    tokens, vocabulary, size = engine.micro_batch_tokens, facts.vocabulary or 0, DTYPE_BYTES[engine.dtype]
    if tokens * vocabulary < DENSE_LOGITS or not facts.plain_logits:
        return tokens * vocabulary * 4 * (LOGIT_COPIES if trained else 2) / GIB
    chunk = chunk_rows(tokens, vocabulary, "cuda" if on_gpu else "cpu") * vocabulary
    # Two float32 buffers forward, one backward; in bfloat16 a chunk in that dtype besides.
    rounded = 0 if size == 4 else size * chunk
    forward, backward = 8 * chunk + rounded, 4 * chunk + rounded
    if head:  # its gradient adds up in float32; in bfloat16 each chunk's share is a matrix of its own
        backward += vocabulary * (facts.hidden or 0) * (4 if size == 4 else 4 + size)
    return (max(forward, backward) if trained else forward) / GIB
