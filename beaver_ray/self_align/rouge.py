"""ROUGE-L between texts, and an index that finds every text of a pool which is too like a new one.

Lin, ROUGE: A package for automatic evaluation of summaries (2004): with l the length of the longest common subsequence
of two texts of m and n words, ROUGE-L's F is 2l / (m + n). Words are in lower case, without punctuation; of scripts
without spaces every character is one. No stemming.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from beaver_ray.data.near import WORDS

FIRST_REBUILD = 64
"""Texts from which the index has an order that it has learnt."""


def words(text: str) -> list[str]:
    """The words that ROUGE-L compares."""
    return WORDS.findall(text.lower())


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

    Words are numbers here, and so are keys: a word and which of its occurrences in a text it is, so that a text is a
    set of keys.
    """

    def __init__(self, most: float) -> None:
        """most: from 0 to below 1."""
        if not 0 <= most < 1:
            raise ValueError(f"most must be from 0 to below 1, not {most}")
        self.most = most
        self.compared = 0
        """Texts that a longest common subsequence was worked out with, since the start."""
        self._words: dict[str, int] = {}
        self._key_numbers: dict[tuple[int, int], int] = {}
        self._texts: list[tuple[int, ...]] = []
        self._keys: list[tuple[int, ...]] = []
        self._counts: Counter[int] = Counter()
        self._rank: dict[int, int] = {}
        """How often a key occurred when the order was last made; one that did not is the rarest."""
        self._found_by: dict[int, list[int]] = {}
        self._rebuild_at = FIRST_REBUILD

    def __len__(self) -> int:
        return len(self._texts)

    def find(self, text: str) -> int | None:
        """The number, in the order of `add`, of a text with F above ``most``; None where there is none."""
        own, own_keys = self._read(text)
        keys, seen = frozenset(own_keys), set[int]()
        for key in self._first(own_keys):
            for number in self._found_by.get(key, ()):
                if number in seen:
                    continue
                seen.add(number)
                other = self._texts[number]
                least = self.most * (len(own) + len(other)) / 2
                if min(len(own), len(other)) > least and len(keys.intersection(self._keys[number])) > least:
                    self.compared += 1
                    if rouge_l(own, other) > self.most:
                        return number
        return None

    def add(self, text: str) -> None:
        """From now on the text is one of the pool."""
        own, keys = self._read(text)
        self._texts.append(own)
        self._keys.append(keys)
        self._counts.update(keys)
        if len(self) >= self._rebuild_at:
            self._rank, self._found_by = dict(self._counts), {}
            self._rebuild_at = 2 * len(self)
            for number in range(len(self)):
                self._index(number)
        else:
            self._index(len(self) - 1)

    def _read(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The numbers of a text's words, and of its keys."""
        own = tuple(self._words.setdefault(word, len(self._words)) for word in words(text))
        counts: Counter[int] = Counter()
        keys = []
        for word in own:
            key = (word, counts[word])
            keys.append(self._key_numbers.setdefault(key, len(self._key_numbers)))
            counts[word] += 1
        return own, tuple(keys)

    def _first(self, keys: Sequence[int]) -> list[int]:
        """The keys that a text is found by, and that it finds others by."""
        shared = int(self.most * len(keys) / (2 - self.most) + 1e-9)  # rather one key too many than one too few
        ordered = sorted(keys, key=lambda key: (self._rank.get(key, 0), key))
        return ordered[: len(ordered) - shared + 1]

    def _index(self, number: int) -> None:
        for key in self._first(self._keys[number]):
            self._found_by.setdefault(key, []).append(number)
