"""How far apart a score model's features of preferred and of other answers lie, and where they lie in a plane.

A feature is the hidden state at an answer's last token, before the heads. Axes: P pairs, N features, D numbers of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, special
from scipy.spatial.distance import cdist

from beaver_ray.evaluation import mean_interval, share_interval

MOST_PAIRS = 500
"""That are looked at: distances of all from all are taken."""
PERPLEXITY = 30.0


@dataclass(frozen=True)
class PairFeatures:
    """Of P pairs, and what is equal of pairs on one prompt."""

    preferred_PD: np.ndarray
    other_PD: np.ndarray
    prompt_P: np.ndarray


def overlap(pairs: PairFeatures) -> dict[str, dict[str, Any]]:
    """Figures {"mean", "low", "high", "n"} with 95 % intervals clustered by prompt; two of them need two prompts.

    ``cosine``: mean over pairs of the cosine of the two features; ``cosine_means``: of the two classes' means;
    ``probe``: share of answers that a logistic regression on the other half of the prompts puts in their class;
    ``silhouette``: mean over answers of (b - a) / max(a, b), a and b being the mean distances to the others of their
    class and to the other class (Rousseeuw 1987): 0 where the classes lie in one another.
    """
    preferred_PD, other_PD = pairs.preferred_PD.astype(np.float64), pairs.other_PD.astype(np.float64)
    prompt_P = pairs.prompt_P
    whole = float(_cosine(preferred_PD.mean(axis=0), other_PD.mean(axis=0)))
    found = {
        "cosine": mean_interval(_cosine(preferred_PD, other_PD), prompt_P, within=(-1.0, 1.0)),
        "cosine_means": {"mean": whole, "low": None, "high": None, "n": len(prompt_P)},
    }
    _, number_P = np.unique(prompt_P, return_inverse=True)
    if number_P.max() > 0:
        features_ND, prompt_N = np.concatenate([preferred_PD, other_PD]), np.tile(number_P, 2)
        preferred_N = np.arange(len(features_ND)) < len(preferred_PD)
        found["probe"] = share_interval(_probed(features_ND, preferred_N, prompt_N % 2 == 0), prompt_N)
        found["silhouette"] = mean_interval(silhouettes(features_ND, preferred_N), prompt_N, within=(-1.0, 1.0))
    return found


def silhouettes(features_ND: np.ndarray, first_N: np.ndarray) -> np.ndarray:
    """The silhouette [N] of each feature in one of two classes of at least two each, by Euclidean distance."""
    distance_NN = cdist(features_ND, features_ND)
    inside_NN = first_N[:, None] == first_N
    size_N = inside_NN.sum(axis=1)
    own_N = (distance_NN * inside_NN).sum(axis=1) / (size_N - 1)
    other_N = (distance_NN * ~inside_NN).sum(axis=1) / (len(first_N) - size_N)
    widest_N = np.maximum(own_N, other_N)
    return np.divide(other_N - own_N, widest_N, out=np.zeros_like(own_N), where=widest_N > 0)


def logistic_probe(features_ND: np.ndarray, first_N: np.ndarray) -> tuple[np.ndarray, float]:
    """(weight [D], bias) of the logistic regression that tells the classes apart, with a penalty of |weight|^2 / 2."""
    sign_N = np.where(first_N, 1.0, -1.0)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weight_D, bias = parameters[:-1], parameters[-1]
        margin_N = sign_N * (features_ND @ weight_D + bias)
        slope_N = -sign_N * special.expit(-margin_N)
        gradient = np.append(features_ND.T @ slope_N + weight_D, slope_N.sum())
        return float(-special.log_expit(margin_N).sum() + weight_D @ weight_D / 2), gradient

    found = optimize.minimize(loss, np.zeros(features_ND.shape[1] + 1), jac=True, method="L-BFGS-B")
    return found.x[:-1], float(found.x[-1])


def principal_plane(features_ND: np.ndarray) -> tuple[np.ndarray, float]:
    """(Coordinates [N, 2] along the two directions of most variance, their share of all variance), by SVD."""
    centred_ND = features_ND - features_ND.mean(axis=0)
    left_NR, singular_R, _ = np.linalg.svd(centred_ND, full_matrices=False)
    total = float((singular_R**2).sum())
    share = float((singular_R[:2] ** 2).sum()) / total if total > 0 else 0.0
    return left_NR[:, :2] * singular_R[:2], share


def tsne_plane(features_ND: np.ndarray) -> np.ndarray | None:
    """Coordinates [N, 2] by t-SNE (van der Maaten and Hinton 2008); None where scikit-learn is not installed."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return None
    perplexity = min(PERPLEXITY, (len(features_ND) - 1) / 3)
    found: np.ndarray = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(features_ND)
    return found


def _probed(features_ND: np.ndarray, first_N: np.ndarray, half_N: np.ndarray) -> np.ndarray:
    """Whether [N] each feature is put in its class by a probe of the other half."""
    right_N = np.zeros(len(first_N), dtype=bool)
    for half in (half_N, ~half_N):
        mean_D, spread_D = features_ND[~half].mean(axis=0), features_ND[~half].std(axis=0)
        scaled_ND = (features_ND - mean_D) / np.where(spread_D > 0, spread_D, 1.0)
        weight_D, bias = logistic_probe(scaled_ND[~half], first_N[~half])
        right_N[half] = (scaled_ND[half] @ weight_D + bias > 0) == first_N[half]
    return right_N


def _cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Along the last axis; 0 of a vector of zeros."""
    lengths = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return np.divide((first * second).sum(axis=-1), lengths, out=np.zeros_like(lengths), where=lengths > 0)
