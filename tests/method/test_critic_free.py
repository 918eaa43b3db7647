"""Advantages without critics: against loops, against exact gradients of a policy small enough to enumerate, at rest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from beaver_ray.constraint_options import MultiplierConfig
from beaver_ray.method.advantages import constant_share, gae, leave_one_out_baselines, shape_rewards, standardize_groups
from beaver_ray.method.objective import (
    Answers,
    ConstrainedReward,
    Objective,
    RewardMaximization,
    RewardShaping,
    Settings,
)
from beaver_ray.ppo_options import AdvantageRule

NAMES = ("harm", "leak")
RAGGED = [9, 4, 9, 2, 4, 9, 7, 4, 2, 9]  # prompts of ten answers: four, three, two and one of each


def objectives(settings: Settings, count: int) -> list[Objective]:
    """All three, with ``count`` costs in those that know costs."""
    names = NAMES[:count]
    shaping = RewardShaping(settings, {name: 0.7 + i for i, name in enumerate(names)})
    return [
        RewardMaximization(settings),
        shaping,
        ConstrainedReward(settings, {name: MultiplierConfig() for name in names}),
    ]


def drawn(prompts: Sequence[int], seed: int) -> Answers:
    """Answers of 1 to 8 tokens to these prompts, scores wide enough to be clipped."""
    rng = np.random.default_rng(seed)
    rows = len(prompts)
    lengths = rng.integers(1, 9, rows)
    return Answers(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        prompts_B=np.array(prompts),
        rewards_B=rng.normal(0, 3, rows).astype(np.float32),
        costs={name: rng.normal(1, 3, rows).astype(np.float32) for name in NAMES},
        truncated_B=rng.random(rows) < 0.4,
        kl_terms_T=rng.normal(0, 0.5, lengths.sum()),
        log_ratios_T=np.zeros(lengths.sum()),
        values={},
    )


def literal_baseline(scores: Sequence[float], prompts: Sequence[int], i: int) -> float:
    """The other answers to the prompt, and the mean of the answers to all other prompts as one more."""
    counted = [score for j, score in enumerate(scores) if prompts[j] == prompts[i] and j != i]
    elsewhere = [score for j, score in enumerate(scores) if prompts[j] != prompts[i]]
    if elsewhere:
        counted.append(sum(elsewhere) / len(elsewhere))
    return sum(counted) / len(counted) if counted else 0.0


def test_baselines_by_hand() -> None:
    # Two prompts, means 2 and 6: (3 + 6) / 2, (1 + 6) / 2; (4 + 6 + 2) / 3, ...
    scores = np.array([1.0, 3.0, 8.0, 4.0, 6.0])
    assert leave_one_out_baselines(scores, np.array([5, 5, 1, 1, 1])).tolist() == [4.5, 3.5, 4.0, 16 / 3, 14 / 3]
    # One prompt: the plain leave-one-out mean. One answer of its own: the mean of the others. One answer: nothing.
    assert leave_one_out_baselines(scores[:3], np.array([5, 5, 5])).tolist() == [5.5, 4.5, 2.0]
    assert leave_one_out_baselines(scores[:3], np.array([5, 5, 1])).tolist() == [5.5, 4.5, 2.0]
    assert leave_one_out_baselines(scores[:2], np.array([5, 1])).tolist() == [3.0, 1.0]
    assert leave_one_out_baselines(scores[:1], np.array([5])).tolist() == [0.0]


@pytest.mark.parametrize("prompts", [RAGGED, [3] * 6, list(range(6)), [1], [0, 0, 1]])
def test_baselines_by_loops(prompts: list[int]) -> None:
    scores = np.random.default_rng(len(prompts)).normal(2, 3, len(prompts))
    expected = [literal_baseline(scores.tolist(), prompts, i) for i in range(len(prompts))]
    np.testing.assert_allclose(leave_one_out_baselines(scores, np.array(prompts)), expected, atol=1e-12)


def test_an_answer_is_no_part_of_its_baseline() -> None:
    scores, prompts = np.random.default_rng(0).normal(0, 1, len(RAGGED)), np.array(RAGGED)
    before = leave_one_out_baselines(scores, prompts)
    for i in range(len(scores)):
        changed = scores.copy()
        changed[i] += 100.0
        after = leave_one_out_baselines(changed, prompts)
        assert after[i] == pytest.approx(before[i]) and np.all(np.delete(after, i) > np.delete(before, i))


@pytest.mark.parametrize("rule", ["leave_one_out", "group_standardized"])
def test_a_cost_that_counts_for_some_prompts_is_compared_with_those_alone(rule: AdvantageRule) -> None:
    """As if the other prompts' answers were not there, and 0 for these; where it counts for none, 0 for all."""
    settings = Settings(kl_coefficient=0.3, advantage=rule)
    prompts = [4, 4, 7, 7, 9, 9, 9]
    answers = drawn(prompts, seed=5)
    inside_B = np.array([True, True, False, False, True, True, True])
    scoped = objectives(settings, 1)[2].advantages(replace(answers, inside={"harm": inside_B}))
    kept_T = np.repeat(inside_B, np.diff(answers.offsets))
    lengths_B = np.diff(answers.offsets)[inside_B]
    alone = replace(
        answers,
        offsets=np.concatenate([[0], np.cumsum(lengths_B)]),
        rewards_B=answers.rewards_B[inside_B],
        costs={name: cost_B[inside_B] for name, cost_B in answers.costs.items()},
        truncated_B=answers.truncated_B[inside_B],
        kl_terms_T=answers.kl_terms_T[kept_T],
        log_ratios_T=answers.log_ratios_T[kept_T],
        prompts_B=answers.prompts_B[inside_B],
    )
    expected = objectives(settings, 1)[2].advantages(alone)
    np.testing.assert_allclose(scoped.advantages["harm"][kept_T], expected.advantages["harm"], rtol=1e-12)
    assert not scoped.advantages["harm"][~kept_T].any()
    # The reward counts everywhere.
    whole = objectives(settings, 1)[2].advantages(answers)
    np.testing.assert_array_equal(scoped.advantages["reward"], whole.advantages["reward"])
    nobody = objectives(settings, 1)[2].advantages(replace(answers, inside={"harm": np.zeros(7, bool)}))
    assert not nobody.advantages["harm"].any() and math.isnan(nobody.figures["baseline/harm/constant_share"])


def test_where_all_answers_cost_the_same_there_is_a_gradient() -> None:
    """Against the plain leave-one-out mean, the advantages of such a prompt would be 0."""
    costs, prompts = np.array([3.0, 3.0, 3.0, 3.0, -1.0, 1.0]), np.array([0, 0, 0, 0, 1, 1])
    advantages = costs - leave_one_out_baselines(costs, prompts)
    assert advantages[:4].tolist() == [3.0 / 4] * 4, "a share 1/n of how much more they cost than the others"
    assert constant_share(costs, prompts) == 0.5
    assert standardize_groups(costs, prompts)[:4].tolist() == [0.0] * 4


def test_standardized_by_loops() -> None:
    scores, prompts = np.random.default_rng(1).normal(2, 3, len(RAGGED)), np.array(RAGGED)
    found = standardize_groups(scores, prompts)
    for i, prompt in enumerate(RAGGED):
        group = scores[prompts == prompt]
        expected = (scores[i] - group.mean()) / (group.std() + 1e-4)
        assert found[i] == pytest.approx(expected, abs=1e-12)
    assert found[RAGGED.index(7)] == 0.0, "an only answer"
    assert constant_share(scores, prompts) == 1 / 4
    # The same answer scored in two forwards differs by rounding, which is no advantage.
    twice = np.float32(2.5) * np.array([1.0, 1.0 + 1e-7], dtype=np.float32)
    assert np.abs(standardize_groups(twice, np.zeros(2))).max() < 0.01
    assert constant_share(twice, np.zeros(2)) == 1.0


@pytest.mark.parametrize("rule", ["leave_one_out", "group_standardized"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_all_by_loops(count: int, rule: AdvantageRule) -> None:
    settings = Settings(0.3, clip_score=2.5, truncation_penalty=1.5, advantage=rule)
    for seed, objective in enumerate(objectives(settings, count)):
        answers = drawn(RAGGED, seed)
        made = objective.advantages(answers)
        assert objective.critics == () and made.returns == {}
        assert made.advantages.keys() == objective.signals.keys()
        for signal, scores in objective.scores(answers).items():
            sign = -1 if signal == "reward" else 1
            kls = [sign * 0.3 * kl for kl in np.split(answers.kl_terms_T, answers.offsets[1:-1])]
            # Every token's reward is clipped, KL included; or, where the KL is a term of its own, the score alone.
            tokens = [[*kl[:-1], kl[-1] + score] for kl, score in zip(kls, scores, strict=True)]
            returns = [sum(min(max(t, -2.5), 2.5) for t in row) for row in tokens]
            clipped = np.clip(scores, -2.5, 2.5)
            expected = []
            for i, prompt in enumerate(RAGGED):
                if rule == "leave_one_out":
                    expected += [returns[i] - literal_baseline(returns, RAGGED, i)] * len(kls[i])
                else:
                    group = clipped[answers.prompts_B == prompt]
                    expected += ((clipped[i] - group.mean()) / (group.std() + 1e-4) + kls[i]).tolist()
            np.testing.assert_allclose(made.advantages[signal], expected, atol=1e-5)
            assert made.figures[f"baseline/{signal}/constant_share"] == 1 / 4
            if rule == "leave_one_out":
                baselines = [literal_baseline(returns, RAGGED, i) for i in range(len(RAGGED))]
                explained = 1 - np.var(np.subtract(returns, baselines)) / np.var(returns)
                assert made.figures[f"baseline/{signal}/explained_variance"] == pytest.approx(explained)
        assert len(made.figures) == len(objective.signals) * (2 if rule == "leave_one_out" else 1)


def test_what_gae_would_see_of_a_whole_answer() -> None:
    """At an answer's first token, GAE with lambda 1 and the baseline for a value has the same advantage."""
    answers = drawn(RAGGED, seed=4)
    settings = Settings(0.3, clip_score=2.5, advantage="leave_one_out")
    objective = objectives(settings, 2)[2]
    made = objective.advantages(answers).advantages
    for signal, sign in objective.signals.items():
        scores = objective.scores(answers)[signal]
        rewards = shape_rewards(scores, answers.kl_terms_T, answers.offsets, 0.3, 2.5, sign)
        returns = np.add.reduceat(rewards, answers.offsets[:-1])
        values = np.repeat(leave_one_out_baselines(returns, answers.prompts_B), np.diff(answers.offsets))
        advantages, _ = gae(rewards, values, answers.offsets, 1.0, 1.0)
        first = answers.offsets[:-1]
        np.testing.assert_allclose(made[signal][first], advantages[first], atol=1e-12)


@pytest.mark.parametrize("rule", ["leave_one_out", "group_standardized"])
def test_the_kl_weight_does_not_depend_on_multipliers(rule: AdvantageRule) -> None:
    answers, parts = drawn(RAGGED, seed=8), []
    for harm, leak in ((0.0, 0.0), (0.3, 0.0), (7.0, 2.0), (0.0, 50.0)):
        combined = []
        for beta in (0.4, 0.0):
            objective = objectives(Settings(beta, clip_score=None, advantage=rule), 2)[2]
            made = objective.advantages(answers).advantages
            combined.append(objective.combine(made, {"harm": harm, "leak": leak}))
        parts.append(combined[0] - combined[1])
    for part in parts[1:]:
        np.testing.assert_allclose(part, parts[0], atol=1e-12)


def test_a_multiplier_is_a_price() -> None:
    """Costs in cents need a multiplier of a hundredth, unless standard deviations have swallowed the unit."""
    answers = drawn(RAGGED, seed=9)
    cents = replace(answers, costs={"harm": 100 * answers.costs["harm"]})

    def lagrangian(rule: AdvantageRule, given: Answers, multiplier: float) -> np.ndarray:
        objective = objectives(Settings(0.0, clip_score=None, advantage=rule), 1)[2]
        return objective.combine(objective.advantages(given).advantages, {"harm": multiplier}) * (1 + multiplier)

    expected = lagrangian("leave_one_out", answers, 2.0)
    np.testing.assert_allclose(lagrangian("leave_one_out", cents, 0.02), expected, atol=1e-5)
    expected = lagrangian("group_standardized", answers, 2.0)
    np.testing.assert_allclose(lagrangian("group_standardized", cents, 2.0), expected, atol=1e-3)


# A policy small enough to enumerate: an answer is the token 0 alone, or 1 and then one of 0, 1, 2. A prompt has a row
# of five logits, two for the first token and three for the second.

ANSWERS = ((0,), (1, 0), (1, 1), (1, 2))


def token_logprobs(logits: Tensor, answer: Sequence[int]) -> list[Tensor]:
    first, second = logits[:2].log_softmax(0), logits[2:].log_softmax(0)
    return [first[answer[0]], *(second[token] for token in answer[1:])]


class Tiny:
    """Two prompts, of which the first is answered three times and the second twice; rewards and costs by table."""

    def __init__(self, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.logits, self.reference = (torch.randn(2, 5, generator=rng, dtype=torch.float64) for _ in range(2))
        self.rewards, self.costs = (torch.randn(2, 4, generator=rng, dtype=torch.float64) for _ in range(2))
        self.prompts = [0, 0, 0, 1, 1]
        self.probabilities = torch.stack(
            [torch.stack([sum(token_logprobs(row, a)) for a in ANSWERS]).exp() for row in self.logits]  # type: ignore[arg-type]
        )

    def gradients(self, prompt: int, answer: int) -> np.ndarray:
        """Of the log-prob of each token of an answer, [T, 2, 5]."""
        found = []
        for t in range(len(ANSWERS[answer])):
            logits = self.logits.clone().requires_grad_()
            token_logprobs(logits[prompt], ANSWERS[answer])[t].backward()
            assert logits.grad is not None
            found.append(logits.grad.numpy())
        return np.stack(found)

    def answers(self, chosen: Sequence[int]) -> Answers:
        """The step in which the prompts have these answers."""
        pairs = list(zip(self.prompts, chosen, strict=True))
        kl = [
            float(p - q)
            for x, y in pairs
            for p, q in zip(
                token_logprobs(self.logits[x], ANSWERS[y]), token_logprobs(self.reference[x], ANSWERS[y]), strict=True
            )
        ]
        return Answers(
            offsets=np.cumsum([0, *(len(ANSWERS[y]) for y in chosen)]),
            prompts_B=np.array(self.prompts),
            rewards_B=np.array([float(self.rewards[x, y]) for x, y in pairs]),
            costs={"harm": np.array([float(self.costs[x, y]) for x, y in pairs])},
            truncated_B=np.zeros(len(pairs), dtype=bool),
            kl_terms_T=np.array(kl),
            log_ratios_T=np.zeros(len(kl)),
            values={},
        )

    def expected(self, advantages: Callable[[Answers], np.ndarray]) -> np.ndarray:
        """The policy gradient in expectation over all answers that the step can have, each prompt's by its mean."""
        gradients = {(x, y): self.gradients(x, y) for x in range(2) for y in range(4)}
        total = np.zeros((2, 5))
        for chosen in itertools.product(range(4), repeat=len(self.prompts)):
            pairs = list(zip(self.prompts, chosen, strict=True))
            probability = np.prod([float(self.probabilities[x, y]) for x, y in pairs])
            answers = self.answers(chosen)
            parts = np.split(advantages(answers), answers.offsets[1:-1])
            for (x, y), part in zip(pairs, parts, strict=True):
                total += probability * np.tensordot(part, gradients[x, y], 1) / self.prompts.count(x)
        return total

    def exact(self, of_answers: Callable[[Tensor], Tensor]) -> np.ndarray:
        """Gradient of the expectation, summed over the prompts, of numbers [2, 4] made of the log-probs [2, 4]."""
        logits = self.logits.clone().requires_grad_()
        logprobs = torch.stack(
            [torch.stack([sum(token_logprobs(row, a)) for a in ANSWERS]) for row in logits]  # type: ignore[arg-type]
        )
        (logprobs.exp() * of_answers(logprobs)).sum().backward()
        assert logits.grad is not None
        return logits.grad.numpy()

    @property
    def reference_logprobs(self) -> Tensor:
        return torch.stack(
            [torch.stack([sum(token_logprobs(row, a)) for a in ANSWERS]) for row in self.reference]  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_the_expectation_is_the_exact_gradient(kind: int) -> None:
    """Of the reward, of the shaped reward and of the Lagrangian over 1 + multiplier, each less beta times the KL."""
    tiny, beta, multiplier = Tiny(kind), 0.3, 1.7
    objective = objectives(Settings(beta, clip_score=None, advantage="leave_one_out"), 1)[kind]
    scores = (
        tiny.rewards,
        tiny.rewards - 0.7 * tiny.costs,
        (tiny.rewards - multiplier * tiny.costs) / (1 + multiplier),
    )[kind]
    multipliers = {"harm": multiplier} if kind == 2 else {}
    found = tiny.expected(lambda answers: objective.combine(objective.advantages(answers).advantages, multipliers))
    exact = tiny.exact(lambda logprobs: scores - beta * (logprobs - tiny.reference_logprobs))
    np.testing.assert_allclose(found, exact, atol=1e-12)


def test_to_shrink_only_where_answers_score_alike_would_be_biased() -> None:
    """The plain leave-one-out mean, but the mean elsewhere where a prompt's answers all score alike."""
    tiny = Tiny(3)

    def switching(answers: Answers) -> np.ndarray:
        scores, prompts = answers.rewards_B, answers.prompts_B
        advantages = []
        for i, prompt in enumerate(prompts):
            group, elsewhere = scores[prompts == prompt], scores[prompts != prompt]
            mean = elsewhere.mean() if np.ptp(group) == 0 else (group.sum() - scores[i]) / (len(group) - 1)
            advantages.append(scores[i] - mean)
        return np.repeat(advantages, np.diff(answers.offsets))

    assert np.abs(tiny.expected(switching) - tiny.exact(lambda _: tiny.rewards)).max() > 0.01


def test_the_kl_term_of_standardized_groups_is_the_gradient_of_the_tokens_kl() -> None:
    """Summed over states, each as often as it is visited, without the KL's influence on where one gets."""
    tiny, beta = Tiny(5), 0.3
    found = []
    for weight in (beta, 0.0):
        objective = objectives(Settings(weight, clip_score=None, advantage="group_standardized"), 1)[2]

        def combined(answers: Answers, objective: Objective = objective) -> np.ndarray:
            return objective.combine(objective.advantages(answers).advantages, {"harm": 2.5})

        found.append(tiny.expected(combined))
    logits = tiny.logits.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for row, reference in zip(logits, tiny.reference, strict=True):
        for cut, visited in ((slice(0, 2), 1.0), (slice(2, 5), row[:2].softmax(0)[1].detach())):
            logprobs = row[cut].log_softmax(0)
            total = total - beta * visited * (logprobs.exp() * (logprobs - reference[cut].log_softmax(0))).sum()
    total.backward()
    assert logits.grad is not None
    np.testing.assert_allclose(found[0] - found[1], logits.grad.numpy(), atol=1e-12)


# Primal and dual steps on a table of logits, with answers of one token, whose constrained optimum is known.


class Table:
    """Prompts with four answers each; what earns more costs more.

    The reference is uniform, so that under a multiplier m the optimal policy is proportional to
    exp((r - m c) / ((1 + m) beta)).
    """

    beta, limit, samples = 0.2, 1.2, 4

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.costs_GV = 4 * rng.random((16, 4)) * rng.choice([0.5, 2.0], (16, 1))
        self.rewards_GV = 0.3 * self.costs_GV + rng.normal(0, 0.3, (16, 4))

    def mean_cost(self, multiplier: float) -> float:
        scaled = (self.rewards_GV - multiplier * self.costs_GV) / ((1 + multiplier) * self.beta)
        return float((softmax(scaled) * self.costs_GV).sum(1).mean())

    def optimum(self) -> float:
        """The multiplier under which the optimal policy costs the limit."""
        low, high = 0.0, 1000.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if self.mean_cost(middle) > self.limit else (low, middle)
        return low

    def at_rest(self, rule: AdvantageRule, steps: int = 3000) -> float:
        """The mean multiplier over the second half; critics, where there are any, know the exact values."""
        rng, logits_GV, found = np.random.default_rng(1), np.zeros((16, 4)), []
        config = MultiplierConfig(rule="pid", initial=0.0)
        settings = Settings(self.beta, clip_score=None, advantage=rule)
        objective = ConstrainedReward(settings, {"harm": config})
        multiplier = objective.multipliers()["harm"]
        prompts_B = np.repeat(np.arange(16), self.samples)
        for _ in range(steps):
            probabilities_GV = softmax(logits_GV)
            edges_BV = probabilities_GV.cumsum(1)[prompts_B]
            chosen_B = np.minimum((rng.random((len(prompts_B), 1)) > edges_BV).sum(1), 3)
            kl_GV = np.log(probabilities_GV * 4)
            rewards_G = (probabilities_GV * (self.rewards_GV - self.beta * kl_GV)).sum(1)
            costs_G = (probabilities_GV * (self.costs_GV + self.beta * kl_GV)).sum(1)
            answers = Answers(
                offsets=np.arange(len(prompts_B) + 1),
                prompts_B=prompts_B,
                rewards_B=self.rewards_GV[prompts_B, chosen_B],
                costs={"harm": self.costs_GV[prompts_B, chosen_B]},
                truncated_B=np.zeros(len(prompts_B), dtype=bool),
                kl_terms_T=kl_GV[prompts_B, chosen_B],
                log_ratios_T=np.zeros(len(prompts_B)),
                values={"reward": rewards_G[prompts_B], "harm": costs_G[prompts_B]},
            )
            made = objective.advantages(answers).advantages
            multiplier.update(answers.costs["harm"], self.limit, reward_std=float(answers.rewards_B.std()))
            advantages_B = objective.combine(made, {"harm": multiplier.value})
            gradients_BV = -probabilities_GV[prompts_B]
            gradients_BV[np.arange(len(prompts_B)), chosen_B] += 1
            step_GV = np.zeros((16, 4))
            np.add.at(step_GV, prompts_B, advantages_B[:, None] * gradients_BV / self.samples)
            logits_GV += 0.5 * step_GV
            found.append(multiplier.value)
        return float(np.mean(found[steps // 2 :]))


def softmax(logits_GV: np.ndarray) -> np.ndarray:
    exponentials_GV: Any = np.exp(logits_GV - logits_GV.max(1, keepdims=True))
    return exponentials_GV / exponentials_GV.sum(1, keepdims=True)


def test_the_multiplier_at_rest_is_that_with_critics() -> None:
    table = Table()
    optimum, critics = table.optimum(), table.at_rest("gae")
    assert critics == pytest.approx(optimum, rel=0.05)
    assert table.at_rest("leave_one_out") == pytest.approx(optimum, rel=0.05)
    # Standardised costs and rewards have the same size, so that the multiplier counts something else.
    assert abs(table.at_rest("group_standardized") / optimum - 1) > 0.5
