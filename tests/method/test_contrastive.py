"""Contrastive losses against loops over single numbers, Sinkhorn's algorithm by hand, and PyTorch's cross-entropy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from beaver_ray.method.contrastive import false_negatives, paired, simcse_loss, sinkhorn, swav_loss


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    dot = sum(float(x * y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(x * x) for x in a) * sum(float(y * y) for y in b))


def plain_sinkhorn(scores: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """Scaling by division, prototype by prototype and feature by feature."""
    mass = np.exp(scores / epsilon)
    mass = mass / mass.sum()
    features, prototypes = mass.shape
    for _ in range(iterations):
        for k in range(prototypes):
            mass[:, k] /= mass[:, k].sum() * prototypes
        for i in range(features):
            mass[i] /= mass[i].sum() * features
    return mass * features


def test_pairs_on_one_prompt_are_no_negatives() -> None:
    """Three pairs, the first and the last on one prompt: a0 b0 a1 b1 are features 0 3, 1 4, 2 5."""
    left_out = false_negatives(torch.tensor([7, 8, 7]))
    expected = {(i, j) for i in (0, 3) for j in (2, 5)} | {(j, i) for i in (0, 3) for j in (2, 5)}
    assert {(int(i), int(j)) for i, j in left_out.nonzero()} == expected


def test_differences_and_their_opposites() -> None:
    first, second = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[0.0, 4.0], [1.0, 1.0]])
    assert paired(first, second, "pair").tolist() == [[1, 2], [3, 5], [0, 4], [1, 1]]
    assert paired(first, second, "difference").tolist() == [[1, -2], [2, 4], [-1, 2], [-2, -4]]


@pytest.mark.parametrize("prompts", [[0, 1, 2, 3], [0, 1, 0, 1], [5, 5, 5, 5]])
def test_simcse_feature_by_feature(prompts: list[int]) -> None:
    one, two, temperature = draws(8, 6), draws(8, 6, seed=1), 0.3
    losses = []
    for i in range(8):
        rivals = [j for j in range(8) if prompts[i % 4] != prompts[j % 4] or j % 4 == i % 4]
        weights = {j: math.exp(cosine(one[i], two[j]) / temperature) for j in rivals}
        losses.append(-math.log(weights[i] / sum(weights.values())))
    found = simcse_loss(one, two, temperature, false_negatives(torch.tensor(prompts)))
    assert float(found) == pytest.approx(np.mean(losses), rel=1e-9)


def test_sinkhorn_by_hand_and_in_the_limit() -> None:
    scores = draws(12, 5).clamp(-1, 1)
    for iterations in (1, 3):
        expected = plain_sinkhorn(scores.numpy().copy(), 0.05, iterations)
        np.testing.assert_allclose(sinkhorn(scores, 0.05, iterations).numpy(), expected, atol=1e-5)
    much = sinkhorn(scores, 0.5, 200)
    assert much.dtype == torch.float32
    np.testing.assert_allclose(much.sum(0), 12 / 5, rtol=1e-4)
    np.testing.assert_allclose(much.sum(1), 1, rtol=1e-5)
    # Scores whose exponentials no float32 holds, and a prototype that nobody is near.
    wide = torch.tensor([[300.0, -300.0], [299.0, -400.0], [280.0, -900.0]])
    assert torch.isfinite(sinkhorn(wide)).all()


def test_swav_against_cross_entropy_with_fixed_targets() -> None:
    features, prototypes, temperature = draws(12, 6), draws(5, 6, seed=2), 0.1
    one = features.clone().requires_grad_()
    two = (features + 0.1 * draws(12, 6, seed=3)).requires_grad_()
    scores = [normalize(view, dim=1) @ normalize(prototypes, dim=1).T for view in (one, two)]
    loss = swav_loss(*scores, temperature)
    targets = [torch.tensor(plain_sinkhorn(s.detach().numpy().copy(), 0.05, 3), dtype=torch.float32) for s in scores]
    logits = [s.float() / temperature for s in scores]
    expected = (cross_entropy(logits[0], targets[1]) + cross_entropy(logits[1], targets[0])) / 2
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-4)
    mine = torch.autograd.grad(loss, (one, two), retain_graph=True)
    theirs = torch.autograd.grad(expected, (one, two))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
