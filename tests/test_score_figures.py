"""Figures of scores against hand-made answers where they are known, and against scipy's own correlations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from beaver_ray.errors import UserError
from beaver_ray.rewardbench import SECTIONS, Contest, benchmark
from beaver_ray.score_figures import Labelled, agreement, figures, rank_correlation

RNG = np.random.default_rng(0)


def labelled(pairs: int, seed: int = 1) -> Labelled:
    """Pairs on prompts of their own; which of two answers is right is a coin's matter."""
    rng = np.random.default_rng(seed)
    right = rng.integers(0, 2, pairs).astype(float)
    unsafe = np.zeros(2 * pairs)
    unsafe[2 * np.arange(pairs) + (right > 0)] = 1.0  # the other one
    return Labelled(
        prompt_N=np.repeat(np.arange(pairs), 2),
        words_N=rng.integers(1, 200, 2 * pairs),
        unsafe_N=unsafe,
        pairs_P2=np.arange(2 * pairs).reshape(-1, 2),
        better_P=right,
        safer_P=right,
    )


def test_perfect_constant_and_random_scorers() -> None:
    data = labelled(400)
    good = 1.0 - data.unsafe_N
    perfect = figures("reward", good, data)
    assert perfect["accuracy"]["mean"] == 1 and perfect["margin"]["mean"] == 1 and perfect["ties"]["mean"] == 0
    assert figures("reward", -good, data)["accuracy"]["mean"] == 0
    constant = figures("reward", np.zeros(800), data)
    assert (constant["accuracy"]["mean"], constant["ties"]["mean"]) == (0, 1)
    guessed = figures("reward", np.random.default_rng(5).normal(size=800), data)
    assert guessed["accuracy"]["low"] < 0.5 < guessed["accuracy"]["high"]
    assert guessed["length"]["correlation"]["low"] < 0 < guessed["length"]["correlation"]["high"]
    cost = figures("cost", 2 * data.unsafe_N - 1, data)
    assert [cost[name]["mean"] for name in ("accuracy", "accuracy_sign", "unsafe_found", "safe_found")] == [1] * 4
    turned = figures("cost", 1 - 2 * data.unsafe_N, data)
    assert (turned["accuracy"]["mean"], turned["accuracy_sign"]["mean"]) == (0, 0)
    assert "fitted scale" in turned["calibration"]["not_fitted"]


def test_signs_and_groups_counted_by_hand() -> None:
    """Two prompts: costs 2 and -1 of unsafe answers, -3 and 1 of safe ones; the second pair is not compared."""
    data = Labelled(
        prompt_N=np.array([0, 0, 1, 1]),
        words_N=np.array([5, 3, 2, 2]),
        unsafe_N=np.array([1.0, 0.0, 1.0, 0.0]),
        pairs_P2=np.array([[0, 1], [2, 3]]),
        better_P=np.array([np.nan, np.nan]),
        safer_P=np.array([0.0, np.nan]),
        groups={"severity": {"3": np.array([1, 0, 0, 0], bool), "1": np.array([0, 0, 1, 1], bool)}},
    )
    found = figures("cost", np.array([2.0, -3.0, -1.0, 1.0]), data)
    assert (found["accuracy"]["mean"], found["accuracy"]["n"], found["margin"]["mean"]) == (1, 1, 5)
    shares = {name: (found[name]["mean"], found[name]["n"]) for name in ("accuracy_sign", "unsafe_found", "safe_found")}
    assert shares == {"accuracy_sign": (0.5, 4), "unsafe_found": (0.5, 2), "safe_found": (0.5, 2)}
    severe, slight = found["by"]["severity"]["3"], found["by"]["severity"]["1"]
    assert severe["unsafe_found"]["mean"] == 1 and severe["accuracy"]["n"] == 1 and "safe_found" not in severe
    assert slight["accuracy_sign"]["mean"] == 0 and "accuracy" not in slight
    assert found["length"]["accuracy_longer_is_worse"] == found["accuracy"]
    with pytest.raises(UserError, match="which answer is more helpful"):
        figures("reward", np.zeros(4), data)


def test_a_scorer_that_is_the_length() -> None:
    data = labelled(300)
    found = figures("reward", 0.1 * data.words_N + 3, data)["length"]
    assert found["correlation"]["mean"] == pytest.approx(1)
    assert found["correlation"]["low"] is None, "no draw differs, which says nothing of how far another set would"
    assert found["scores_prefer_longer"]["mean"] == 1
    assert found["accuracy_longer_is_worse"]["mean"] == 0 and found["accuracy_longer_is_better"]["mean"] == 1
    assert found["labels_prefer_longer"]["low"] < 0.5 < found["labels_prefer_longer"]["high"]
    noisy = data.words_N + RNG.normal(0, 80, 600)
    differences = np.array([s[0::2] - s[1::2] for s in (noisy, data.words_N.astype(float))])
    both_ways = np.concatenate([differences, -differences], axis=1)
    expected = stats.pearsonr(*both_ways).statistic
    assert figures("reward", noisy, data)["length"]["correlation"]["mean"] == pytest.approx(expected)
    # Long answers that cost more: the same as of a reward, by the score itself.
    assert figures("cost", noisy, data)["length"]["correlation"]["mean"] == pytest.approx(expected)


def test_scores_that_say_nothing_of_a_pair_prefer_neither_answer() -> None:
    """A reward of 0 and 1 that half of the pairs have alike, and that is for the longer answer wherever it decides."""
    data = labelled(400)
    longer = data.words_N.reshape(-1, 2).argmax(axis=1)
    rewards = np.zeros((400, 2))
    rewards[np.arange(0, 400, 2), longer[::2]] = 1.0
    found = figures("reward", rewards.ravel(), data)["length"]
    assert found["scores_prefer_longer"]["mean"] == 1.0 and found["scores_prefer_longer"]["n"] <= 200
    assert "scores_prefer_longer" not in figures("reward", np.zeros(800), data)["length"]


def test_intervals_that_nothing_is_known_of_are_left_empty() -> None:
    two = rank_correlation(np.array([1.0, 2.0]), np.array([3.0, 9.0]), np.arange(2))
    assert (two["mean"], two["low"], two["high"]) == (1.0, None, None)
    # Two unsafe answers of a hundred, found by both: many a draw has none of them, and kappa is unknown there.
    costs = np.where(np.arange(100) < 2, 1.0, -1.0)
    kappa = agreement("cost", costs, costs, labelled(50))["kappa"]
    assert (kappa["mean"], kappa["low"], kappa["high"]) == (1.0, None, None)


def test_calibration_of_scores_that_are_log_odds() -> None:
    rng, pairs = np.random.default_rng(3), 3000
    data = labelled(pairs)
    costs = rng.normal(0, 2, 2 * pairs)
    unsafe = (rng.random(2 * pairs) < 1 / (1 + np.exp(-costs))).astype(float)
    true = figures("cost", costs, Labelled(**{**data.__dict__, "unsafe_N": unsafe}))["calibration"]
    assert true["raw"]["ece"] < 0.02 and true["fitted"]["ece"] < 0.03
    boastful = figures("cost", 4 * costs, Labelled(**{**data.__dict__, "unsafe_N": unsafe}))["calibration"]
    assert boastful["raw"]["ece"] > 0.1 and boastful["fitted"]["ece"] < 0.03
    rewards = rng.normal(0, 1, 2 * pairs)
    wins = (rng.random(pairs) < 1 / (1 + np.exp(rewards[1::2] - rewards[0::2]))).astype(float)
    order = figures("reward", rewards, Labelled(**{**data.__dict__, "better_P": wins}))["calibration"]["raw"]
    assert order["ece"] < 0.02 and order["low"] < order["predicted"] < order["high"]


def test_agreement_of_models_with_themselves_and_others() -> None:
    data = labelled(200)
    one, other = RNG.normal(size=400), RNG.normal(size=400)
    same = agreement("cost", one, one, data)
    assert [same[name]["mean"] for name in ("order", "rank_correlation", "kappa")] == pytest.approx([1, 1, 1])
    # Order is all that counts for a rank correlation, and for kappa the sign.
    assert agreement("cost", one, one**3, data)["kappa"]["mean"] == 1
    assert agreement("reward", one, np.exp(one), data)["rank_correlation"]["mean"] == pytest.approx(1)
    strangers = agreement("cost", one, other, data)
    assert strangers["rank_correlation"]["mean"] == pytest.approx(stats.spearmanr(one, other).statistic)
    for name, chance in {"order": 0.5, "rank_correlation": 0, "kappa": 0}.items():
        assert strangers[name]["low"] < chance < strangers[name]["high"]
    # 20 both unsafe, 5 and 10 by one alone, 15 by neither: agreement 0.7, by chance 0.5, kappa 0.4 (Cohen 1960).
    a, b = np.repeat([1.0, 1.0, -1.0, -1.0], [20, 5, 10, 15]), np.repeat([1.0, -1.0, 1.0, -1.0], [20, 5, 10, 15])
    empty = np.zeros((0, 2), np.int64)
    alone = Labelled(np.arange(50), np.ones(50), np.full(50, np.nan), empty, np.zeros(0), np.zeros(0))
    assert agreement("cost", a, b, alone)["kappa"]["mean"] == pytest.approx(0.4)


def test_rewardbench_sections_by_hand() -> None:
    """One row of each subset; all won but math-prm: reasoning is the code's half of it (6 x 164 of 2 x 984)."""
    names = [subset for section in SECTIONS.values() for subset in section]
    rows = [Contest(name, str(n), (2 * n,), (2 * n + 1,)) for n, name in enumerate(names)]
    scores = np.tile([1.0, 0.0], len(names))
    lost = names.index("math-prm")
    scores[2 * lost] = -1
    found = benchmark(scores, rows)
    assert found["sections"] == {"Chat": 1, "Chat Hard": 1, "Safety": 1, "Reasoning": 0.5} and found["missing"] == []
    assert found["score"] == 0.875
    scores[2 * names.index("alpacaeval-easy")] = 0  # a tie is not won: 100 of 358
    assert benchmark(scores, rows)["sections"]["Chat"] == pytest.approx(258 / 358)
    part = benchmark(scores, rows[:2])
    assert part["missing"] == names[2:] and part["sections"].keys() == {"Chat"}
    assert benchmark(scores, [Contest("mine", "0", (0,), (1,))]) == {}


def test_rewardbench_2_by_hand() -> None:
    best_of_4 = [Contest("Focus", str(n), (4 * n,), (4 * n + 1, 4 * n + 2, 4 * n + 3)) for n in range(3)]
    scores = np.array([3, 1, 2, 0, 2, 2, 1, 0, 1, 2, 0, 0], dtype=float)  # won, shared by two, lost
    found = benchmark(scores, best_of_4)
    assert (found["version"], found["score"]) == (2, 0.5) and found["missing"][0] == "Factuality"
    # Tied row: right 5 and 4 (spread 1), wrong 2 (gap 2). Its reference row: right 3, wrong 2.5 (gap 0.5).
    ties = [Contest("Ties", "tied:7", (0, 1), (2,)), Contest("Ties", "ref:7", (3,), (4,))]
    expected = 0.3 + 0.3 + 0.2 + 0.0 + 0.01 * np.tanh(0.5 - 1)
    assert benchmark(np.array([5, 4, 2, 3, 2.5]), ties)["score"] == pytest.approx(expected)
    expected = 0.3 + 0.0 + 0.2 + 0.0 + 0.01 * np.tanh(-1 / 1 - 1)
    assert benchmark(np.array([5, 4, 2, 3, 4.0]), ties)["score"] == pytest.approx(expected)
