"""How far people agree beyond chance.

Cohen 1960, "A coefficient of agreement for nominal scales"; Fleiss 1971, "Measuring nominal scale agreement among many
raters". 1 is perfect agreement, 0 what chance gives; None where chance alone would agree always, or there is nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Agreement of two raters on the same items, [N] each."""
    if not first:
        return None
    count = len(first)
    agreed = sum(a == b for a, b in zip(first, second, strict=True)) / count
    theirs, others = Counter(first), Counter(second)
    by_chance = sum(theirs[value] * others[value] for value in theirs) / count**2
    return None if by_chance == 1 else (agreed - by_chance) / (1 - by_chance)


def fleiss_kappa(ratings: Sequence[Sequence[Hashable]]) -> float | None:
    """Agreement of several raters, whoever they are, on items [N]; each item's ratings are as many as it has.

    Items with fewer than two ratings say nothing. Where the items have different numbers of ratings, each weighs the
    same, and chance is taken over all ratings.
    """
    items = [Counter(item) for item in ratings if len(item) > 1]
    if not items:
        return None
    sizes = [item.total() for item in items]
    pairs = [sum(n * (n - 1) for n in item.values()) for item in items]
    agreed = sum(same / (size * (size - 1)) for same, size in zip(pairs, sizes, strict=True)) / len(items)
    every: Counter[Hashable] = sum(items, Counter())
    by_chance = sum((n / every.total()) ** 2 for n in every.values())
    return None if by_chance == 1 else (agreed - by_chance) / (1 - by_chance)
