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

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from beaver_ray.config import DTYPE_BYTES, GPU_SHARE, EngineConfig
from beaver_ray.errors import UserError
from beaver_ray.fit import length_problems
from beaver_ray.gpus import on_this_machine, visible_gpus
from beaver_ray.models.chunks import DENSE_LOGITS, chunk_rows
from beaver_ray.models.folders import ModelFacts, adapter_numbers, read_model
from beaver_ray.stage import RoleSpec, Stage
from launch.compatibility import architecture_problem

if TYPE_CHECKING:
    from rich.table import Table

GIB = 2.0**30
# Measured: a process that has imported torch, transformers and Ray; one with vLLM besides.
BASE_GIB, VLLM_BASE_GIB = 0.6, 1.5
ACTIVATIONS_PER_LAYER = 17
LOGIT_COPIES = 3  # where all are made at once: logits, their log-softmax and its gradient, in float32


@dataclass(frozen=True)
class Resources:
    """What a machine or cluster has; ``cpus`` None where Ray is told how many to assume."""

    name: str
    memory_gib: float
    gpus: float = 0
    gpu_gib: float = 0.0
    """Memory of one GPU; 0 where unknown."""
    cpus: float | None = None


@dataclass(frozen=True)
class RolePlan:
    """One role, or one constraint's part of it; memory is of each process."""

    role: str
    name: str
    processes: int
    group: str
    cpus: float
    gpus: float
    model: str | None
    parameters: int | None
    host_gib: float
    gpu_gib: float


@dataclass(frozen=True)
class Plan:
    """All roles of a run, what they take together, and what stands against it."""

    roles: list[RolePlan]
    resources: Resources
    problems: list[str] = field(default_factory=list)

    @property
    def cpus(self) -> float:
        """CPUs of all processes."""
        return sum(r.cpus * r.processes for r in self.roles)

    @property
    def gpus(self) -> float:
        """GPUs of all processes."""
        return sum(r.gpus * r.processes for r in self.roles)

    @property
    def host_gib(self) -> float:
        """Estimated host memory of all processes."""
        return sum(r.host_gib * r.processes for r in self.roles)

    @property
    def gpu_gib(self) -> float:
        """Estimated GPU memory of all processes."""
        return sum(r.gpu_gib * r.processes for r in self.roles)

    @property
    def groups(self) -> dict[str, list[tuple[float, float]]]:
        """Group to its bundles (CPUs, GPUs): process i of every role of a group shares bundle i."""
        groups: dict[str, list[tuple[float, float]]] = {}
        for role in self.roles:
            bundles = groups.setdefault(role.group, [])
            bundles += [(0.0, 0.0)] * (role.processes - len(bundles))
            for index in range(role.processes):
                cpus, gpus = bundles[index]
                bundles[index] = (cpus + role.cpus, gpus + role.gpus)
        return groups

    def check(self) -> None:
        """Raises UserError with the first thing that cannot work."""
        if self.problems:
            raise UserError(self.problems[0])

    def table(self) -> Table:
        """The plan for a terminal."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=f"Plan for {self.resources.name}", title_justify="left", show_footer=True)
        gpus = f"{self.gpus:g} of {self.resources.gpus:g}"
        cpus = f"{self.cpus:g}" + ("" if self.resources.cpus is None else f" of {self.resources.cpus:g}")
        memory = f"{self.host_gib:.1f} of {self.resources.memory_gib:.1f}"
        for title, footer in (
            ("role", "all"),
            ("processes", str(sum(r.processes for r in self.roles))),
            ("group", ""),
            ("bundles", str(sum(len(b) for b in self.groups.values()))),
            ("CPUs each", cpus),
            ("GPUs each", gpus),
            ("parameters", ""),
            ("GiB each", memory),
            ("GPU GiB each", f"{self.gpu_gib:.1f}" if self.gpu_gib else ""),
            ("model", ""),
        ):
            right = title not in ("role", "group", "model")
            table.add_column(title, footer, justify="right" if right else "left", overflow="fold")
        seen: set[str] = set()
        for r in self.roles:
            bundles = "" if r.group in seen else str(len(self.groups[r.group]))
            seen.add(r.group)
            table.add_row(
                escape(r.name),
                str(r.processes),
                escape(r.group),
                bundles,
                f"{r.cpus:g}",
                f"{r.gpus:g}",
                "" if r.model is None else "?" if r.parameters is None else _count(r.parameters),
                f"{r.host_gib:.1f}",
                f"{r.gpu_gib:.1f}" if r.gpu_gib else "",
                escape(r.model or ""),
            )
        return table


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
    problems = [*length_problems(stage, models), *_rank_problems(stage, specs, made), *_room_problems(made)]
    if impossible := architecture_problem(stage):
        problems.insert(0, impossible)
    return Plan(roles, resources, problems)


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


# What stands against it


def _rank_problems(stage: Stage, specs: Sequence[RoleSpec], made: Plan) -> list[str]:
    problems = []
    for spec in specs:
        placement = stage.cluster.of(spec.kind)
        ranks, training = 1 if stage.debug else placement.workers, spec.training
        if training is not None and not training.alone and ranks > training.rows:
            problems.append(
                f"{training.rows_are} cannot be dealt to {ranks} ranks of {spec.name}; make it larger, or lower "
                f"cluster.placement.{spec.kind}.workers"
            )
        if training is not None and not training.alone and (parts := _parts_of_one_gpu(spec, made, stage)):
            problems.append(
                f"two of the {ranks} ranks of {spec.name} may lie on one GPU (bundles of {parts}), which NCCL refuses; "
                f"give cluster.placement.{spec.kind} more than 0.5 gpus, or workers: 1"
            )
        if spec.kv_cache_gib is not None and placement.gpus > 1 and placement.gpus != int(placement.gpus):
            problems.append(
                f"cluster.placement.{spec.kind}.gpus is {placement.gpus:g}; "
                f"a generator on several GPUs needs whole ones"
            )
    return problems


def _parts_of_one_gpu(spec: RoleSpec, made: Plan, stage: Stage) -> str:
    """The two smallest bundles of a role's ranks where Ray may put them on the same GPU; nothing where it cannot."""
    (role,) = (role for role in made.roles if role.name == spec.name)
    together = {stage.cluster.of(r.role).strategy for r in made.roles if r.group == role.group}
    if role.processes < 2 or not role.gpus or "STRICT_SPREAD" in together:
        return ""
    smallest = sorted(gpus for _, gpus in made.groups[role.group][: role.processes])[:2]
    return " and ".join(f"{gpus:g}" for gpus in smallest) if round(sum(smallest), 4) <= 1 else ""


def _room_problems(made: Plan) -> list[str]:
    have = made.resources
    problems = []
    if made.gpus > have.gpus:
        problems.append(
            f"the run asks for {made.gpus:g} GPUs, {have.name} has {have.gpus:g}; lower gpus or workers "
            f"under cluster.placement"
        )
    if have.cpus is not None and made.cpus > have.cpus:
        problems.append(
            f"the run asks for {made.cpus:g} CPUs, {have.name} has {have.cpus:g}; lower cpus or workers "
            f"under cluster.placement"
        )
    if made.host_gib > have.memory_gib:
        largest = max(made.roles, key=lambda r: r.host_gib * r.processes)
        problems.append(
            f"the run needs about {made.host_gib:.1f} GiB of memory, {have.name} has {have.memory_gib:.1f}; "
            f"most goes to {largest.name} ({largest.processes} x {largest.host_gib:.1f})"
        )
    if have.gpu_gib:
        for group, bundles in made.groups.items():
            for index, (_, gpus) in enumerate(bundles):
                sharing = [r for r in made.roles if r.group == group and r.gpus > 0 and r.processes > index]
                needs, has = sum(r.gpu_gib for r in sharing), math.ceil(gpus) * have.gpu_gib
                if needs > has:
                    names = ", ".join(r.name for r in sharing)
                    problems.append(
                        f"{names} need about {needs:.1f} GiB of the {has:.1f} GiB on {math.ceil(gpus)} GPUs "
                        f"of group {group}; raise gpus, workers or engine.zero_stage, or lower "
                        f"engine.micro_batch_tokens"
                    )
        if made.gpu_gib > have.gpus * have.gpu_gib and not problems:
            problems.append(
                f"the run needs about {made.gpu_gib:.1f} GiB of GPU memory, {have.name} has "
                f"{have.gpus * have.gpu_gib:.1f}; lower the rollouts' gpus or "
                f"engine.micro_batch_tokens"
            )
    return problems


# What there is


def find_resources(stage: Stage) -> Resources:
    """This machine's resources, or those of the Ray cluster that the run would join."""
    address = os.environ.get("RAY_ADDRESS")
    if stage.debug or address in (None, "local"):
        return this_machine()
    return cluster_resources(str(address))


def this_machine() -> Resources:
    """Memory (a container's limit included) and GPUs of this machine; a local Ray is told its CPUs."""
    memory = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    gpus = visible_gpus()
    return Resources("this machine", memory / GIB, len(gpus), min(gpus, default=0.0))


def cluster_resources(address: str) -> Resources:
    """What a Ray cluster has in all; its GPUs' memory is not known. UserError if it does not answer."""
    import ray

    from actors.machine.cluster import join_ray

    # Left connected for the run that follows: Ray may delete the folder that a job runs in when its process leaves.
    if not ray.is_initialized():
        join_ray(address, "RAY_ADDRESS")
    total = ray.cluster_resources()
    return Resources(
        f"the cluster at {address}",
        total.get("memory", 0.0) / GIB,
        total.get("GPU", 0.0),
        0.0,
        total.get("CPU", 0.0),
    )


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
