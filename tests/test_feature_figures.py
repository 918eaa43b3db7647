"""Overlap of features by hand, by brute force, and against scikit-learn where that is installed."""

from __future__ import annotations

import numpy as np
import pytest

from beaver_ray.feature_figures import (
    PairFeatures,
    logistic_probe,
    overlap,
    principal_plane,
    silhouettes,
    tsne_plane,
)
from beaver_ray.report.features import feature_pictures


def two_clouds(distance: float, pairs: int = 60, size: int = 6) -> PairFeatures:
    """Normal clouds around +- distance / 2 along all axes; two pairs on each prompt."""
    rng = np.random.default_rng(0)
    preferred, other = (rng.normal(sign * distance / 2, 1.0, (pairs, size)) for sign in (1, -1))
    return PairFeatures(preferred.astype(np.float32), other.astype(np.float32), np.arange(pairs) // 2)


def test_figures_by_hand() -> None:
    pairs = PairFeatures(np.array([[1.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 2.0], [4.0, 3.0]]), np.array([0, 1]))
    found = overlap(pairs)
    assert found["cosine"]["mean"] == pytest.approx((0 + 24 / 25) / 2) and found["cosine"]["n"] == 2
    means = np.array([2.0, 2.0]) @ np.array([2.0, 2.5]) / np.sqrt(8 * 10.25)
    assert found["cosine_means"] == {"mean": pytest.approx(means), "low": None, "high": None, "n": 2}
    # Of (1, 0): sqrt(20) from its own, (sqrt(5) + sqrt(18)) / 2 from the others.
    own, others = np.sqrt(20), (np.sqrt(5) + np.sqrt(18)) / 2
    both = np.array([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0], [4.0, 3.0]])
    assert silhouettes(both, np.arange(4) < 2)[0] == pytest.approx((others - own) / own)
    assert overlap(PairFeatures(both[:2], both[2:], np.array([3, 3]))).keys() == {"cosine", "cosine_means"}


def test_silhouettes_by_brute_force() -> None:
    pairs = two_clouds(1.0, pairs=9)
    features, first = np.concatenate([pairs.preferred_PD, pairs.other_PD]), np.arange(18) < 9
    for i, found in enumerate(silhouettes(features, first)):
        distance = [np.linalg.norm(features[i] - other) for other in features]
        own = np.mean([d for j, d in enumerate(distance) if j != i and first[j] == first[i]])
        others = np.mean([d for j, d in enumerate(distance) if first[j] != first[i]])
        assert found == pytest.approx((others - own) / max(own, others), rel=1e-5)


def test_clouds_apart_and_in_one_another() -> None:
    apart, same = overlap(two_clouds(4.0)), overlap(two_clouds(0.0))
    assert apart["probe"]["mean"] > 0.97 and apart["silhouette"]["mean"] > 0.5 and apart["cosine"]["mean"] < -0.5
    assert 0.3 < same["probe"]["mean"] < 0.7 and abs(same["silhouette"]["mean"]) < 0.05
    assert same["probe"]["n"] == 120
    # Both at one place: no figure is undefined.
    nowhere = overlap(PairFeatures(np.zeros((4, 3)), np.zeros((4, 3)), np.arange(4)))
    assert nowhere["cosine"]["mean"] == 0 and nowhere["silhouette"]["mean"] == 0


def test_probe_stands_where_its_gradient_is_zero() -> None:
    pairs = two_clouds(0.7)
    features = np.concatenate([pairs.preferred_PD, pairs.other_PD]).astype(np.float64)
    sign = np.where(np.arange(120) < 60, 1.0, -1.0)
    weight, bias = logistic_probe(features, sign > 0)
    slope = -sign / (1 + np.exp(sign * (features @ weight + bias)))
    np.testing.assert_allclose(features.T @ slope + weight, 0, atol=2e-3)
    assert slope.sum() == pytest.approx(0, abs=2e-3)


def test_plane_of_most_variance_by_eigenvectors() -> None:
    features = np.random.default_rng(3).normal(size=(40, 5)) * np.array([5.0, 3.0, 1.0, 0.5, 0.1])
    plane, share = principal_plane(features)
    values, vectors = np.linalg.eigh(np.cov(features.T))
    expected = (features - features.mean(0)) @ vectors[:, ::-1][:, :2]
    np.testing.assert_allclose(np.abs(plane), np.abs(expected), atol=1e-8)
    assert share == pytest.approx(values[::-1][:2].sum() / values.sum())
    assert principal_plane(np.ones((4, 3)))[1] == 0


def test_pictures_show_all_that_is_there() -> None:
    pictures = feature_pictures("Features: reward", two_clouds(4.0, pairs=20))
    assert pictures[0][0].title == "Features: reward, PCA"
    assert len(pictures) == (1 if tsne_plane(np.random.default_rng(0).normal(size=(8, 3))) is None else 2)
    # A head's name is whatever a model's folder says.
    (_, svg), *_ = feature_pictures('x" onload=alert(1) y="', two_clouds(1.0, pairs=3))
    assert 'aria-label="x&quot; onload=alert(1) y=&quot;, PCA"' in svg
    for _, svg in pictures:
        assert "preferred" in svg and svg.count("<use") >= 40 and "var(--series-1)" in svg


def test_against_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    linear = pytest.importorskip("sklearn.linear_model")
    pairs = two_clouds(0.7)
    features, first = np.concatenate([pairs.preferred_PD, pairs.other_PD]).astype(np.float64), np.arange(120) < 60
    np.testing.assert_allclose(silhouettes(features, first), metrics.silhouette_samples(features, first), atol=1e-9)
    theirs = linear.LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(features, first)
    weight, bias = logistic_probe(features, first)
    np.testing.assert_allclose(weight, theirs.coef_[0], atol=1e-3)
    assert bias == pytest.approx(theirs.intercept_[0], abs=1e-3)
    plane = tsne_plane(features + 40.0 * first[:, None])
    assert plane is not None and plane.shape == (120, 2)
    assert metrics.silhouette_score(plane, first) > 0.5  # clouds far apart stay apart
