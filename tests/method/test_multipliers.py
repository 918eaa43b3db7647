"""The published rule's closed forms; what the bounded rules promise: limits, no wind-up, exact resumption."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beaver_ray.constraint_options import FEWEST, MultiplierConfig
from beaver_ray.errors import UserError
from beaver_ray.method.multipliers import (
    CostWindow,
    LogSgdMultiplier,
    PidMultiplier,
    ProjectedMultiplier,
    make_multiplier,
    spread,
)

SETTINGS = settings(max_examples=60, deadline=None)
RULES = ["log_sgd", "pid", "projected"]


def settings_of(**changes):
    common = dict(
        rule="projected",
        initial=1.0,
        learning_rate=0.1,
        max=5.0,
        window=4,
        delay_steps=0,
        time_constant=10.0,
    )
    return SimpleNamespace(**(common | changes))


def log_sgd(initial):
    return LogSgdMultiplier(initial, learning_rate=0.1, maximum=5.0, window=None, delay_steps=0)


def path(multiplier, gap, steps):
    return [multiplier.update(gap, 0.0) for _ in range(steps)]


def test_window_keeps_the_last_episodes():
    window = CostWindow(3)
    with pytest.raises(ValueError, match="empty"):
        window.mean()
    window.extend([1.0, 2.0])
    assert window.mean() == 1.5
    window.extend([3.0, 10.0])
    assert window.mean() == 5.0 and len(window) == 3


def test_log_sgd_falling_from_one():
    values = path(log_sgd(1.0), -10.0, 100)
    assert values[0] == pytest.approx(math.exp(-1), rel=1e-12)  # log lambda = 0 + 0.1 * 1 * -10
    assert values[1] == pytest.approx(math.exp(-1 - math.exp(-1)), rel=1e-12)
    assert values[9] == pytest.approx(0.08, abs=0.005)
    assert values[99] == pytest.approx(0.0097, abs=5e-5)


def test_log_sgd_at_a_gap_of_minus_three():
    values = path(log_sgd(1.0), -3.0, 200)
    assert [values[9], values[49], values[199]] == pytest.approx([0.24, 0.061, 0.016], abs=0.005)


def test_log_sgd_rising_to_its_cap():
    values = path(log_sgd(1.0), 5.0, 4)
    assert values[0] == pytest.approx(math.exp(0.5), rel=1e-12)
    assert values[1] == pytest.approx(3.76, abs=0.005)
    assert values[2:] == [5.0, 5.0]


def test_log_sgd_falls_from_its_cap_in_one_step():
    assert log_sgd(5.0).update(-10.0, 0.0) == pytest.approx(5 * math.exp(-5), rel=1e-12)


def test_log_sgd_winds_up():
    multiplier = log_sgd(1.0)
    path(multiplier, -10.0, 100)
    values = path(multiplier, 5.0, 210)
    assert values[206] < 1.0 <= values[207]
    assert values[208] < 5.0 == values[209]


def test_log_sgd_without_a_cap_says_that_it_ran_away():
    multiplier = LogSgdMultiplier(1.0, 1.0, None, None, 0)
    with pytest.raises(UserError, match=r"multiplier\.max"):
        path(multiplier, 5.0, 10)


def test_projected_by_hand():
    multiplier = ProjectedMultiplier(1.0, learning_rate=0.1, maximum=2.0, window=None, delay_steps=0)
    assert multiplier.update(5.0, 2.0) == pytest.approx(1.3)
    assert multiplier.update(-20.0, 2.0) == 0.0
    assert multiplier.update(7.0, 2.0) == 0.5
    assert multiplier.update(100.0, 2.0) == 2.0


def test_pid_by_hand():
    multiplier = PidMultiplier(0.5, time_constant=10.0, maximum=2.0, window=None, delay_steps=0)
    # Mean .5, gap .1; stds .5 and 2: unit 4, error .2. I = .5 + 4 * .2 / 10 = .58; .58 + 4 * .2
    assert multiplier.update([0.0, 0.0, 1.0, 1.0] * 8, 0.4, reward_std=2.0) == pytest.approx(1.38)
    # Variances so far (.25 + 0) / 2 and (4 + 0) / 2: unit 4 again. A gap of -.4 is an error of more than .3.
    assert multiplier.update([0.0] * FEWEST, 0.4, reward_std=0.0) == 0.0
    assert multiplier.state.integral == pytest.approx(0.58 - 4 * 0.3 / 10)
    # Variances .25 / 3 and 8 / 3: unit 4 * sqrt(2), .46 + .3 * 5.66 is over the maximum, so I stays.
    assert multiplier.update([1.0] * FEWEST, 0.4, reward_std=2.0) == 2.0
    assert multiplier.state.integral == pytest.approx(0.46)


def test_pid_grows_by_factors_above_its_unit():
    multiplier = PidMultiplier(8.0, time_constant=5.0, maximum=None, window=None, delay_steps=0)
    # Stds 1 and 1: unit 1; gap .25. I = 8 + 8 * .25 / 5; the quick part is 8 * .25
    assert multiplier.update([-0.75, 1.25] * 16, 0.0, reward_std=1.0) == pytest.approx(8.4 + 2.0)
    assert multiplier.update([-0.75, 1.25] * 16, 0.0, reward_std=1.0) == pytest.approx(8.82 + 2.1)


def test_pid_takes_the_last_of_several_steps_where_one_has_few_costs():
    multiplier = PidMultiplier(0.5, time_constant=10.0, maximum=None, window=None, delay_steps=0)
    # Mean .25 of the first eight: gap .05. Variance .1875, unit 1 / .433, which times the error .05 / .433 is .2667.
    first = [0.0] * 6 + [1.0] * 2
    assert multiplier.update(first, 0.2) == pytest.approx(0.5 + 2.3094 * 0.11547 / 10 + 2.3094 * 0.11547, abs=1e-4)
    # Both steps: mean .25 and variance .1875 again; these sixteen are half a step old, so that 10 + 3 / 2 stand for 10.
    integral = multiplier.state.integral
    costs, prompts = multiplier.compared([0.0] * 7 + [1.0], range(8))
    assert len(costs) == 16 and costs.mean() == 3 / 16 and prompts.tolist() == [*range(-8, 0), *range(8)]
    value = multiplier.update([0.0] * 6 + [1.0] * 2, 0.2)
    assert multiplier.state.integral == pytest.approx(integral + 0.26667 / 11.5, abs=1e-4)
    assert value == pytest.approx(multiplier.state.integral + 0.26667, abs=1e-4)
    # No more than the last FEWEST, and a step that has these stands alone, as it would without any before it.
    multiplier.update([0.0] * 24, 0.2)
    assert len(multiplier.window) == FEWEST and multiplier.window.mean() == 2 / FEWEST
    alone = [0.0, 1.0] * (FEWEST // 2)
    assert multiplier.compared(alone)[0].tolist() == alone
    long = [1.0] * 40 + [0.0] * 8
    assert multiplier.compared(long)[0].tolist() == long
    # With a window that was asked for these go through it.
    asked = PidMultiplier(0.5, time_constant=10.0, maximum=None, window=64, delay_steps=0)
    asked.update(long, 0.2)
    assert asked.compared(long)[0].tolist() == (long + long)[-64:]


def test_pid_of_a_checkpoint_that_knew_no_variance():
    """One cost a step of an earlier version: means that are of nothing but zeros would make every gap a large one."""
    multiplier = PidMultiplier(1.0, time_constant=10.0, maximum=None, window=None, delay_steps=0)
    multiplier.update([0.0], 0.1)
    old = multiplier.state_dict() | {"window": None}
    del old["window_prompts"]
    old["state"] |= {"steps": 200, "cost_variance": 0.0, "reward_variance": 4.0}
    resumed = PidMultiplier(1.0, time_constant=10.0, maximum=None, window=None, delay_steps=0)
    resumed.load_state_dict(old)
    assert (resumed.state.steps, resumed.state.cost_variance, resumed.state.reward_variance) == (0, 0.0, 0.0)
    assert resumed.state.integral == multiplier.state.integral
    old["state"]["cost_variance"] = 0.25  # of several costs a step: they go on
    resumed.load_state_dict(old)
    assert (resumed.state.steps, resumed.state.reward_variance) == (200, 4.0)


@pytest.mark.parametrize("answers", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("limit", [0.05, 0.1])
def test_pid_keeps_the_mean_of_rare_costs_whatever_a_step_has(answers, limit):
    """A policy whose log-odds of a harmful answer rise with the reward and fall with lambda, costs of 0 and 1.

    Its rate at rest is within 0.01 of the limit; by the answers of each step alone it would be at 0.69 with one answer
    to a step, at 0.2 to 0.3 with two and at 0.12 to 0.17 with four.
    """
    rng, log_odds, rates = np.random.default_rng(answers), 0.0, []
    multiplier = PidMultiplier(0.0, time_constant=10.0, maximum=None, window=None, delay_steps=0)
    for _ in range(5000):
        rates.append(1 / (1 + math.exp(-log_odds)))
        value = multiplier.update((rng.random(answers) < rates[-1]).astype(float), limit)
        weight = value * math.sqrt(limit * (1 - limit))
        log_odds += 0.2 * (1 - weight) / (1 + weight)
    assert np.mean(rates[1000:]) == pytest.approx(limit, abs=0.01)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 100))
@SETTINGS
def test_pid_knows_no_units(rewards_in, costs_in, seed):
    """Rewards or costs in other units give the same multiplier in these units.

    Faults 9 and 20 of the published code.
    """
    rng = np.random.default_rng(seed)
    plain, scaled = (PidMultiplier(0.5 * f, 10.0, None, None, 0) for f in (1.0, rewards_in / costs_in))
    for _ in range(20):
        costs, reward_std = rng.normal(0.2, 1.0, 8), float(rng.uniform(0.5, 2.0))
        expected = plain.update(costs, 0.1, reward_std=reward_std) * rewards_in / costs_in
        value = scaled.update(costs_in * costs, 0.1 * costs_in, reward_std=rewards_in * reward_std)
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-9 * rewards_in / costs_in)


def test_pid_is_not_at_a_loss_where_nothing_differs():
    """Costs that are all alike, rewards that are all alike: lambda still rises above the limit, and falls below it."""
    multiplier = PidMultiplier(0.0, 10.0, None, None, 0)
    values = [multiplier.update([2.0] * FEWEST, 0.5, reward_std=0.0) for _ in range(10)]
    assert values[0] > 0 and values == sorted(values)
    assert [multiplier.update([0.5] * FEWEST, 0.5, reward_std=0.0)] == [multiplier.state.integral]
    assert [multiplier.update([0.0] * FEWEST, 0.5, reward_std=0.0) for _ in range(200)][-1] == 0.0
    # Costs that hardly differ say as little: a twentieth of the gap of .9 is the least spread, and .3 the error still.
    nearly = PidMultiplier(1.0, 10.0, None, None, 0)
    unit = 1 / (0.9 / 20)
    value = nearly.update([0.9999, 1.0001] * (FEWEST // 2), 0.1, reward_std=1.0)
    assert value == pytest.approx(1.0 + unit * 0.3 / 10 + unit * 0.3)
    # Costs come as float32, whose 0.1 is 1.5e-9 more than 0.1: these are at the limit.
    assert PidMultiplier(1.0, 10.0, None, None, 0).update(np.full(64, 0.1, np.float32), 0.1) == 1.0
    # What small gaps mean is a matter of the spread: half a standard deviation at a million is no rounding error.
    far, near = PidMultiplier(0.0, 10.0, None, None, 0), PidMultiplier(0.0, 10.0, None, None, 0)
    drawn = np.random.default_rng(0).normal(0.5, 1.0, 64)
    assert near.update(drawn, 0.0) == pytest.approx(far.update(1e6 + drawn, 1e6), rel=1e-6) and near.value > 0.0
    # Their mean may be rounded: three times 0.1, summed and divided, is not 0.1.
    assert np.full(3, 0.1).std() > 0 == spread(np.full(3, 0.1)) and spread(np.array([0.0, 2.0])) == 1.0
    exact, rounded = (PidMultiplier(0.0, 10.0, None, None, 0) for _ in range(2))
    assert rounded.update([0.1] * 3, 0.05) == pytest.approx(exact.update([0.5] * 3, 0.45))


@given(
    st.sampled_from(RULES),
    st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5), min_size=1, max_size=30),
    st.floats(-10, 10),
)
@SETTINGS
def test_every_rule_stays_in_its_bounds(rule, rounds, limit):
    """Fault 9 of the published code."""
    multiplier = make_multiplier(settings_of(rule=rule, window=None if rule == "pid" else 4))
    for costs in rounds:
        value = multiplier.update(costs, limit)
        assert 0.0 <= value <= 5.0 and value == multiplier.value


@given(st.integers(0, 300), st.floats(0.1, 50), st.floats(0.1, 50), st.floats(0.05, 5))
@SETTINGS
def test_projected_does_not_wind_up(stretch, below, above, level):
    """After any time under the limit, a gap g brings lambda to a level l within l / (gain * g) steps."""
    multiplier = make_multiplier(settings_of(window=1))
    path(multiplier, -below, stretch)
    steps = math.ceil(level / (0.1 * above)) + 1  # one more for rounding
    assert path(multiplier, above, steps)[-1] >= level * (1 - 1e-9)


@given(st.integers(1, 300), st.floats(0.05, 0.3), st.floats(0.05, 0.3))
@SETTINGS
def test_pid_does_not_wind_up(stretch, below, above):
    """Costs of standard deviation 1, so that one unit of lambda is 1 and a gap is an error: after any time under the
    limit I reaches a level within level * T / gap steps, and from its maximum it is back at 0 within T / gap times
    the log of that maximum for its fall to the unit, and once more for the rest.

    Fault 9 of the published code.
    """
    multiplier = make_multiplier(settings_of(rule="pid", window=None, max=None))

    def see(gap, steps):
        return [multiplier.update([gap - 1.0, gap + 1.0] * 16, 0.0) for _ in range(steps)][-1]

    see(-below, stretch)
    see(above, math.ceil(10.0 / above) + 1)
    assert multiplier.state.integral >= 1 - 1e-9
    see(above, stretch)
    falling = math.log(max(multiplier.state.integral, 1.0)) / -math.log1p(-below / 10.0) + 10.0 / below
    assert see(-below, math.ceil(falling) + 2) == 0.0


@pytest.mark.parametrize("rule", RULES)
def test_no_step_during_the_delay_though_the_window_fills(rule):
    delayed = make_multiplier(settings_of(rule=rule, delay_steps=3))
    assert [delayed.update([cost], 0.0) for cost in (2.0, 4.0, 6.0)] == [1.0, 1.0, 1.0]
    prompt = make_multiplier(settings_of(rule=rule))
    # Window of four: the mean of 2, 4, 6, 8 is 5.
    assert delayed.update([8.0], 0.0) == prompt.update(5.0, 0.0) > 1.0


def test_pid_without_a_maximum_stays_below_100_units():
    """Rewards of spread 3 and costs of spread 1.5 make a unit of 2."""
    multiplier = make_multiplier(settings_of(rule="pid", max=None, initial=0.0, time_constant=2.0))
    values = [multiplier.update([8.5, 11.5], 0.0, reward_std=3.0) for _ in range(60)]
    assert values[0] < 2.0 and max(values) == values[-1] == 200.0
    integral = multiplier.state.integral
    assert 200.0 / 1.3 <= integral < 200.0
    for _ in range(20):
        assert multiplier.update([8.5, 11.5], 0.0, reward_std=3.0) == 200.0
    assert multiplier.state.integral == integral
    assert multiplier.update([-11.5, -8.5], 0.0, reward_std=3.0) < 200.0, "nothing to unwind"


@pytest.mark.parametrize("rule", RULES)
def test_no_step_while_it_is_held_though_the_window_fills(rule):
    held, free = (make_multiplier(settings_of(rule=rule, initial=1.0, window=4)) for _ in range(2))
    assert [held.update([3.0, 5.0], 0.0, hold=True) for _ in range(2)] == [1.0, 1.0]
    assert held.window.mean() == 4.0
    free.window.extend([3.0, 5.0, 3.0, 5.0])
    for _ in range(2 * (rule == "pid")):  # which also takes note of how far costs and rewards lie apart
        free._observe(1.0, 1.0)
    assert held.update([1.0], 0.0) == pytest.approx(free.update([1.0], 0.0)) != 1.0


def test_without_a_window_each_update_stands_alone():
    multiplier = make_multiplier(settings_of(window=None))
    multiplier.update([1.0, 3.0], 0.0)
    assert multiplier.update([-1.0, -2.0], 0.0) == pytest.approx(1.0 + 0.2 - 0.15)


@pytest.mark.parametrize(("rule", "window"), [*((rule, 4) for rule in RULES), ("pid", None)])
def test_a_resumed_multiplier_is_the_uninterrupted_one(rule, window):
    """Fault 9 of the published code."""
    rounds = np.random.default_rng(1).normal(0.3, 4, (40, 3)).astype(np.float32)
    whole = make_multiplier(settings_of(rule=rule, window=window, delay_steps=5))
    expected = [whole.update(costs, 0.1) for costs in rounds]
    for cut in (0, 3, 20):
        first = make_multiplier(settings_of(rule=rule, window=window, delay_steps=5))
        values = [first.update(costs, 0.1) for costs in rounds[:cut]]
        second = make_multiplier(settings_of(rule=rule, window=window, delay_steps=5))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        values += [second.update(costs, 0.1) for costs in rounds[cut:]]
        assert values == expected
        assert second.state_dict() == whole.state_dict()


def test_once_a_cost_was_neither_0_nor_1_that_is_known_for_good():
    """What a window holds of earlier steps, and what may come again, is no share then."""
    multiplier = make_multiplier(settings_of())
    multiplier.update([0.0, 1.0], 0.1, shares=True)
    assert multiplier.shares
    multiplier.update([5.0, 0.0], 0.1, shares=False)
    multiplier.update([0.0, 1.0], 0.1, shares=True)
    resumed = make_multiplier(settings_of())
    resumed.load_state_dict(json.loads(json.dumps(multiplier.state_dict())))
    assert not multiplier.shares and not resumed.shares


@pytest.mark.parametrize("rule", RULES)
def test_a_maximum_that_was_lowered_holds_at_once(rule):
    before = make_multiplier(settings_of(rule=rule, initial=5.0))
    for _ in range(5):
        before.update([1.0, 0.0, 1.0, 0.0], 0.1)
    assert before.value == 5.0
    after = make_multiplier(settings_of(rule=rule, max=2.0))
    after.load_state_dict(before.state_dict())
    kept = [1.0] * 4 + [0.0] * 36
    values = [after.value, after.update([1.0, 0.0] * 20, 0.1, hold=True), after.update([1.0, 0.0] * 20, 0.1)]
    assert values == [2.0, 2.0, 2.0] and after.update(kept, 0.1) <= 2.0


def test_a_window_without_prompts_in_an_earlier_checkpoint_counts_each_cost_by_itself():
    saved = make_multiplier(settings_of()).state_dict() | {"window": [1.0, 2.0, 3.0]}
    del saved["window_prompts"]
    multiplier = make_multiplier(settings_of())
    multiplier.load_state_dict(saved)
    costs, prompts = multiplier.compared([4.0, 5.0], [7, 7])
    assert costs.tolist() == [2.0, 3.0, 4.0, 5.0] and prompts.tolist() == [-2, -1, 7, 7]


def test_state_of_another_rule_is_refused():
    with pytest.raises(UserError, match=r"set multiplier\.rule to pid"):
        make_multiplier(settings_of()).load_state_dict(make_multiplier(settings_of(rule="pid")).state_dict())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("costs", [math.nan, [1.0, math.inf], np.array([np.nan, np.nan]), []])
def test_costs_that_are_not_numbers_are_refused_and_change_nothing(rule, costs):
    multiplier = make_multiplier(settings_of(rule=rule))
    multiplier.update([1.0], 0.0)
    before = multiplier.state_dict()
    with pytest.raises(ValueError, match="episode cost"):
        multiplier.update(costs, 0.0)
    with pytest.raises(ValueError, match="limit"):
        multiplier.update([1.0], math.nan)
    assert multiplier.state_dict() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"initial": -1.0},
        {"initial": math.nan},
        {"initial": 6.0},
        {"rule": "pid", "time_constant": 0.5},
        {"rule": "log_sgd", "initial": 0.0},
        {"rule": "adam"},
    ],
)
def test_settings_that_cannot_work_are_refused(changes):
    with pytest.raises(UserError):
        make_multiplier(settings_of(**changes))


@pytest.mark.parametrize("rule", RULES)
def test_the_configuration_class_fits(rule):
    # 0 is the same in any units of rewards and costs; log_sgd cannot leave it, and starts as published.
    assert make_multiplier(MultiplierConfig(rule=rule)).value == (1.0 if rule == "log_sgd" else 0.0)
