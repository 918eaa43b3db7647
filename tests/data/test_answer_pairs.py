"""Pairs drawn from answers, and the labels that scores give them, by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest

from beaver_ray.data.pairs import draw_pairs, is_held_out, pair_id, read_pairs, scored_labels
from beaver_ray.data.safe_rlhf_formats import pku_saferlhf
from beaver_ray.errors import UserError


def answer(prompt: Any, response: str, model: str = "a", truncated: bool = False, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, **more, "response": response, "model": model, "truncated": truncated, "tokens": 3}


def test_pairs_are_of_different_whole_answers() -> None:
    answers = [
        *(answer("p", text, "a") for text in ("one", "two", " one ", "")),
        answer("p", "three", "b"),
        answer("p", "cut off", "b", truncated=True),
        *(answer("q", "same", model) for model in "ab"),
        *(answer(["x", "y", "z"], text, system="be kind", kind="odd") for text in ("u", "v")),
    ]
    pairs, left_out = draw_pairs(answers, 5, seed=1)
    assert left_out == {
        "answers that repeat another to their prompt": 2,
        "empty answers": 1,
        "answers cut at their longest": 1,
        "prompts without two different answers": 1,
    }
    # Three different answers make three pairs, two make one; each pair once.
    said = [frozenset((row["response_0"], row["response_1"])) for row in pairs if row["prompt"] == "p"]
    assert sorted(map(sorted, said)) == [["one", "three"], ["one", "two"], ["three", "two"]]
    models = {"one": "a", "two": "a", "three": "b", "u": "a", "v": "a"}
    for row in pairs:
        assert [row["model_0"], row["model_1"]] == [models[row["response_0"]], models[row["response_1"]]]
        assert row["id"] == pair_id(row)
    (long,) = [row for row in pairs if row["prompt"] != "p"]
    sample = pku_saferlhf(long)
    assert (sample.input, sample.system, sample.fields["kind"]) == (["x", "y", "z"], "be kind", "odd")
    assert draw_pairs(answers, 5, seed=1)[0] == pairs
    # The draw of a prompt does not depend on the others, and each order comes up.
    assert draw_pairs(answers[:6], 5, seed=1)[0] == [row for row in pairs if row["prompt"] == "p"]
    assert {draw_pairs(answers[-2:], 1, seed)[0][0]["response_0"] for seed in range(20)} == {"u", "v"}
    assert len(draw_pairs(answers, 2, seed=1)[0]) == 3


def test_labels_of_scores() -> None:
    rng = random.Random(0)
    labels, ties = scored_labels([1.0, 2.0], [-0.5, 0.25], rng)
    assert labels == {
        "better_response_id": 1,
        "safer_response_id": 0,
        "is_response_0_safe": True,
        "is_response_1_safe": False,
    }
    assert ties == []
    labels, ties = scored_labels([2.0, 1.0], [0.0, -1.0], rng)
    assert (labels["better_response_id"], labels["safer_response_id"]) == (0, 1)
    assert labels["is_response_0_safe"], "a cost of 0 is safe"
    # A coin decides what is equal: 400 throws of a fair one lie within 4 standard deviations.
    thrown = [scored_labels([1.0, 1.0], [-1.0, -1.0], random.Random(seed)) for seed in range(400)]
    assert all(ties == ["better_response_id", "safer_response_id"] for _, ties in thrown)
    for name in ("better_response_id", "safer_response_id"):
        assert abs(sum(labels[name] for labels, _ in thrown) - 200) < 40


def test_the_same_prompts_are_held_out_in_every_round() -> None:
    rows = [{"prompt": f"prompt {number}"} for number in range(2000)]
    held = [is_held_out(row, 0.1) for row in rows]
    assert abs(sum(held) - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5
    assert all(is_held_out(row, 0.2) for row, out in zip(rows, held, strict=True) if out)
    assert is_held_out({"prompt": " prompt 7 "}, 0.5) == is_held_out({"prompt": "prompt 7"}, 0.5)


def test_what_are_pairs() -> None:
    good = {"prompt": "p", "response_0": "a", "response_1": "b"}
    pairs, left_out = read_pairs([good, {**good, "response_1": "a"}, good, 3, {**good, "safer_response_id": "x"}])
    assert pairs == [{"id": pair_id(good), **good}]
    assert left_out == {"identical responses": 1, "row is not an object": 1, "repeated pair": 2}
    other = pair_id({**good, "prompt": "q"})
    with pytest.raises(
        UserError, match=rf"the data: pair 1 has id '{other}', but its texts have \w+: they were changed since"
    ):
        read_pairs([{**good, "id": other}])
    for own in ("12", 7):  # of somebody who counts rows
        assert read_pairs([{**good, "id": own}])[0] == [{"id": pair_id(good), "source_id": own, **good}]
    assert read_pairs([{**good, "id": None}])[0] == [{"id": pair_id(good), **good}]
    with pytest.raises(UserError, match="no pair of two different answers"):
        read_pairs([])
