"""Near duplicates among texts: MinHash finds pairs that may be alike, their shingles decide.

Broder, On the resemblance and containment of documents (1997): the share of equal minima of two sets under random hash
functions estimates their Jaccard similarity, the size of what both hold over the size of what either holds.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from beaver_ray.spelling import words

ALIKE = 0.8
"""Jaccard similarity of shingles from which two texts are near duplicates."""
SHINGLE = 3
BANDS, IN_A_BAND = 16, 4  # texts of similarity 0.8 meet in some band with probability 1 - (1 - 0.8^4)^16 = 0.9998
MOST_COMPARED = 8
"""Texts of one band that a new one is compared with; more would take time that grows with the square of the rows."""

_RANDOM = np.random.default_rng(0).integers(0, 2**63, (2, BANDS * IN_A_BAND), dtype=np.uint64)
_FACTORS_H, _OFFSETS_H = _RANDOM[0] | np.uint64(1), _RANDOM[1]


def shingles(text: str) -> NDArray[np.uint64]:
    """A number for each distinct run of three words, sorted; case and, beside words, punctuation do not count."""
    found = words(text) or list("".join(text.split()))
    numbers = np.array([zlib.crc32(word.encode()) for word in found], dtype=np.uint64)
    if len(numbers) < SHINGLE:
        numbers = np.append(numbers, np.zeros(SHINGLE - len(numbers), dtype=np.uint64))
    count = len(numbers) - SHINGLE + 1
    mixed = np.zeros(count, dtype=np.uint64)
    for place in range(SHINGLE):  # wraps around at 2^64
        mixed = (mixed ^ numbers[place : place + count]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed)


def similarity(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> float:
    """Jaccard similarity of two texts' `shingles`."""
    both = len(np.intersect1d(first, second, assume_unique=True))
    return both / (len(first) + len(second) - both)


class NearTexts:
    """Texts that have been seen, and whether a new one is nearly one of them."""

    def __init__(self) -> None:
        self.seen: list[NDArray[np.uint64]] = []
        self.bands: dict[bytes, list[int]] = {}

    def find(self, text: str) -> int | None:
        """The number, in the order of `add`, of a text that this one is nearly; None where none was found."""
        return self._find(*_signed(text))

    def add(self, text: str) -> int | None:
        """`find`, and from now on the text is one of those seen."""
        own, keys = _signed(text)
        found = self._find(own, keys)
        number = len(self.seen)
        self.seen.append(own)
        for key in keys:
            there = self.bands.setdefault(key, [])
            if len(there) < MOST_COMPARED:
                there.append(number)
        return found

    def _find(self, own: NDArray[np.uint64], keys: Iterable[bytes]) -> int | None:
        compared: set[int] = set()
        for key in keys:
            for number in self.bands.get(key, ()):
                if number not in compared and similarity(own, self.seen[number]) >= ALIKE:
                    return number
                compared.add(number)
        return None


def _signed(text: str) -> tuple[NDArray[np.uint64], list[bytes]]:
    """A text's shingles, and a key for each of its bands."""
    own = shingles(text)
    minima_H = ((own[:, None] * _FACTORS_H + _OFFSETS_H) >> np.uint64(32)).min(axis=0).astype(np.uint32)
    return own, [bytes([band]) + part.tobytes() for band, part in enumerate(minima_H.reshape(BANDS, IN_A_BAND))]
