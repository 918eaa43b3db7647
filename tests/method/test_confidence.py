"""How far below its bound a mean must be seen: by hand, and how often the bound then really holds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special, stats

from beaver_ray.method.calibration import Calibration, fit_platt
from beaver_ray.method.confidence import safety_margin
from beaver_ray.method.forms import CVaR, WorstOfK


def test_by_hand():
    # Student's t of 0.9 with 3 degrees of freedom is 1.638 in printed tables; costs 0, 0, 4, 4 have std 4 / sqrt(3).
    costs, prompts = np.array([0.0, 0.0, 4.0, 4.0]), np.arange(4)
    assert safety_margin(costs, prompts, 0.9) == pytest.approx(1.638 * 4 / math.sqrt(3) / 2, abs=1e-3)
    # Of 0, 0, 0, 4, with std 2, the residuals' mean cube is 6 and their mean square 3: a skew of 6 / 3^1.5 upwards.
    costs = np.array([0.0, 0.0, 0.0, 4.0])
    sampled = 1.638 + 6 / 3**1.5 / (6 * 2) * (1 + 2 * 1.638**2)
    assert safety_margin(costs, prompts, 0.9) == pytest.approx(sampled, abs=1e-3)
    assert safety_margin(4 - costs, prompts, 0.9) == pytest.approx(1.638, abs=1e-3), "downwards nothing was missed"
    # With 9 degrees of freedom it is 1.383.
    calibration = Calibration(1.0, 0.0, 10, 1.0, 1.0, 0.0, 0.3, scale_variance=0.0, bias_variance=0.0, covariance=0.0)
    more = safety_margin(costs, prompts, 0.9, calibration)
    assert more == pytest.approx(sampled + 1.383 * 0.3 / math.sqrt(10), abs=1e-3)
    # Where the worst tenth is bounded, all of the calibration's error may lie there.
    worst = safety_margin(10 * costs, prompts, 0.9, calibration, CVaR(0.9))
    assert worst == pytest.approx(10 * sampled + 10 * 1.383 * 0.3 / math.sqrt(10), abs=1e-2)
    # Two answers to each of four prompts, alike: as of one answer to each.
    assert safety_margin(np.repeat(costs, 2), np.repeat(prompts, 2), 0.9) == pytest.approx(sampled, abs=1e-3)


def test_of_shares_by_hand():
    """Of n answers none with a cost, the bound is 1 - (1 - confidence)^(1/n); of all, 1."""
    none, prompts = np.zeros(32), np.arange(32)
    assert safety_margin(none, prompts, 0.9, shares=True) == pytest.approx(1 - 0.1 ** (1 / 32))
    assert safety_margin(none + 1, prompts, 0.9, shares=True) == 0.0
    # A tenth of the answers that cost anything is the mean of all of it: each counts ten times.
    assert safety_margin(10 * none, prompts, 0.9, form=CVaR(0.9), shares=True) == pytest.approx(
        10 * (1 - 0.1 ** (1 / 32))
    )
    # Four answers to each of eight prompts: as of eight answers, where those to one prompt are alike.
    assert safety_margin(none, prompts // 4, 0.9, shares=True) == pytest.approx(1 - 0.1 ** (1 / 8))
    alike = np.repeat([1.0, 0, 0, 0, 0, 0, 0, 0], 4)
    # At most one of eight: (1 - p)^8 + 8 p (1 - p)^7 = 0.1 at p = 0.4062.
    assert safety_margin(alike, prompts // 4, 0.9, shares=True) == pytest.approx(0.4062 - 0.125, abs=1e-4)
    # One of four at every prompt: nothing is shared, and these are 32 answers of which 8 have a cost; but seen on few
    # prompts, which counts as Student's t does: 1.309 with 31 degrees of freedom, 1.415 with 7.
    spread = np.tile([1.0, 0, 0, 0], 8)
    upper = 0.25 + safety_margin(spread, prompts // 4, 0.9, shares=True)
    trials = 32 * (1.309 / 1.415) ** 2
    assert stats.beta.cdf(upper, trials / 4 + 1, trials * 3 / 4) == pytest.approx(0.9, abs=1e-3)


def test_a_calibration_where_it_was_not_fitted():
    """The policy's scores lie between the safe and the unsafe ones that were labelled, where few labels say anything.

    The sigmoid is the right one: all that is wrong of it comes of the labels that it was fitted on.
    """
    rng = np.random.default_rng(3)
    held = []
    for _ in range(300):
        scores = rng.normal(size=2000) + np.where(rng.random(2000) < 0.5, 4.0, -4.0)
        calibration = fit_platt(scores, rng.random(2000) < special.expit(scores))
        costs = calibration.probability(rng.normal(-2.2, 0.3, 1024))
        true = special.expit(rng.normal(-2.2, 0.3, 20_000)).mean()
        held.append(costs.mean() + safety_margin(costs, np.arange(1024), 0.9, calibration) >= true)
    assert np.mean(held) >= 0.9


def test_of_the_worst_share_its_own_error_counts():
    """Where the worst fifth scores unlike what was labelled, bounding it alone or by cvar is one and the same."""
    rng = np.random.default_rng(5)
    scores = np.concatenate([rng.normal(-3.5, 0.6, 3200), rng.normal(0.0, 0.4, 800)])
    true = np.sort(special.expit(scores))[-800:].mean()
    held = []
    for _ in range(200):
        labelled = rng.normal(-3.2, 0.8, 1000)
        calibration = fit_platt(labelled, rng.random(1000) < special.expit(labelled))
        zeros, numbers = np.zeros(4000), np.arange(4000)
        costs = CVaR(0.8).episodes(calibration.probability(scores), numbers, zeros + 1, zeros).costs_E
        held.append(costs.mean() + safety_margin(costs, numbers, 0.9, calibration, CVaR(0.8)) >= true)
    assert np.mean(held) >= 0.85, "0.65 by the error of what lies below"


def test_probabilities_next_to_nothing_still_have_a_margin():
    """Of 64 prompts without an unsafe answer up to 1 - 0.1^(1/64) = 3.5 % may be unsafe, whatever a cost model says."""
    surely = Calibration(1.0, 0.0, 10**6, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    costs = np.full(64, 0.001)
    assert costs.mean() + safety_margin(costs, np.arange(64), 0.9, surely) == pytest.approx(1 - 0.1 ** (1 / 64))
    # Two answers to each of 32 prompts tell as much as 32.
    assert 0.001 + safety_margin(costs, np.arange(64) // 2, 0.9, surely) == pytest.approx(1 - 0.1 ** (1 / 32))
    # All of them may be among the worst tenth, where each counts ten times; the worst of a prompt's k counts once.
    tenth = safety_margin(costs, np.arange(64), 0.9, surely, CVaR(0.9))
    assert 0.001 + tenth == pytest.approx(10 * (1 - 0.1 ** (1 / 64)))
    of_four = safety_margin(costs, np.arange(64), 0.9, surely, WorstOfK(4))
    assert 0.001 + of_four == pytest.approx(1 - 0.1 ** (1 / 64))


@pytest.mark.parametrize(("least", "most"), [(0.001, 0.999), (0.02, 0.98)])
@pytest.mark.parametrize(("count", "rate"), [(128, 0.05), (128, 0.1), (256, 0.05)])
def test_of_sure_probabilities_it_holds_nearly_as_often_as_it_says(least, most, count, rate):
    """Student's t alone holds in 0.77 to 0.88 of these."""
    rng = np.random.default_rng(0)
    surely = Calibration(1.0, 0.0, 10**6, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    unsafe = rng.random((1500, count)) < (rate - least) / (most - least)
    costs = np.where(unsafe, most, least)
    held = [row.mean() + safety_margin(row, np.arange(count), 0.9, surely) >= rate for row in costs]
    assert np.mean(held) >= 0.86


def test_of_one_prompt_nothing_is_known():
    assert safety_margin(np.array([0.2]), np.array([7]), 0.9) == math.inf
    assert safety_margin(np.array([0.2, 0.3, 0.1]), np.array([7, 7, 7]), 0.9) == math.inf


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_the_mean_is_within_the_bound_as_often_as_it_says(confidence, shared):
    """Three answers to each of 30 prompts, of whose variance the prompt has the ``shared`` part."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(30), 3)
    of_prompts = math.sqrt(shared) * rng.normal(0, 1.0, (4000, 30)).repeat(3, axis=1)
    costs = 0.3 + of_prompts + math.sqrt(1 - shared) * rng.normal(0, 1.0, (4000, 90))
    held = [row.mean() + safety_margin(row, prompts, confidence) >= 0.3 for row in costs]
    assert np.mean(held) == pytest.approx(confidence, abs=0.02)


@pytest.mark.parametrize("rate", [0.01, 0.1])
@pytest.mark.parametrize("shared", [0.0, 0.5])
@pytest.mark.parametrize("count", [32, 256])
def test_a_share_is_within_the_bound_at_least_as_often_as_it_says(rate, shared, count):
    """Two answers to each prompt, which has a rate of its own (beta) where they have something in common."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(count // 2), 2)
    held = []
    for _ in range(1000):
        odds = (1 / shared - 1) * np.array([rate, 1 - rate]) if shared else None
        of_prompts = rng.beta(*odds, count // 2)[prompts] if odds is not None else rate
        costs = (rng.random(count) < of_prompts).astype(float)
        held.append(costs.mean() + safety_margin(costs, prompts, 0.9, shares=True) >= rate)
    assert np.mean(held) >= 0.9 - 0.02


def test_a_share_of_weighted_answers_is_within_the_bound_too():
    """Answers of a policy a little behind: one in a hundred costs 1, by ratios that lie within some 30 % of 1."""
    rng = np.random.default_rng(2)
    held, prompts = [], np.arange(256)
    for _ in range(1500):
        weights = np.exp(rng.normal(0, 0.3, 256))
        weights /= weights.mean()
        hits = (rng.random(256) < 0.01).astype(float)
        mean = (weights * hits).mean()
        held.append(mean + safety_margin(mean + weights * (hits - mean), prompts, 0.9, shares=True) >= 0.01)
    assert np.mean(held) >= 0.9 - 0.02


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_a_prompt_with_most_of_the_answers_is_not_many(rate):
    """Thirty answers to one prompt and two to each of twenty, as a scope may leave them; correlation 0.4 within one."""
    rng = np.random.default_rng(4)
    prompt_of = np.repeat(np.arange(21), [30] + [2] * 20)
    rates = rng.beta(rate * 1.5, (1 - rate) * 1.5, (1500, 21))
    costs = (rng.random((1500, len(prompt_of))) < rates[:, prompt_of]).astype(float)
    held = [row.mean() + safety_margin(row, prompt_of, 0.9, shares=True) >= rate for row in costs]
    assert np.mean(held) >= 0.9 - 0.02


@pytest.mark.parametrize("prompts", [2, 3, 4, 8])
def test_of_few_prompts_it_is_no_surer_than_they_allow(prompts):
    """Sixteen answers to each, which has a rate of its own (beta; correlation 0.4 within a prompt)."""
    rng = np.random.default_rng(1)
    prompt_of = np.repeat(np.arange(prompts), 16)
    rates = rng.beta(0.3 * 1.5, 0.7 * 1.5, (1500, prompts))
    costs = (rng.random((1500, len(prompt_of))) < rates[:, prompt_of]).astype(float)
    held = [row.mean() + safety_margin(row, prompt_of, 0.9, shares=True) >= 0.3 for row in costs]
    assert np.mean(held) >= 0.9 - 0.03
