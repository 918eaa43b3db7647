"""DPO in two steps is SACPO, and SafeDPO's loss: on numbers small enough to be worked out by hand."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from beaver_ray.method.losses import dpo_loss

BETA, LAMBDA = 0.7, 2.5
# One prompt with four answers: what each is worth, how safe it is, and how likely it is at first.
REWARD, SAFETY = torch.tensor([1.0, 2.0, 0.0, -1.0]).double(), torch.tensor([0.5, -1.5, 1.0, 0.0]).double()
START = torch.tensor([0.4, 0.3, 0.2, 0.1]).double().log()


def dpo_on_endless_data(start: Tensor, score: Tensor, beta: float) -> Tensor:
    """The policy that minimises DPO's loss over all pairs, each as often won as Bradley and Terry say of ``score``."""
    pairs = torch.tensor(list(permutations(range(4), 2)))
    better, worse = pairs.unbind(1)
    often = torch.sigmoid(score[better] - score[worse])
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15)

    def step() -> Tensor:
        optimizer.zero_grad()
        policy = logits.log_softmax(0)
        loss, _ = dpo_loss(policy[better], policy[worse], start[better], start[worse], beta=beta, weights_B=often)
        loss.backward()
        return loss

    optimizer.step(step)
    return logits.detach().log_softmax(0)


def test_two_steps_are_sacpo() -> None:
    """pi* = pi_ref exp((r + lambda g) / beta) / Z, with beta / lambda in the step on safety, in either order."""
    weights = np.exp((REWARD.numpy() + LAMBDA * SAFETY.numpy()) / BETA) * START.exp().numpy()
    optimum = torch.from_numpy(weights / weights.sum())
    helpful = dpo_on_endless_data(START, REWARD, BETA)
    then_safe = dpo_on_endless_data(helpful, SAFETY, BETA / LAMBDA)
    safe = dpo_on_endless_data(START, SAFETY, BETA / LAMBDA)
    then_helpful = dpo_on_endless_data(safe, REWARD, BETA)
    for policy in (then_safe, then_helpful):
        torch.testing.assert_close(policy.exp(), optimum, atol=1e-6, rtol=0)
    assert (helpful.exp() - optimum).abs().max() > 0.1 and (safe.exp() - optimum).abs().max() > 0.05


def test_safe_dpo_loss_by_hand() -> None:
    """-log s(beta h - (h_l - h_w) Delta) with beta 0.5, Delta 2: h = 3 gives -log s(1.5) of two safe answers, and
    -log s(1.5 - 2) = log(1 + e^0.5) = 0.9741 where the worse one is unsafe."""
    logprobs = [torch.tensor([value] * 2) for value in (-10.0, -9.0, -12.0, -8.0)]
    offset = 2.0 * torch.tensor([0.0, 1.0])
    each = [dpo_loss(*(x[i : i + 1] for x in logprobs), beta=0.5, offset_B=offset[i : i + 1]) for i in range(2)]
    assert [float(loss) for loss, _ in each] == pytest.approx([0.201413, 0.974077], abs=1e-5)
    both, metrics = dpo_loss(*logprobs, beta=0.5, offset_B=offset)
    assert float(both) == pytest.approx((0.201413 + 0.974077) / 2, abs=1e-5)
    assert float(metrics["margin"]) == pytest.approx(1.5), "what was moved, not what is missing"
