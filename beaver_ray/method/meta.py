"""Reward models for answers that have moved away from their labelled pairs, without new labels: MetaRM.

https://arxiv.org/abs/2405.00438; Secrets of RLHF II (https://arxiv.org/abs/2401.06080), section 4. With J how far a
model tells unlabelled answers of the current policy apart, and L the ranking loss on the labelled pairs, a step is

    theta' = theta + eta grad J(theta)        ascent, on answers of the current policy
    theta <- theta - alpha grad L(theta')     descent, on labelled pairs

The derivative of L(theta') by theta is (I + eta H_J) grad L(theta'), with H_J the second derivatives of J at theta.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Parts = Sequence[Callable[[], Tensor]]
"""A function of the parameters in parts that add up; each says its value for the parameters as they are now."""


def spread(scores_K: Tensor) -> Tensor:
    """J of the scores [..., K] of K answers to one prompt: (2 / K^2) * sum over pairs of sigmoid(|r_i - r_j|).

    Between (K - 1) / 2K, where all are equal, and (K - 1) / K. Equal scores have no slope.
    """
    count = scores_K.shape[-1]
    first, second = torch.triu_indices(count, count, offset=1, device=scores_K.device)
    return 2 * torch.sigmoid((scores_K[..., first] - scores_K[..., second]).abs()).sum(-1) / count**2


def gradient(parts: Parts, parameters: list[Tensor]) -> list[Tensor]:
    """The derivative by each of the parameters, one part after the other."""
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for part in parts:
        torch._foreach_add_(total, torch.autograd.grad(part(), parameters, materialize_grads=True))
    return total


def meta_gradient(
    parameters: list[Tensor], objective: Parts, loss: Parts, rate: float, second: bool = True
) -> list[Tensor]:
    """The derivative of L(theta + rate * grad J(theta)) by theta, J the ``objective`` and L the ``loss``.

    second: False leaves out how theta' depends on theta beyond theta itself, so that it is grad L(theta'). With it J is
    differentiated twice: whatever attention it goes through must be able to (not PyTorch's fused kernels). Each part is
    computed anew, so that no graph outlives it. The parameters are shifted meanwhile, and then what they were, to the
    bit.
    """
    with _shifted(parameters, gradient(objective, parameters), rate):
        found = gradient(loss, parameters)
    if not second:
        return found
    bent = [torch.zeros_like(parameter) for parameter in parameters]
    for part in objective:
        slopes = torch.autograd.grad(part(), parameters, create_graph=True, materialize_grads=True)
        along = torch.stack([(slope * fixed).sum() for slope, fixed in zip(slopes, found, strict=True)]).sum()
        torch._foreach_add_(bent, torch.autograd.grad(along, parameters, materialize_grads=True))
    torch._foreach_add_(found, bent, alpha=rate)
    return found


@contextmanager
def _shifted(parameters: list[Tensor], by: list[Tensor], rate: float) -> Iterator[None]:
    """The parameters moved by ``rate`` times ``by``."""
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        torch._foreach_add_(parameters, by, alpha=rate)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, before)


def collapse(steps: Sequence[int], spreads: Sequence[float], floor: float) -> str | None:
    """One sentence where the spread of rewards fell under ``floor`` again, or was never above it; else None."""
    above = [value >= floor for value in spreads]
    if not spreads or (any(above) and all(above[above.index(True) :])):
        return None
    why = "equal rewards have no slope that could part them again"
    if not any(above):
        return f"the spread of rewards never reached {floor:g} (at most {max(spreads):.3g}): {why}"
    place = above.index(False, above.index(True))
    return f"the spread of rewards fell to {spreads[place]:.3g} at step {steps[place]}, under {floor:g}: {why}"
