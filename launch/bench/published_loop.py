"""The published Safe RLHF (PPO-Lag) loop, written anew from its description: the other side of `iteration`.

One process, on the GPU where there is one. For each micro-batch of 16 prompts: transformers' `generate` on the
left-padded prompts, six separate padded forwards (policy, reference, reward, cost, reward critic, cost critic), rewards
and costs with the KL on both sides, advantages in a loop over time, then one after another: multiplier, policy, reward
critic, cost critic, and the policy again on demonstrations (PTX). As published, with PTX one optimizer step of the
policy takes the mean of the two gradients. AdamW, betas 0.9 and 0.95, gradients clipped to norm 1. Scores are those of
the last answer token; values are those of the state before each token. In bfloat16 the optimizer works on the bfloat16
weights themselves.

The published code takes its masks from token ids; here they come from positions, which costs the same. Left out, to
this side's advantage: DeepSpeed, distributed all-reduces, emptying of the allocator's cache, logging.

As a program (`python -m launch.bench.published_loop FOLDER ...`) it prints one JSON object for each iteration.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """Constants of the published scripts."""

    micro_batch: int = 16
    max_new_tokens: int = 32
    kl_coefficient: float = 0.01
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_ratio: float = 0.2
    clip_value: float = 5.0
    clip_score: float = 50.0
    ptx_coefficient: float = 16.0
    limit: float = 0.0
    multiplier: float = 1.0
    multiplier_rate: float = 0.1
    multiplier_max: float = 5.0
    cost_window: int = 128
    policy_rate: float = 1e-5
    critic_rate: float = 5e-6


@dataclass
class Rollout:
    """One micro-batch: `ids_BL` are left-padded prompts and right-padded answers; per-token tensors are [B, L - 1]."""

    ids_BL: Tensor
    mask_BL: Tensor
    answer_BT: Tensor
    """Which of the L - 1 predicted tokens belong to the answer."""
    logprobs_BT: Tensor
    reference_BT: Tensor
    reward_B: Tensor
    cost_B: Tensor
    reward_values_BT: Tensor
    cost_values_BT: Tensor


class PublishedLoop:
    """The six models, three optimizers and the multiplier; every model is a module on one device."""

    def __init__(
        self,
        policy: Any,
        reference: Any,
        reward: nn.Module,
        cost: nn.Module,
        reward_critic: nn.Module,
        cost_critic: nn.Module,
        settings: Settings,
        pad: int,
        eos: int,
    ) -> None:
        self.policy, self.reference = policy, reference
        self.reward, self.cost = reward, cost
        self.critics = {"reward": reward_critic, "cost": cost_critic}
        self.settings, self.pad, self.eos = settings, pad, eos
        self.device = next(policy.parameters()).device
        self.log_multiplier = torch.tensor(settings.multiplier).log()
        self.costs: deque[float] = deque(maxlen=settings.cost_window)
        self.policy_optimizer = adamw(policy, settings.policy_rate)
        self.critic_optimizers = {name: adamw(m, settings.critic_rate) for name, m in self.critics.items()}

    @property
    def multiplier(self) -> float:
        """lambda now."""
        return float(self.log_multiplier.exp())

    def iteration(self, prompts: list[list[int]], ptx: list[tuple[list[int], list[int]]]) -> dict[str, float]:
        """All prompts, micro-batch by micro-batch; `ptx` are as many (prompt, answer).

        Returns the iteration's mean losses, and its seconds: time/generate, time/score, time/train, time/step.
        """
        size = self.settings.micro_batch
        losses: dict[str, list[float]] = {}
        seconds = {"time/generate": 0.0, "time/score": 0.0, "time/train": 0.0}
        began = time.perf_counter()
        for start in range(0, len(prompts), size):
            started = time.perf_counter()
            ids_BL, mask_BL, prompt_length = self.generate(prompts[start : start + size])
            generated = time.perf_counter()
            rollout = self.score(ids_BL, mask_BL, prompt_length)
            scored = time.perf_counter()
            for name, loss in self.train(rollout, ptx[start : start + size]).items():
                losses.setdefault(name, []).append(loss)
            seconds["time/generate"] += generated - started
            seconds["time/score"] += scored - generated
            seconds["time/train"] += time.perf_counter() - scored
        means = {f"loss/{name}": sum(values) / len(values) for name, values in losses.items()}
        return {**means, **seconds, "time/step": time.perf_counter() - began}

    @torch.no_grad()
    def generate(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor, int]:
        """Sequences [B, L] and their mask, and the length of the padded prompts."""
        self.policy.eval()
        longest = max(len(p) for p in prompts)
        ids_BP = self._tensor([[self.pad] * (longest - len(p)) + p for p in prompts])
        mask_BP = self._tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        ids_BL = self.policy.generate(
            input_ids=ids_BP,
            attention_mask=mask_BP,
            do_sample=True,
            top_k=0,
            max_new_tokens=self.settings.max_new_tokens,
            pad_token_id=self.pad,
            eos_token_id=self.eos,
        )
        answers = ids_BL[:, longest:]
        # Everything up to and including the first EOS.
        ended = (answers == self.eos).cumsum(-1) - (answers == self.eos).long()
        return ids_BL, torch.cat([mask_BP, (ended == 0).long()], dim=1), longest

    @torch.no_grad()
    def score(self, ids_BL: Tensor, mask_BL: Tensor, prompt_length: int) -> Rollout:
        """The six separate forwards over finished sequences; `prompt_length` is that of the padded prompts."""
        answer_BT = mask_BL[:, 1:].bool().clone()
        answer_BT[:, : prompt_length - 1] = False
        last_B = mask_BL.shape[1] - 1 - mask_BL.flip(-1).argmax(-1)
        rows = torch.arange(len(ids_BL), device=self.device)
        return Rollout(
            ids_BL,
            mask_BL,
            answer_BT,
            logprobs_BT=logprobs(self.policy, ids_BL, mask_BL),
            reference_BT=logprobs(self.reference, ids_BL, mask_BL),
            reward_B=token_scores(self.reward, ids_BL, mask_BL)[rows, last_B],
            cost_B=token_scores(self.cost, ids_BL, mask_BL)[rows, last_B],
            reward_values_BT=token_scores(self.critics["reward"], ids_BL, mask_BL)[:, :-1],
            cost_values_BT=token_scores(self.critics["cost"], ids_BL, mask_BL)[:, :-1],
        )

    def train(self, rollout: Rollout, ptx: list[tuple[list[int], list[int]]]) -> dict[str, float]:
        """Multiplier, policy, reward critic, cost critic and PTX, one after another; the losses."""
        settings = self.settings
        self.costs.extend(rollout.cost_B.tolist())
        self.update_multiplier(sum(self.costs) / len(self.costs))
        answer, old = rollout.answer_BT, rollout.logprobs_BT
        rewards_BT, costs_BT = shape_scores(rollout, settings)
        reward_advantages, reward_returns = gae(rollout.reward_values_BT, rewards_BT, answer, settings)
        cost_advantages, cost_returns = gae(rollout.cost_values_BT, costs_BT, answer, settings)
        multiplier = self.multiplier
        advantages = (reward_advantages - multiplier * cost_advantages) / (1.0 + multiplier)

        self.policy.train()
        new = logprobs(self.policy, rollout.ids_BL, rollout.mask_BL)
        policy_loss = surrogate_loss(new, old, advantages, answer, settings.clip_ratio)
        scale = 0.5 if ptx else 1.0
        (scale * policy_loss).backward()
        losses = {"policy": policy_loss.item()}
        if not ptx:
            optimizer_step(self.policy, self.policy_optimizer)
        for name, old_values, returns in (
            ("reward", rollout.reward_values_BT, reward_returns),
            ("cost", rollout.cost_values_BT, cost_returns),
        ):
            critic = self.critics[name].train()
            values = token_scores(critic, rollout.ids_BL, rollout.mask_BL)[:, :-1]
            loss = clipped_value_loss(values, old_values, returns, answer, settings.clip_value)
            loss.backward()
            optimizer_step(critic, self.critic_optimizers[name])
            losses[f"{name} critic"] = loss.item()
        if ptx:
            loss = self.ptx_loss(ptx)
            (scale * settings.ptx_coefficient * loss).backward()
            optimizer_step(self.policy, self.policy_optimizer)
            losses["ptx"] = loss.item()
        return losses

    def update_multiplier(self, mean_cost: float) -> None:
        """Plain gradient step on log lambda, capped."""
        settings = self.settings
        moved = self.log_multiplier + settings.multiplier_rate * self.multiplier * (mean_cost - settings.limit)
        self.log_multiplier = moved.clamp(max=torch.tensor(settings.multiplier_max).log())

    def ptx_loss(self, ptx: list[tuple[list[int], list[int]]]) -> Tensor:
        """Cross-entropy of the demonstrations' answers, mean over tokens, right-padded."""
        longest = max(len(p) + len(a) for p, a in ptx)
        ids = self._tensor([p + a + [self.pad] * (longest - len(p) - len(a)) for p, a in ptx])
        mask = self._tensor([[1] * (len(p) + len(a)) + [0] * (longest - len(p) - len(a)) for p, a in ptx])
        labels = ids.masked_fill(mask == 0, -100)
        for row, (prompt, _) in enumerate(ptx):
            labels[row, : len(prompt)] = -100
        logits = self.policy(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, device=self.device)


def adamw(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """The published optimizer; PyTorch's fused one, as on our side."""
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def optimizer_step(model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """Clip, step, forget."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def positions_of(mask_BL: Tensor) -> Tensor:
    """Position ids of left-padded sequences."""
    return (mask_BL.cumsum(-1) - 1).clamp(min=0)


def logprobs(model: Any, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Log-probs [B, L - 1] of every next token, from logits of every position."""
    output = model(input_ids=ids_BL, attention_mask=mask_BL, position_ids=positions_of(mask_BL), use_cache=False)
    table = F.log_softmax(output.logits[:, :-1].float(), dim=-1)
    return table.gather(-1, ids_BL[:, 1:, None]).squeeze(-1)


def token_scores(model: nn.Module, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Scores [B, L], float32."""
    hidden = model.trunk(  # type: ignore[operator]
        input_ids=ids_BL, attention_mask=mask_BL, position_ids=positions_of(mask_BL), use_cache=False
    ).last_hidden_state
    head: Any = model.score_head
    return F.linear(hidden.float(), head.weight.float(), head.bias.float()).squeeze(-1)


def shape_scores(rollout: Rollout, settings: Settings) -> tuple[Tensor, Tensor]:
    """Per-token rewards and costs [B, L - 1]: the KL on both sides, the score at the last answer token, clamped."""
    kl_BT = settings.kl_coefficient * (rollout.logprobs_BT - rollout.reference_BT) * rollout.answer_BT
    last_B = rollout.answer_BT.shape[1] - 1 - rollout.answer_BT.long().flip(-1).argmax(-1)
    rows = torch.arange(len(last_B), device=last_B.device)
    shaped = []
    for sign, scores_B in ((-1.0, rollout.reward_B), (1.0, rollout.cost_B)):
        signal = sign * kl_BT
        signal[rows, last_B] += scores_B
        shaped.append(signal.clamp(-settings.clip_score, settings.clip_score))
    return shaped[0], shaped[1]


def gae(values_BT: Tensor, rewards_BT: Tensor, answer_BT: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, L - 1] by a loop over time; both are only meant where `answer_BT` holds."""
    values, rewards = values_BT * answer_BT, rewards_BT * answer_BT
    zero = values.new_zeros(len(values))
    last = zero
    found = []
    length = values.shape[1]
    start = int(answer_BT.any(0).long().argmax())
    for t in reversed(range(start, length)):
        following = values[:, t + 1] if t < length - 1 else zero
        delta = rewards[:, t] + settings.gamma * following - values[:, t]
        last = delta + settings.gamma * settings.gae_lambda * last
        found.append(last)
    advantages = F.pad(torch.stack(found[::-1], dim=1), (start, 0))
    return advantages, advantages + values


def masked_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The mean over each sequence's tokens, then over sequences."""
    return ((values_BT * mask_BT).sum(-1) / mask_BT.sum(-1)).mean()


def surrogate_loss(new_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, answer_BT: Tensor, clip: float) -> Tensor:
    """The clipped surrogate."""
    ratio = torch.exp((new_BT - old_BT) * answer_BT)
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    return -masked_mean(torch.minimum(ratio * advantages_BT, clipped * advantages_BT), answer_BT)


def clipped_value_loss(values_BT: Tensor, old_BT: Tensor, returns_BT: Tensor, answer_BT: Tensor, clip: float) -> Tensor:
    """Half the larger of the free and the clipped squared error."""
    clipped = torch.clamp(values_BT, old_BT - clip, old_BT + clip)
    return 0.5 * masked_mean(torch.maximum((values_BT - returns_BT) ** 2, (clipped - returns_BT) ** 2), answer_BT)


def load(folder: Path, dtype: torch.dtype, settings: Settings) -> PublishedLoop:
    """The loop over a workspace of `models.write_workspace`."""
    from transformers import AutoModelForCausalLM

    from beaver_ray.models.loading import default_device
    from beaver_ray.models.score import load_score_model
    from launch.bench.models import EOS, PAD

    def policy() -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype, use_safetensors=True)
        return model.to(device)

    def scorer(kind: Any, use: Any) -> nn.Module:
        model: nn.Module = load_score_model(str(folder / kind), use, dtype)
        return model.to(device)

    device = default_device()
    scores = {kind: scorer(kind, kind).eval().requires_grad_(False) for kind in ("reward", "cost")}
    critics = {kind: scorer(kind, "critic") for kind in ("reward", "cost")}
    reference = policy().eval().requires_grad_(False)
    models = (policy(), reference, scores["reward"], scores["cost"], critics["reward"], critics["cost"])
    return PublishedLoop(*models, settings, PAD, EOS)


def main() -> None:
    """One JSON line for each iteration: seconds and mean losses."""
    logging.disable(logging.WARNING)
    from launch.bench.models import read_demonstrations, read_prompts

    parser = argparse.ArgumentParser(description="The published Safe RLHF loop over a workspace of the benchmark.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    settings = Settings(micro_batch=options.micro_batch, max_new_tokens=options.max_new_tokens)
    loop = load(options.folder, getattr(torch, options.dtype), settings)
    prompts, ptx = read_prompts(options.folder), read_demonstrations(options.folder)
    for index in range(options.iterations):
        chosen = [(index * options.prompts + i) % len(prompts) for i in range(options.prompts)]
        print(json.dumps(loop.iteration([prompts[i] for i in chosen], [ptx[i] for i in chosen])), flush=True)


if __name__ == "__main__":
    main()
