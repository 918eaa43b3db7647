"""Where a score model's features of preferred and of other answers lie, as two pictures."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from beaver_ray.feature_figures import PairFeatures, principal_plane, tsne_plane
from beaver_ray.report.charts import Chart
from beaver_ray.report.page import SERIES_COLORS, drawing

HEIGHT = 4.0


def feature_pictures(title: str, pairs: PairFeatures) -> list[tuple[Chart, str]]:
    """A chart's title and caption, and its <svg>: by the principal components and, with scikit-learn, by t-SNE."""
    features_ND = np.concatenate([pairs.preferred_PD, pairs.other_PD]).astype(np.float64)
    what = f"Hidden states at the last token of the answers of {len(pairs.prompt_P)} pairs, before the head"
    plane_N2, share = principal_plane(features_ND)
    found = [(f"{title}, PCA", f"{what}: two principal components, {share:.0%} of the variance.", plane_N2)]
    if (nearby_N2 := tsne_plane(features_ND)) is not None:
        found.append((f"{title}, t-SNE", f"{what}: by t-SNE, where only neighbourhoods mean something.", nearby_N2))
    return [(Chart(name, caption, []), _scattered(name, places_N2)) for name, caption, places_N2 in found]


def _scattered(title: str, places_N2: np.ndarray) -> str:
    """The preferred answers, which come first, and the others."""
    halves = np.split(places_N2, 2)

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        ax.patch.set_alpha(0)
        ax.set_xticks([])
        ax.set_yticks([])
        for label, places, color in zip(("preferred", "other"), halves, SERIES_COLORS, strict=False):
            ax.scatter(places[:, 0], places[:, 1], s=9, color=color, alpha=0.6, linewidths=0, label=label)
        ax.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.1)

    return drawing(title, HEIGHT, draw)
