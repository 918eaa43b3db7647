"""Forms of a cost: against their definitions by loops, against exact gradients of small policies, and at rest."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from beaver_ray.constraint_options import MultiplierConfig
from beaver_ray.method.forms import CVaR, Form, Hinge, WorstOfK, bounded, make_form
from beaver_ray.method.objective import Answers, ConstrainedReward, RewardShaping, Settings
from beaver_ray.ppo_options import AdvantageRule
from tests.method.test_critic_free import RAGGED, Tiny, drawn, softmax

FORMS = (Hinge(), CVaR(0.7), WorstOfK(4))


def objective(form: Form | None, **settings: Any) -> ConstrainedReward:
    """Under one constraint, harm."""
    forms = {} if form is None else {"harm": form}
    return ConstrainedReward(Settings(forms=forms, **settings), {"harm": MultiplierConfig()})


def worst_share(costs: np.ndarray, level: float, weights: np.ndarray | None = None) -> float:
    """The mean of the worst 1 - level of the answers, the one on the edge by its part."""
    left, total = (1 - level) * len(costs), 0.0
    weights = np.ones(len(costs)) if weights is None else weights * len(costs) / weights.sum()
    for i in np.argsort(-costs):
        taken = min(left, weights[i])
        total, left = total + taken * costs[i], left - taken
    return total / ((1 - level) * len(costs))


def test_names() -> None:
    assert [make_form(name, 4) for name in ("mean", "hinge", "cvar:0.9", "worst_of_k")] == [
        Form(),
        Hinge(),
        CVaR(0.9),
        WorstOfK(4),
    ]


def test_by_hand() -> None:
    costs, prompts, ones = np.array([-3.0, 1.0, 5.0, 2.0, 2.0]), np.array([7, 7, 7, 4, 4]), np.ones(5)
    assert bounded(Form(), costs, prompts) == 7 / 5 and Form().per_answer(costs, prompts, ones) is costs
    assert Hinge().per_answer(costs, prompts, ones).tolist() == [0.0, 1.0, 5.0, 2.0, 2.0]
    assert bounded(Hinge(), costs, prompts) == 2.0
    # The worst two of five, by their quantile 2: 2, 2, 2 + 3 / 0.4, 2, 2.
    assert CVaR(0.6).per_answer(costs, prompts, ones).tolist() == pytest.approx([2.0, 2.0, 9.5, 2.0, 2.0])
    assert bounded(CVaR(0.6), costs, prompts) == pytest.approx((5 + 2) / 2)
    assert CVaR(0.6).deciding(np.array([2.0, 2.0, 9.5, 2.0, 2.0])).tolist() == pytest.approx([2.0, 5.0])
    assert Form().deciding(costs) is costs
    # The worst of 7 is 5, its next 1; of 4 both are 2.
    assert WorstOfK(3).per_answer(costs, prompts, ones).tolist() == [0.0, 0.0, 3 * 4.0, 0.0, 0.0]
    assert bounded(WorstOfK(3), costs, prompts) == (5 + 2) / 2
    # Against the worst of the others and, by a share of one third or one half, the worst elsewhere, 2 or 5.
    together, without = WorstOfK(3).against_others(costs, prompts)
    assert together.tolist() == [15.0, 15.0, 15.0, 4.0, 4.0]
    assert without.tolist() == pytest.approx([3 * (5 * 2 / 3 + 2 / 3)] * 2 + [3 * (1 * 2 / 3 + 2 / 3)] + [2 + 5] * 2)
    for form in (Form(), *FORMS):
        assert (
            math.isnan(bounded(form, costs[:0], prompts[:0]))
            and form.per_answer(costs[:0], prompts[:0], ones[:0]).size == 0
        )


@pytest.mark.parametrize("level", [0.1, 0.5, 0.7, 0.9, 0.95])
def test_the_mean_of_the_worst_share(level: float) -> None:
    """Fault 22 of the published code."""
    rng = np.random.default_rng(int(100 * level))
    for rows in (1, 7, 20, 100):
        for costs in (rng.normal(1, 3, rows), rng.integers(0, 3, rows).astype(float)):
            prompts, weights = np.arange(rows), rng.random(rows)
            assert bounded(CVaR(level), costs, prompts) == pytest.approx(worst_share(costs, level), abs=1e-9)
            counted = CVaR(level).per_answer(costs, prompts, weights)
            found = (weights * counted).sum() / weights.sum()
            assert found == pytest.approx(worst_share(costs, level, weights), abs=1e-9)
            # And it is the least over all nu.
            for nu in rng.normal(1, 3, 20):
                other = nu + np.maximum(costs - nu, 0.0) / (1 - level)
                assert (weights * other).sum() / weights.sum() >= found - 1e-9


def test_a_quantile_on_the_edge_leaves_the_worst_above_it() -> None:
    """Of 20 answers one is the worst twentieth; if the quantile were it, there would be nothing to learn from."""
    for rows, level in ((20, 0.95), (10, 0.7), (100, 0.57), (100, 0.29), (64, 0.75)):
        counted = CVaR(level).per_answer(np.arange(float(rows)), np.arange(rows), np.ones(rows))
        assert (counted > counted.min()).sum() == round(rows * (1 - level))


@pytest.mark.parametrize("prompts", [RAGGED, [3] * 6, list(range(6)), [1], [0, 0, 1]])
def test_the_worst_by_loops(prompts: list[int]) -> None:
    rng = np.random.default_rng(len(prompts))
    for costs in (rng.normal(1, 3, len(prompts)), rng.integers(0, 2, len(prompts)).astype(float)):
        rows, ones = np.array(prompts), np.ones(len(prompts))
        largest = {p: max(costs[rows == p]) for p in prompts}
        marginal, together, without = [], [], []
        for i, prompt in enumerate(prompts):
            others = [c for j, c in enumerate(costs) if prompts[j] == prompt and j != i]
            elsewhere = [value for p, value in largest.items() if p != prompt]
            k = len(others) + 1
            marginal.append(k * (largest[prompt] - max(others, default=0.0)))
            expected = max(others, default=0.0)
            if elsewhere:
                expected += (np.mean(elsewhere) - expected) / k
            together.append(k * largest[prompt])
            without.append(k * expected)
        form = WorstOfK(4)
        np.testing.assert_allclose(form.per_answer(costs, rows, ones), marginal, atol=1e-12)
        np.testing.assert_allclose(form.against_others(costs, rows), [together, without], atol=1e-12)
        assert bounded(form, costs, rows) == pytest.approx(np.mean(list(largest.values())))


def test_an_answer_is_no_part_of_what_is_expected_without_it() -> None:
    costs, prompts = np.random.default_rng(0).normal(0, 1, len(RAGGED)), np.array(RAGGED)
    _, before = WorstOfK(4).against_others(costs, prompts)
    for i in range(len(costs)):
        changed = costs.copy()
        changed[i] += 100.0
        assert WorstOfK(4).against_others(changed, prompts)[1][i] == pytest.approx(before[i])


def exact(tiny: Tiny, form: Form, multiplier: float, beta: float) -> np.ndarray:
    """Gradient of the Lagrangian over 1 + multiplier, less beta times the KL; the worst of 3 and of 2 answers."""
    logits = tiny.logits.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for x, row in enumerate(logits):
        logprobs: Tensor = torch.cat([row[:2].log_softmax(0)[:1], row[:2].log_softmax(0)[1] + row[2:].log_softmax(0)])
        p_Y, costs_Y = logprobs.exp(), tiny.costs[x]
        if isinstance(form, WorstOfK):
            drawn_together = list(itertools.product(range(4), repeat=tiny.prompts.count(x)))
            cost = sum(p_Y[list(ys)].prod() * costs_Y[list(ys)].max() for ys in drawn_together)
        else:
            cost = (p_Y * torch.relu(costs_Y)).sum()
        kl = (p_Y * (logprobs - tiny.reference_logprobs[x])).sum()
        total = total + ((p_Y * tiny.rewards[x]).sum() - multiplier * cost) / (1 + multiplier) - beta * kl
    total.backward()
    assert logits.grad is not None
    return logits.grad.numpy()


@pytest.mark.parametrize("form", [Hinge(), WorstOfK(3)])
@pytest.mark.parametrize("rule", ["leave_one_out", "gae"])
def test_the_expectation_is_the_exact_gradient(form: Form, rule: AdvantageRule) -> None:
    """Over all answers that a step can have; with whatever critics, which are right or wrong about the state alone."""
    tiny, beta, multiplier = Tiny(4), 0.3, 1.7
    made_of = objective(form, kl_coefficient=beta, clip_score=None, gae_lambda=1.0, advantage=rule)

    def advantages(answers: Answers) -> np.ndarray:
        values = {"reward": np.full(len(answers.kl_terms_T), 0.4), "harm": np.full(len(answers.kl_terms_T), -0.7)}
        made = made_of.advantages(replace(answers, values=values))
        return made_of.combine(made.advantages, {"harm": multiplier})

    np.testing.assert_allclose(tiny.expected(advantages), exact(tiny, form, multiplier, beta), atol=1e-12)


def test_the_gradient_of_the_worst_share() -> None:
    """Answers as often as their probabilities say, against differences of the worst share of these probabilities."""
    counts, costs, level, step = np.array([130, 270, 350, 250]), np.array([3.0, 0.5, -1.0, 1.5]), 0.7, 1e-6

    def worst(logits: np.ndarray) -> float:
        return worst_share(costs, level, softmax(logits[None])[0])

    logits, chosen = np.log(counts / 1000), np.repeat(np.arange(4), counts)
    numeric = [(worst(logits + step * row) - worst(logits - step * row)) / (2 * step) for row in np.eye(4)]
    counted = CVaR(level).per_answer(costs[chosen], np.arange(1000), np.ones(1000))
    found = (counted[:, None] * (np.eye(4)[chosen] - counts / 1000)).mean(0)
    np.testing.assert_allclose(found, numeric, atol=1e-6)
    assert found[0] > 0.1, "more of the worst answer is worse"


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rule", ["gae", "leave_one_out"])
def test_a_form_in_a_scope_is_as_if_the_other_answers_were_not_there(form: Form, rule: AdvantageRule) -> None:
    prompts = [4, 4, 7, 7, 9, 9, 9]
    answers, inside_B = drawn(prompts, seed=6), np.array([True, True, False, False, True, True, True])
    tokens = len(answers.kl_terms_T)
    answers = replace(answers, values={"reward": np.zeros(tokens), "harm": np.zeros(tokens)})
    kept_T, lengths_B = np.repeat(inside_B, np.diff(answers.offsets)), np.diff(answers.offsets)[inside_B]
    # What stands elsewhere, a NaN say, does not matter.
    costs_B = np.where(inside_B, answers.costs["harm"], np.nan)
    alone = replace(
        answers,
        offsets=np.concatenate([[0], np.cumsum(lengths_B)]),
        rewards_B=answers.rewards_B[inside_B],
        costs={"harm": costs_B[inside_B]},
        truncated_B=answers.truncated_B[inside_B],
        kl_terms_T=answers.kl_terms_T[kept_T],
        log_ratios_T=answers.log_ratios_T[kept_T],
        prompts_B=answers.prompts_B[inside_B],
        values={name: values_T[kept_T] for name, values_T in answers.values.items()},
    )
    scoped = replace(answers, costs={"harm": costs_B}, inside={"harm": inside_B})
    made_of = objective(form, kl_coefficient=0.3, advantage=rule)
    found, expected = made_of.advantages(scoped), made_of.advantages(alone)
    np.testing.assert_allclose(found.advantages["harm"][kept_T], expected.advantages["harm"], rtol=1e-12)
    assert not found.advantages["harm"][~kept_T].any()
    seen, prompts_E, _ = made_of.costs(scoped)[0]["harm"]
    assert seen.tolist() == made_of.costs(alone)[0]["harm"].costs_E.tolist()
    assert prompts_E.tolist() == ([4, 9] if isinstance(form, WorstOfK) else [4, 4, 9, 9, 9])
    assert seen.mean() == pytest.approx(bounded(form, costs_B[inside_B], answers.prompts_B[inside_B]))
    nobody = replace(scoped, inside={"harm": np.zeros(7, bool)})
    assert (
        made_of.costs(nobody)[0]["harm"].costs_E.size == 0 and not made_of.advantages(nobody).advantages["harm"].any()
    )


def test_importance_weights() -> None:
    """Ratios of 0.25, 5 and 1, 4 and 1/8, cut at 2; of several answers together their product is cut."""
    answers = replace(
        drawn([0, 0, 1, 1, 2], seed=3),
        offsets=np.arange(6),
        kl_terms_T=np.zeros(5),
        log_ratios_T=np.log([0.25, 5.0, 1.0, 4.0, 0.125]),
        costs={"harm": np.array([-1.0, 3.0, 2.0, 5.0, 4.0])},
    )
    costs, weights = answers.costs["harm"], np.array([0.25, 2.0, 1.0, 2.0, 0.125])
    seen = {}
    for form in (Hinge(), CVaR(0.6), WorstOfK(2)):
        found, figures = objective(form, importance_cap=2.0).costs(answers)
        seen[form], (mean,) = found["harm"].costs_E.tolist(), figures.values()
        assert mean == weights.mean()
    assert seen[Hinge()] == pytest.approx(weighed(np.maximum(costs, 0), weights))
    assert np.mean(seen[CVaR(0.6)]) == pytest.approx(worst_share(costs, 0.6, weights))
    # 1.25, 4 cut at 2, and 0.125: the three prompts' worst are 3, 5 and 4.
    together = np.array([1.25, 2.0, 0.125])
    assert seen[WorstOfK(2)] == pytest.approx(weighed(np.array([3.0, 5.0, 4.0]), together))
    # The policy's costs have the quantile of the same weights: 3.25 of 5.375 are of costs up to 3.
    counted = objective(CVaR(0.6), importance_cap=2.0).scores(answers)["harm"]
    assert counted.tolist() == pytest.approx([3.0, 3.0, 3.0, 3.0 + 2.0 / 0.4, 3.0 + 1.0 / 0.4])


def test_weights_that_are_too_small_for_a_float_weigh_against_each_other() -> None:
    """Ratios of e to the -800 and -801: 1 / (1 + 1/e) and the rest."""
    answers = replace(drawn([0, 1], seed=3), offsets=np.arange(3), log_ratios_T=np.array([-800.0, -801.0]))
    answers = replace(answers, costs={"harm": np.array([1.0, 0.0])}, kl_terms_T=np.zeros(2))
    found = objective(None, importance_cap=2.0).costs(answers)[0]["harm"].costs_E
    assert found.mean() == pytest.approx(1 / (1 + math.exp(-1)))


def weighed(costs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Each cost's distance from the weighted mean, by its weight."""
    mean = np.average(costs, weights=weights)
    return mean + weights / weights.mean() * (costs - mean)


def test_two_draws_of_a_prompt_are_two_groups() -> None:
    """Where steps overlap one may train on a prompt twice: the worst of 2 answers is then asked for twice."""
    answers = replace(drawn([3, 3, 3, 3], seed=3), costs={"harm": np.array([1.0, 0.0, 0.0, 5.0])})
    for rule in ("gae", "leave_one_out"):
        zeros = np.zeros(len(answers.kl_terms_T))
        made_of = objective(WorstOfK(2), advantage=rule)
        answers = replace(answers, values={"reward": zeros, "harm": zeros}, draws_B=np.array([6, 6, 7, 7]))
        found = made_of.costs(answers)[0]["harm"]
        assert found.costs_E.tolist() == [1.0, 5.0] and found.prompts_E.tolist() == [3, 3]
        assert made_of.scores(answers)["harm"].tolist() == [2.0, 0.0, 0.0, 10.0]


def test_the_clip_is_in_units_of_an_answers_own_cost() -> None:
    """A cost of 9 is within 10 also where a form counts it ten times."""
    answers = replace(drawn([0, 0, 1, 1], seed=2), offsets=np.arange(5), kl_terms_T=np.zeros(4))
    answers = replace(answers, costs={"harm": np.array([9.0, 0.0, 0.0, 0.0])}, rewards_B=np.zeros(4))
    answers = replace(answers, values={"reward": np.zeros(4), "harm": np.zeros(4)}, log_ratios_T=np.zeros(4))
    for form, worst in ((CVaR(0.75), 36.0), (WorstOfK(2), 18.0), (Hinge(), 9.0)):
        made = objective(form, clip_score=10.0).advantages(answers)
        assert made.advantages["harm"].tolist() == pytest.approx([worst, 0.0, 0.0, 0.0])
    free = objective(WorstOfK(2), clip_score=10.0, advantage="leave_one_out").advantages(answers)
    # 2 * 9 less 2 * (0 * 1/2 + 0 * 1/2); the other's is 2 * 9 less 2 * (9 * 1/2 + 0); elsewhere less 2 * 9 / 2.
    assert free.advantages["harm"].tolist() == pytest.approx([18.0, 9.0, -9.0, -9.0])


def test_shaped_rewards_lose_the_cost_that_the_form_counts() -> None:
    answers = drawn(RAGGED, seed=1)
    shaping = RewardShaping(Settings(forms={"harm": Hinge()}), {"harm": 0.7, "leak": 2.0})
    expected = answers.rewards_B - 0.7 * np.maximum(answers.costs["harm"], 0) - 2.0 * answers.costs["leak"]
    np.testing.assert_allclose(shaping.scores(answers)["reward"], expected, rtol=1e-6)


@pytest.mark.parametrize("rule", ["gae", "leave_one_out", "group_standardized"])
def test_the_mean_is_as_without_a_form_to_the_bit(rule: AdvantageRule) -> None:
    answers = drawn(RAGGED, seed=7)
    tokens = len(answers.kl_terms_T)
    answers = replace(answers, values={"reward": np.ones(tokens), "harm": np.ones(tokens)})
    found, plain = (objective(form, advantage=rule, importance_cap=2.0) for form in (Form(), None))
    for signal, advantages in plain.advantages(answers).advantages.items():
        assert np.array_equal(found.advantages(answers).advantages[signal], advantages)
    assert np.array_equal(found.costs(answers)[0]["harm"].costs_E, plain.costs(answers)[0]["harm"].costs_E)


class Answered:
    """Sixteen prompts with six answers each, of which what earns more costs more; the reference is uniform."""

    beta, samples = 0.2, 4

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.costs_GV = rng.normal(0.0, 1.0, (16, 6)) * rng.choice([0.5, 2.0], (16, 1))
        self.rewards_GV = 0.5 * self.costs_GV + rng.normal(0, 0.2, (16, 6))

    def bounded(self, form: Form, probabilities_GV: np.ndarray) -> float:
        """Exactly, of this policy."""
        if isinstance(form, CVaR):
            return worst_share(self.costs_GV.ravel(), form.level, probabilities_GV.ravel())
        if isinstance(form, Hinge):
            return float((probabilities_GV * np.maximum(self.costs_GV, 0)).sum(1).mean())
        # P(max <= c) is P(cost <= c) to the power of the number of answers.
        order = np.argsort(self.costs_GV, axis=1)
        below = np.take_along_axis(probabilities_GV, order, 1).cumsum(1) ** self.samples
        chances = np.diff(below, axis=1, prepend=0.0)
        return float((chances * np.take_along_axis(self.costs_GV, order, 1)).sum(1).mean())

    def trained(self, form: Form, limit: float, rule: AdvantageRule, steps: int = 4000) -> np.ndarray:
        """The bounded figure after each step of policy and multiplier."""
        rng, logits_GV, multiplier, found = np.random.default_rng(1), np.zeros((16, 6)), 0.0, []
        made_of = objective(form, kl_coefficient=self.beta, clip_score=None, advantage=rule)
        prompts_B = np.repeat(np.arange(16), self.samples)
        for _ in range(steps):
            probabilities_GV = softmax(logits_GV)
            edges_BV = probabilities_GV.cumsum(1)[prompts_B]
            chosen_B = np.minimum((rng.random((len(prompts_B), 1)) > edges_BV).sum(1), 5)
            zeros = np.zeros(len(prompts_B))
            answers = Answers(
                offsets=np.arange(len(prompts_B) + 1),
                prompts_B=prompts_B,
                rewards_B=self.rewards_GV[prompts_B, chosen_B],
                costs={"harm": self.costs_GV[prompts_B, chosen_B]},
                truncated_B=zeros > 0,
                kl_terms_T=np.log(probabilities_GV * 6)[prompts_B, chosen_B],
                log_ratios_T=zeros,
                values={"reward": zeros, "harm": zeros},
            )
            made = made_of.advantages(answers).advantages
            multiplier = max(0.0, multiplier + 0.02 * (made_of.costs(answers)[0]["harm"].costs_E.mean() - limit))
            advantages_B = made_of.combine(made, {"harm": multiplier})
            gradients_BV = -probabilities_GV[prompts_B]
            gradients_BV[np.arange(len(prompts_B)), chosen_B] += 1
            np.add.at(logits_GV, prompts_B, 0.3 * advantages_B[:, None] * gradients_BV / self.samples)
            found.append(self.bounded(form, probabilities_GV))
        return np.array(found)


@pytest.mark.parametrize("rule", ["gae", "leave_one_out"])
@pytest.mark.parametrize(("form", "limit"), [(Hinge(), 0.25), (CVaR(0.75), 0.9), (WorstOfK(4), 0.5)], ids=str)
def test_the_limit_holds_at_rest(form: Form, limit: float, rule: AdvantageRule) -> None:
    """Sixty-four answers a step; critics know nothing."""
    world = Answered()
    start = world.bounded(form, np.full((16, 6), 1 / 6))
    settled = float(world.trained(form, limit, rule)[2000:].mean())
    assert start > 1.2 * limit and settled == pytest.approx(limit, rel=0.1), (start, settled)
