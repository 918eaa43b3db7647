"""A bag of words: its counts and scores by hand, its weights against another way to the same minimum."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from beaver_ray.errors import UserError
from beaver_ray.models.bag_of_words import BagOfWords, WordCounter, fit_logistic, words_of


def test_words_are_counted_apart_by_side() -> None:
    assert words_of("Don't stop, it's  fine!") == ["don", "'", "t", "stop", ",", "it", "'", "s", "fine", "!"]
    counter = WordCounter(["a b", "a"], ["b b c", "d"], unknown=["d"])
    assert list(counter.columns) == [("question", "a"), ("question", "b"), ("answer", "b"), ("answer", "c")]
    assert counter.counts(["a b", "a x"], ["b b c", "d"]).toarray().tolist() == [[1, 1, 2, 1, 1], [1, 0, 0, 0, 1]]
    assert list(WordCounter(["a b"], ["b c"], known=["b"]).columns) == [("question", "b"), ("answer", "b")]
    model = counter.model(np.array([1.0, 2.0, 10.0, 20.0, 0.5]))
    assert model.scores(["a b", "a x"], ["b b c", "d"]).tolist() == [43.5, 1.5]


def test_the_weights_are_those_of_least_loss() -> None:
    rng = np.random.default_rng(0)
    asked = [" ".join(rng.choice(list("abcdef"), 4)) for _ in range(80)]
    answers = [" ".join(rng.choice(list("uvwxyz"), 5)) for _ in range(80)]
    labels = rng.random(80)
    features = WordCounter(asked, answers).counts(asked, answers)
    found = fit_logistic(features, labels, ridge=0.7)
    x, y = torch.from_numpy(features.toarray()), torch.from_numpy(labels)
    weights = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(50):  # Newton, with all second derivatives
        p = torch.sigmoid(x @ weights)
        gradient = x.T @ (p - y) + 0.7 * weights
        weights -= torch.linalg.solve((x.T * (p * (1 - p))) @ x + 0.7 * torch.eye(len(weights)), gradient)
    assert np.allclose(found, weights.numpy(), atol=1e-4)


def test_a_file_comes_back(tmp_path: Path) -> None:
    model = BagOfWords({"a": 0.5}, {"b": -2.0}, 0.25)
    model.write(tmp_path)
    assert BagOfWords.read(tmp_path) == model
    (tmp_path / "bag_of_words.json").write_text(json.dumps({"question": {}, "answer": {}, "bias": "much"}))
    with pytest.raises(UserError, match="holds no bag of words"):
        BagOfWords.read(tmp_path)
