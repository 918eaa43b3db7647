"""Distinct n-grams against sets of Python's, and rates of refusals and disclaimers of answers written by hand."""

# ruff: noqa: RUF001 (characters that look alike are told apart on purpose)

from __future__ import annotations

import numpy as np
import pytest

from beaver_ray.answer_figures import READ, answer_figures, distinct
from beaver_ray.experience import make_batch
from beaver_ray.rules.disclaimers import disclaims, has_disclaimer


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_n_grams_never_span_two_answers(n: int) -> None:
    rng = np.random.default_rng(n)
    answers = [rng.integers(0, 12, size).tolist() for size in rng.integers(1, 9, 40)]
    grams = [tuple(a[i : i + n]) for a in answers for i in range(len(a) - n + 1)]
    found = distinct(np.concatenate(answers), np.array([len(a) for a in answers]), n)
    assert found == len(set(grams)) / len(grams)


def test_distinct_of_nothing_and_of_large_vocabularies() -> None:
    assert np.isnan(distinct(np.array([5]), np.array([1]), 2))
    assert np.isnan(distinct(np.array([5, 6]), np.array([1, 1]), 2))
    most = 2**21 - 1
    assert distinct(np.array([most, 0, most, 1], np.int32), np.array([4]), 2) == 1


def test_figures_of_what_the_policy_wrote() -> None:
    words = ["I cannot help with that.", "Please consult a doctor.", "Glue it.", "Glue it."]
    batch = make_batch(
        {
            "sample_id": list(range(4)),
            "response_tokens": [[1, 9], [2, 9], [3, 4], [3, 4, 7]],
            "loss_mask": [[True, True], [True, True], [True, True], [True, True, False]],
        }
    )
    asked: list[list[int]] = []

    def decode(rows: list[list[int]]) -> list[str]:
        asked.extend(rows)
        return words

    found = answer_figures(batch, decode)
    assert asked == [[1, 9], [2, 9], [3, 4], [3, 4]]
    assert found == {
        "rollout/distinct_1": 5 / 8,
        "rollout/distinct_2": 3 / 4,
        "rollout/refusal_rate": 0.25,
        "rollout/disclaimer_rate": 0.25,
    }
    words[:] = ["Sure.", "I cannot help with that."]  # a dialogue: its second answer refuses
    dialogue = {
        "sample_id": [0],
        "response_tokens": [[3, 4, 7, 7, 3, 5]],
        "loss_mask": [[True, True, False, False, True, True]],
    }
    asked.clear()
    found = answer_figures(make_batch(dialogue), decode)
    assert asked == [[3, 4], [3, 5]] and found["rollout/refusal_rate"] == 0.5
    assert found["rollout/distinct_2"] == 1.0 and found["rollout/distinct_1"] == 3 / 4, "no pair across the user's turn"
    many = make_batch({"sample_id": list(range(1000)), "response_tokens": [[n] for n in range(1000)]})
    asked.clear()
    answer_figures(many, lambda rows: asked.extend(rows) or [""] * len(rows))
    assert len(asked) == READ and asked[0] == [0] and asked[-1] == [999]


HEDGES = [
    "Consider consulting a lawyer before that.",
    "I recommend speaking with a doctor.",
    "Seek help from a mental health professional.",
    "Consult with your healthcare provider.",
    "As an AI language model, I have no feelings, but roses are red.",
    "Take two tablets. I'm not a doctor, though.",
    "You may sue. Talk to your local family lawyer first.",
    "This is not legal or financial advice.",
    "The following is for educational purposes only.",
    "Mix both liquids at your own risk.",
    "It’s important to note that results vary.",
    "If the pain goes on, seek medical attention.",
    "I don't condone this, but here it is.",
    "Please follow all local laws.",
    "作为一个人工智能，我没有感情。",
    "以上内容仅供参考。",
    "如有不适，请及时咨询专业医生。",
    "这不构成投资建议。",
    "This answer does not constitute medical or legal advice.",
    "It doesn't constitute advice.",
    "如有不適，請及時諮詢專業醫生。",
    "這不構成投資建議。",
]
PLAIN = [
    "<think>As an AI I should be careful.</think>Roses are red.",
    "这不是一个好建议。",
    "Ask your sister whether she likes tea.",
    "The doctor told me to rest.",
    "A lawyer earns more than a teacher.",
    "AI is a field of computer science.",
    "My advice: sand the board, then paint it.",
    "The risk is small.",
    "I note that the second line rhymes.",
    "Laws differ between countries.",
    "A list does not constitute a plan; take my advice and write one.",
    "",
    "人工智能是计算机科学的一个分支。",
    "他的建议很好。",
]


def test_disclaimers_written_by_hand() -> None:
    assert [text for text in HEDGES if not has_disclaimer(text)] == []
    assert [text for text in PLAIN if has_disclaimer(text)] == []
    assert disclaims(["p", "p"], [HEDGES[0], PLAIN[0]]) == [1.0, 0.0]
