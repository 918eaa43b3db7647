"""The pool of self-instruct at size: every text is held against all that were kept before, by ROUGE-L, exactly.

    python benchmarks/rouge_pool.py --texts 300000

Texts are made up, and read like instructions: the beginning of one of our seed tasks and the end of another, whose
common words stay where they are, while all others are drawn from a made-up vocabulary by 1 / (rank + 20). A fifth are
copies of a text that is there, with one word changed. One process; seconds are of its CPU time, without what it takes
to make the texts up. Memory is the process's largest, less what it had at the start.

Brute force is timed on some texts at the end, against each text of the pool, and extrapolated to all.
"""

from __future__ import annotations

import random
import resource
import time
from collections import Counter
from typing import Any

import numpy as np
from common import study_options, write

from beaver_ray.self_align.rouge import RougePool, rouge_l
from beaver_ray.self_align.seeds import read_tasks, read_types
from beaver_ray.spelling import words

VOCABULARY, FLAT, COPIES, MOST = 30_000, 20, 0.2, 0.7
COMMON = 5
"""Times that a word comes in our seeds from which it is a common one."""
BRUTE = 20
"""Texts that are compared with the whole pool."""


class Instructions:
    """Made-up instructions without end."""

    def __init__(self, seed: int) -> None:
        self.rng, self.numbers = random.Random(seed), np.random.default_rng(seed)
        told = [task.instruction for task in read_tasks()] + [one.question for one in read_types()]
        self.frames = [words(text) for text in told]
        counts = Counter(word for frame in self.frames for word in frame)
        self.common = {word for word, count in counts.items() if count >= COMMON}
        chances = 1 / (FLAT + np.arange(1, VOCABULARY + 1))
        self.chances = chances / chances.sum()
        self.drawn: list[int] = []

    def word(self) -> str:
        if not self.drawn:
            self.drawn = self.numbers.choice(VOCABULARY, size=100_000, p=self.chances).tolist()
        return f"v{self.drawn.pop()}"

    def text(self) -> str:
        first, second = self.rng.choice(self.frames), self.rng.choice(self.frames)
        frame = first[: self.rng.randint(1, len(first))] + second[self.rng.randint(0, len(second) - 1) :]
        return " ".join(word if word in self.common else self.word() for word in frame)

    def copy(self, text: str) -> str:
        own = text.split()
        own[self.rng.randrange(len(own))] = self.word()
        return " ".join(own)


def fill(count: int, seed: int) -> dict[str, Any]:
    """Offer so many texts to a pool."""
    made, index, texts = Instructions(seed), RougePool(MOST), list[str]()
    marks: list[dict[str, Any]] = []
    before, began, spent = peak(), time.process_time(), 0.0
    for number in range(1, count + 1):
        making = time.process_time()
        text = made.copy(made.rng.choice(texts)) if texts and made.rng.random() < COPIES else made.text()
        spent += time.process_time() - making
        if index.find(text) is None:
            index.add(text)
            texts.append(text)
        if number in {count * part // 8 for part in (1, 2, 4, 8)}:
            seconds = time.process_time() - began - spent
            mark = {"offered": number, "kept": len(index), "seconds": round(seconds, 1), "mib": round(peak() - before)}
            marks.append(
                mark | {"found_each": round(index.found / number), "compared_each": round(index.compared / number, 3)}
            )
            print(marks[-1], flush=True)
    return {"texts": count, "words": round(np.mean([len(t.split()) for t in texts]), 1), "filled": marks} | brute(texts)


def brute(texts: list[str]) -> dict[str, float]:
    """Seconds of comparing with everything, as far as that was done and for all texts."""
    pool = [words(text) for text in texts]
    began = time.process_time()
    for own in pool[:BRUTE]:
        for other in pool:
            rouge_l(own, other)
    each = (time.process_time() - began) / BRUTE / len(pool)
    return {"brute_microseconds_a_pair": round(1e6 * each, 2), "brute_hours": round(each * len(pool) ** 2 / 7200, 1)}


def peak() -> float:
    """The process's largest size so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure and write."""
    parser = study_options(__doc__, "rouge_pool", "runs/rouge-pool", [0])
    parser.add_argument("--texts", type=int, default=300_000)
    options = parser.parse_args()
    write(options.out, fill(options.texts, options.seeds[0]))


if __name__ == "__main__":
    main()
