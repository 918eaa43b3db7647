"""What an arena says of answers, on cases whose outcome is known or can be counted."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import optimize

from beaver_ray.arena.comparisons import VERDICT, compare, win_tie_loss
from beaver_ray.arena.figures import Entrant, Match, figures
from beaver_ray.arena.ratings import AVERAGE, elo
from beaver_ray.arena.safety import STOOD_FIRM, insistence, safety_matrix, worst_of_k

PROMPTS, ANSWERS = 60, 3


def entrant(seed: int, answers: int = ANSWERS) -> Entrant:
    draw = np.random.default_rng(seed)
    shape = (PROMPTS, answers)
    return Entrant(
        costs={"harm": draw.normal(size=shape)},
        refused_NK=draw.random(shape) < 0.3,
        truncated_NK=np.zeros(shape, dtype=bool),
        words_NK=draw.integers(1, 9, shape),
        rewards_NK=draw.normal(size=shape),
    )


def match(**entrants: Entrant) -> Match:
    half = np.arange(PROMPTS) < PROMPTS // 2
    return Match(entrants, half, ~half, {"all": np.ones(PROMPTS, dtype=bool), "first half": half})


def flat(verdicts: list[str]) -> tuple[Any, Any]:
    return np.array(verdicts), np.arange(len(verdicts))


MORE = 1.959964**2
"""z^2: as many prompts of which nothing is known widen an interval where all that were seen went alike."""


def test_ties_alone_do_not_make_a_win_rate_certain() -> None:
    ties = win_tie_loss(*flat(["tie"] * 6))["win_rate"]
    assert (ties["low"], ties["high"]) == pytest.approx((3 / (6 + MORE), (3 + MORE) / (6 + MORE)), abs=1e-6)
    even = win_tie_loss(np.array(["first", "second"] * 2), np.array([0, 0, 1, 1]))["win_rate"]
    assert (even["low"], even["high"]) == pytest.approx((1 / (2 + MORE), (1 + MORE) / (2 + MORE)), abs=1e-6)
    single = win_tie_loss(*flat(["unparsed", "tie"]))["win_rate"]
    assert (single["low"], single["high"]) == pytest.approx((0.5 / (1 + MORE), (0.5 + MORE) / (1 + MORE)), abs=1e-6)
    # One win among them does not make the others better known.
    one_win = win_tie_loss(*flat(["tie"] * 99 + ["first"]))["win_rate"]
    assert (one_win["low"], one_win["high"]) == pytest.approx(
        (50.5 / (100 + MORE), (50.5 + MORE) / (100 + MORE)), abs=1e-6
    )


@pytest.mark.parametrize(("win", "loss"), [(0.02, 0.0), (0.1, 0.05), (0.3, 0.1), (0.5, 0.5)])
def test_a_win_rate_and_ratings_hold_the_truth_as_often_as_they_say(win: float, loss: float) -> None:
    """Counted over all outcomes of ten prompts, each with its chance."""
    truth, held = win + (1 - win - loss) / 2, np.zeros(2)
    rating = AVERAGE + 200 * math.log10(truth / (1 - truth))
    for wins, losses in itertools.product(range(11), repeat=2):
        ties = 10 - wins - losses
        if ties < 0:
            continue
        verdicts = flat(["first"] * wins + ["second"] * losses + ["tie"] * ties)
        ways = math.comb(10, wins) * math.comb(10 - wins, losses)
        chance = ways * win**wins * loss**losses * max(1 - win - loss, 0) ** ties
        rate, ratings = win_tie_loss(*verdicts)["win_rate"], elo(["a", "b"], {("a", "b"): verdicts})
        held[0] += chance * (rate["low"] <= truth <= rate["high"])
        held[1] += chance * (ratings is None or ratings["a"]["low"] <= rating <= ratings["a"]["high"])
    assert (held >= 0.95).all(), held


def test_ties_alone_do_not_make_ratings_certain() -> None:
    ratings = elo(["a", "b"], {("a", "b"): flat(["tie"] * 6)})
    half = 200 * math.log10((3 + MORE) / 3)  # the odds of a win rate of (3 + z^2) / (6 + z^2)
    assert ratings is not None and ratings["b"]["n"] == 6
    for rating in ratings.values():
        assert [rating[end] - AVERAGE for end in ("low", "mean", "high")] == pytest.approx([-half, 0, half], abs=1e-4)
    # Of three the best off has twice that distance to the two others, each a third of it below the mean.
    triple = {pair: flat(["tie"] * 6) for pair in itertools.combinations("abc", 2)}
    rated = elo(list("abc"), triple)
    assert rated is not None
    assert {round(r["high"] - AVERAGE, 4) for r in rated.values()} == {round(2 * half * 2 / 3, 4)}
    # Each wins and loses once on every prompt, in one circle or in the other.
    one, other = np.array(["first", "second"] * 3), np.array(["second", "first"] * 3)
    circle = {("a", "b"): (one, np.arange(6)), ("b", "c"): (one, np.arange(6)), ("a", "c"): (other, np.arange(6))}
    circled = elo(list("abc"), circle)
    assert circled is not None and circled["a"]["high"] - AVERAGE == pytest.approx(2 * half * 2 / 3, abs=1e-4)


def test_one_tie_says_little_beside_many_comparisons_of_others() -> None:
    many = flat(["first", "second"] * 100)
    ratings = elo(["a", "b", "c"], {("a", "b"): flat(["tie"]), ("b", "c"): many})
    assert ratings is not None and ratings["a"]["n"] == 1
    # a's win rate against b may be (0.5 + z^2) / (1 + z^2); b and c have equal strengths.
    gap = 400 * math.log10((0.5 + MORE) / 0.5)
    assert ratings["a"]["high"] - ratings["a"]["mean"] == pytest.approx(gap * 2 / 3, abs=0.1)
    assert ratings["c"]["mean"] - ratings["c"]["low"] == pytest.approx(gap / 3, abs=0.1), "a mean of which a is part"


def test_one_policy_under_two_names_ties_for_certain_and_two_that_say_the_same_do_not() -> None:
    same = entrant(0)
    both = replace(match(one=same, two=same, other=entrant(1)), same=frozenset({("one", "two")}))
    found = figures(both)
    itself = [
        pair for pair in found["pairs"] + found["pairs_by_group"] if (pair["first"], pair["second"]) == ("one", "two")
    ]
    assert len(itself) == 2 + 2 * 2
    for pair in itself:
        assert (pair["win_rate"]["low"], pair["win_rate"]["high"]) == (0.5, 0.5)
        assert (pair["difference"]["low"], pair["difference"]["high"]) == (0.0, 0.0)
        assert pair["tie"]["low"] < 1.0
    unknown = figures(replace(both, same=frozenset()))["pairs"][0]
    low = PROMPTS / 2 / (PROMPTS + MORE)
    assert (unknown["win_rate"]["low"], unknown["win_rate"]["high"]) == pytest.approx((low, 1 - low), abs=1e-6)
    assert unknown["difference"]["mean"] == 0.0 and unknown["difference"]["low"] is None
    alone = replace(match(one=same, two=same), same=frozenset({("one", "two")}))
    assert {r["high"] for r in figures(alone)["elo"]["reward"].values()} == {AVERAGE}
    assert {r["high"] > AVERAGE + 5 for r in figures(match(one=same, two=same))["elo"]["reward"].values()} == {True}
    # Where it says another thing to the same prompts it is as any other.
    varied = figures(replace(match(one=same, two=entrant(1)), same=frozenset({("one", "two")})))["pairs"][0]
    assert varied["win_rate"]["low"] < varied["win_rate"]["mean"] < varied["win_rate"]["high"]


def test_identical_policies_tie() -> None:
    same = entrant(0)
    found = figures(match(one=same, other=same, third=replace(same)))
    for pair in found["pairs"]:
        assert (pair["win"]["mean"], pair["tie"]["mean"], pair["loss"]["mean"]) == (0.0, 1.0, 0.0)
        assert pair["win_rate"]["mean"] == 0.5
        assert pair["difference"]["mean"] == 0.0
    assert {by: {r["mean"] for r in ratings.values()} for by, ratings in found["elo"].items()} == {
        "reward": {AVERAGE},
        "cost/harm": {AVERAGE},
    }
    assert all(m["safe/unsafe"]["mean"] == m["unsafe/safe"]["mean"] == 0.0 for m in found["safety_matrix"])


def test_a_coin_flip_judge_gives_half_within_its_interval_19_times_in_20() -> None:
    draw, prompts = np.random.default_rng(1), np.repeat(np.arange(100), 2)
    covered = 0
    for _ in range(400):
        rate = win_tie_loss(draw.choice(["first", "second"], 200), prompts)["win_rate"]
        covered += rate["low"] <= 0.5 <= rate["high"]
    assert 0.92 <= covered / 400 <= 0.98  # four standard errors of a share of 0.95 are 0.044


def test_intervals_know_that_answers_to_one_prompt_are_alike() -> None:
    verdicts = np.repeat(np.where(np.arange(50) % 2 == 0, "first", "second"), 10)
    clustered = win_tie_loss(verdicts, np.repeat(np.arange(50), 10))["win_rate"]
    once = win_tie_loss(verdicts[::10], np.arange(50))["win_rate"]
    assert (clustered["low"], clustered["high"]) == pytest.approx((once["low"], once["high"]))


def test_a_judge_s_failures_are_counted_and_in_no_share() -> None:
    found = win_tie_loss(*flat(["first", "first", "second", "tie", "unparsed", "refused", "refused", "first"]))
    assert (found["comparisons"], found["unparsed"], found["refused"]) == (8, 1, 2)
    assert found["win"]["mean"] == 3 / 5 and found["win"]["n"] == 5
    assert found["win_rate"]["mean"] == pytest.approx(3.5 / 5)
    always = win_tie_loss(*flat(["first"] * 20))["win_rate"]
    assert always["high"] == 1.0 and always["low"] == pytest.approx(0.8389, abs=1e-4)  # Wilson, 20 of 20
    nothing = win_tie_loss(*flat(["refused", "unparsed"]))
    assert nothing["win_rate"] is None and nothing["comparisons"] == 2
    with pytest.raises(ValueError, match="'draw' is no verdict"):
        win_tie_loss(*flat(["first", "draw"]))


def test_a_lower_cost_wins() -> None:
    assert compare(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 1.0]), higher_wins=False).tolist() == [
        "first",
        "tie",
        "second",
    ]


def test_elo_of_known_win_rates() -> None:
    ten_of_eleven = flat(["first"] * 10 + ["second"])
    ratings = elo(["a", "b"], {("a", "b"): ten_of_eleven})
    assert ratings is not None
    assert ratings["a"]["mean"] - ratings["b"]["mean"] == pytest.approx(400.0)
    assert ratings["a"]["mean"] + ratings["b"]["mean"] == pytest.approx(2 * AVERAGE)
    assert ratings["a"]["n"] == 11
    # Of one pair: the delta method on the logarithm of the odds of a share with variance s^2 (G / (G - 1)) / G.
    share, scale, games = 10 / 11, 400 / math.log(10), 11
    error = scale * math.sqrt(share * (1 - share) / (games - 1)) / (share * (1 - share)) / 2
    assert ratings["a"]["high"] - ratings["a"]["mean"] == pytest.approx(2.228139 * error, rel=1e-4)  # t(0.975, 10)


def test_elo_recovers_strengths_and_is_their_maximum_likelihood() -> None:
    strengths = {"a": 1.0, "b": 0.2, "c": -0.4, "d": -0.8}
    draw = np.random.default_rng(5)
    pairs = {}
    for one, other in itertools.combinations(strengths, 2):
        chance = 1 / (1 + math.exp(strengths[other] - strengths[one]))
        verdicts = np.where(draw.random(4000) < chance, "first", "second").astype(VERDICT)
        pairs[one, other] = verdicts, np.arange(4000)
    pairs["a", "b"][0][:100] = "unparsed"
    ratings = elo(list(strengths), pairs)
    assert ratings is not None
    for name, strength in strengths.items():
        truth = AVERAGE + 400 / math.log(10) * strength
        assert abs(ratings[name]["mean"] - truth) < 25
        assert ratings[name]["low"] - 5 < truth < ratings[name]["high"] + 5

    def loss(free: np.ndarray) -> float:
        known = dict(zip(strengths, [0.0, *free], strict=True))
        total = 0.0
        for (one, other), (verdicts, _) in pairs.items():
            gap = known[one] - known[other]
            total += (verdicts == "first").sum() * math.log1p(math.exp(-gap))
            total += (verdicts == "second").sum() * math.log1p(math.exp(gap))
        return total

    by_simplex = optimize.minimize(loss, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-8}).x
    gaps = [(ratings[name]["mean"] - ratings["a"]["mean"]) * math.log(10) / 400 for name in "bcd"]
    assert gaps == pytest.approx(by_simplex, abs=1e-5)


def test_there_are_no_finite_ratings_of_one_who_wins_always() -> None:
    assert elo(["a", "b"], {("a", "b"): flat(["first"] * 9)}) is None
    never_met = {("a", "b"): flat(["first", "second"]), ("c", "d"): flat(["first", "second"])}
    assert elo(["a", "b", "c", "d"], never_met) is None
    assert elo(["a", "b"], {("a", "b"): flat(["first"] * 9 + ["tie"])}) is not None


def test_worst_of_k_is_the_mean_over_all_ways_to_draw_k() -> None:
    unsafe_NK = np.random.default_rng(3).random((7, 6)) < 0.3
    for k, found in enumerate(worst_of_k(unsafe_NK, np.arange(7)), start=1):
        drawn = [any(row[list(some)]) for row in unsafe_NK for some in itertools.combinations(range(6), k)]
        assert found["mean"] == pytest.approx(np.mean(drawn))
        assert found["n"] == 7
        assert found["low"] < found["mean"] < found["high"] or found["mean"] == 1.0
    never = worst_of_k(np.zeros((20, 2), dtype=bool), np.arange(20))
    assert never[1]["high"] == pytest.approx(0.161, abs=1e-3)  # Wilson, 0 of 20
    one_of_many = worst_of_k((np.arange(1100) == 5)[None], np.arange(1))
    assert [found["mean"] for found in one_of_many] == pytest.approx([k / 1100 for k in range(1, 1101)])


def test_the_safety_matrix_counts_answers_of_equal_number() -> None:
    first = np.array([[True, False], [False, False]])
    second = np.array([[True, True], [False, True]])
    shares = {key: figure["mean"] for key, figure in safety_matrix(first, second, np.arange(2)).items()}
    assert shares == {"safe/safe": 0.25, "safe/unsafe": 0.5, "unsafe/safe": 0.0, "unsafe/unsafe": 0.25}


def test_insistence_counts_only_who_was_refused() -> None:
    found = insistence(np.array([0, 0, 1, 1, 2, STOOD_FIRM, STOOD_FIRM, STOOD_FIRM]), turns=3)
    assert found["refused_at_first"]["mean"] == 6 / 8
    assert [figure["mean"] for figure in found["gave_in_by_turn"]] == [2 / 6, 3 / 6, 3 / 6]
    assert found["gave_in_by_turn"][0]["n"] == 6
    assert insistence(np.array([0, 0]), turns=1)["gave_in_by_turn"] == [None]


def test_policies_with_other_numbers_of_answers_meet_in_the_first_ones() -> None:
    many, few = entrant(1), entrant(2, answers=1)
    found = figures(match(many=many, few=few))
    (pair,) = [pair for pair in found["pairs"] if pair["by"] == "reward"]
    assert many.rewards_NK is not None and few.rewards_NK is not None
    assert pair["win"]["mean"] == np.mean(many.rewards_NK[:, 0] > few.rewards_NK[:, 0])
    assert pair["comparisons"] == PROMPTS


def test_figures_over_categories_refusals_and_a_judge_of_pairs() -> None:
    one, other = entrant(1), entrant(2)
    verdicts = np.full((PROMPTS, ANSWERS), "second")
    verdicts[:, 0] = "first"
    judged = replace(match(one=one, other=other), verdicts={"judge": {("one", "other"): verdicts}})
    found = figures(replace(judged, held_out=["first half"]))
    harmful = judged.harmful_N
    refused = found["policies"]["one"]["refusal_rate_harmful"]
    assert refused["mean"] == one.refused_NK[harmful].mean() and refused["n"] == harmful.sum() * ANSWERS
    assert found["policies"]["one"]["refusal_rate_benign"]["mean"] == pytest.approx(one.refused_NK[~harmful].mean())
    inside = found["categories"]["first half"]["other"]["violation_rate/harm"]
    assert inside["mean"] == pytest.approx((other.costs["harm"][harmful] > 0).mean())
    assert found["held_out"]["held out"] == found["categories"]["first half"]
    assert found["held_out"]["others"]["one"]["prompts"] == PROMPTS - harmful.sum()
    by_judge = next(pair for pair in found["pairs"] if pair["by"] == "judge")
    assert by_judge["win"]["mean"] == pytest.approx(1 / 3) and "difference" not in by_judge
    assert set(found["elo"]) == {"reward", "cost/harm", "judge"}


def by_hand() -> Match:
    """Two policies, two answers to each of four prompts, of which the first three are of the kind that is held out."""
    nothing = np.zeros((4, 2), dtype=bool)
    rest = {"refused_NK": nothing, "truncated_NK": nothing, "words_NK": np.ones((4, 2), dtype=int)}
    one = Entrant(
        costs={"harm": np.array([[1.0, -1.0], [-1.0, -1.0], [2.0, 2.0], [3.0, -1.0]])},
        rewards_NK=np.array([[1.0, 2.0], [3.0, 0.0], [1.0, 1.0], [0.0, 0.0]]),
        **rest,
    )
    other = Entrant(
        costs={"harm": np.array([[-1.0, -1.0], [-1.0, 1.0], [2.0, 3.0], [1.0, 1.0]])},
        rewards_NK=np.array([[0.0, 2.0], [4.0, -1.0], [1.0, 0.0], [5.0, 0.0]]),
        **rest,
    )
    kind = np.arange(4) < 3
    return Match({"one": one, "other": other}, ~kind, kind, {"a": kind, "b": ~kind}, held_out=["a"])


def test_pairs_matrix_and_worst_of_k_by_category_are_counted() -> None:
    found = figures(by_hand())
    parts = [("held out", "held out"), ("held out", "others"), ("category", "a"), ("category", "b")]
    pairs = {(p["group"], p["questions of"], p["by"]): p for p in found["pairs_by_group"]}
    assert list(pairs) == [(*part, by) for part in parts for by in ("reward", "cost/harm")]

    def shares(group: str, name: str, by: str) -> list[float]:
        pair = pairs[group, name, by]
        return [round(pair[outcome]["mean"] * pair["win"]["n"], 6) for outcome in ("win", "tie", "loss")]

    # Rewards of the first three: 1 > 0, 2 = 2; 3 < 4, 0 > -1; 1 = 1, 1 > 0. Costs: 1 > -1, =; =, -1 < 1; =, 2 < 3.
    assert shares("category", "a", "reward") == [3, 2, 1] and shares("category", "b", "reward") == [0, 1, 1]
    assert shares("category", "a", "cost/harm") == [2, 3, 1] and shares("category", "b", "cost/harm") == [1, 0, 1]
    reward = pairs["category", "a", "reward"]
    # Win rates by prompt: 3/4, 1/2, 3/4, so 2/3 with a standard error of 1/12; t(0.975, 2) = 4.302653.
    assert reward["win_rate"]["mean"] == pytest.approx(2 / 3) and reward["comparisons"] == 6
    assert reward["win_rate"]["low"] == pytest.approx(2 / (3 + MORE), abs=1e-6), "less than 2/3 - 4.30 / 12 = 0.308"
    # Differences by prompt 1/2, 0, 1/2: mean 1/3, standard error 1/6.
    assert reward["difference"]["high"] == pytest.approx(1 / 3 + 4.302653 / 6, abs=1e-6)
    for half, name in (("held out", "a"), ("others", "b")):
        for by in ("reward", "cost/harm"):
            same = pairs["category", name, by]
            assert pairs["held out", half, by] == same | {"group": "held out", "questions of": half}
    matrices = {(m["group"], m["questions of"]): m for m in found["safety_matrix_by_group"]}
    assert list(matrices) == parts
    keys = ("safe/safe", "safe/unsafe", "unsafe/safe", "unsafe/unsafe")
    # Of the first three: unsafe/safe, safe/safe; safe/safe, safe/unsafe; twice both. Of the last: both, safe/unsafe.
    assert [matrices["category", "a"][k]["mean"] for k in keys] == pytest.approx([2 / 6, 1 / 6, 1 / 6, 2 / 6])
    assert [matrices["category", "b"][k]["mean"] for k in keys] == [0, 0.5, 0, 0.5]
    worst = {c: {p: mine["worst_of_k"]["harm"] for p, mine in found["categories"][c].items()} for c in "ab"}
    assert [figure["mean"] for figure in worst["a"]["one"]] == pytest.approx([3 / 6, 2 / 3])
    assert [figure["mean"] for figure in worst["b"]["one"]] == [0.5, 1.0] and worst["a"]["other"][1]["n"] == 3
    assert found["held_out"]["held out"] == found["categories"]["a"]
