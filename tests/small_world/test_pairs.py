"""Preference pairs and demonstrations: labels follow the truth, and the answers cover its range."""

from __future__ import annotations

import random

import pytest

from beaver_ray.small_world.pairs import demonstration_rows, preference_rows, sample_response
from beaver_ray.small_world.world import SmallWorld

WORLD = SmallWorld(seed=7)
ROWS = preference_rows(WORLD, 3000, "train", random.Random(0))


def test_labels_follow_the_truth() -> None:
    ties = 0
    for row in ROWS:
        texts = (row["response_0"], row["response_1"])
        rewards = [WORLD.reward(row["prompt"], text) for text in texts]
        costs = [WORLD.cost(row["prompt"], text) for text in texts]
        assert texts[0] != texts[1] and rewards[0] != rewards[1]
        assert rewards[row["better_response_id"]] == max(rewards)
        assert costs[row["safer_response_id"]] == min(costs)
        assert [row["is_response_0_safe"], row["is_response_1_safe"]] == [cost < 0 for cost in costs]
        ties += costs[0] == costs[1]
    assert 0.3 < ties / len(ROWS) < 0.6


def test_labels_are_balanced() -> None:
    for name in ("better_response_id", "safer_response_id"):
        assert abs(sum(row[name] for row in ROWS) / len(ROWS) - 0.5) < 0.04
    agree = sum(row["better_response_id"] == row["safer_response_id"] for row in ROWS) / len(ROWS)
    assert 0.35 < agree < 0.65  # helpfulness and harmlessness are in tension


def test_label_noise_flips_at_its_rate_and_stays_consistent() -> None:
    noisy = WORLD.model_copy(update={"label_noise": 0.2})
    rows = preference_rows(noisy, 3000, "train", random.Random(1))
    wrong_better = wrong_safe = mixed = 0
    for row in rows:
        rewards = [WORLD.reward(row["prompt"], row[f"response_{i}"]) for i in (0, 1)]
        wrong_better += rewards[row["better_response_id"]] < max(rewards)
        assert row["better_flipped"] == (rewards[row["better_response_id"]] < max(rewards))
        flags = [row["is_response_0_safe"], row["is_response_1_safe"]]
        if flags[0] != flags[1]:
            assert flags[row["safer_response_id"]]
            mixed += 1
            wrong_safe += (WORLD.cost(row["prompt"], row["response_0"]) < 0) != flags[0]
    assert wrong_better / len(rows) == pytest.approx(0.2, abs=0.03)
    assert wrong_safe / mixed == pytest.approx(0.2, abs=0.03)


def test_a_graded_world_says_how_much_better_and_safer() -> None:
    graded = preference_rows(WORLD.model_copy(update={"graded": True}), 1000, "train", random.Random(1))
    strengths = [(row.pop("strength_mean"), row.pop("safety_strength_mean")) for row in graded]
    assert graded == preference_rows(WORLD, 1000, "train", random.Random(1))  # else the same pairs
    for row, found in zip(graded, strengths, strict=True):
        answers = row["response_0"], row["response_1"]
        reward, cost = (
            abs(of(row["prompt"], answers[0]) - of(row["prompt"], answers[1])) for of in (WORLD.reward, WORLD.cost)
        )
        assert found[0] == (1 if reward <= 1 else 2 if reward <= 3 else 3)
        assert found[1] == (0 if cost < 1e-9 else 1 if cost <= 1 else 2 if cost <= 3 else 3)
    assert {better for better, _ in strengths} == {1, 2, 3} and {safer for _, safer in strengths} == {0, 1, 2, 3}


def test_answers_cover_the_range() -> None:
    rng = random.Random(2)
    for prompt in WORLD.prompts("train")[:10]:
        answers = [sample_response(WORLD, prompt, rng) for _ in range(600)]
        assert all(1 <= len(answer.split()) < WORLD.max_response_tokens for answer in answers)
        rewards = [WORLD.reward(prompt.text, answer) for answer in answers]
        assert max(rewards) == pytest.approx(WORLD.optimum([prompt.text]))
        assert min(rewards) < -1.5
        assert 0.02 < sum(map(WORLD.is_refusal, answers)) / len(answers) < 0.2
        assert 0.25 < sum(WORLD.cost(prompt.text, answer) > 0 for answer in answers) / len(answers) < 0.7


def test_splits_keep_to_their_prompts() -> None:
    test_prompts = {prompt.text for prompt in WORLD.prompts("test")}
    assert not {row["prompt"] for row in ROWS} & test_prompts
    assert {row["prompt"] for row in preference_rows(WORLD, 200, "test", random.Random(0))} <= test_prompts
    assert {row["prompt"] for row in demonstration_rows(WORLD, 200, random.Random(0), "test")} <= test_prompts


def test_demonstrator_is_mediocre() -> None:
    rows = demonstration_rows(WORLD, 4000, random.Random(0))
    by_intent: dict[bool, list[str]] = {False: [], True: []}
    rewards = []
    for row in rows:
        adversarial = WORLD.is_adversarial(row["prompt"])
        refused, cost = WORLD.is_refusal(row["response"]), WORLD.cost(row["prompt"], row["response"])
        by_intent[adversarial].append("refusal" if refused else "harmful" if cost > 0 else "safe")
        rewards.append(WORLD.reward(row["prompt"], row["response"]))
    harmless, adversarial_kinds = by_intent[False], by_intent[True]
    assert harmless.count("harmful") == 0
    assert harmless.count("refusal") / len(harmless) == pytest.approx(0.08, abs=0.02)
    for kind, share in (("harmful", 1 / 2), ("safe", 1 / 3), ("refusal", 1 / 6)):
        assert adversarial_kinds.count(kind) / len(adversarial_kinds) == pytest.approx(share, abs=0.04)
    assert 1.0 < sum(rewards) / len(rewards) < 2.2  # all-safe optimum: 3
