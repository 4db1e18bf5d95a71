"""The figures of the chapter on joint dimensionality reduction."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..figures import _MARKERS, _PALETTE, _STYLE, _Picture

_SOURCES = {"synthetic": "artificial images", "photographs": "pieces of photographs", "digits": "handwritten digits"}


def precision_by_dimensions(rows: pd.DataFrame, reductions: tuple[str, ...] = ("whitened", "pca")) -> Figure:
    """mAP over the number of dimensions kept, one panel a source, one line a set of vocabularies, each seed a point; what
    there was before the reduction as a short line at the right edge. Whitened vectors solid, PCA alone dashed."""
    sources = [source for source in _SOURCES if source in set(rows["source"])]
    names = list(rows["vocabularies"].drop_duplicates())
    with mpl.rc_context(_STYLE):
        figure = _Picture(figsize=(3.6 * len(sources) + 1.2, 4.2), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(sources), sharey=True))
        for ax, source in zip(axes, sources, strict=True):
            chosen = rows[rows["source"] == source]
            dimensions = sorted(chosen.loc[chosen["reduction"] != "none", "n_dimensions"].unique())
            place = {n: index for index, n in enumerate(dimensions)}
            for name, group in chosen.groupby("vocabularies", sort=False):
                color, marker = _PALETTE[names.index(name)], _MARKERS[names.index(name)]
                for reduction, line in zip(reductions, ("-", ":"), strict=False):
                    runs = group[group["reduction"] == reduction]
                    means = runs.groupby("n_dimensions")["mean_average_precision"].mean()
                    ax.plot([place[n] for n in means.index], means, line, color=color, linewidth=1.6)
                    if reduction == reductions[0]:
                        ax.scatter(
                            runs["n_dimensions"].map(place), runs["mean_average_precision"], color=color, marker=marker,
                            s=32, edgecolor="white", linewidth=0.5, label=name, zorder=3,
                        )  # fmt: skip
                before = group.loc[group["reduction"] == "none", "mean_average_precision"].mean()
                ax.plot([len(place) - 0.55, len(place) - 0.2], 2 * [before], color=color, linewidth=3)
            ax.set_xticks([*place.values(), len(place) - 0.375], [*map(str, dimensions), "all"])
            ax.set_xlabel(f"dimensions kept, {_SOURCES[source]}")
        axes[0].set_ylabel("mean average precision (up is better)")
        labelled = {text: handle for ax in axes for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(labelled.values(), labelled.keys(), loc="outside upper center", ncols=5, frameon=False)
    return figure
