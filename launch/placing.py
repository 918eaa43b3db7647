"""Whether Ray can place what a run asks for, found without Ray.

GPUs cannot be poured: a bundle of 0.6 GPUs lies on one GPU, one of more than 1 takes whole ones of one node, and what
shares a bundle shares its GPUs in the same way. Ray gives a part of a GPU from the fullest that has room for it, and
moves nothing that is placed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from actors.machine.bundles import Bundle, come_one_by_one, group_labels, group_strategy, make_bundles
from beaver_ray.config import Placement
from launch.resources import Node

Spots = dict[tuple[str, int], tuple[int, tuple[int, ...]]]
"""(group, number of the bundle) -> (its node, its GPUs there)."""


@dataclass(frozen=True)
class Piece:
    """Bundles of a group that Ray must place with one another in mind, or one that finds its own way."""

    group: str
    bundles: dict[int, Bundle]
    """By their number in the group; all on one node, or each on another."""
    labels: Mapping[str, str]
    apart: bool = False

    @property
    def size(self) -> tuple[float, float]:
        """GPUs and CPUs of all bundles."""
        gpus, cpus = (sum(bundle.get(kind, 0.0) for bundle in self.bundles.values()) for kind in ("GPU", "CPU"))
        return gpus, cpus

    def may_lie_on(self, node: Node) -> bool:
        """Whether the node has the labels that are asked for."""
        return all(_is_meant(node.labels.get(key), wanted) for key, wanted in self.labels.items())


def pieces_of(group: str, members: Mapping[str, Placement]) -> list[Piece]:
    """A group in pieces. UserError where its members' strategies or labels contradict one another."""
    placements = list(members.values())
    bundles = dict(enumerate(make_bundles(group, placements)))
    strategy, labels = group_strategy(group, placements), group_labels(group, placements)
    if strategy.startswith("STRICT") and not come_one_by_one(group, members):
        return [Piece(group, bundles, labels, strategy == "STRICT_SPREAD")]
    return [Piece(group, {number: bundle}, labels) for number, bundle in bundles.items()]


def place(pieces: Sequence[Piece], nodes: Sequence[Node]) -> tuple[Spots, Piece | None]:
    """Where the bundles lie, and the first piece without room; its bundles have no spot, nor have later ones.

    In the order in which they are asked for. Of several nodes nobody knows which Ray takes, so that there it is enough
    if all find room in one of two other orders: the largest first, or first what few nodes may hold.
    """
    spots, left_out = _in_order(pieces, nodes)
    if left_out is None or len(nodes) == 1:
        return spots, left_out
    largest = sorted(pieces, key=lambda piece: piece.size, reverse=True)
    for order in (largest, sorted(largest, key=lambda piece: sum(map(piece.may_lie_on, nodes)))):
        packed, failed = _in_order(order, nodes)
        if failed is None:
            return packed, None
    return spots, left_out


def share_whole_gpus(parts: Sequence[float], gpus: int) -> list[tuple[int, ...]] | None:
    """Which of so many whole GPUs actors get that ask for these parts, one after another; None where one gets none."""
    left = [1.0] * gpus
    taken = [_take(left, part) for part in parts]
    return None if None in taken else [own for own in taken if own is not None]


def _in_order(pieces: Sequence[Piece], nodes: Sequence[Node]) -> tuple[Spots, Piece | None]:
    cpus = [float("inf") if node.cpus is None else node.cpus for node in nodes]
    gpus = [[1.0] * int(node.gpus) for node in nodes]
    spots: Spots = {}
    for piece in pieces:
        allowed = [number for number, node in enumerate(nodes) if piece.may_lie_on(node)]
        tries = [allowed] if piece.apart or len(piece.bundles) == 1 else [[number] for number in allowed]
        found = next(filter(None, (_try(piece, some, cpus, gpus) for some in tries)), None)
        if found is None:
            return spots, piece
        spots |= found
    return spots, None


def _try(piece: Piece, among: Sequence[int], cpus: list[float], gpus: list[list[float]]) -> Spots | None:
    """Spots for the piece's bundles on the first of these nodes with room for each; taken from ``cpus`` and ``gpus``
    where all find one."""
    left_cpus, left_gpus = list(cpus), [list(left) for left in gpus]
    found: Spots = {}
    for number, bundle in piece.bundles.items():
        taken = {node for node, _ in found.values()} if piece.apart else set()
        for node in (node for node in among if node not in taken):
            if left_cpus[node] < bundle.get("CPU", 0.0):
                continue
            if (on := _take(left_gpus[node], bundle.get("GPU", 0.0))) is not None:
                left_cpus[node] = round(left_cpus[node] - bundle.get("CPU", 0.0), 4)
                found[piece.group, number] = node, on
                break
        else:
            return None
    cpus[:], gpus[:] = left_cpus, left_gpus
    return found


def _take(left: list[float], amount: float) -> tuple[int, ...] | None:
    """Take whole GPUs, or a part of the fullest with room, of what is left of each; their numbers, None without room.

    As Ray counts, in steps of 1/10000.
    """
    each = round(min(1.0, amount), 4)
    with_room = sorted((number for number, free in enumerate(left) if free >= each), key=left.__getitem__)
    taken = with_room[: ceil(amount)]
    if len(taken) < ceil(amount):
        return None
    for number in taken:
        left[number] = round(left[number] - each, 4)
    return tuple(taken)


def _is_meant(value: str | None, wanted: str) -> bool:
    """Whether a node's label is one that is asked for: VALUE, in(VALUE,VALUE), or either after a "!"."""
    plain = wanted.removeprefix("!")
    listed = plain[3:-1].split(",") if plain.startswith("in(") and plain.endswith(")") else [plain]
    return (value in [each.strip() for each in listed]) != wanted.startswith("!")
