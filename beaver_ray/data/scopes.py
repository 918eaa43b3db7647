"""Which prompts a constraint counts over: those whose row says what its ``where`` does.

A row's value and the wanted one are compared as text, so that true in a JSON file is "true" in a CSV file, and 1 is
1.0. All fields of a ``where`` must match, each any one of its values; of a list in a row any item will do, and ``a.b``
is b of what stands in a. What is no text, number, true, false or null matches nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beaver_ray.data.sources import RawSample, as_text, fits, several
from beaver_ray.errors import UserError

SHOWN = 5  # values of a field that an error names

Where = Mapping[str, Any]
"""Field to a value, or to a list of them."""


def masks(scopes: Mapping[str, Where], samples: Sequence[RawSample]) -> dict[str, NDArray[np.bool_]]:
    """For each constraint that has a scope, which of the samples [N] it counts over."""
    return {
        name: np.fromiter((fits(where, sample.fields) for sample in samples), dtype=np.bool_, count=len(samples))
        for name, where in scopes.items()
    }


def check_masks(
    scopes: Mapping[str, Where], inside: Mapping[str, NDArray[np.bool_]], samples: Sequence[RawSample]
) -> None:
    """UserError where a scope holds none of the training prompts; ``samples`` are what they were read from."""
    for name, where in scopes.items():
        if not inside[name].any():
            raise UserError(
                f"constraints.{name}.where: no training prompt has {in_words(where)}; their rows have {_known(samples)}"
            )


def lines(scopes: Mapping[str, Where], inside: Mapping[str, NDArray[np.bool_]]) -> list[str]:
    """Over how many prompts each scope is, a line each."""
    return [
        f"{name} counts over {marks.sum()} of {len(marks)} prompts: {in_words(scopes[name])}"
        for name, marks in inside.items()
    ]


def in_words(where: Where) -> str:
    """A scope on one line: "kind: benign or edge, safe: true"."""
    return ", ".join(f"{field}: {' or '.join(map(_shown, several(wanted)))}" for field, wanted in where.items())


def _shown(value: Any) -> str:
    text = as_text(value)
    if not text:
        return "..." if text is None else '""'
    return text if len(text) <= 40 else f"{text[:37]}..."


def _known(samples: Sequence[RawSample]) -> str:
    """The fields of the rows with their most frequent values."""
    counts: dict[str, Counter[str]] = {}
    for sample in samples:
        for field, value in sample.fields.items():
            counts.setdefault(field, Counter())[_shown(value)] += 1
    if not counts:
        return "no further fields"
    described = []
    for field in sorted(counts):
        values = [value for value, _ in counts[field].most_common(SHOWN)]
        more = ", ..." if len(counts[field]) > SHOWN else ""
        described.append(f"{field} ({', '.join(values)}{more})")
    return ", ".join(described)
