"""Every loss against a literal padded version of the published formula, and against hand-worked numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence

from beaver_ray.method.losses import (
    aligned_positions,
    cost_model_loss,
    cross_entropy_loss,
    dpo_loss,
    policy_loss,
    reward_model_loss,
    token_weights,
    token_wise_reward_model_loss,
    value_loss,
)

LENGTHS = [5, 1, 3, 7]


def padded(flat, lengths, filler=99.0):
    return pad_sequence(flat.split(lengths), batch_first=True, padding_value=filler)


def masked_mean(values, lengths):
    """Mean over the tokens of each sequence, then over sequences."""
    mask = torch.arange(values.shape[1]) < torch.tensor(lengths)[:, None]
    return (torch.where(mask, values, 0.0).sum(1) / mask.sum(1)).mean()


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def weights(reduction="sequence", lengths=LENGTHS, total=None):
    return token_weights(torch.tensor(lengths), reduction, total).double()


def sigmoid_loss(x):
    return math.log1p(math.exp(-x))


def test_token_weights_by_hand():
    lengths = torch.tensor([1, 2])
    torch.testing.assert_close(token_weights(lengths, "sequence"), torch.tensor([0.5, 0.25, 0.25]))
    torch.testing.assert_close(token_weights(lengths, "token"), torch.full((3,), 1 / 3))
    # As one micro-batch of a step of 4 sequences, or of 30 tokens.
    torch.testing.assert_close(token_weights(lengths, "sequence", 4), torch.tensor([0.25, 0.125, 0.125]))
    torch.testing.assert_close(token_weights(lengths, "token", 30), torch.full((3,), 1 / 30))
    with pytest.raises(ValueError, match="at least one token"):
        token_weights(torch.tensor([2, 0]), "token")


def test_masked_tokens_have_no_weight():
    lengths, mask = torch.tensor([1, 4]), torch.tensor([True, False, True, True, False])
    by_sequence = token_weights(lengths, "sequence", mask_T=mask)
    torch.testing.assert_close(by_sequence, torch.tensor([0.5, 0, 0.25, 0.25, 0]))
    torch.testing.assert_close(token_weights(lengths, "token", mask_T=mask), mask / 3)
    torch.testing.assert_close(token_weights(lengths, "token", 30, mask), mask / 30)
    for reduction in ("sequence", "token"):
        everything = torch.ones(16, dtype=torch.bool)
        assert torch.equal(
            token_weights(torch.tensor(LENGTHS), reduction, 7, everything),
            token_weights(torch.tensor(LENGTHS), reduction, 7),
        )
    with pytest.raises(ValueError, match="at least one token"):
        token_weights(lengths, "token", mask_T=torch.tensor([False, True, True, True, True]))


def test_masked_tokens_are_in_no_metric():
    # Only the second token counts: ratio 1.1, advantage 3.
    mask = torch.tensor([False, True, False])
    loss, metrics = policy_loss(
        torch.tensor([9.0, math.log(1.1), -9.0], dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
        torch.tensor([2.0, 3.0, -1.0]),
        token_weights(torch.tensor([3]), "sequence", mask_T=mask).double(),
        clip_ratio=0.2,
    )
    assert loss.item() == pytest.approx(-3.3) and metrics["clip_fraction"] == 0
    assert metrics["ratio_max_deviation"].item() == pytest.approx(0.1)
    assert metrics["kl_update"].item() == pytest.approx(0.1 - math.log(1.1))


def test_policy_loss_by_hand():
    # Ratios 1.5, .5, 1.1, advantages 2, -1, 3, eps .2: min(3, 2.4), min(-.5, -.8), 3.3; the mean is 4.9 / 3.
    logprobs = torch.tensor([1.5, 0.5, 1.1], dtype=torch.float64).log()
    loss, metrics = policy_loss(
        logprobs,
        torch.zeros(3, dtype=torch.float64),
        torch.tensor([2.0, -1.0, 3.0]),
        weights("token", [3]),
        clip_ratio=0.2,
    )
    assert loss.item() == pytest.approx(-4.9 / 3)
    assert metrics["clip_fraction"].item() == pytest.approx(2 / 3)
    assert metrics["ratio_max_deviation"].item() == pytest.approx(0.5)
    k3 = [0.5 - math.log(1.5), -0.5 - math.log(0.5), 0.1 - math.log(1.1)]
    assert metrics["kl_update"].item() == pytest.approx(sum(k3) / 3)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0])
def test_policy_loss_and_gradient_are_the_published_ones(scale):
    old, advantages = draw(16, seed=1), draw(16, seed=2)
    logprobs = (old + draw(16, seed=3, scale=scale)).requires_grad_()
    loss, _ = policy_loss(logprobs, old, advantages, weights(), clip_ratio=0.2)
    gradient = torch.autograd.grad(loss, logprobs)[0]

    ratios = torch.exp(padded(logprobs, LENGTHS) - padded(old, LENGTHS))
    advantages_2d = padded(advantages, LENGTHS)
    surrogate = torch.minimum(advantages_2d * ratios, advantages_2d * ratios.clamp(0.8, 1.2))
    expected = -masked_mean(surrogate, LENGTHS)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logprobs)[0], rtol=1e-6, atol=1e-7)


def test_truncated_importance_weights():
    # Trainer's old minus generator's: log 1.5 and log 4; cap 2. Ratio 1, advantages 1 and -3.
    old = torch.tensor([1.5, 4.0], dtype=torch.float64).log().requires_grad_()
    rollout = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss, metrics = policy_loss(
        old,
        old.detach(),
        torch.tensor([1.0, -3.0]),
        weights("token", [2]),
        clip_ratio=0.2,
        rollout_logprobs_T=rollout,
        importance_cap=2.0,
    )
    assert loss.item() == pytest.approx(-(1.5 - 6.0) / 2)
    # The weights carry no gradient: d loss / d logp = -w * A * importance.
    assert torch.autograd.grad(loss, rollout, retain_graph=True, allow_unused=True)[0] is None
    torch.testing.assert_close(torch.autograd.grad(loss, old)[0], torch.tensor([-0.75, 3.0], dtype=torch.float64))
    assert metrics["importance_weight_mean"].item() == pytest.approx(1.75)
    expected_kl = (0.5 - math.log(1.5) + 3 - math.log(4)) / 2
    assert metrics["kl_rollout_train"].item() == pytest.approx(expected_kl)


def test_equal_logprobs_give_ratio_one_and_unit_weights():
    old, advantages = draw(16, seed=1).float(), draw(16, seed=2).float()
    plain, metrics = policy_loss(old, old, advantages, weights(), clip_ratio=0.2)
    corrected, _ = policy_loss(old, old, advantages, weights(), clip_ratio=0.2, rollout_logprobs_T=old)
    assert metrics["ratio_max_deviation"] == 0 and metrics["clip_fraction"] == 0 and metrics["kl_update"] == 0
    assert plain == corrected


def test_extreme_ratio_keeps_a_finite_gradient():
    logprobs = torch.zeros(2, requires_grad=True)
    old = torch.tensor([-200.0, -200.0])
    loss, _ = policy_loss(logprobs, old, torch.tensor([1.0, -1.0]), torch.ones(2), clip_ratio=0.2)
    assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, logprobs)[0]).all()


def test_micro_batches_add_up_to_the_step():
    logprobs, old, advantages = draw(16, seed=3), draw(16, seed=1), draw(16, seed=2)
    whole, whole_metrics = policy_loss(logprobs, old, advantages, weights(), clip_ratio=0.2)
    parts = []
    for tokens, lengths in ((slice(0, 6), [5, 1]), (slice(6, 16), [3, 7])):
        part_weights = weights(lengths=lengths, total=4)
        parts.append(policy_loss(logprobs[tokens], old[tokens], advantages[tokens], part_weights, clip_ratio=0.2))
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    for name in ("clip_fraction", "kl_update"):
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], whole_metrics[name])


def test_value_loss_by_hand():
    # V 3, old 1, G 4, eps 0.5: clipped V 1.5, max(1, 6.25); V 0, old 0, G 1: 1. Loss .5 * (6.25 + 1) / 2.
    loss, metrics = value_loss(
        torch.tensor([3.0, 0.0]),
        torch.tensor([1.0, 0.0]),
        torch.tensor([4.0, 1.0]),
        torch.full((2,), 0.5),
        clip=0.5,
    )
    assert loss.item() == pytest.approx(1.8125)
    assert metrics["clip_fraction"].item() == 0.5


@pytest.mark.parametrize("clip", [None, 0.3, 5.0])
def test_value_loss_and_gradient_are_the_published_ones(clip):
    """Fault 21 of the published code: a clip of none too."""
    old, returns = draw(16, seed=1), draw(16, seed=2, scale=4)
    values = (old + draw(16, seed=3)).requires_grad_()
    loss, _ = value_loss(values, old, returns, weights(), clip=clip)
    v, o, g = (padded(x, LENGTHS) for x in (values, old, returns))
    squares = (v - g).square()
    if clip is not None:
        squares = torch.maximum(squares, (torch.clamp(v, o - clip, o + clip) - g).square())
    expected = 0.5 * masked_mean(squares, LENGTHS)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        torch.autograd.grad(loss, values)[0], torch.autograd.grad(expected, values)[0], rtol=1e-6, atol=1e-7
    )


def test_cross_entropy_is_torchs_token_mean():
    logits, labels = draw(16, 11), torch.arange(16) % 11
    logprobs = torch.log_softmax(logits, -1)[torch.arange(16), labels]
    loss, _ = cross_entropy_loss(logprobs, weights("token"))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels), rtol=1e-6, atol=0)


def test_reward_model_loss_by_hand():
    # Pairs (2, 0) and (-1, 1): sigmoid losses of 2 and -2; mean square (4 + 0 + 1 + 1) / 4 = 1.5.
    better, worse = torch.tensor([2.0, -1.0]), torch.tensor([0.0, 1.0])
    loss, metrics = reward_model_loss(better, worse, regularization=0.1)
    assert loss.item() == pytest.approx((sigmoid_loss(2) + sigmoid_loss(-2)) / 2 + 0.15)
    assert metrics["accuracy"].item() == 0.5


def test_reward_model_loss_is_the_published_one():
    better, worse = draw(6, seed=1), draw(6, seed=2)
    expected = -logsigmoid(better - worse).mean() + 0.01 * torch.stack([better, worse]).square().mean()
    torch.testing.assert_close(reward_model_loss(better, worse, regularization=0.01)[0], expected)
    # In two micro-batches, with the weights of the whole step.
    parts = [
        reward_model_loss(b, w, regularization=0.01, weights_B=torch.full((len(b),), 1 / 6).double())[0]
        for b, w in ((better[:2], worse[:2]), (better[2:], worse[2:]))
    ]
    torch.testing.assert_close(parts[0] + parts[1], expected, rtol=1e-6, atol=0)


def test_aligned_positions_by_hand():
    # Pair 1: [1 2 3 4] and [1 2 9]: differ from position 2 on; the shorter's last token (index 2) is held.
    # Pair 2: [7] and [7 7]: one is the start of the other, they differ where it ends.
    better, worse, weight = aligned_positions(
        torch.tensor([1, 2, 3, 4, 7]),
        torch.tensor([4, 1]),
        torch.tensor([1, 2, 9, 7, 7]),
        torch.tensor([3, 2]),
    )
    assert better.tolist() == [2, 3, 4]
    assert worse.tolist() == [2, 2, 4]
    torch.testing.assert_close(weight, torch.tensor([0.25, 0.25, 0.5]))
    with pytest.raises(ValueError, match="pair 1"):
        aligned_positions(torch.tensor([1, 5, 6]), torch.tensor([1, 2]), torch.tensor([2, 5, 6]), torch.tensor([1, 2]))


@pytest.mark.parametrize("seed", range(20))
def test_token_wise_loss_is_the_published_one_on_padded_rows(seed):
    rng = np.random.default_rng(seed)
    pairs, length, pad = 4, 10, 0
    tokens = torch.full((2, pairs, length), pad)
    ends = rng.integers(2, length + 1, size=(2, pairs))
    for i in range(pairs):
        prompt = torch.tensor(rng.integers(1, 4, size=2))
        for side in (0, 1):
            tokens[side, i, : ends[side, i]] = torch.tensor(rng.integers(1, 4, size=ends[side, i]))
            tokens[side, i, :2] = prompt
        if torch.equal(tokens[0, i], tokens[1, i]):
            tokens[1, i, 0] = 9
    scores = draw(2, pairs, length, seed=seed, scale=2)

    losses = []
    for i in range(pairs):
        diverge = (tokens[0, i] != tokens[1, i]).nonzero()[0].item()
        end = int(ends[:, i].max())
        better, worse = scores[0, i, diverge:end], scores[1, i, diverge:end]
        regulariser = torch.stack([better, worse]).square().mean()
        losses.append(-logsigmoid(better - worse).mean() + 0.01 * regulariser)
    expected = torch.stack(losses).mean()

    # Rows cut at the longer end, padding included: what the published code reads.
    cut = [int(end) for end in ends.max(axis=0)]
    flat_tokens = [torch.cat([tokens[side, i, : cut[i]] for i in range(pairs)]) for side in (0, 1)]
    flat_scores = [torch.cat([scores[side, i, : cut[i]] for i in range(pairs)]) for side in (0, 1)]
    better, worse, weight = aligned_positions(flat_tokens[0], torch.tensor(cut), flat_tokens[1], torch.tensor(cut))
    loss, _ = token_wise_reward_model_loss(
        flat_scores[0][better], flat_scores[1][worse], weight.double(), regularization=0.01
    )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_cost_model_loss_by_hand():
    # Unsafer 2 (labelled unsafe), safer 1 (labelled safe): s(2 - 1), s(-1 * 1), s(2); mean square 2.5.
    loss, metrics = cost_model_loss(
        torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([1]), torch.tensor([-1]), regularization=0.1
    )
    assert loss.item() == pytest.approx(sigmoid_loss(1) + sigmoid_loss(-1) + sigmoid_loss(2) + 0.25)
    assert metrics["accuracy"].item() == 1.0 and metrics["sign_accuracy"].item() == 0.5


def test_cost_model_loss_is_the_published_one():
    unsafer, safer = draw(8, seed=1), draw(8, seed=2)
    unsafer_sign = torch.tensor([1, 1, 1, 1, -1, -1, 1, 1])
    safer_sign = torch.tensor([1, -1, -1, 1, -1, -1, -1, 1])
    loss, metrics = cost_model_loss(unsafer, safer, unsafer_sign, safer_sign, regularization=0.001)
    expected = (
        -logsigmoid(unsafer - safer) - logsigmoid(safer_sign * safer) - logsigmoid(unsafer_sign * unsafer)
    ).mean() + 0.001 * torch.stack([unsafer, safer]).square().mean()
    torch.testing.assert_close(loss, expected)
    right = ((unsafer * unsafer_sign) > 0).sum() + ((safer * safer_sign) > 0).sum()
    assert metrics["sign_accuracy"].item() == pytest.approx(right.item() / 16)
    assert metrics["accuracy"].item() == pytest.approx((unsafer > safer).double().mean().item())


def test_dpo_loss_by_hand():
    # beta 0.5 * [(-10 - -12) - (-9 - -8)] = 0.5 * (2 + 1) = 1.5
    loss, metrics = dpo_loss(
        torch.tensor([-10.0]), torch.tensor([-9.0]), torch.tensor([-12.0]), torch.tensor([-8.0]), beta=0.5
    )
    assert loss.item() == pytest.approx(sigmoid_loss(1.5))
    assert metrics["margin"].item() == pytest.approx(1.5) and metrics["accuracy"].item() == 1.0
