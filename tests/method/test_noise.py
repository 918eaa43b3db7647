"""Strength, what is made of it, and the losses of noisy pairs: by hand, and gradients against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from beaver_ray.method.losses import cost_model_loss, ranking_loss, reward_model_loss
from beaver_ray.method.noise import Quantile, decay, detection, quantiles, strength, treat, u_shape

STRENGTH_N = np.array([0.5, -1.0, 2.0, -0.2, 0.1])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_strength_divides_by_the_number_of_models() -> None:
    mean_N, deviation_N = strength(np.array([[1.0, -2.0], [3.0, 0.0]]))
    assert mean_N.tolist() == [2.0, -1.0]
    assert deviation_N.tolist() == [1.0, 1.0]  # not sqrt(2), which divides by M - 1


def test_the_weakest_pairs_change_places_and_their_strength_its_sign() -> None:
    done = treat(STRENGTH_N, flip=0.4, margin=2.0, smoothing=0.1, smooth="negative")
    assert done.flipped_N.tolist() == [False, True, False, True, False]
    assert done.margin_N == pytest.approx([1.0, 2.0, 4.0, 0.4, 0.2])
    assert not done.smoothing_N.any()  # nothing is below 0 any more
    some = treat(STRENGTH_N, flip=0.2, margin=0.5, smoothing=0.1, smooth="negative")
    assert some.flipped_N.tolist() == [False, True, False, False, False]
    assert some.margin_N == pytest.approx([0.25, 0.5, 1.0, -0.1, 0.05])
    assert some.smoothing_N == pytest.approx([0.0, 0.0, 0.0, 0.1, 0.0])
    everywhere = treat(np.full(5, np.nan), smoothing=0.3)
    assert everywhere.smoothing_N == pytest.approx([0.3] * 5) and not everywhere.margin_N.any()


def test_soft_labels_are_the_log_odds_of_each_order() -> None:
    done = treat(STRENGTH_N, soft=2.0)
    assert done.smoothing_N == pytest.approx([1 - sigmoid(2 * mu) for mu in (0.5, -1.0, 2.0, -0.2, 0.1)])
    assert not done.margin_N.any() and not done.flipped_N.any()
    # The loss is least where the scores differ by soft * strength, also where that is below 0.
    best_N = torch.tensor([1.0, -2.0, 4.0, -0.4, 0.2], dtype=torch.float64, requires_grad=True)
    ranking_loss(best_N, smoothing_B=torch.from_numpy(done.smoothing_N).double()).sum().backward()
    assert best_N.grad is not None and best_N.grad.numpy() == pytest.approx([0.0] * 5, abs=1e-7)


def test_margin_and_smoothing_by_hand() -> None:
    difference, margin, smoothing = 0.7, -0.4, 0.1
    expected = -0.9 * math.log(sigmoid(1.1)) - 0.1 * math.log(sigmoid(-1.1))
    found = ranking_loss(*(torch.tensor([x], dtype=torch.float64) for x in (difference, margin, smoothing)))
    assert found.item() == pytest.approx(expected)
    plain = ranking_loss(torch.tensor([difference], dtype=torch.float64))
    assert plain.item() == pytest.approx(-math.log(sigmoid(0.7)))
    # A smoothed pair is content where its probability is 1 - a, a margin of m there m further on.
    best = torch.tensor([math.log(9.0) + margin], dtype=torch.float64, requires_grad=True)
    ranking_loss(best, torch.tensor([margin]).double(), torch.tensor([smoothing]).double()).sum().backward()
    assert best.grad is not None and best.grad.item() == pytest.approx(0.0, abs=1e-7)


def test_a_far_wrong_pair_still_has_a_gradient() -> None:
    """-log(s(D) + 1e-5), as some code has it, has none below D = -11.5."""
    difference = torch.tensor([-40.0], requires_grad=True)
    ranking_loss(difference).sum().backward()
    assert difference.grad is not None and difference.grad.item() == pytest.approx(-1.0)


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, margin = (torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(3))
    smoothing = torch.tensor([0.0, 0.1, 0.5, 0.2], dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64), torch.full((4,), -1.0, dtype=torch.float64)

    def loss(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        more = {"regularization": 0.01, "margin_B": margin, "smoothing_B": smoothing}
        if kind == "reward":
            return reward_model_loss(one, two, **more)[0]
        return cost_model_loss(one, two, *signs, **more)[0]

    assert torch.autograd.gradcheck(loss, (first.requires_grad_(), second.requires_grad_()))


def test_a_cost_keeps_its_sign_loss() -> None:
    one = torch.tensor([0.5], dtype=torch.float64)
    zero, sign = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    found, _ = cost_model_loss(one, zero, sign, -sign, margin_B=2 * one, smoothing_B=0.2 * sign)
    ranking = -0.8 * math.log(sigmoid(-0.5)) - 0.2 * math.log(sigmoid(0.5))
    assert found.item() == pytest.approx(ranking + math.log(2) - math.log(sigmoid(0.5)))


def test_quantiles_detection_and_shape() -> None:
    wrong_N = np.array([False, True, False, True, False])
    parts = quantiles(STRENGTH_N, np.array([1.0, 2.0, 3.0, 4.0, 5.0]), wrong_N, parts=2)
    # By strength: -1, -0.2, 0.1 | 0.5, 2
    assert [part.count for part in parts] == [3, 2]
    assert parts[0].mean == pytest.approx(-1.1 / 3) and parts[1].lowest == 0.5
    assert parts[0].deviation == pytest.approx((2 + 4 + 5) / 3) and parts[0].flipped == pytest.approx(2 / 3)
    assert detection(STRENGTH_N, wrong_N) == 1.0 and detection(-STRENGTH_N, wrong_N) == 0.0
    assert detection(np.array([0.0, 0.0, 1.0]), np.array([True, False, False])) == pytest.approx(0.75)
    assert detection(STRENGTH_N, np.zeros(5, dtype=bool)) is None
    published = [Quantile(1, 0, 0, sigma, None) for sigma in (0.33, 0.25, 0.21, 0.3, 0.55)]
    assert u_shape(published) == pytest.approx(0.44 / 0.21)
    assert u_shape(published[:4]) is None


def test_decay_is_more_than_chance() -> None:
    fallen = decay([10, 20, 30], [0.69, 0.707, 0.694], 8000)  # the published curve; its error is 0.005
    assert fallen is not None and (fallen.step, fallen.best, fallen.last) == (20, 0.707, 0.694)
    assert decay([10, 20, 30], [0.69, 0.707, 0.694], 100) is None  # four pairs of a hundred are chance
    assert decay([10, 20], [0.6, 0.7], 8000) is None and decay([], [], 10) is None
