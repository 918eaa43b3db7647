"""ROUGE-L between texts, and an index that finds every text of a pool which is too like a new one.

Lin, ROUGE: A package for automatic evaluation of summaries (2004): with l the length of the longest common subsequence
of two texts of m and n words, ROUGE-L's F is 2l / (m + n). Words are in lower case, without punctuation; of scripts
without spaces every character is one. No stemming.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beaver_ray.spelling import words

FIRST_REBUILD = 64
"""Texts from which the index has an order that it has learnt."""
BITS = 256
"""Of the row of a text in the index: more than texts have words, so that few keys share one."""


def longest_common(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, by whole numbers as rows of bits.

    Hyyrö, Bit-parallel LCS-length computation revisited (2004): a 0 in ``row`` marks a place of ``first`` where the
    length rises by one.
    """
    places: dict[Hashable, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(first) - row.bit_count()


def rouge_l(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """F of two texts' words; 0 where either has none."""
    if not first or not second:
        return 0.0
    return 2 * longest_common(first, second) / (len(first) + len(second))


class RougePool:
    """Texts, and whether a new one has F above ``most`` with any of them. Exact, as if it compared with all.

    A common subsequence is at most as long as the words that two texts share. For F above t they must share more than
    t (m + n) / 2 words, and so, whatever the length m of the other text, at least c(n) of them, the least whole number
    above t n / (2 - t). Of two sets that share c elements the first n - c + 1 of the one and the first m - c + 1 of the
    other, in any one order, share one (prefix filtering; Chaudhuri et al., A primitive operator for similarity joins,
    2006). Texts are found by those of their keys alone, in order of how rare they are; the order is made anew whenever
    the pool has doubled.

    Those that are found are many where words are common. Each text has a row of bits, in which every key sets one: a
    bit of one text that another lacks is a key that they do not share, and so the rows bound how many they share
    (bitmap filtering; Sandes et al., Bitmap filter: speeding up exact set similarity joins, 2018). Only what that bound
    lets pass is compared.

    Words are numbers here, and so are keys: a word and which of its occurrences in a text it is, so that a text is a
    set of keys.
    """

    def __init__(self, most: float) -> None:
        """most: from 0 to below 1."""
        if not 0 <= most < 1:
            raise ValueError(f"most must be from 0 to below 1, not {most}")
        self.most = most
        self.found = self.compared = 0
        """Texts that were found by a key, each as often as it was; and with which a longest common subsequence was
        worked out, since the start."""
        self._words: dict[str, int] = {}
        self._key_numbers: dict[tuple[int, int], int] = {}
        self._texts: list[tuple[int, ...]] = []
        self._keys: list[tuple[int, ...]] = []
        self._bits_NW = np.zeros((FIRST_REBUILD, BITS // 64), dtype=np.uint64)
        self._sizes_N = np.zeros(FIRST_REBUILD, dtype=np.int64)
        self._counts: Counter[int] = Counter()
        self._rank: dict[int, int] = {}
        """How often a key occurred when the order was last made; one that did not is the rarest."""
        self._found_by: dict[int, array[int]] = {}
        self._rebuild_at = FIRST_REBUILD

    def __len__(self) -> int:
        return len(self._texts)

    def find(self, text: str) -> int | None:
        """The number, in the order of `add`, of a text with F above ``most``; None where there is none."""
        own, own_keys = self._read(text)
        keys = frozenset(own_keys)
        for number in self._near(own_keys):
            other = self._texts[number]
            if len(keys.intersection(self._keys[number])) > self._least(len(own), len(other)):
                self.compared += 1
                if rouge_l(own, other) > self.most:
                    return number
        return None

    def add(self, text: str) -> None:
        """From now on the text is one of the pool."""
        own, keys = self._read(text)
        number = len(self)
        if number == len(self._sizes_N):
            self._bits_NW = np.concatenate([self._bits_NW, np.zeros_like(self._bits_NW)])
            self._sizes_N = np.concatenate([self._sizes_N, np.zeros_like(self._sizes_N)])
        self._bits_NW[number], self._sizes_N[number] = _bits(keys), len(own)
        self._texts.append(own)
        self._keys.append(keys)
        self._counts.update(keys)
        if len(self) >= self._rebuild_at:
            self._rank, self._found_by = dict(self._counts), {}
            self._rebuild_at = 2 * len(self)
            for other in range(len(self)):
                self._index(other)
        else:
            self._index(number)

    def _read(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The numbers of a text's words, and of its keys."""
        own = tuple(self._words.setdefault(word, len(self._words)) for word in words(text))
        counts: dict[int, int] = {}
        keys = []
        for word in own:
            key = (word, counts.get(word, 0))
            keys.append(self._key_numbers.setdefault(key, len(self._key_numbers)))
            counts[word] = key[1] + 1
        return own, tuple(keys)

    def _near(self, keys: Sequence[int]) -> list[int]:
        """The texts that share a rare key and, as far as bits can say, enough of all keys."""
        # Views of arrays that grow; they must be gone before the next text is added.
        found = [
            np.frombuffer(self._found_by[key], dtype=np.int32) for key in self._first(keys) if key in self._found_by
        ]
        if not found:
            return []
        numbers_M = np.concatenate(found)
        self.found += len(numbers_M)
        sizes_M, bits_MW, own_W = self._sizes_N[numbers_M], self._bits_NW[numbers_M], _bits(keys)
        not_there_M = np.bitwise_count(own_W & ~bits_MW).sum(axis=1, dtype=np.int64)
        not_here_M = np.bitwise_count(bits_MW & ~own_W).sum(axis=1, dtype=np.int64)
        shared_M = np.minimum(len(keys) - not_there_M, sizes_M - not_here_M)
        near_M = numbers_M[shared_M > self._least(len(keys), sizes_M)]
        return list(dict.fromkeys(near_M.tolist()))

    def _least(self, size: int, other: Any) -> Any:
        """Words, or keys, that two texts of these sizes must share more than; rather a little less than too much."""
        return self.most * (size + other) / 2 - 1e-9

    def _first(self, keys: Sequence[int]) -> list[int]:
        """The keys that a text is found by, and that it finds others by."""
        shared = int(self.most * len(keys) / (2 - self.most) + 1e-9)  # rather one key too many than one too few
        ordered = sorted(keys, key=lambda key: (self._rank.get(key, 0), key))
        return ordered[: len(ordered) - shared + 1]

    def _index(self, number: int) -> None:
        for key in self._first(self._keys[number]):
            self._found_by.setdefault(key, array("i")).append(number)


def _bits(keys: Sequence[int]) -> NDArray[np.uint64]:
    """The row of bits [BITS / 64] of some keys."""
    row = 0
    for key in keys:
        row |= 1 << key % BITS
    return np.frombuffer(row.to_bytes(BITS // 8, "little"), dtype="<u8")
