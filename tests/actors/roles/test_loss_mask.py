"""Responses with holes, tokens that the policy did not write: builder, policy and critic against loops over own tokens.

Whatever stands in a hole is NaN or nonsense here, so that nothing can read it unnoticed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.roles.critic import Critic
from actors.roles.experience_builder import ExperienceBuilder
from actors.roles.micro_batches import minibatches
from actors.roles.policy import PolicyTrainer
from beaver_ray import experience
from beaver_ray.errors import UserError
from beaver_ray.method.objective import BoundedCosts
from tests.actors.support import (
    LiteralScoreModel,
    gradients_of,
    literal_logprobs,
    padded_logits,
    ppo_config,
    random_sequences,
    set_up,
    whole_sequences,
    with_columns,
)

SIGNALS = {"reward": ("reward", -1), "harm": ("cost/harm", 1)}
CAP = 1.1
MULTIPLIER = 1.3


def masks_of(lengths: Sequence[int], seed: int) -> list[list[bool]]:
    """Holes at the start, inside, at the end, several in one response, and none; each keeps a token."""
    rng = np.random.default_rng(seed)
    masks = [[True] * lengths[0], *((rng.random(n) < 0.6).tolist() for n in lengths[1:])]
    for mask in masks:
        if not any(mask):
            mask[int(rng.integers(len(mask)))] = True
    assert any(not m[0] for m in masks) and any(not m[-1] for m in masks)
    assert any(m[a] and not m[b] and m[c] for m in masks for c in range(len(m)) for b in range(c) for a in range(b))
    return masks


def in_holes(column: list[Any], masks: list[list[bool]], value: Any) -> list[list[Any]]:
    return [
        [v if m else value for v, m in zip(row, mask, strict=True)] for row, mask in zip(column, masks, strict=True)
    ]


def holed(rows: int, seed: int, logprobs: list[np.ndarray] | None = None) -> pa.RecordBatch:
    """Scored sequences with all per-token columns, unusable in holes; log-probs of noise unless given."""
    rng = np.random.default_rng(seed)
    batch = random_sequences(rows, seed)
    lengths = experience.lengths(batch, "response_tokens")
    scores = {name: rng.normal(0, 3, rows).astype(np.float32) for name in ("reward", "cost/harm")}
    noise = {"reference_logprobs": 0.5, "logprobs": 0.5, "values/reward": 1.0, "values/harm": 1.0}
    batch = with_columns(batch, seed, **scores, **noise)
    columns = {n: batch.column(n).to_pylist() for n in ("rollout_logprobs", *noise)}
    if logprobs is not None:
        # The policy's before its update and the generator's, both some way off the policy's as it is.
        columns["logprobs"], columns["rollout_logprobs"] = (
            [row + 0.3 * rng.standard_normal(len(row)) for row in logprobs] for _ in range(2)
        )
    masks = masks_of(lengths.tolist(), seed)
    spoilt = {name: in_holes(column, masks, math.nan) for name, column in columns.items()}
    versions = in_holes([rng.integers(2, 5, n).tolist() for n in lengths], masks, -1000)
    batch = batch.drop_columns([*columns, "token_versions"])
    return with_columns(batch, loss_mask=masks, token_versions=versions, **spoilt)


def own(row: dict[str, Any], name: str) -> list[float]:
    """A row's column without holes."""
    return [value for value, written in zip(row[name], row["loss_mask"], strict=True) if written]


def built(config: Any, batch: pa.RecordBatch) -> tuple[dict[str, Any], dict[str, BoundedCosts], pa.RecordBatch]:
    """(figures, costs for the multipliers, batch with advantages) of `ExperienceBuilder`."""
    given = ("values/reward", "values/harm", "logprobs")
    parts = [batch.select(["sample_id", name]) for name in given]
    (stats, costs), whole = ExperienceBuilder(config).advantages([1, 1, 1], {}, batch.drop_columns(list(given)), *parts)
    return stats, costs, whole


def literal_gae(row: dict[str, Any], signal: str, beta: float) -> tuple[list[float], list[float]]:
    """Advantages and returns of every response token: worked out without holes, then put back with zeros in them."""
    score, sign = SIGNALS[signal]
    values = own(row, f"values/{signal}")
    kl = [p - q for p, q in zip(own(row, "logprobs"), own(row, "reference_logprobs"), strict=True)]
    rewards = [sign * beta * k for k in kl]
    rewards[-1] += row[score]
    advantages, running = [], 0.0
    for t in reversed(range(len(values))):
        following = values[t + 1] if t + 1 < len(values) else 0.0
        running = rewards[t] + following - values[t] + 0.95 * running
        advantages.insert(0, running)
    at = [t for t, written in enumerate(row["loss_mask"]) if written]
    whole_advantages, whole_returns = [0.0] * len(row["loss_mask"]), [0.0] * len(row["loss_mask"])
    for t, advantage, value in zip(at, advantages, values, strict=True):
        whole_advantages[t], whole_returns[t] = advantage, advantage + value
    return whole_advantages, whole_returns


def test_the_builder_skips_holes(tiny_world: Path) -> None:
    batch = holed(17, seed=1)
    config = ppo_config(tiny_world, ppo={"kl_coefficient": 0.3}, rollout={"staleness": 1})
    stats, costs, whole = built(config, batch)
    rows = batch.to_pylist()
    assert stats["unusable"] == {}
    for row, found in zip(rows, whole.to_pylist(), strict=True):
        for signal in SIGNALS:
            advantages, returns = literal_gae(row, signal, 0.3)
            np.testing.assert_allclose(found[f"advantages/{signal}"], advantages, atol=1e-4)
            np.testing.assert_allclose(found[f"returns/{signal}"], returns, atol=1e-4)

    policy, rollout, reference = (
        [own(row, name) for row in rows] for name in ("logprobs", "rollout_logprobs", "reference_logprobs")
    )
    kl = [sum(p) - sum(q) for p, q in zip(policy, reference, strict=True)]
    assert stats["kl/reference"] == pytest.approx(sum(kl) / 17)
    gaps = [r - p for rs, ps in zip(rollout, policy, strict=True) for r, p in zip(rs, ps, strict=True)]
    assert stats["kl/rollout_train"] == pytest.approx(sum(gaps) / len(gaps))
    assert stats["kl/rollout_train_max"] == pytest.approx(max(abs(gap) for gap in gaps))
    versions = [v for row in rows for v in own(row, "token_versions")]
    assert stats["rollout/weight_version_mean"] == pytest.approx(sum(versions) / len(versions))
    assert stats["rollout/response_tokens"] == pytest.approx(sum(map(len, policy)) / 17)
    assert stats["tokens"] == sum(map(len, whole_sequences(batch))), "all that models read"
    for signal in SIGNALS:
        returns = [g for row in whole.to_pylist() for g in own(row, f"returns/{signal}")]
        values = [v for row in rows for v in own(row, f"values/{signal}")]
        expected = 1 - np.var(np.subtract(returns, values)) / np.var(returns)
        assert stats[f"critic/{signal}/explained_variance"] == pytest.approx(expected, abs=1e-5)
    # The importance of a whole answer is that of its own tokens.
    weights = [min(math.exp(sum(p) - sum(r)), 2.0) for p, r in zip(policy, rollout, strict=True)]
    mean = sum(weights) / 17
    assert stats["rollout/importance_weight_mean"] == pytest.approx(mean)
    cost = sum(w * row["cost/harm"] for w, row in zip(weights, rows, strict=True)) / sum(weights)
    expected = [cost + w / mean * (row["cost/harm"] - cost) for w, row in zip(weights, rows, strict=True)]
    assert costs["harm"].costs_E.tolist() == pytest.approx(expected, rel=1e-4)


def test_a_hole_by_hand(tiny_world: Path) -> None:
    """beta 0, gamma 1, lambda 0.5: tokens 0 and 3 are the policy's, which is all that the reward 3 is for."""
    mask = [True, False, False, True, False]
    columns: dict[str, Any] = {
        "sample_id": [1],
        "prompt_id": [0],
        "prompt_tokens": [[5]],
        "response_tokens": [[7, 8, 9, 7, 8]],
        "loss_mask": [mask],
        "rollout_logprobs": [[-1.0, 0.0, 0.0, -1.0, 0.0]],
        "weight_version": [0],
        "token_versions": [[0] * 5],
        "finish_reason": ["stop"],
        "reward": [3.0],
        "cost/harm": [-2.0],
        **{name: [[-1.0] * 5] for name in ("logprobs", "reference_logprobs")},
        "values/reward": [[0.5, 100.0, -100.0, 1.0, 100.0]],
        "values/harm": [[0.0] * 5],
    }
    _, _, whole = built(ppo_config(tiny_world, ppo={"gae_lambda": 0.5}), experience.make_batch(columns))
    # deltas 1 - 0.5 and 3 - 1
    assert whole.column("advantages/reward").to_pylist() == [[0.5 + 0.5 * 2.0, 0, 0, 2.0, 0]]
    assert whole.column("returns/reward").to_pylist() == [[2.0, 0, 0, 3.0, 0]]


@pytest.mark.parametrize("rule", ["leave_one_out", "group_standardized"])
def test_without_critics_the_builder_skips_holes(tiny_world: Path, rule: str) -> None:
    """Own tokens have the advantage of their answer, holes 0; the KL is that of own tokens."""
    batch = holed(12, seed=4).drop_columns(["prompt_id", "values/reward", "values/harm"])
    batch = with_columns(batch, prompt_id=np.arange(12) // 3)
    logprobs = batch.select(["sample_id", "logprobs"])
    config = ppo_config(tiny_world, ppo={"kl_coefficient": 0.3, "advantage": rule}, rollout={"samples_per_prompt": 3})
    _, whole = ExperienceBuilder(config).advantages([1], {}, batch.drop_columns(["logprobs"]), logprobs)
    rows = batch.to_pylist()
    for signal, (score, sign) in SIGNALS.items():
        kls = [
            [sign * 0.3 * (p - q) for p, q in zip(own(row, "logprobs"), own(row, "reference_logprobs"), strict=True)]
            for row in rows
        ]
        returns = [row[score] + sum(kl) for row, kl in zip(rows, kls, strict=True)]
        for i, (row, found) in enumerate(zip(rows, whole.column(f"advantages/{signal}").to_pylist(), strict=True)):
            group = [j for j in range(12) if j // 3 == i // 3]
            if rule == "leave_one_out":
                elsewhere = [returns[j] for j in range(12) if j // 3 != i // 3]
                expected = [returns[i] - (sum(returns[j] for j in group if j != i) + np.mean(elsewhere)) / 3] * len(
                    kls[i]
                )
            else:
                scores = np.array([rows[j][score] for j in group])
                expected = [(row[score] - scores.mean()) / (scores.std() + 1e-4) + kl for kl in kls[i]]
            written = iter(expected)
            np.testing.assert_allclose(found, [next(written) if m else 0.0 for m in row["loss_mask"]], atol=1e-4)


def test_a_response_without_own_tokens_is_refused(tiny_world: Path) -> None:
    batch = holed(6, seed=2)
    masks = batch.column("loss_mask").to_pylist()
    masks[3] = [False] * len(masks[3])
    batch = with_columns(batch.drop_columns(["loss_mask"]), loss_mask=masks)
    with pytest.raises(UserError, match=r"^sample 103 cannot be trained on: no token of the response is the policy's"):
        built(ppo_config(tiny_world), batch)


def test_only_what_is_not_finite_outside_holes_costs_the_sample(tiny_world: Path) -> None:
    batch = holed(9, seed=3)
    column, masks = (batch.column(name).to_pylist() for name in ("values/harm", "loss_mask"))
    row = next(i for i, mask in enumerate(masks) if not mask[0])
    column[row][masks[row].index(True)] = -math.inf
    spoilt = with_columns(batch.drop_columns(["values/harm"]), **{"values/harm": column})
    stats, _, whole = built(ppo_config(tiny_world), spoilt)
    assert list(stats["unusable"]) == ["values/harm"] and whole.num_rows == 8
    assert stats["unusable"]["values/harm"].startswith("1 of 9 sample(s) have no finite values/harm but -inf, from")


def mean_of(terms: list[list[Tensor]], reduction: str) -> Tensor:
    """Of one term for each own token, by response: the mean of each and then of all, or of all tokens alike."""
    if reduction == "token":
        return torch.stack([term for row in terms for term in row]).mean()
    return torch.stack([torch.stack(row).mean() for row in terms]).mean()


def literal_policy(
    model: torch.nn.Module, batch: pa.RecordBatch, advantages: list[list[float]], reduction: str
) -> dict[str, Tensor]:
    """The loss and figures of one minibatch by padded forwards and a loop over own tokens."""
    rows, new = batch.to_pylist(), literal_logprobs(model, batch)
    logits = padded_logits(model, whole_sequences(batch))
    terms: dict[str, list[list[Tensor]]] = {}
    deviations = []
    for b, row in enumerate(rows):
        for column in terms.values():
            column.append([])
        for t in [t for t, written in enumerate(row["loss_mask"]) if written]:
            log_ratio = new[b][t] - row["logprobs"][t]
            ratio, advantage = log_ratio.exp(), advantages[b][t]
            mismatch = torch.tensor(row["logprobs"][t] - row["rollout_logprobs"][t])
            importance = mismatch.exp().clamp(max=CAP)
            free, clipped = ratio * advantage, ratio.clamp(0.8, 1.2) * advantage
            found = {
                "loss": -importance * torch.minimum(free, clipped),
                "clip_fraction": (clipped < free).float(),
                "kl_update": ratio - 1 - log_ratio,
                "importance_weight_mean": importance,
                "kl_rollout_train": mismatch.exp() - 1 - mismatch,
                "entropy": torch.distributions.Categorical(
                    logits=logits[b, len(row["prompt_tokens"]) - 1 + t]
                ).entropy(),
            }
            deviations.append((ratio - 1).abs())
            for name, term in found.items():
                terms.setdefault(name, [[]])[-1].append(term)
    means = {name: mean_of(column, reduction) for name, column in terms.items()}
    return means | {"ratio_max_deviation": torch.stack(deviations).max()}


def check_gradients(found: dict[str, Tensor], model: torch.nn.Module, loss: Tensor, atol: float) -> None:
    model.zero_grad()
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=atol, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def trained(config: Any, batch: pa.RecordBatch) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Figures of the policy's update, and the gradient of its last minibatch."""
    trainer = set_up(PolicyTrainer(config, 0, 1))
    climbed = ExperienceBuilder(config).combine(batch, {"harm": MULTIPLIER})[1]
    return gradients_of(trainer.engine.module, lambda: trainer.update(climbed, 1))


def with_everything(world: Path, config: Any, rows: int, seed: int) -> pa.RecordBatch:
    """A batch from the builder, off policy, so that tokens are clipped on both sides and importance weights capped."""
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    with torch.no_grad():
        exact = [row.numpy() for row in literal_logprobs(model, random_sequences(rows, seed))]
    return built(config, holed(rows, seed, exact))[2]


def combined(batch: pa.RecordBatch, normalize: bool) -> list[list[float]]:
    """(A_r - lambda * A_c) / (1 + lambda) of every token, in holes NaN; whitened over own tokens where asked for."""
    rows = batch.to_pylist()
    found = [
        [
            (r - MULTIPLIER * c) / (1 + MULTIPLIER)
            for r, c in zip(*(row[f"advantages/{s}"] for s in SIGNALS), strict=True)
        ]
        for row in rows
    ]
    found = in_holes(found, [row["loss_mask"] for row in rows], math.nan)
    tokens = [a for row in found for a in row if not math.isnan(a)]
    mean, spread = (float(np.mean(tokens)), float(np.std(tokens))) if normalize else (0.0, 1.0)
    return [[(a - mean) / spread for a in row] for row in found]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("reduction", "count"), [("sequence", 1), ("token", 1), ("sequence", 2), ("token", 2)])
def test_the_policys_update_is_the_loss_of_own_tokens(
    one_rank: None, tiny_world: Path, reduction: str, count: int, normalize: bool
) -> None:
    """In several micro-batches; with two minibatches the steps are too small for the first to move the second."""
    ppo = {"loss_reduction": reduction, "minibatches": count, "normalize_advantages": normalize, "importance_cap": CAP}
    config = ppo_config(tiny_world, ppo=ppo, policy={"learning_rate": 1e-12})
    batch = with_everything(tiny_world, config, 13, seed=4)
    figures, gradients = trained(config, batch)

    model = AutoModelForCausalLM.from_pretrained(tiny_world / "model", dtype=torch.float32)
    advantages = combined(batch, normalize)
    parts = [
        literal_policy(model, batch.take(pa.array(part)), [advantages[r] for r in part], reduction)
        for part in minibatches(13, count, (config.seed, 1, 0))
    ]
    for name in parts[0]:
        values = [float(part[name].detach()) for part in parts]
        expected = max(values) if name == "ratio_max_deviation" else sum(values) / count
        assert figures[f"policy/{name}"] == pytest.approx(expected, abs=1e-4), name
    assert figures["policy/clip_fraction"] > 0.1 and figures["policy/skipped_updates"] == 0
    check_gradients(gradients, model, parts[-1]["loss"], atol=1e-4)


@pytest.mark.parametrize("clip", [0.5, None])
@pytest.mark.parametrize(("reduction", "count"), [("sequence", 1), ("token", 1), ("token", 2)])
def test_the_critics_update_is_the_loss_of_own_tokens(
    one_rank: None, tiny_world: Path, reduction: str, count: int, clip: float | None
) -> None:
    ppo = {"loss_reduction": reduction, "minibatches": count, "clip_value": clip}
    config = ppo_config(tiny_world, ppo=ppo, critic={"learning_rate": 1e-12})
    batch = with_everything(tiny_world, config, 13, seed=5)
    critic = set_up(Critic(config, ["harm"], str(tiny_world / "cost_model"), 0, 1))
    assert np.isfinite(experience.flat(critic.values(batch), "values/harm")).all(), "holes have values too"
    figures, gradients = gradients_of(critic.engine.module, lambda: critic.update(batch, 1))

    model = LiteralScoreModel(tiny_world / "cost_model")
    losses, fractions = [], []
    for part in minibatches(13, count, (config.seed, 1, 0)):
        chosen = batch.take(pa.array(part))
        values_BL = model(whole_sequences(chosen))
        terms: list[list[Tensor]] = []
        clipped_terms: list[list[Tensor]] = []
        for b, row in enumerate(chosen.to_pylist()):
            terms.append([])
            clipped_terms.append([])
            for t in [t for t, written in enumerate(row["loss_mask"]) if written]:
                value = values_BL[b, len(row["prompt_tokens"]) - 1 + t]
                old, target = row["values/harm"][t], row["returns/harm"][t]
                error = clipped_error = (value - target) ** 2
                if clip is not None:
                    clipped_error = (value.clamp(old - clip, old + clip) - target) ** 2
                terms[-1].append(0.5 * torch.maximum(error, clipped_error))
                clipped_terms[-1].append((clipped_error > error).float())
        losses.append(mean_of(terms, reduction))
        fractions.append(float(mean_of(clipped_terms, reduction)))
    assert figures["critic/harm/loss"] == pytest.approx(sum(float(x.detach()) for x in losses) / count, rel=1e-4)
    assert figures["critic/harm/clip_fraction"] == pytest.approx(sum(fractions) / count, abs=1e-5)
    assert figures["critic/harm/skipped_updates"] == 0 and (clip is None or 0.05 < fractions[0] < 0.95)
    check_gradients(gradients, model, losses[-1], atol=1e-3)


def test_a_mask_without_holes_changes_nothing(one_rank: None, tiny_world: Path) -> None:
    """To the bit: the builder's batch and figures, the policy's figures and gradients, with and without the column."""
    config = ppo_config(
        tiny_world, ppo={"normalize_advantages": True, "importance_cap": CAP, "loss_reduction": "token"}
    )
    bare = random_sequences(11, seed=6)
    scores = {name: np.linspace(-2, 2, 11).astype(np.float32) for name in ("reward", "cost/harm")}
    noise = {"reference_logprobs": 0.5, "logprobs": 0.5, "values/reward": 1.0, "values/harm": 1.0}
    bare = with_columns(bare, 6, **scores, **noise)
    mask = [[True] * int(n) for n in experience.lengths(bare, "response_tokens")]
    whole, masked = (built(config, batch) for batch in (bare, with_columns(bare, loss_mask=mask)))
    assert whole[0] == masked[0] and masked[2].select(whole[2].schema.names).equals(whole[2])
    (figures, gradients), (same, others) = (trained(config, batch) for batch in (whole[2], masked[2]))
    for seen, again in zip(whole[1].values(), masked[1].values(), strict=True):
        assert np.array_equal(seen.costs_E, again.costs_E)
    assert figures == same and all(torch.equal(gradients[name], others[name]) for name in gradients)
