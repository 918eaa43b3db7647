"""Bundles on nodes, placed by hand."""

from __future__ import annotations

import pytest

from beaver_ray.config import Placement
from beaver_ray.errors import UserError
from launch.placing import Spots, pieces_of, place, share_whole_gpus
from launch.resources import Node

EIGHT = (Node(100.0, 8),)
TWO_OF_FOUR = (Node(100.0, 4, cpus=8.0, labels={"pool": "spot"}), Node(100.0, 4, cpus=8.0))


def placed(groups: dict[str, list[Placement]], nodes: tuple[Node, ...]) -> tuple[Spots, str | None]:
    """Where bundles lie, and the group without room; each member of a group is called after its number in it."""
    pieces = [
        piece
        for group, members in groups.items()
        for piece in pieces_of(group, {group if not n else f"{group}-{n}": p for n, p in enumerate(members)})
    ]
    spots, left_out = place(pieces, nodes)
    return spots, left_out and left_out.group


def test_parts_lie_on_the_fullest_gpu_with_room() -> None:
    # What Ray was seen to do with eight GPUs.
    parts = [0.5, 0.6, 0.4, 0.5, 0.3, 0.7, 0.2]
    groups = {f"group-{n}": [Placement(gpus=part)] for n, part in enumerate(parts)}
    spots, left_out = placed(groups, EIGHT)
    assert left_out is None and [gpus for _, gpus in spots.values()] == [(0,), (1,), (1,), (0,), (2,), (2,), (3,)]
    assert share_whole_gpus([0.3, 0.8, 0.2, 0.4, 0.5], 3) == [(0,), (1,), (1,), (0,), (2,)]


def test_gpus_cannot_be_poured() -> None:
    # 0.5 + 2 + 3 + 3: three members of half a GPU take two whole ones.
    roles = {
        "rollout": [Placement(gpus=0.5)],
        "scorers": [Placement(gpus=0.5)] * 3,
        "policy": [Placement(gpus=1, workers=3)],
        "critic": [Placement(gpus=1, workers=3)],
    }
    assert placed(roles, EIGHT)[1] == "critic"
    assert placed(roles, (Node(100.0, 9),))[1] is None
    # Eight parts of 0.6 take a GPU each.
    halves = {"policy": [Placement(gpus=0.6, workers=4)], "critic": [Placement(gpus=0.6, workers=4)]}
    assert placed(halves, EIGHT)[1] is None
    assert placed(halves | {"scorers": [Placement(gpus=0.9)]}, EIGHT)[1] == "scorers"


def test_members_of_a_bundle_share_its_gpus() -> None:
    assert share_whole_gpus([0.6, 0.6, 0.6], 2) is None
    assert share_whole_gpus([0.6, 0.6, 0.4, 0.4], 2) == [(0,), (1,), (0,), (1,)]
    assert share_whole_gpus([1, 0.5, 0.5], 2) == [(0,), (1,), (1,)]
    # In this order the last finds 0.1 and 0.4 left, as Ray moves nothing.
    assert share_whole_gpus([0.5, 0.4, 0.6, 0.5], 2) is None
    assert share_whole_gpus([0.5] * 2 + [0.0], 1) == [(0,), (0,), ()]
    # Six of a sixth, in Ray's steps of 1/10000.
    assert share_whole_gpus([0.1666] * 6, 1) is not None and share_whole_gpus([0.16667] * 6, 1) is None


@pytest.mark.parametrize(
    ("role", "placement", "fits"),
    [
        ("rollout", Placement(gpus=8), False),
        ("rollout", Placement(gpus=4, workers=2), True),
        ("trainer", Placement(gpus=1, workers=8), True),
        ("trainer", Placement(gpus=1, workers=8, strategy="STRICT_PACK"), False),
        ("trainer", Placement(gpus=1, workers=4, strategy="STRICT_PACK"), True),
        ("trainer", Placement(gpus=1, workers=2, strategy="STRICT_SPREAD"), True),
        ("trainer", Placement(gpus=1, workers=3, strategy="STRICT_SPREAD"), False),
        # Each generator is placed for itself.
        ("rollout", Placement(gpus=1, workers=8, strategy="STRICT_PACK"), True),
        ("trainer", Placement(gpus=1, workers=4, labels={"pool": "spot"}), True),
        ("trainer", Placement(gpus=1, workers=5, labels={"pool": "spot"}), False),
        ("trainer", Placement(gpus=1, workers=4, labels={"pool": "!spot"}), True),
        ("trainer", Placement(gpus=1, workers=5, labels={"pool": "in(spot, other)"}), False),
        ("trainer", Placement(cpus=9), False),
        ("trainer", Placement(cpus=8, workers=2), True),
        ("trainer", Placement(cpus=0), True),
    ],
)
def test_two_nodes_of_four(role: str, placement: Placement, fits: bool) -> None:
    assert (placed({role: [placement]}, TWO_OF_FOUR)[1] is None) is fits


def test_of_several_nodes_any_order_will_do() -> None:
    # Alone the first role lies where the second must.
    groups = {"scorer": [Placement(gpus=1)], "trainer": [Placement(gpus=1, workers=4, strategy="STRICT_PACK")]}
    nodes = (Node(100.0, 4), Node(100.0, 1))
    spots, left_out = placed(groups, nodes)
    assert left_out is None and spots["scorer", 0] == (1, (0,))
    assert [spots["trainer", n] for n in range(4)] == [(0, (n,)) for n in range(4)]


def test_what_few_nodes_may_hold_comes_first() -> None:
    spot = Placement(gpus=1, workers=4, labels={"pool": "spot"})
    for policy in (Placement(gpus=1, workers=4), Placement(gpus=2, workers=2)):
        spots, left_out = placed({"policy": [policy], "rollout": [spot]}, TWO_OF_FOUR)
        assert left_out is None
        assert {spots["rollout", n][0] for n in range(4)}.isdisjoint(spots["policy", n][0] for n in range(2))


def test_where_nobody_says_how_many_cpus_there_are() -> None:
    assert placed({"rollout": [Placement(cpus=100, workers=100)]}, (Node(8.0),))[1] is None


def test_a_group_asks_for_one_strategy() -> None:
    with pytest.raises(UserError, match="SPREAD and STRICT_PACK; choose one"):
        pieces_of("g", {"a": Placement(strategy="SPREAD"), "b": Placement(strategy="STRICT_PACK")})
