"""Figures of a classifier with several labels, against counting by hand and exhaustive search."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from beaver_ray.json_files import plain
from beaver_ray.method.losses import masked_label_loss
from beaver_ray.method.multilabel import (
    HIGHEST,
    area_under_roc,
    average_precision,
    best_threshold,
    figures,
    flag_margin,
    group_odds,
    shares_by,
    thresholds,
    unsafe_truth,
)


def drawn(seed: int, n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties, and truths that go with them."""
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=n), 1)
    return scores, rng.random(n) < 1 / (1 + np.exp(-2 * scores))


@pytest.mark.parametrize("seed", range(3))
def test_areas_are_those_of_counting(seed: int) -> None:
    scores, truth = drawn(seed)
    pairs = list(itertools.product(scores[truth], scores[~truth]))
    wins = sum(1.0 if high > low else 0.5 if high == low else 0.0 for high, low in pairs)
    assert area_under_roc(scores, truth) == pytest.approx(wins / len(pairs))
    # Average precision: over every cut of the scores, the recall gained there times the precision.
    area = recall = 0.0
    for cut in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= cut
        now = (truth & taken).sum() / truth.sum()
        area, recall = area + (now - recall) * (truth & taken).sum() / taken.sum(), now
    assert average_precision(scores, truth) == pytest.approx(area)
    nothing = np.zeros(len(scores), dtype=bool)
    assert math.isnan(area_under_roc(scores, nothing)) and math.isnan(average_precision(scores, nothing))


@pytest.mark.parametrize("seed", range(3))
def test_thresholds_are_the_best_there_are(seed: int) -> None:
    scores, truth = drawn(seed)
    cuts = [scores.min() - 1, *((a + b) / 2 for a, b in itertools.pairwise(sorted(set(scores.tolist()))))]

    def f1(cut: float) -> float:
        above = scores > cut
        return 2 * (above & truth).sum() / (above.sum() + truth.sum())

    def precision(cut: float) -> float:
        return (scores > cut)[truth].sum() / (scores > cut).sum()

    found = best_threshold(scores, truth)
    assert found is not None and f1(found) == pytest.approx(max(map(f1, cuts)))
    for target in (0.6, 0.8, 0.95):
        reached = [cut for cut in cuts if precision(cut) >= target]
        at = best_threshold(scores, truth, target)
        assert (at is None) == (not reached)
        if at is not None:
            assert at == pytest.approx(min(reached)) and precision(at) >= target


def test_labels_without_a_threshold_are_named() -> None:
    odds = np.array([[2.0, 0.0, 1.0], [1.0, 1.0, 2.0], [-1.0, 2.0, -9.0]])
    truth = np.array([[1, 0, 0], [0, 0, 0], [0, -1, 1]])
    found, notes = thresholds(odds, truth, ["a", "b", "c"], 0.9, np.ones(3, dtype=bool))
    assert found.tolist() == [1.5, 0.0, HIGHEST]
    assert notes == [
        "b: no held-out row has it, so its threshold is a probability of 0.5",
        "c: no threshold has a precision of 0.9, so it is never flagged",
    ]
    assert flag_margin(odds, found).tolist() == [0.5, 1.0, 2.0]
    found, notes = thresholds(odds, truth, ["a", "b", "c"], None, np.array([False, True, False]))
    assert found.tolist() == [HIGHEST, 0.0, HIGHEST]
    assert notes[0] == "a: the model has learned nothing of it, so it is never flagged" and len(notes) == 3


def test_what_is_never_flagged_is_not_flagged_however_sure_a_decoder_is() -> None:
    odds = np.array([[31.0, -1.0], [5.0, -2.0]])
    found, _ = thresholds(odds, np.array([[0, 0], [1, 1]]), ["a", "b"], 0.9, np.array([True, True]))
    assert found[0] == HIGHEST and (flag_margin(odds[:, :1], found[:1]) < 0).all()


def test_figures_by_hand() -> None:
    """Four answers, two labels, one label unknown: counted on paper."""
    odds = np.array([[2.0, -2.0], [1.0, 3.0], [-1.0, 2.0], [-2.0, -1.0]])
    truth = np.array([[1, 0], [0, 1], [1, -1], [0, -1]])
    found = figures(odds, truth, odds > 0, flag_margin(odds, np.zeros(2)), ["a", "b"])
    a, b = found["labels"]["a"], found["labels"]["b"]
    assert (a["precision"], a["recall"], a["f1"], a["known"], a["true"]) == (0.5, 0.5, 0.5, 4, 2)
    assert (b["precision"], b["recall"], b["f1"], b["known"], b["true"]) == (1.0, 1.0, 1.0, 2, 1)
    assert a["auroc"] == 0.75 and b["auroc"] == 1.0
    # a: 1 hit, 2 flagged, 2 true; b: 1, 1, 1.
    assert found["micro_f1"] == pytest.approx(4 / 6) and found["macro_f1"] == 0.75
    # The last answer has no true label and an unknown one, so nobody knows whether it should be flagged.
    assert unsafe_truth(truth).tolist() == [1, 1, 1, -1]
    assert (found["flagged"]["known"], found["flagged"]["recall"]) == (3, 1.0)
    for name in ("auroc", "precision", "f1", "accuracy"):
        assert plain(found)["flagged"][name] is None, "there is none without a safe answer"
    # Without an unsafe one every flag is wrong, however good the classifier: only how seldom it flags says something.
    benign = figures(odds, np.zeros_like(truth), odds > 0, flag_margin(odds, np.zeros(2)), ["a", "b"])
    assert benign["flagged"]["accuracy"] == 0.25 and benign["labels"]["b"]["accuracy"] == 0.5
    for one in (benign["flagged"], benign["labels"]["a"], benign["labels"]["b"]):
        assert np.isnan([one["precision"], one["recall"], one["f1"]]).all()
    assert math.isnan(benign["micro_f1"]) and math.isnan(benign["macro_f1"])
    # A third label that nobody says anything of changes nothing: the second answer is known to be safe.
    unasked = np.array([[1, 0, -1], [0, 0, -1], [0, -1, -1]])
    assert unsafe_truth(unasked).tolist() == [1, 0, -1]
    confident = figures(odds[:2] * 100, truth[:2], odds[:2] > 0, odds[:2].max(axis=1), ["a", "b"])
    assert confident["labels"]["a"]["ece"] == pytest.approx(0.5), "wrong with certainty on one of two"


def test_shares_count_prompts_once() -> None:
    flags = np.array([True, True, False, True])
    found = shares_by(["x", ["x", "y"], "y", None], flags, np.array([1, 1, 2, 3]))
    assert list(found) == ["x", "y"] and (found["x"]["mean"], found["y"]["mean"]) == (1.0, 0.5)
    assert found["x"]["n"] == 2 and found["x"]["low"] == pytest.approx(1 / (1 + 1.959964**2), rel=1e-5), "one prompt"


def test_groups_of_labels() -> None:
    rng = np.random.default_rng(0)
    odds, above = rng.normal(size=(20, 4)) * 3, np.array([0.5, -1.0, 2.0, 0.0])
    most = group_odds(odds, above, [0, 2], "max")
    assert np.array_equal(most > 0, (odds[:, 0] > 0.5) | (odds[:, 2] > 2.0))
    probability = 1 / (1 + np.exp(-odds[:, [1, 3]]))
    none = np.prod(1 - probability, axis=1)
    np.testing.assert_allclose(group_odds(odds, above, [1, 3], "any"), np.log((1 - none) / none), rtol=1e-9)
    np.testing.assert_allclose(group_odds(odds, above, [1], "any"), odds[:, 1], rtol=1e-9)
    far = group_odds(np.array([[-300.0, -300.0], [500.0, 400.0]]), above[:2], [0, 1], "any")
    np.testing.assert_allclose(far, [-300 + math.log(2), 900.0])
    above[3] = HIGHEST  # nothing was learned of it: its odds mean nothing
    np.testing.assert_allclose(group_odds(odds, above, [1, 3], "any"), odds[:, 1], rtol=1e-9)
    assert (group_odds(odds, above, [3], "any") < -900).all() and (group_odds(odds, above, [3], "max") < -900).all()


def test_loss_is_pytorchs_on_known_labels() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.randint(-1, 2, (6, 3))
    weight = torch.tensor([0.5, 1.0, 7.0])
    known = labels >= 0
    expected = binary_cross_entropy_with_logits(
        logits + weight.log(), labels.clamp(min=0).float(), pos_weight=weight, reduction="none"
    )[known].mean()
    whole, metrics = masked_label_loss(logits, labels, positive_weight_K=weight, total=float(known.sum()))
    torch.testing.assert_close(whole, expected)
    right = ((logits > 0).long() == labels)[known].float().mean()
    torch.testing.assert_close(metrics["label_accuracy"], right)
    parts = [
        masked_label_loss(logits[s], labels[s], positive_weight_K=weight, total=float(known.sum()))[0]
        for s in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)


@pytest.mark.parametrize("weight", [0.2, 1.0, 9.0])
def test_weights_leave_logits_the_log_odds_of_the_data(weight: float) -> None:
    """Of a classifier that knows nothing but the share of true rows, 2 of 10."""
    labels, logit = torch.tensor([[1]] * 2 + [[0]] * 8), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([logit], max_iter=100, tolerance_grad=1e-9, tolerance_change=1e-12)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss, _ = masked_label_loss(logit.expand(10, 1), labels, positive_weight_K=torch.tensor([weight]), total=10.0)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    assert logit.item() == pytest.approx(math.log(0.2 / 0.8), abs=1e-3)
