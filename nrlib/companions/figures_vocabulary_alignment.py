"""The figures of the page *Bridging vocabularies*."""

from __future__ import annotations

import math

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from ..figures import MARKERS, PALETTE, PERCENT, STYLE, Picture
from .vocabulary_alignment import MAPS, RULES
from .vocabulary_extension import ROWS

LABELS = {
    "least_squares": "least squares", "procrustes": "Procrustes", "rcsls_spectral": "RCSLS, spectral", "rcsls": "RCSLS",
    "calibrated": "synthetic counts", "synthetic": "synthetic text", "fr": "English to French",
    "tr": "English to Turkish", "nearest": "nearest neighbour", "csls": "CSLS",
    "none": "no new tokens", "random": "random", "mean": "mean row", "pieces": "mean of its pieces",
    "mapped": "mapped by RCSLS", "mixture": "CSLS mixture", "wechsel": "wechsel", "focus": "deepfocus",
}  # fmt: skip


def precision(table: pd.DataFrame) -> Figure:
    """Precision at 1 of every map, one panel a pair of languages; each seed a point, the bar their mean."""
    pairs = list(table["pair"].unique())
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(2.2 + 2.4 * len(pairs), 3.1), layout="constrained")
        axes = figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0]
        for ax, pair in zip(axes, pairs, strict=True):
            for index, rule in enumerate(RULES):
                chosen = table[(table["pair"] == pair) & (table["rule"] == rule)]
                place = chosen["map"].map({name: i for i, name in enumerate(MAPS)}) + (0.16 - 0.32 * index)
                ax.scatter(
                    chosen["precision"], place, color=PALETTE[index], marker=MARKERS[index], s=34,
                    edgecolor="white", linewidth=0.5, label=LABELS[rule], zorder=3,
                )  # fmt: skip
                means = chosen["precision"].groupby(place).mean()
                ax.scatter(means, means.index, marker="|", s=150, color=PALETTE[index], zorder=2)
            ax.set_xlabel("right first translation")
            ax.annotate(LABELS.get(pair, f"English to {pair}"), (0.02, 1.02), xycoords="axes fraction", fontsize=10)
            ax.margins(x=0.15, y=0.1)
            ax.xaxis.set_major_formatter(PERCENT)
        axes[0].set_yticks(range(len(MAPS)), [LABELS[name] for name in MAPS])
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def beginnings(table: pd.DataFrame) -> Figure:
    """What a way to begin the rows is worth: bits per byte of the new language before and after training, and the steps
    to the last validation loss of random rows. Each seed a point, the bar their mean."""
    panels = {
        "start_new": "bits per byte before training",
        "end_new": "bits per byte after training",
        "steps": "steps to where random rows end",
    }
    shown = [name for name in ROWS if name in set(table["initialisation"])]
    place = table["initialisation"].astype(str).map({name: i for i, name in enumerate(shown)})
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(9.6, 3.2), layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
        for ax, (column, label) in zip(axes, panels.items(), strict=True):
            values = table[column].replace(math.inf, math.nan)
            ax.scatter(values, place, color=PALETTE[0], s=34, edgecolor="white", linewidth=0.5, zorder=3)
            means = values.groupby(place).mean()
            ax.scatter(means, means.index, marker="|", s=170, color="black", zorder=2)
            ax.set_xlabel(f"{label}\n(left is better)")
            ax.margins(x=0.1)
        axes[0].set_yticks(range(len(shown)), [LABELS[name] for name in shown])
    return figure


def theft(table: pd.DataFrame) -> Figure:
    """Forgetting by the way the rows begin, before and after training: with all tokens to choose from, and with the
    backbone's own alone. Each seed a point."""
    shown = [name for name in ROWS if name in set(table["initialisation"])]
    place = table["initialisation"].astype(str).map({name: i for i, name in enumerate(shown)})
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(8.4, 3.4), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for ax, (when, words) in zip(axes, (("start", "before training"), ("end", "after training")), strict=True):
            for index, (suffix, label) in enumerate((("", "all tokens"), ("_own_tokens", "the backbone's own tokens"))):
                ax.scatter(
                    table[f"{when}_forgetting{suffix}"], place + (0.15 - 0.3 * index), color=PALETTE[3 - 3 * index],
                    marker=MARKERS[index], s=34, edgecolor="white", linewidth=0.5, label=label, zorder=3,
                )  # fmt: skip
            ax.axvline(0, color="black", linewidth=0.8)
            ax.set_xlabel(f"forgetting {words} (left is better)")
            ax.xaxis.set_major_formatter(PERCENT)
        axes[0].set_yticks(range(len(shown)), [LABELS[name] for name in shown])
        figure.legend(
            *axes[0].get_legend_handles_labels(), title="old text predicted with", loc="outside upper center", ncols=2,
            frameon=False,
        )  # fmt: skip
    return figure
