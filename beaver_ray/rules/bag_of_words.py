"""What a bag of words says of answers (`beaver_ray.models.bag_of_words`): final/weak of stage weak_to_strong.

A run with models of words as its supervisor: constraints.NAME.model =
"python:beaver_ray/rules/bag_of_words.py:score(model='runs/w2s/final/weak')", with a folder for its critic.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from beaver_ray.models.bag_of_words import BagOfWords

_read = cache(BagOfWords.read)


def score(prompts: list[str], responses: list[str], *, model: str) -> list[float]:
    """The score of each answer: of a reward the higher the better, of a cost above 0 unsafe.

    model: its folder. Raises UserError where that holds none.
    """
    found: list[float] = _read(Path(model)).scores(prompts, responses).tolist()
    return found
