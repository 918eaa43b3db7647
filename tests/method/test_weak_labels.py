"""Losses on weak labels and what is recovered: by hand, by finite differences, by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from beaver_ray.method.weak_to_strong import (
    confidence_weight,
    figures,
    hardened,
    imitation,
    mixed_target,
    product_target,
    recovered,
    recovery,
    soft_label_loss,
)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_weight_rises_linearly() -> None:
    # 100 steps, a fifth of them warm-up: a * step / 20, then a.
    for step in range(100):
        assert confidence_weight(step, 100, 0.5, 0.2) == pytest.approx(0.5 * min(step / 20, 1.0))
    assert [confidence_weight(step, 10, 0.75, 0.0) for step in (0, 9)] == [0.75, 0.75]
    growth = np.diff([confidence_weight(step, 1000, 0.5, 0.2) for step in range(1000)])
    assert growth.max() == pytest.approx(0.5 / 200), "no step is larger than the others"


def test_the_published_weight_jumps() -> None:
    weights = [confidence_weight(step, 100, 0.5, 0.1, published=True) for step in range(100)]
    assert weights[:11] == pytest.approx([0.5 * step / 100 for step in range(11)])
    assert weights[11:] == [0.5] * 89
    assert weights[11] / weights[10] == pytest.approx(10)


def test_as_many_are_positive_as_the_weak_labels_say() -> None:
    logits = torch.tensor([0.3, -2.0, 1.5, -0.1, 0.9])
    # The weak labels add up to 2.4: two of five.
    assert hardened(logits, torch.tensor([0.9, 0.1, 0.4, 0.8, 0.2])).tolist() == [0, 0, 1, 0, 1]
    # 2.6: three. Their place does not matter, only their sum.
    assert hardened(logits, torch.tensor([0.1, 0.9, 0.8, 0.6, 0.2])).tolist() == [1, 0, 1, 0, 1]
    assert hardened(logits, torch.full((5,), 0.05)).tolist() == [0] * 5
    assert hardened(logits, torch.full((5,), 0.95)).tolist() == [1] * 5
    rng = np.random.default_rng(0)
    for _ in range(50):
        logits, weak = torch.from_numpy(rng.normal(size=37)), torch.from_numpy(rng.random(37))
        found = hardened(logits, weak)
        assert abs(float(found.mean() - weak.mean())) <= 0.5 / 37 + 1e-9
        assert logits[found == 1].min() > logits[found == 0].max()


def test_ties_share_what_is_left() -> None:
    # A head of zeros: everybody gets the share, and the order of the batch does not matter.
    assert hardened(torch.zeros(4), torch.tensor([1.0, 0.0, 0.0, 0.0])).tolist() == [0.25] * 4
    # Two are to be positive; one is above the tie of three, which share the other.
    found = hardened(torch.tensor([0.5, 0.2, 0.2, -1.0, 0.2]), torch.full((5,), 0.4))
    assert found.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 0, 1 / 3])


def test_the_mixed_target_and_its_gradient_by_hand() -> None:
    weak = torch.tensor([[0.8], [0.3], [0.6]])
    logits = torch.tensor([[0.2], [1.0], [-0.5]], dtype=torch.float64, requires_grad=True)
    # Sum 1.7: two are positive, those of 0.2 and 1.0.
    target = mixed_target(weak.flatten(), logits.detach().flatten(), 0.25)
    assert target.tolist() == pytest.approx([0.75 * 0.8 + 0.25, 0.75 * 0.3 + 0.25, 0.75 * 0.6])
    loss, metrics = soft_label_loss(logits, target[:, None], torch.full((3,), 1 / 3, dtype=torch.float64))
    # One cross-entropy against the mixed target is the mixture of two cross-entropies.
    both = 0.0
    for z, w, h in zip((0.2, 1.0, -0.5), (0.8, 0.3, 0.6), (1, 1, 0), strict=True):
        ce = [-(y * math.log(sigmoid(z)) + (1 - y) * math.log(sigmoid(-z))) for y in (w, h)]
        both += (0.75 * ce[0] + 0.25 * ce[1]) / 3
    assert loss.item() == pytest.approx(both, rel=1e-6)
    assert float(metrics["agreement"]) == pytest.approx(2 / 3), "the second target is 0.475, its logit above 0"
    loss.backward()
    wanted = [(sigmoid(z) - t) / 3 for z, t in zip((0.2, 1.0, -0.5), target.tolist(), strict=True)]
    assert logits.grad is not None and logits.grad.flatten().tolist() == pytest.approx(wanted)


def test_the_product_target_by_hand() -> None:
    weak, logits = torch.tensor([0.8, 0.5]), torch.tensor([-1.0, 2.0])
    for alpha, beta in ((1.0, 1.0), (0.5, 2.0)):
        wanted = []
        for w, z in zip((0.8, 0.5), (-1.0, 2.0), strict=True):
            one, other = sigmoid(z) ** beta * w**alpha, sigmoid(-z) ** beta * (1 - w) ** alpha
            wanted.append(one / (one + other))
        assert product_target(weak, logits, alpha, beta).tolist() == pytest.approx(wanted)
    assert product_target(torch.tensor([1.0, 0.0]), torch.tensor([-3.0, 3.0]), 1.0, 1.0).tolist() == [1.0, 0.0]


def test_a_pair_of_answers_by_hand() -> None:
    # y log s(D) + (1 - y) log s(-D) with D = 0.7 and y = 0.9.
    loss, _ = soft_label_loss(torch.tensor([[0.7]]), torch.tensor([[0.9]]), torch.ones(1))
    assert float(loss) == pytest.approx(-0.9 * math.log(sigmoid(0.7)) - 0.1 * math.log(sigmoid(-0.7)))


def draw(seed: int, clusters: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(clusters), rng.integers(1, 4, clusters))
    weak, student, ceiling = (rng.random(len(cluster)) < share for share in (0.7, 0.8, 0.95))
    return weak, student, ceiling, cluster


def test_what_is_recovered_against_brute_force() -> None:
    assert recovered(0.6, 0.7, 0.8) == pytest.approx(0.5)
    assert recovered(0.6, 0.7, 0.6) is None
    weak, student, ceiling, cluster = draw(1)
    found = recovery(weak, student, ceiling, cluster, 0.05, seed=3)
    assert found["pgr"] == pytest.approx((student.mean() - weak.mean()) / (ceiling.mean() - weak.mean()))
    assert found["valid"] and found["gap"] == pytest.approx(ceiling.mean() - weak.mean())
    # Prompts drawn with all their questions, one draw after another.
    rng, ratios = np.random.default_rng(99), []
    rows_of = [np.flatnonzero(cluster == number) for number in range(60)]
    for _ in range(6000):
        rows = np.concatenate([rows_of[number] for number in rng.integers(0, 60, 60)])
        w, s, c = (right[rows].mean() for right in (weak, student, ceiling))
        ratios.append((s - w) / (c - w))
    low, high = np.percentile(ratios, [2.5, 97.5])
    assert found["pgr_low"] == pytest.approx(low, abs=0.05) and found["pgr_high"] == pytest.approx(high, abs=0.05)


def test_without_a_gap_nothing_is_valid() -> None:
    weak, student, _, cluster = draw(2)
    found = recovery(weak, student, weak, cluster, 0.05)
    assert found == {"pgr": None, "pgr_low": None, "pgr_high": None, "gap": 0.0, "valid": False}
    # Two noises: 0.9 + 0.01 would be "PGR 1".
    rng = np.random.default_rng(0)
    near = [rng.random(400) < share for share in (0.5, 0.5, 0.5)]
    assert not recovery(*near, np.arange(400), 0.05)["valid"]
    ceiling = weak.copy()
    ceiling[np.flatnonzero(~weak)[: math.ceil(0.05 * len(weak))]] = True
    assert recovery(weak, student, ceiling, cluster, 0.05)["valid"]
    assert not recovery(weak, student, ceiling, cluster, 0.1)["valid"]


def test_copied_mistakes_by_hand() -> None:
    weak = np.array([1, 1, 1, 1, 0, 0, 0, 1], dtype=bool)
    student = np.array([1, 0, 1, 1, 0, 1, 0, 1], dtype=bool)
    # Three mistakes, two of them made again; five right, one of them spoilt; six answers alike.
    assert imitation(weak, student) == {"agreement": 6 / 8, "copied": 2 / 3, "spoilt": 1 / 5}
    assert imitation(np.ones(2, dtype=bool), np.zeros(2, dtype=bool))["copied"] is None
    right = {"weak": weak, "student_a": student, "ceiling": np.ones(8, dtype=bool)}
    found = figures(right, ["student_a"], np.arange(8), 0.05)
    assert found["weak"]["mean"] == 5 / 8 and found["student_a"]["mean"] == 5 / 8 and found["student_a"]["pgr"] == 0
    assert found["student_a"]["copied"] == 2 / 3 and found["student_a"]["low"] < 5 / 8 < found["student_a"]["high"]
