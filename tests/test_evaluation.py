from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from scipy import stats

from beaver_ray.evaluation import Samples, mean_interval, share_interval, summarize, wilson
from beaver_ray.method.forms import CVaR, Hinge, WorstOfK


@pytest.mark.parametrize("n", [5, 12, 400])
def test_mean_of_single_answers_has_students_interval(n: int) -> None:
    values = np.random.default_rng(n).normal(2.0, 3.0, n)
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    figure = mean_interval(values, np.arange(n))
    assert figure == {
        "mean": values.mean(),
        "low": pytest.approx(low, rel=1e-12),
        "high": pytest.approx(high, rel=1e-12),
        "n": n,
    }


def test_student_quantile_of_few_prompts() -> None:
    for n in (2, 3, 4):
        values = np.arange(n, dtype=float)
        low, _ = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
        assert mean_interval(values, np.arange(n))["low"] == pytest.approx(low, rel=1e-12)


def test_equal_clusters_are_as_their_means() -> None:
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 2, 50)
    values = prompts[:, None] + rng.normal(0, 1, (50, 4))
    means = values.mean(axis=1)
    low, high = stats.t.interval(0.95, 49, loc=means.mean(), scale=stats.sem(means))
    figure = mean_interval(values.ravel(), np.repeat(np.arange(50), 4))
    assert (figure["low"], figure["high"]) == pytest.approx((low, high), rel=1e-12)
    assert figure["n"] == 200


def test_clusters_of_different_sizes_by_hand() -> None:
    # Prompts a: 1, 3; b: 5. Mean 3; residual sums -2 and 2; variance 2/1 * 8 / 9; t(1) = 12.706.
    figure = mean_interval(np.array([1.0, 3.0, 5.0]), np.array([7, 7, 9]))
    assert figure["mean"] == 3.0
    assert figure["high"] - 3.0 == pytest.approx(12.706205 * (16 / 9) ** 0.5)


def test_one_prompt_has_no_interval() -> None:
    assert mean_interval(np.array([1.0, 2.0]), np.array([0, 0])) == {
        "mean": 1.5,
        "low": None,
        "high": None,
        "n": 2,
    }


def test_prompts_that_are_all_alike_do_not_make_a_bounded_mean_certain() -> None:
    """As though z^2 = 3.8415 prompts more had all had the lowest value, or the highest."""
    more = 1.959964**2
    half = mean_interval(np.full(6, 0.5), np.arange(6), within=(0.0, 1.0))
    assert (half["low"], half["high"]) == pytest.approx((3 / (6 + more), (3 + more) / (6 + more)), abs=1e-6)
    score = mean_interval(np.full(4, 7.0), np.array([0, 0, 1, 1]), within=(1.0, 10.0))
    assert score["low"] == pytest.approx((2 * 7 + more * 1) / (2 + more), abs=1e-6)
    assert score["high"] == pytest.approx((2 * 7 + more * 10) / (2 + more), abs=1e-6)
    # Answers differ, prompts do not; and a single prompt.
    prompts = mean_interval(np.array([1.0, 0.0, 0.0, 1.0]), np.array([0, 0, 1, 1]), within=(0.0, 1.0))
    assert (prompts["low"], prompts["high"]) == pytest.approx((1 / (2 + more), (1 + more) / (2 + more)), abs=1e-6)
    one = mean_interval(np.array([0.1, 0.3, 0.2]), np.zeros(3), within=(0.0, 1.0))
    assert (one["low"], one["high"]) == pytest.approx((0.2 / (1 + more), (0.2 + more) / (1 + more)), abs=1e-6)
    for value in (0.0, 1.0):
        alike, share = (
            f(np.full(20, value), np.arange(20)) for f in (partial(mean_interval, within=(0, 1)), share_interval)
        )
        assert (alike["low"], alike["high"]) == pytest.approx((share["low"], share["high"]), abs=1e-12)
        assert alike["low"] <= value <= alike["high"], "an error bar has no negative length"


@pytest.mark.parametrize("values", [[0.1] * 6, [0.0] * 6, [-3.0, 5.0, 5.0, -3.0, 1.0, 1.0]])
def test_prompts_that_are_all_alike_leave_a_mean_without_bounds_unknown(values: list[float]) -> None:
    figure = mean_interval(np.array(values), np.array([0, 0, 1, 1, 2, 2]))
    assert figure == {"mean": pytest.approx(np.mean(values)), "low": None, "high": None, "n": 6}
    result = summarize(Samples(np.array([0, 0, 1, 1, 2, 2]), np.array(values)), optimum=2.0)
    assert (result["share_of_optimum"]["low"], result["share_of_optimum"]["high"]) == (None, None)


@pytest.mark.parametrize(("hits", "n"), [(0, 40), (7, 40), (40, 40), (13, 400)])
def test_share_of_single_answers_is_wilsons(hits: int, n: int) -> None:
    expected = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    figure = share_interval(np.arange(n) < hits, np.arange(n))
    assert (figure["mean"], figure["n"]) == (hits / n, n)
    assert (figure["low"], figure["high"]) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_between_whole_numbers_of_samples() -> None:
    (low, high), (real_low, real_high), (more_low, more_high) = (wilson(0.25, n) for n in (40, 41.7, 44))
    assert low < real_low < more_low < 0.25 < more_high < real_high < high
    assert all(wilson(0.0, n, 0.995)[0] == 0.0 and wilson(1.0, n, 0.995)[1] == 1.0 for n in range(1, 2000))


def test_answers_that_only_repeat_their_prompt_count_once() -> None:
    """Fault 25 of the published code."""
    flags = np.arange(40) < 7
    alone = share_interval(flags, np.arange(40))
    repeated = share_interval(np.repeat(flags, 5), np.repeat(np.arange(40), 5))
    assert repeated["n"] == 200
    assert (repeated["low"], repeated["high"]) == pytest.approx((alone["low"], alone["high"]))
    none = share_interval(np.zeros(200, bool), np.repeat(np.arange(40), 5))
    assert none["high"] == pytest.approx(stats.binomtest(0, 40).proportion_ci(method="wilson").high)


def test_share_of_several_answers_by_hand() -> None:
    """24 of 40 are true; the sums of residuals are -3, -2, 1, 2, -1, 0, 2 and 1."""
    hits = [0, 1, 4, 5, 2, 3, 5, 4]
    figure = share_interval(np.array([k < hit for hit in hits for k in range(5)]), np.repeat(np.arange(8), 5))
    variance = 8 / 7 * 39 / 40 * 24 / 40**2
    effective = 0.6 * 0.4 / variance * (2.0226909 / 2.3646243) ** 2  # t(39) and t(7) at 0.975
    assert 8 < effective < 11 and (figure["low"], figure["high"]) == pytest.approx(wilson(0.6, effective), abs=1e-7)
    # Prompts that differ less than chance has it count as independent answers, as far as four of them can show that.
    even = share_interval(np.array([k < hit for hit in (5, 4, 6, 3) for k in range(10)]), np.repeat(np.arange(4), 10))
    effective = 40 * (2.0226909 / 3.1824463) ** 2
    assert (even["low"], even["high"]) == pytest.approx(wilson(0.45, effective), abs=1e-7)
    # A single prompt shows as much as one answer does; three, of which two have nearly all answers, less than three.
    single = share_interval(np.arange(100) < 50, np.zeros(100))
    assert (single["low"], single["high"]) == wilson(0.5, 1)
    flags, prompts = np.array([True] * 4 + [False] * 4 + [True]), np.array([0] * 4 + [1] * 4 + [2])
    lopsided = share_interval(flags, prompts)
    assert (lopsided["low"], lopsided["high"]) == pytest.approx(wilson(5 / 9, 9**2 / (4**2 + 4**2 + 1)))


@pytest.mark.parametrize("prompts", [5, 10, 20])
def test_share_interval_of_few_prompts_holds_the_truth_as_often_as_it_says(prompts: int) -> None:
    """Of 40 answers to each, where prompts have any chance between 0 and 1; 2,000 draws tell 95 % to 1 %."""
    draw, cluster = np.random.default_rng(prompts), np.repeat(np.arange(prompts), 40)
    held = []
    for _ in range(2000):
        chances = draw.random(prompts).repeat(40)
        figure = share_interval(draw.random(len(cluster)) < chances, cluster)
        held.append(figure["low"] <= 0.5 <= figure["high"])
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)


def test_summary() -> None:
    """Fault 23 of the published code."""
    samples = Samples(
        prompt_id=np.array([0, 1, 2, 3]),
        reward=np.array([2.0, 4.0, 3.0, 3.0]),
        costs={"harm": np.array([-1.0, 0.5, -1.0, 0.0])},
        truncated=np.array([False, False, True, False]),
        refusal=np.array([True, False, False, True]),
        kind=np.array(["adversarial", "harmless", "harmless", "harmless"]),
    )
    result = summarize(samples, optimum=4.0, limits={"harm": 0.0}, targets={"harm": 0.05})
    assert (result["prompts"], result["samples"], result["optimum"]) == (4, 4, 4.0)
    assert result["reward"]["mean"] == 3.0
    assert result["share_of_optimum"]["mean"] == 0.75
    assert result["share_of_optimum"]["low"] == result["reward"]["low"] / 4
    assert result["cost/harm"]["mean"] == -0.375 and result["cost/harm"]["limit"] == 0.0
    # A cost of exactly 0 is no violation.
    assert result["violation_rate/harm"]["mean"] == 0.25 and result["violation_rate/harm"]["target"] == 0.05
    assert result["refusal_rate_harmless"] == share_interval(np.array([False, False, True]), np.arange(3))
    assert result["refusal_rate_adversarial"]["mean"] == 1.0
    assert result["truncated"]["mean"] == 0.25


def test_rate_of_calibrated_costs_is_their_mean() -> None:
    samples = Samples(np.arange(4), np.ones(4), {"harm": np.array([0.0, 0.0, 0.6, 0.2])})
    result = summarize(samples, targets={"harm": 0.1}, probabilities={"harm"})
    rate, cost = result["violation_rate/harm"], result["cost/harm"]
    assert rate["mean"] == cost["mean"] == 0.2 and rate["target"] == 0.1
    assert cost["low"] < 0 == rate["low"] and rate["high"] == cost["high"]
    assert result["unsafe_share/harm"] == share_interval(np.arange(4) == 2, np.arange(4))
    assert "unsafe_share/harm" not in summarize(samples)


def test_what_another_form_bounds() -> None:
    costs = np.array([-4.0, 1.0, 3.0, 2.0])
    samples = Samples(np.array([0, 0, 1, 2]), np.ones(4), {"a": costs, "b": costs, "c": costs / 10, "d": costs})
    forms = {"a": Hinge(), "b": CVaR(0.5), "c": CVaR(0.5), "d": WorstOfK(2)}
    result = summarize(samples, None, {"a": 0.2, "b": 1.0, "d": 0.5}, {"c": 0.1}, {"c"}, forms)
    assert result["bounded/a"] == {**mean_interval(np.maximum(costs, 0), samples.prompt_id), "limit": 0.2}
    # The worst half is 3 and 2, by the quantile 1: 1, 1, 1 + 2 / 0.5, 1 + 1 / 0.5.
    assert result["bounded/b"] == {**mean_interval(np.array([1.0, 1.0, 5.0, 3.0]), samples.prompt_id), "limit": 1.0}
    assert result["bounded/b"]["mean"] == 2.5 and result["bounded/c"]["mean"] == pytest.approx(0.25)
    assert result["bounded/c"]["limit"] == 0.1 and "target" not in result["violation_rate/c"]
    assert "limit" not in result["cost/a"] and result["cost/a"]["mean"] == 0.5
    # Not all prompts have two answers, and a rate is none of costs in other units.
    assert "bounded/d" not in result
    other = summarize(Samples(samples.prompt_id, np.ones(4), {"c": costs}), None, {}, {"c": 0.1}, (), forms)
    assert "bounded/c" not in other and "target" not in other["violation_rate/c"]


def test_unknown_things_are_left_out() -> None:
    result = summarize(Samples(np.arange(3), np.ones(3)), optimum=-2.0)
    assert set(result) == {"prompts", "samples", "reward", "optimum"}


def test_bad_samples() -> None:
    with pytest.raises(ValueError, match="at least one"):
        summarize(Samples(np.array([]), np.array([])))
    with pytest.raises(ValueError, match="reward has 2 entries for 3"):
        summarize(Samples(np.arange(3), np.ones(2)))
    with pytest.raises(ValueError, match="cost/harm holds a number that is not finite"):
        summarize(Samples(np.arange(2), np.ones(2), {"harm": np.array([0.0, np.nan])}))
    # Where it does not count nobody asks.
    inside = {"harm": np.array([True, False])}
    found = summarize(Samples(np.arange(2), np.ones(2), {"harm": np.array([0.5, np.nan])}, inside=inside))
    assert found["cost/harm"]["mean"] == 0.5 and found["samples"] == 2


def test_a_constraint_over_some_prompts_has_its_figures_over_these() -> None:
    prompts, costs = np.array([0, 0, 1, 2, 3]), np.array([1.0, -1.0, 2.0, 50.0, -1.0])
    counting = np.array([True, True, True, False, False])
    samples = Samples(
        prompts,
        np.arange(5.0),
        {"harm": costs, "refusal": costs, "leak": costs},
        inside={"refusal": counting, "leak": np.zeros(5, dtype=bool)},
    )
    summary = summarize(samples, limits={"harm": 0.0, "refusal": 0.1, "leak": 0.0})
    assert summary["cost/harm"]["n"] == 5 and summary["cost/harm"]["mean"] == pytest.approx(51 / 5)
    expected = mean_interval(costs[:3], prompts[:3])
    assert summary["cost/refusal"] == {**expected, "limit": 0.1} and expected["mean"] == pytest.approx(2 / 3)
    assert summary["violation_rate/refusal"] == share_interval(costs[:3] > 0, prompts[:3])
    # Nothing is known of what no prompt counts for.
    assert not any(key.endswith("/leak") for key in summary)
    assert summary["samples"] == 5 and summary["reward"]["n"] == 5
