"""What the fuzzing tests share: broken trees and files, and the one way in which they may be refused."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from beaver_ray.errors import UserError

ODD_TEXT = ["", " ", "a\nb", "a\x00b", "\ud800", "\u2028", "${workspace}", "${x}", "${", "~nobody/x", "x" * 300, "1e5"]
ODD_NUMBERS = [0, -1, 2**31, 2**63, 10**4000, -(10**400), 0.5, 1e308, -1e-308, float("nan"), float("inf")]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(ODD_TEXT),
    st.sampled_from(ODD_NUMBERS),
)
dates = st.dates() | st.datetimes(timezones=st.just(datetime.UTC))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def accepted(load: Callable[[], Any]) -> Any:
    """What ``load`` gives; None where it refuses with one line. Whatever else it raises fails the test."""
    try:
        return load()
    except UserError as error:
        assert str(error).strip() and len(str(error).splitlines()) == 1, repr(str(error))
        return None


def paths(tree: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where everything in a tree stands."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in ((*above, key), *paths(value, (*above, key)))]


@st.composite
def mutated(draw: st.DrawFn, tree: Any, odd: st.SearchStrategy[Any] = values) -> Any:
    """The tree after one to three changes: something dropped, renamed, added, nested, or replaced by an odd value."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        known = paths(tree)
        if not known:
            break
        *parents, last = draw(st.sampled_from(known))
        node = tree
        for key in parents:
            node = node[key]
        match draw(st.sampled_from(("drop", "rename", "add", "nest", "list", "replace", "replace", "replace"))):
            case "drop":
                del node[last]
            case "rename" if isinstance(node, dict):
                node[draw(st.sampled_from([f"{last}s", str(last)[:-1], 7, None, ""]))] = node.pop(last)
            case "add" if isinstance(node, dict):
                node[draw(st.text(max_size=6))] = draw(odd)
            case "nest":
                node[last] = {str(last): node[last]}
            case "list":
                node[last] = [node[last]] * draw(st.integers(0, 3))
            case _:
                node[last] = draw(odd)
    return tree


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes after one to three damages: cut off, some overwritten, some put in."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(("cut", "overwrite", "insert")))
        piece = b"" if kind == "cut" else draw(st.binary(min_size=1, max_size=8))
        rest = b"" if kind == "cut" else content[place + (len(piece) if kind == "overwrite" else 0) :]
        content = content[:place] + piece + rest
    return content
