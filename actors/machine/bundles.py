"""The placement groups that a configuration asks Ray for, and their bundles; worked out without Ray."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import ceil

from beaver_ray.config import ClusterConfig, Placement
from beaver_ray.errors import UserError

Bundle = dict[str, float]
GENERATORS = "rollout"


def groups_of(config: ClusterConfig, roles: Mapping[str, str]) -> dict[str, dict[str, Placement]]:
    """Group to its members, each with what it takes; ``roles``: each role's name, and its key under placement."""
    groups: dict[str, dict[str, Placement]] = {}
    for name, kind in roles.items():
        placement = config.of(kind)
        groups.setdefault(placement.group or name, {})[name] = placement
    return groups


def come_one_by_one(group: str, members: Iterable[str]) -> bool:
    """Whether each bundle is a placement group to itself: generators come and go, where they share no group."""
    return group == GENERATORS and list(members) == [GENERATORS]


def make_bundles(group: str, members: Sequence[Placement]) -> list[Bundle]:
    """The bundles of a placement group: bundle i holds worker i of every member that has so many.

    Above 1 GPU a bundle has whole ones, as Ray wants it; the members' fractions are packed onto them.
    """
    group_strategy(group, members)
    group_labels(group, members)
    bundles = []
    for index in range(max(p.workers for p in members)):
        here = [p for p in members if index < p.workers]
        # Ray counts in steps of 1/10000; sums of fractions must not exceed 1 by a rounding error.
        cpus, gpus = round(sum(p.cpus for p in here), 4), round(sum(p.gpus for p in here), 4)
        bundle = {"CPU": cpus, "GPU": float(ceil(gpus)) if gpus > 1 else gpus}
        bundles.append({kind: amount for kind, amount in bundle.items() if amount} or {"CPU": 0.001})
    return bundles


def group_strategy(group: str, members: Sequence[Placement]) -> str:
    """The strategy of a placement group: the one that a member sets. UserError where two set different ones."""
    chosen = sorted({p.strategy for p in members if p.strategy != "PACK"})
    if len(chosen) > 1:
        raise UserError(f"cluster.placement: the roles of group {group} ask for {' and '.join(chosen)}; choose one")
    return chosen[0] if chosen else "PACK"


def group_labels(group: str, members: Sequence[Placement]) -> dict[str, str]:
    """The labels of a placement group: all that members ask for. UserError where two want one of different values."""
    labels: dict[str, str] = {}
    for key, value in (label for placement in members for label in placement.labels.items()):
        if labels.setdefault(key, value) != value:
            both = f"{key}={labels[key]} and {key}={value}"
            raise UserError(f"cluster.placement: the roles of group {group} ask for nodes with {both}; choose one")
    return labels
