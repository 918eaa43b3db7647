"""What stands against a run: batches that its ranks cannot share, GPUs that its processes cannot use, and room and
memory that are not there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from actors.machine.bundles import groups_of
from beaver_ray.config import DTYPE_BYTES, GPU_SHARE, Placement
from beaver_ray.errors import UserError
from beaver_ray.models.folders import ModelFacts
from beaver_ray.stage import RoleSpec, Stage
from launch.placing import Piece, Spots, pieces_of, place, share_whole_gpus
from launch.plans import Plan, RolePlan
from launch.resources import GIB, Resources


def rank_problems(stage: Stage, specs: Sequence[RoleSpec], made: Plan) -> list[str]:
    """Of roles whose ranks train together: batches with too few rows, and ranks on one GPU."""
    problems = []
    for spec, role in zip(specs, made.roles, strict=True):
        ranks, training = role.processes, spec.training
        if training is None or training.alone:
            continue
        if ranks > training.rows:
            problems.append(
                f"{training.rows_are} cannot be dealt to {ranks} ranks of {spec.name}; make it larger, or lower "
                f"cluster.placement.{spec.kind}.workers"
            )
        if parts := _parts_of_one_gpu(role, made, stage):
            problems.append(
                f"two of the {ranks} ranks of {spec.name} may lie on one GPU (bundles of {parts}), which NCCL refuses; "
                f"give cluster.placement.{spec.kind} more than 0.5 gpus, or workers: 1"
            )
    return problems


def _parts_of_one_gpu(role: RolePlan, made: Plan, stage: Stage) -> str:
    """The two smallest bundles of a role's ranks where Ray may put them on the same GPU; nothing where it cannot."""
    together = {stage.cluster.of(r.role).strategy for r in made.roles if r.group == role.group}
    if role.processes < 2 or not role.gpus or "STRICT_SPREAD" in together:
        return ""
    smallest = sorted(gpus for _, gpus in made.groups[role.group][: role.processes])[:2]
    return " and ".join(f"{gpus:g}" for gpus in smallest) if round(sum(smallest), 4) <= 1 else ""


def device_problems(stage: Stage, specs: Sequence[RoleSpec], models: Mapping[str, ModelFacts], made: Plan) -> list[str]:
    """Of each role's own GPUs: more than its processes use, or fewer than its generators' models need."""
    problems = []
    for spec, role in zip(specs, made.roles, strict=True):
        option = f"cluster.placement.{spec.kind}.gpus"
        if spec.kv_cache_gib is not None:
            problems += _generator_problems(spec, role, models, DTYPE_BYTES[stage.engine.dtype], made.resources)
        elif role.gpus > 1 and role.gpus != int(role.gpus):
            problems.append(f"{option} is {role.gpus:g}; Ray gives parts of one GPU, or whole ones")
        elif role.gpus > 1 and spec.models:  # a function's process may do with its GPUs what it likes
            problems.append(
                f"{option} is {role.gpus:g}, but a process of {spec.name} uses one GPU; "
                f"write workers: {round(role.gpus * role.processes)}, gpus: 1"
            )
    return problems


def _generator_problems(
    spec: RoleSpec, role: RolePlan, models: Mapping[str, ModelFacts], bytes_each: int, have: Resources
) -> list[str]:
    option = f"cluster.placement.{spec.kind}.gpus"
    if role.gpus > 1 and role.gpus != int(role.gpus):
        return [f"{option} is {role.gpus:g}; a generator on several GPUs needs whole ones"]
    problems = []
    for folder in dict.fromkeys(use.folder for use in spec.models):
        heads, weights = models[folder].heads, (models[folder].parameters or 0) * bytes_each / GIB
        if heads and role.gpus > 1 and heads % int(role.gpus):
            problems.append(
                f"{option} is {role.gpus:g}, but the {heads} attention heads of {folder} cannot be dealt to so many; "
                f"set it to a divisor of {heads}"
            )
        if 0 < role.gpu_gib < weights and not models[folder].quantized:
            least = weights / (GPU_SHARE * have.gpu_gib)
            enough = math.ceil(least) if least > 1 else math.ceil(100 * least) / 100
            problems.append(
                f"{option} is {role.gpus:g}, of which a generator takes {role.gpu_gib:.1f} GiB, but the weights of "
                f"{folder} are {weights:.1f}; set it to {enough:g} at least, and more for the KV cache"
            )
    return problems


def sum_problems(made: Plan) -> list[str]:
    """What the roles take together against what there is in all."""
    have = made.resources
    problems = [
        f"the run asks for {asked:g} {kind}, {have.name} has {there:g}; lower {kind.lower()} or workers under "
        f"cluster.placement"
        for kind, asked, there in (("GPUs", made.gpus, have.gpus), ("CPUs", made.cpus, have.cpus))
        if there is not None and asked > there
    ]
    if made.host_gib > have.memory_gib:
        largest = max(made.roles, key=lambda r: r.host_gib * r.processes)
        problems.append(
            f"the run needs about {made.host_gib:.1f} GiB of memory, {have.name} has {have.memory_gib:.1f}; "
            f"most goes to {largest.name} ({largest.processes} x {largest.host_gib:.1f})"
        )
    return problems


def gpu_memory_problems(made: Plan) -> list[str]:
    """What the roles of each group need of its GPUs' memory, and all roles of all GPUs'; none where it is unknown."""
    have = made.resources
    if not have.gpu_gib:
        return []
    problems = []
    for group, bundles in made.groups.items():
        for index, (_, gpus) in enumerate(bundles):
            sharing = [r for r in _members(made, group, index) if r.gpus > 0]
            needs, has = sum(r.gpu_gib for r in sharing), math.ceil(gpus) * have.gpu_gib
            if needs > has:
                # A process alone has a whole GPU's memory already, whatever its part.
                more = "gpus, workers" if len(sharing) > 1 else "workers"
                problems.append(
                    f"{', '.join(r.name for r in sharing)} need about {needs:.1f} GiB of the {has:.1f} GiB on "
                    f"{math.ceil(gpus)} GPUs of group {group}; raise {more} or engine.zero_stage, or lower "
                    f"engine.micro_batch_tokens"
                )
    if made.gpu_gib > have.gpus * have.gpu_gib and made.gpus <= have.gpus and not problems:
        problems.append(
            f"the run needs about {made.gpu_gib:.1f} GiB of GPU memory, {have.name} has "
            f"{have.gpus * have.gpu_gib:.1f}; lower the rollouts' gpus or "
            f"engine.micro_batch_tokens"
        )
    return problems


def _members(made: Plan, group: str, index: int) -> list[RolePlan]:
    """The roles with a process in bundle ``index`` of a group."""
    return [r for r in made.roles if r.group == group and r.processes > index]


def placing_problems(stage: Stage, specs: Sequence[RoleSpec], made: Plan) -> tuple[list[str], list[str]]:
    """(what Ray would refuse or never place, or place where memory is short; what to know of it).

    Of a run whose sums fit.
    """
    nodes, problems, notes = made.resources.nodes, [], []
    pieces: list[Piece] = []
    for group, members in groups_of(stage.cluster, {spec.name: spec.kind for spec in specs}).items():
        try:
            found = pieces_of(group, members)
        except UserError as error:
            problems.append(str(error))
            continue
        problems += _sharing_problems(group, members, found)[:1]
        if any(piece.may_lie_on(node) for piece in found[:1] for node in nodes):
            pieces += found
        else:
            labels = ", ".join(f"{key}={value}" for key, value in found[0].labels.items())
            ends = "would wait for one" if made.resources.several else "would not be placed"
            notes.append(f"no node of {made.resources.name} has {labels}: {', '.join(members)} {ends}")
    if problems:
        return problems, notes
    spots, left_out = place(pieces, nodes)
    if left_out is not None:
        return [_no_room(left_out, made)], notes
    memory = _node_memory_problems(pieces, made)
    if len(nodes) > 1:  # nobody knows which nodes Ray takes
        return memory[:1], [*notes, *_shared_gpu_problems(spots, made, "may put")[:1]]
    return [*memory, *_shared_gpu_problems(spots, made, "puts")][:1], notes


def _sharing_problems(group: str, members: Mapping[str, Placement], pieces: Sequence[Piece]) -> list[str]:
    """Of bundles with several GPUs, onto which the members' parts do not go."""
    problems = []
    for number, bundle in ((number, bundle) for piece in pieces for number, bundle in piece.bundles.items()):
        parts = [placement.gpus for placement in members.values() if number < placement.workers]
        whole = math.ceil(bundle.get("GPU", 0.0))
        if share_whole_gpus(parts, whole) is None:
            problems.append(
                f"{', '.join(members)} ask for {' + '.join(f'{part:g}' for part in parts if part)} GPUs in one bundle "
                f"of group {group}, but its {whole} GPUs cannot be shared so: a part lies on one GPU; change their "
                f"gpus, or give one of them another group"
            )
    return problems


def _no_room(piece: Piece, made: Plan) -> str:
    names = _names(made, piece)
    gpus, cpus = piece.size
    what = f"a bundle of {gpus:g} GPUs and {cpus:g} CPUs"
    if len(piece.bundles) > 1:
        strategy = "each on another node (STRICT_SPREAD)" if piece.apart else "on one node (STRICT_PACK)"
        what = f"{len(piece.bundles)} bundles {strategy}, {gpus:g} GPUs and {cpus:g} CPUs in all"
    nodes = Counter(
        f"{node.gpus:g} GPUs" + ("" if node.cpus is None else f" and {node.cpus:g} CPUs")
        for node in made.resources.nodes
        if piece.may_lie_on(node)
    )
    where = ", ".join(f"{count} x {node}" for node, count in nodes.items())
    labels = " with its labels" if piece.labels else ""
    return (
        f"no room for {names} beside the other roles: {what}; nodes{labels}: {where}. A part of a GPU lies on one GPU, "
        f"and more than 1 are whole ones of one node; change cluster.placement"
    )


def _node_memory_problems(pieces: Sequence[Piece], made: Plan) -> list[str]:
    most = max(node.memory_gib for node in made.resources.nodes)
    problems = []
    for piece in pieces:
        each = {number: sum(r.host_gib for r in _members(made, piece.group, number)) for number in piece.bundles}
        needs = max(each.values()) if piece.apart else sum(each.values())
        if needs > most:
            problems.append(
                f"{_names(made, piece)} need about {needs:.1f} GiB of memory on one node, and no node of "
                f"{made.resources.name} has more than {most:.1f}; raise workers, or lower engine.micro_batch_tokens"
            )
    return problems


def _names(made: Plan, piece: Piece) -> str:
    """The roles with a process in any of these bundles."""
    return ", ".join(dict.fromkeys(r.name for number in piece.bundles for r in _members(made, piece.group, number)))


def _shared_gpu_problems(spots: Spots, made: Plan, puts: str) -> list[str]:
    """Of GPUs on which several processes lie, as Ray would place them: what they need of its memory together.

    puts: "puts" where that is certain, else "may put".
    """
    on: dict[tuple[int, int], list[tuple[RolePlan, float]]] = {}
    for (group, number), (node, gpus) in spots.items():
        sharing = [r for r in _members(made, group, number) if r.gpus > 0]
        inside = share_whole_gpus([r.gpus for r in sharing], len(gpus)) or []
        for role, own in zip(sharing, inside, strict=True):
            for gpu in own:
                on.setdefault((node, gpus[gpu]), []).append((role, role.gpu_gib / len(own)))
    have, problems = made.resources.gpu_gib, []
    for together in on.values():
        needs = sum(gib for _, gib in together)
        if len(together) > 1 and have and needs > have:
            counts = Counter(role.name for role, _ in together)
            names = " and ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())
            problems.append(
                f"Ray {puts} {names} on one GPU ({' + '.join(f'{role.gpus:g}' for role, _ in together)}), where they "
                f"need about {needs:.1f} of {have:.1f} GiB; raise their gpus so that each has one, or lower "
                f"engine.micro_batch_tokens"
            )
    return problems


def memory_notes(made: Plan) -> list[str]:
    """What the plan does not know of the GPUs' memory."""
    have = made.resources
    if not made.gpus or not have.gpus:
        return []
    if not have.gpu_gib:
        return [f"GPU memory of {have.name} is not known: not checked"]
    sizes = sorted(node.gpu_gib for node in have.nodes if node.gpus)
    if sizes[-1] - sizes[0] < 1:
        return []
    return [
        f"GPUs of {sizes[0]:.0f} to {sizes[-1]:.0f} GiB on {have.name}: the plan counts with the largest; labels under "
        f"cluster.placement keep a role off the others"
    ]
