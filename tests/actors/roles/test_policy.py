"""The policy's update against the published formulas, written out over padded tensors in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.driver.policy_stage import PolicyStage
from actors.roles.experience_builder import ExperienceBuilder
from actors.roles.micro_batches import minibatches
from actors.roles.policy import PolicyTrainer
from beaver_ray import experience
from beaver_ray.weights import plan_layout, unpack, verify
from tests.actors.support import (
    Ranks,
    gradients_of,
    literal_logprobs,
    pad,
    padded_logits,
    ppo_config,
    published_by,
    random_sequences,
    set_up,
    state_of,
    with_columns,
)

SIGNALS = ("reward", "harm")


def trainer_of(config: PolicyStage, rank: int = 0, world: int = 1) -> PolicyTrainer:
    return set_up(PolicyTrainer(config, rank, world))


def policy_model(world: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)


def with_everything(world: Path, batch: pa.RecordBatch, off_policy: float = 0.0, seed: int = 0) -> pa.RecordBatch:
    """Scores, values and advantages of noise; log-probs of the policy, moved by ``off_policy`` times noise."""
    with torch.no_grad():
        exact = [row.numpy() for row in literal_logprobs(policy_model(world), batch)]
    rng = np.random.default_rng(seed)
    logprobs = [row + off_policy * rng.standard_normal(len(row)) for row in exact]
    scores = {name: rng.normal(0, 2, batch.num_rows).astype(np.float32) for name in ("reward", "cost/harm")}
    noise = {f"{kind}/{s}": 1.0 for kind in ("values", "advantages", "returns") for s in SIGNALS}
    return with_columns(batch, seed, logprobs=logprobs, reference_logprobs=0.5, **scores, **noise)


def masked_mean(values_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """The published reduction: the mean of each answer's tokens, then the mean over answers."""
    return ((values_BL * mask_BL).sum(-1) / mask_BL.sum(-1)).mean()


def literal_policy_loss(
    model: torch.nn.Module,
    batch: pa.RecordBatch,
    advantages: Sequence[np.ndarray],
    old: str = "logprobs",
    cap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Section 2.4 over padded tensors; with ``cap`` each token is weighed by min(old / rollout, cap)."""
    rows = batch.to_pylist()
    new = literal_logprobs(model, batch, temperature)
    longest = max(len(row) for row in new)
    new_BL = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in new])
    old_BL, rollout_BL = (pad([row[name] for row in rows]) for name in (old, "rollout_logprobs"))
    mask_BL, advantages_BL = pad([[1] * len(row) for row in new]), pad(advantages)
    ratio_BL = (new_BL - old_BL).exp()
    surrogate_BL = torch.min(ratio_BL * advantages_BL, ratio_BL.clamp(0.8, 1.2) * advantages_BL)
    if cap is not None:
        surrogate_BL = surrogate_BL * (old_BL - rollout_BL).exp().clamp(max=cap)
    return -masked_mean(surrogate_BL, mask_BL)


def combined(batch: pa.RecordBatch, multiplier: float) -> list[np.ndarray]:
    """Section 2.4: (A_r - lambda * A_c) / (1 + lambda)."""
    reward, harm = (batch.column(f"advantages/{s}").to_pylist() for s in SIGNALS)
    return [(np.array(r) - multiplier * np.array(c)) / (1 + multiplier) for r, c in zip(reward, harm, strict=True)]


def climbing(batch: pa.RecordBatch, multiplier: float) -> pa.RecordBatch:
    """``batch`` with that as the advantages of the policy."""
    return with_columns(batch, advantages=[row.tolist() for row in combined(batch, multiplier)])


def check_gradients(found: dict[str, Tensor], model: torch.nn.Module, loss: Tensor, atol: float = 2e-5) -> float:
    """``found`` is the literal loss's gradient; returns its norm."""
    model.zero_grad()
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=atol, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    return float(torch.stack([g.square().sum() for g in expected.values()]).sum().sqrt())


def test_the_first_ratio_is_one(one_rank: None, tiny_world: Path) -> None:
    """Faults 7 and 27 of the published code."""
    trainer = trainer_of(ppo_config(tiny_world, rollout={"temperature": 0.7}))
    batch = with_everything(tiny_world, random_sequences(19, seed=1)).drop_columns(["logprobs"])
    found = trainer.logprobs(batch)
    with torch.no_grad():
        exact = literal_logprobs(policy_model(tiny_world), batch, temperature=0.7)
    batch = experience.join(batch, found)
    np.testing.assert_allclose(experience.flat(batch, "logprobs"), torch.cat(exact).numpy(), atol=1e-5)
    figures = trainer.update(climbing(batch, 0.5), 1)
    assert figures["policy/ratio_max_deviation"] < 1e-5
    assert figures["policy/clip_fraction"] == 0.0 and abs(figures["policy/kl_update"]) < 1e-8
    # With ratio 1 the loss is minus the mean advantage.
    means = [row.mean() for row in combined(batch, 0.5)]
    assert figures["policy/loss"] == pytest.approx(-np.mean(means), abs=1e-5)


def test_entropy_is_that_of_the_sampled_distribution(one_rank: None, tiny_world: Path) -> None:
    batch = with_everything(tiny_world, random_sequences(6, seed=2))
    figures = trainer_of(ppo_config(tiny_world, rollout={"temperature": 2.0})).update(climbing(batch, 0.0), 1)
    rows = batch.to_pylist()
    with torch.no_grad():
        logits = padded_logits(policy_model(tiny_world), [r["prompt_tokens"] + r["response_tokens"] for r in rows])
    expected = []
    for b, row in enumerate(rows):
        start = len(row["prompt_tokens"]) - 1
        places = logits[b, start : start + len(row["response_tokens"])] / 2.0
        expected.append(torch.distributions.Categorical(logits=places).entropy().mean())
    assert figures["policy/entropy"] == pytest.approx(float(torch.stack(expected).mean()), abs=1e-4)


@pytest.mark.parametrize(
    ("ppo", "old", "cap"),
    [
        ({}, "logprobs", None),
        ({"importance_cap": 1.1}, "logprobs", 1.1),
        ({"old_logprobs": "generator"}, "rollout_logprobs", None),
    ],
)
def test_one_update_is_the_published_loss(
    one_rank: None, tiny_world: Path, ppo: dict[str, Any], old: str, cap: float | None
) -> None:
    """Far off policy, so that tokens are clipped on both sides and importance weights capped."""
    batch = with_everything(tiny_world, random_sequences(11, seed=3), off_policy=0.4)
    rng = np.random.default_rng(1)
    moved = [np.array(row) + 0.3 * rng.standard_normal(len(row)) for row in batch.column("logprobs").to_pylist()]
    batch = with_columns(batch.drop_columns(["rollout_logprobs"]), rollout_logprobs=[row.tolist() for row in moved])
    trainer = trainer_of(ppo_config(tiny_world, ppo=ppo))
    figures, gradients = gradients_of(trainer.engine.module, lambda: trainer.update(climbing(batch, 1.5), 1))
    model = policy_model(tiny_world)
    loss = literal_policy_loss(model, batch, combined(batch, 1.5), old, cap)
    assert figures["policy/loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert figures["policy/clip_fraction"] > 0.1
    norm = check_gradients(gradients, model, loss)
    assert figures["policy/grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_token_reduction_weighs_all_tokens_alike(one_rank: None, tiny_world: Path) -> None:
    batch = with_everything(tiny_world, random_sequences(9, seed=4))
    figures = trainer_of(ppo_config(tiny_world, ppo={"loss_reduction": "token"})).update(climbing(batch, 1.0), 1)
    expected = -np.concatenate(combined(batch, 1.0)).mean()
    assert figures["policy/loss"] == pytest.approx(expected, abs=1e-5)


def test_multipliers_of_zero_are_plain_ppo_to_the_bit(one_rank: None, tiny_world: Path) -> None:
    """Through the builder: with a cost critic and multiplier 0, and without either."""
    batch = with_everything(tiny_world, random_sequences(12, seed=5))
    later = ("logprobs", "values/", "advantages/", "returns/")
    kept = [name for name in batch.schema.names if not name.startswith(later)]
    ppo = {"epochs": 2, "minibatches": 2}

    def weights(stage: str, signals: Sequence[str], multipliers: dict[str, float]) -> dict[str, Tensor]:
        config = ppo_config(tiny_world, stage, ppo=ppo)
        trainer = trainer_of(config)
        parts = [batch.select(["sample_id", f"values/{s}"]) for s in signals] + [trainer.logprobs(batch)]
        builder = ExperienceBuilder(config)
        _, whole = builder.advantages([1] * len(parts), {}, batch.select(kept), *parts)
        _, whole = builder.combine(whole, multipliers)
        for step in (1, 2):
            trainer.update(whole, step)
        return state_of(trainer)

    plain = weights("ppo", ["reward"], {})
    zero = weights("safe_ppo", SIGNALS, {"harm": 0.0})
    assert all(torch.equal(plain[name], zero[name]) for name in plain) and plain.keys() == zero.keys()
    other = weights("safe_ppo", SIGNALS, {"harm": 0.5})
    assert any(not torch.equal(plain[name], other[name]) for name in plain)
    start = policy_model(tiny_world).state_dict()
    assert any(not torch.equal(plain[name], start[name]) for name in plain)


def test_the_policy_reads_no_column_of_a_signal(one_rank: None, tiny_world: Path) -> None:
    """Nor anything else that it could do without, with constraints and without: the same update, bit for bit."""
    batch = climbing(with_everything(tiny_world, random_sequences(10, seed=12), off_policy=0.2), 0.8)
    read = ["sample_id", "prompt_tokens", "response_tokens", "rollout_logprobs", "logprobs", "advantages"]
    assert [name for name in batch.schema.names if "/" in name]
    ppo = {"minibatches": 2, "importance_cap": 2.0}
    states = []
    for stage, seen in (("safe_ppo", batch), ("safe_ppo", batch.select(read)), ("ppo", batch.select(read))):
        trainer = trainer_of(ppo_config(tiny_world, stage, ppo=ppo))
        trainer.update(seen, 1)
        states.append(state_of(trainer))
    for state in states[1:]:
        assert all(torch.equal(tensor, states[0][name]) for name, tensor in state.items())


def test_normalized_advantages_are_whitened_over_the_steps_tokens(one_rank: None, tiny_world: Path) -> None:
    """Fault 20 of the published code."""
    batch = with_everything(tiny_world, random_sequences(10, seed=6), off_policy=0.2)
    config = ppo_config(tiny_world, ppo={"normalize_advantages": True})
    trainer = trainer_of(config)
    _, whole = ExperienceBuilder(config).combine(batch, {"harm": 2.0})
    _, gradients = gradients_of(trainer.engine.module, lambda: trainer.update(whole, 1))
    raw = combined(batch, 2.0)
    tokens = np.concatenate(raw)
    white = [(row - tokens.mean()) / tokens.std() for row in raw]
    model = policy_model(tiny_world)
    check_gradients(gradients, model, literal_policy_loss(model, batch, white), atol=1e-4)


def test_a_step_with_ptx_is_half_of_both_gradients(one_rank: None, tiny_world: Path) -> None:
    data = {"ptx": [f"demonstrations:4/-1:{tiny_world}/ptx.jsonl"]}
    trainer = trainer_of(ppo_config(tiny_world, data=data, ppo={"ptx_coefficient": 16.0}))
    assert trainer.ptx is not None and len(trainer.ptx) == 4  # fewer than a step's 8 samples: all of them each time
    batch = with_everything(tiny_world, random_sequences(8, seed=7), off_policy=0.2)
    figures, gradients = gradients_of(trainer.engine.module, lambda: trainer.update(climbing(batch, 1.0), 1))

    model, tokenizer = policy_model(tiny_world), AutoTokenizer.from_pretrained(tiny_world / "model")
    ids, labels = [], []
    for tokens in trainer.ptx.tokens:
        text = tokenizer.decode(tokens)
        prompt, answer = text.split(" ASSISTANT: ")
        assert prompt.startswith("<s> USER: ") and answer.endswith(" </s>")
        ids.append(tokenizer.encode(text, add_special_tokens=False))
        assert ids[-1] == tokens.tolist()
        cut = len(tokenizer.encode(f"{prompt} ASSISTANT:", add_special_tokens=False))
        labels.append([-100] * cut + ids[-1][cut:])
    # transformers' own causal loss: the mean over the answers' tokens.
    ids_BL, labels_BL = pad(ids, dtype=torch.long), pad(labels, -100, torch.long)
    mask_BL = pad([[1] * len(row) for row in ids], dtype=torch.long)
    ptx_loss = model(input_ids=ids_BL, attention_mask=mask_BL, labels=labels_BL).loss
    rl_loss = literal_policy_loss(model, batch, combined(batch, 1.0))
    assert figures["policy/ptx_loss"] == pytest.approx(float(ptx_loss.detach()), abs=1e-4)
    check_gradients(gradients, model, 0.5 * (rl_loss + 16.0 * ptx_loss), atol=1e-4)


def test_two_rows_under_the_compat_settings(one_rank: None, tiny_world: Path) -> None:
    """Sections 2.2 to 2.4 from log-probs and scores to two optimizer steps, over padded tensors and AdamW."""
    compat = {"kl_coefficient": 0.02, "gae_lambda": 0.95, "clip_ratio": 0.2, "clip_score": 50.0}
    config = ppo_config(tiny_world, ppo={**compat, "epochs": 2}, policy={"learning_rate": 1e-4, "weight_decay": 0.01})
    trainer = trainer_of(config)
    batch = random_sequences(2, seed=8)
    assert len(set(experience.lengths(batch, "response_tokens").tolist())) == 2
    scores = {"reward": np.float32([70.0, -3.0]), "cost/harm": np.float32([-4.0, 6.0])}
    batch = with_columns(batch, 8, reference_logprobs=2.0, **scores)
    values = with_columns(batch.select(["sample_id", "response_tokens"]), 9, **{f"values/{s}": 2.0 for s in SIGNALS})
    parts = [values.select(["sample_id", f"values/{s}"]) for s in SIGNALS] + [trainer.logprobs(batch)]
    builder = ExperienceBuilder(config)
    _, whole = builder.advantages([1, 1, 1], {}, batch, *parts)

    rows = experience.join(batch, values).to_pylist()
    model = policy_model(tiny_world)
    with torch.no_grad():
        old_BL = pad([row.tolist() for row in literal_logprobs(model, batch)])
    mask_BL = pad([[1] * len(row["response_tokens"]) for row in rows])
    kl_BL = (old_BL - pad([row["reference_logprobs"] for row in rows])) * mask_BL
    advantages = {}
    for signal, score, sign in (("reward", "reward", -1), ("harm", "cost/harm", 1)):
        values_BL, shaped_BL = pad([row[f"values/{signal}"] for row in rows]) * mask_BL, sign * 0.02 * kl_BL
        for b, row in enumerate(rows):
            shaped_BL[b, len(row["response_tokens"]) - 1] += row[score]
        shaped_BL = shaped_BL.clamp(-50, 50) * mask_BL
        running, columns = torch.zeros(2, dtype=torch.float64), []
        for t in reversed(range(mask_BL.shape[1])):
            following = values_BL[:, t + 1] if t + 1 < mask_BL.shape[1] else 0.0
            running = shaped_BL[:, t] + following - values_BL[:, t] + 0.95 * running
            columns.append(running)
        advantages[signal] = torch.stack(columns[::-1], dim=1) * mask_BL
        for b, row in enumerate(whole.to_pylist()):
            found, length = row[f"advantages/{signal}"], len(row["response_tokens"])
            np.testing.assert_allclose(found, advantages[signal][b, :length], atol=1e-4)
            returns = advantages[signal][b, :length] + values_BL[b, :length]
            np.testing.assert_allclose(row[f"returns/{signal}"], returns, atol=1e-4)

    multiplier = 1.7
    advantages_BL = (advantages["reward"] - multiplier * advantages["harm"]) / (1 + multiplier)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95))
    losses = []
    for _ in range(2):
        new = literal_logprobs(model, batch)
        new_BL = torch.stack([torch.nn.functional.pad(r, (0, mask_BL.shape[1] - len(r))) for r in new])
        ratio_BL = (new_BL - old_BL).exp()
        surrogate_BL = torch.min(ratio_BL * advantages_BL, ratio_BL.clamp(0.8, 1.2) * advantages_BL)
        loss = -masked_mean(surrogate_BL, mask_BL)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    figures = trainer.update(builder.combine(whole, {"harm": multiplier})[1], 1)
    assert figures["policy/loss"] == pytest.approx(np.mean(losses), abs=1e-4)
    assert losses[0] != losses[1]
    for name, tensor in state_of(trainer).items():
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=1e-5, rtol=0)


def test_minibatches_cover_every_row_once_and_repeat_by_seed() -> None:
    assert [part.tolist() for part in minibatches(5, 1, (0, 1, 0))] == [[0, 1, 2, 3, 4]]
    parts = minibatches(12, 3, (7, 2, 0))
    assert [len(part) for part in parts] == [4, 4, 4]
    assert sorted(np.concatenate(parts).tolist()) == list(range(12))
    again, other = minibatches(12, 3, (7, 2, 0)), minibatches(12, 3, (7, 2, 1))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


def test_published_weights_and_saved_folder_are_the_policy(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    trainer = trainer_of(ppo_config(tiny_world))
    trainer.update(climbing(with_everything(tiny_world, random_sequences(8, seed=9)), 1.0), 1)
    published = published_by(trainer, 4)
    assert published is not None
    tensors = dict(unpack(published.layout, *published.buckets))
    trainer.save(str(tmp_path / "policy"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict()
    now = state_of(trainer)
    assert tensors.keys() == saved.keys() == now.keys() and "lm_head.weight" in now
    for name, tensor in now.items():
        assert torch.equal(tensor, tensors[name]) and torch.equal(tensor, saved[name]), name
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token == "</s>"


def update_on(rank: int, config: PolicyStage, world: int, batch: pa.RecordBatch) -> dict[str, Any]:
    """Log-probs, two updates and the weights after them; rank 0 also sees that they are what is published."""
    trainer = trainer_of(config, rank, world)
    logprobs = trainer.logprobs(batch)
    figures = [trainer.update(climbing(batch, 0.7), step) for step in (1, 2)]
    weights = {name: tensor.detach().clone().numpy() for name, tensor in trainer.engine.full_state()}
    # Many buckets, each gathered in a call of its own.
    trainer.published = plan_layout(trainer.engine.full_shapes(), bucket_bytes=2**12)
    if published := published_by(trainer, 2):
        assert len(published.buckets) > 5
        for index, bucket in enumerate(published.buckets):
            verify(published, index, bucket)
        tensors = [pair for bucket in published.buckets for pair in unpack(published.layout, bucket)]
        assert [name for name, _ in tensors] == list(weights) and "lm_head.weight" in weights
        for name, tensor in tensors:
            np.testing.assert_array_equal(tensor.numpy(), weights[name], err_msg=name)
    return {"logprobs": logprobs, "figures": figures, "weights": weights}


def test_buckets_share_their_memory_only_where_results_are_copied(one_rank: None, tiny_world: Path) -> None:
    config = ppo_config(tiny_world)
    for copied in (True, False):
        trainer = set_up(PolicyTrainer(config, 0, 1, copied))
        one, two = (trainer.bucket(version, 0) for version in (1, 2))
        assert one is not None and two is not None
        assert np.shares_memory(one.data, two.data) == copied
        assert one.checksum == two.checksum and (one.version, two.version) == (1, 2)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_two_ranks_update_as_one(one_rank: None, two_ranks: Ranks, tiny_world: Path, zero_stage: int) -> None:
    """With PTX, and minibatches of 2, 2, 2 and 1 rows: with one, the other rank only keeps in step."""
    config = ppo_config(
        tiny_world,
        data={"ptx": [f"demonstrations:3/-1:{tiny_world}/ptx.jsonl"]},
        ppo={"ptx_coefficient": 2.0, "minibatches": 4, "epochs": 2},
        policy={"learning_rate": 1e-4},
        engine={"zero_stage": zero_stage, "micro_batch_tokens": 36},
    )
    batch = with_everything(tiny_world, random_sequences(7, seed=10), off_policy=0.2)
    alone = update_on(0, config, 1, batch)
    together = two_ranks.run(update_on, config, 2, batch)
    parts = [t["logprobs"] for t in together]
    assert all(part.num_rows for part in parts)
    merged = experience.concat(parts)
    assert merged.column("sample_id").to_pylist() == batch.column("sample_id").to_pylist()
    expected = experience.concat([alone["logprobs"]])
    np.testing.assert_allclose(experience.flat(merged, "logprobs"), experience.flat(expected, "logprobs"), atol=1e-5)
    for result in together:
        for name, weight in alone["weights"].items():
            np.testing.assert_allclose(result["weights"][name], weight, atol=1e-5, rtol=0, err_msg=name)
        for mine, theirs in zip(result["figures"], alone["figures"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_a_nan_score_is_passed_over(one_rank: None, tiny_world: Path) -> None:
    batch = with_everything(tiny_world, random_sequences(8, seed=11))
    flat = experience.flat(batch, "advantages/reward").copy()
    flat[3] = np.nan
    batch = with_columns(batch, advantages=experience.ragged(flat, experience.lengths(batch, "response_tokens")))
    trainer = trainer_of(ppo_config(tiny_world))
    before = state_of(trainer)
    assert trainer.update(batch, 1) == {"policy/skipped_updates": 1.0}
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(trainer).items())


def test_earlier_answers_are_imitated_by_how_much_they_are_ahead(one_rank: None, tiny_world: Path) -> None:
    """Half as many earlier answers as there are, beside advantages of 0: theirs is the whole gradient."""
    beta, multiplier = 0.3, 0.5
    trainer = trainer_of(ppo_config(tiny_world, ppo={"replay": 0.5, "kl_coefficient": beta}))
    first, now = random_sequences(8, seed=21), random_sequences(8, seed=22)
    rng = np.random.default_rng(5)
    scores = {s: rng.normal(0, 3, 8).astype(np.float32) for s in SIGNALS}
    baselines = {s: rng.normal(0, 1, 8).astype(np.float32) for s in SIGNALS}

    def complete(batch: pa.RecordBatch) -> pa.RecordBatch:
        given = {f"scores/{s}": scores[s] for s in SIGNALS} | {f"baselines/{s}": baselines[s] for s in SIGNALS}
        batch = with_columns(batch.drop_columns(["prompt_id"]), prompt_id=np.arange(8))
        return with_columns(with_everything(tiny_world, batch), **given)

    trainer.update(climbing(complete(first), multiplier), 1, {"harm": multiplier})
    before = policy_model(tiny_world)
    before.load_state_dict(state_of(trainer), strict=False)
    batch = climbing(complete(now), multiplier)
    spread = np.concatenate(combined(batch, multiplier)).std()
    still = with_columns(
        batch.drop_columns(["advantages"]), advantages=[np.zeros(len(row)) for row in combined(batch, multiplier)]
    )
    chosen = np.sort(np.random.default_rng((trainer.config.seed, 2)).permutation(8)[:4])
    figures, gradients = gradients_of(trainer.engine.module, lambda: trainer.update(still, 2, {"harm": multiplier}))
    # The prompts are those of the second step and the answers those of the first.
    both = complete(first).to_pylist()
    rows = [both[i] | {"prompt_tokens": batch.to_pylist()[i]["prompt_tokens"]} for i in chosen]
    asked = experience.make_batch({n: [r[n] for r in rows] for n in ("sample_id", "prompt_tokens", "response_tokens")})
    logprobs, loss, imitated = literal_logprobs(before, asked), torch.zeros(()), 0
    for i, row, new in zip(chosen, rows, logprobs, strict=True):
        kl = float(new.sum().detach()) - sum(row["reference_logprobs"])
        ahead = [scores[s][i] - baselines[s][i] for s in SIGNALS]
        gain = (ahead[0] - multiplier * ahead[1]) / (1 + multiplier) - beta * kl
        imitated += gain > 0
        loss = loss - min(max(gain, 0.0), 3 * spread) * new.mean() / 8
    check_gradients(gradients, before, loss)
    assert figures["policy/imitated"] == pytest.approx(imitated / 4) and imitated > 0


def test_replay_and_ptx_may_begin_in_a_resumed_run(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    trainer_of(ppo_config(tiny_world)).save_state(str(tmp_path / "state"))
    demonstrations = [f"demonstrations:1:{tiny_world}/demonstrations/train.jsonl"]
    data = {"prompts": [f"prompts:1:{tiny_world}/prompts/train.jsonl"], "ptx": demonstrations}
    trainer = trainer_of(ppo_config(tiny_world, ppo={"replay": 0.5, "ptx_coefficient": 1.0}, data=data))
    trainer.load_state(str(tmp_path / "state"))
    assert trainer.best is not None and trainer.best.of_prompt == {} and trainer.ptx is not None
