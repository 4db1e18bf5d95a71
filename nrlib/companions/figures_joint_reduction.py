"""The figures of the chapter on joint dimensionality reduction."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import matplotlib.lines
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..figures import LABELS, MARKERS, METHOD_STYLE, PALETTE, STYLE, Picture

_SOURCES = {"synthetic": "artificial images", "photographs": "pieces of photographs", "digits": "handwritten digits"}


def precision_by_dimensions(rows: pd.DataFrame, reductions: tuple[str, ...] = ("whitened", "pca")) -> Figure:
    """mAP over the number of dimensions kept, one panel a source, one line a set of vocabularies, each seed a point; what
    there was before the reduction as a short line at the right edge. Whitened vectors solid, PCA alone dotted."""
    sources = [source for source in _SOURCES if source in set(rows["source"])]
    names = list(rows["vocabularies"].drop_duplicates())
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(3.6 * len(sources) + 1.2, 4.2), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(sources), sharey=True))
        for ax, source in zip(axes, sources, strict=True):
            chosen = rows[rows["source"] == source]
            dimensions = sorted(chosen.loc[chosen["reduction"] != "none", "n_dimensions"].unique())
            place = {n: index for index, n in enumerate(dimensions)}
            for name, group in chosen.groupby("vocabularies", sort=False):
                color, marker = PALETTE[names.index(name)], MARKERS[names.index(name)]
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
        figure.legend(
            labelled.values(),
            labelled.keys(),
            loc="outside upper center",
            ncols=5 if len(sources) > 1 else 2,
            frameon=False,
        )
    return figure


def searches_by_model(rows: pd.DataFrame) -> Figure:
    """mAP of each search by the joint vector of each model, each seed a point, the backbone as a line. Hollow: the database
    and the reduction are still the backbone's."""
    panels = {
        "translation": "translation, new → original",
        "new": "second half, new",
        "original": "second half, original",
    }
    methods = [method for method in METHOD_STYLE if method in set(rows["method"])]
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(9.2, 3.8), layout="constrained")
        for ax, (search, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            chosen = rows[rows["search"] == search]
            backbone = chosen.loc[chosen["method"] == "backbone", "mean_average_precision"].mean()
            ax.axhline(backbone, color="black", linewidth=1.2, linestyle="--")
            ax.annotate(
                "backbone",
                (0.99, backbone),
                (0, 3),
                ax.get_yaxis_transform(),
                textcoords="offset points",
                fontsize=9,
                ha="right",
            )
            for place, method in enumerate(methods):
                color, marker = METHOD_STYLE[method]
                values = chosen.loc[chosen["method"] == method, "mean_average_precision"]
                ax.scatter(place + _spread(len(values)), values, color=color, marker=marker, s=60, zorder=3)
                old = rows.loc[(rows["search"] == "old_index") & (rows["method"] == method), "mean_average_precision"]
                if search == "original":
                    ax.scatter(
                        place + 0.25 + _spread(len(old)), old, marker=marker, s=60, facecolor="none", edgecolor=color,
                        linewidth=1.5, zorder=3,
                    )  # fmt: skip
            ax.set_xticks(range(len(methods)), [LABELS[method].replace(" ", "\n") for method in methods])
            ax.set_xlim(-0.5, len(methods) - 0.3)
            ax.set_ylim(0, 1.2 * chosen["mean_average_precision"].max())
            ax.annotate(title, (0.02, 1.02), xycoords="axes fraction", fontsize=10)
        figure.axes[0].set_ylabel("mean average precision\n(up is better)")
        hollow = mpl.lines.Line2D([], [], color="gray", marker="o", linestyle="", fillstyle="none", markersize=8)
        figure.legend([hollow], ["searched in the backbone's index"], loc="outside lower right", frameon=False)
    return figure


def _spread(n_points: int) -> np.ndarray[Any, np.dtype[Any]]:
    """Places beside each other for the seeds of one model."""
    return np.linspace(-0.08, 0.08, n_points) if n_points > 1 else np.zeros(n_points)
