"""MetaRM's derivative by hand, by finite differences, and by differentiating right through the ascent."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import logsigmoid

from beaver_ray.method.meta import collapse, meta_gradient, spread


def test_spread_by_hand() -> None:
    """The sigmoid of log 3 is 3/4, that of 0 is 1/2."""
    far = math.log(3)
    assert spread(torch.tensor([0.0, far])).item() == pytest.approx(2 / 4 * 0.75)
    assert spread(torch.tensor([far, 0.0, far])).item() == pytest.approx(2 / 9 * (0.75 + 0.75 + 0.5))
    assert spread(torch.zeros(4)).item() == pytest.approx(3 / 8)
    assert spread(torch.tensor([-90.0, 0.0, 90.0])).item() == pytest.approx(2 / 3)
    equal_K = torch.zeros(3, requires_grad=True)
    spread(equal_K).backward()
    assert equal_K.grad is not None and not equal_K.grad.any()


def test_a_linear_model_by_hand() -> None:
    """r = w x, answers x = 0 and 1, one pair whose better answer lies 1 further; w = log 3, eta 2.

    J' = s(1 - s)/2 = 3/32 and J'' = s(1 - s)(1 - 2s)/2 = -3/64, with s = 3/4. So w' = log 3 + 3/16,
    L'(w') = -s(-w'), and the derivative by w is (1 - 2 * 3/64) L'(w').
    """
    weight = torch.tensor([math.log(3)], dtype=torch.float64, requires_grad=True)
    answers_K = torch.tensor([0.0, 1.0], dtype=torch.float64)
    objective = [lambda: spread(weight * answers_K)]
    loss = [lambda: -logsigmoid(weight * 1.0).sum()]
    slope = -1 / (1 + 3 * math.exp(3 / 16))
    first = meta_gradient([weight], objective, loss, 2.0, second=False)
    second = meta_gradient([weight], objective, loss, 2.0)
    assert first[0].item() == pytest.approx(slope, rel=1e-12)
    assert second[0].item() == pytest.approx((1 - 3 / 32) * slope, rel=1e-12)
    assert weight.item() == math.log(3) and weight.grad is None


def model_and_functions() -> tuple[nn.Module, Callable[[], Tensor], Callable[[], Tensor], Callable[..., Tensor]]:
    """A curved model, J of four prompts in two parts, L of ten pairs; L(theta + eta grad J) by ``functional_call``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    answers_PKF = torch.randn(4, 3, 5, dtype=torch.float64)
    better_BF, worse_BF = torch.randn(2, 10, 5, dtype=torch.float64)

    def objective(score: Callable[[Tensor], Tensor], prompts: slice = slice(None)) -> Tensor:
        return torch.stack([spread(score(answers_KF)[:, 0]) for answers_KF in answers_PKF[prompts]]).sum() / 4

    def loss(score: Callable[[Tensor], Tensor]) -> Tensor:
        return -logsigmoid(score(better_BF) - score(worse_BF)).mean()

    def through(rate: float) -> Tensor:
        weights = dict(model.named_parameters())
        value = objective(lambda x: functional_call(model, weights, (x,)))
        slopes = torch.autograd.grad(value, list(weights.values()), create_graph=True)
        moved = {name: w + rate * slope for (name, w), slope in zip(weights.items(), slopes, strict=True)}
        return loss(lambda x: functional_call(model, moved, (x,)))

    halves = (slice(2), slice(2, 4))
    return model, tuple(partial(objective, model, half) for half in halves), (partial(loss, model),), through  # type: ignore[return-value]


def test_second_order_is_the_whole_derivative() -> None:
    model, objective, loss, through = model_and_functions()
    parameters: list[Tensor] = list(model.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    found = meta_gradient(parameters, objective, loss, 1.5)  # type: ignore[arg-type]
    assert all(torch.equal(now, then) for now, then in zip(parameters, before, strict=True))
    literal = torch.autograd.grad(through(1.5), parameters, materialize_grads=True)
    for mine, theirs in zip(found, literal, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)
    # The value itself, a little to both sides of each of some weights.
    step = 1e-5
    for parameter, slope in zip(parameters, found, strict=True):
        flat, slope = parameter.data.view(-1), slope.view(-1)
        for place in {0, len(flat) // 2, len(flat) - 1}:
            kept = flat[place].item()
            flat[place] = kept + step
            above = through(1.5).item()
            flat[place] = kept - step
            below = through(1.5).item()
            flat[place] = kept
            assert slope[place].item() == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-9)
    first = meta_gradient(parameters, objective, loss, 1.5, second=False)  # type: ignore[arg-type]
    assert max(float((a - b).abs().max()) for a, b in zip(first, found, strict=True)) > 1e-3


def test_words_about_a_collapse() -> None:
    assert collapse([1, 2, 3], [0.01, 0.2, 0.3], 0.05) is None  # a fresh head starts from nothing
    fallen = collapse([1, 2, 3, 4], [0.01, 0.2, 0.04, 0.3], 0.05)
    assert fallen is not None and fallen.startswith("the spread of rewards fell to 0.04 at step 3, under 0.05: equal")
    never = collapse([1, 2], [0.01, 0.03], 0.05)
    assert never is not None and "never reached 0.05 (at most 0.03)" in never
    assert collapse([], [], 0.05) is None
