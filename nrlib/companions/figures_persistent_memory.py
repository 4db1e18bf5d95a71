"""Figures of the chapter on persistent memory; colours and style are those of `nrlib.figures`."""

from __future__ import annotations

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..figures import MARKERS, PALETTE, PERCENT, STYLE, Picture

KIND_LABELS = {
    "attention_only": "attention alone",
    "unscaled": "all-attention, vectors not scaled",
    "all_attention": "all-attention",
    "split": "persistent vectors in a softmax of their own",
    "feed_forward": "attention and feed-forward block",
}


def gaps(table: pd.DataFrame) -> Figure:
    """Share of the gap between attention alone and attention with a feed-forward block that each kind closes: one row a
    kind, each seed a point, the mean a bar. Needs the columns `kind`, `gap_closed` and `seed`."""
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(8.4, 2.9), layout="constrained")
        axes = figure.subplots()
        for row, kind in enumerate(KIND_LABELS):
            group = table[table["kind"] == kind]
            is_reference = kind in ("attention_only", "feed_forward")
            color = "0.35" if is_reference else PALETTE[row - 1]
            axes.scatter(
                group["gap_closed"], [row] * len(group), s=60, color=color, marker=MARKERS[row], edgecolor="white",
                linewidth=0.6, zorder=3,
            )  # fmt: skip
            axes.scatter(group["gap_closed"].mean(), row, marker="|", s=350, color=color, zorder=2)
        axes.axvline(0, color="0.35", linewidth=1, linestyle=":")
        axes.axvline(1, color="0.35", linewidth=1, linestyle=":")
        axes.set_yticks(range(len(KIND_LABELS)), list(KIND_LABELS.values()))
        axes.set_xlabel("share of the gap in perplexity closed (right is better)")
        axes.xaxis.set_major_formatter(PERCENT)
    return figure


def trap(rows: pd.DataFrame) -> Figure:
    """Relative change of bits per byte before any training, against the number of vectors and against the bias on their
    scores; each seed a point. Needs the columns `kind`, `n_vectors`, `logit_bias`, `change` and `seed`."""
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(9, 3.6), layout="constrained")
        by_number, by_bias = figure.subplots(1, 2, sharey=True)
        largest = rows["n_vectors"].max()
        numbers = sorted(rows.loc[rows["n_vectors"] > 0, "n_vectors"].unique())
        _line(by_number, rows[rows["kind"] == "joint"], "n_vectors", numbers, "one softmax with the context", 1)
        _line(by_number, rows[rows["kind"] == "separate"], "n_vectors", numbers, "softmax of their own, gated", 0)
        by_number.set_xlabel("persistent vectors of each head")
        by_number.set_ylabel("change of bits per byte on the\noriginal domain (down is better)")
        biased = rows[(rows["kind"] == "biased") | ((rows["kind"] == "joint") & (rows["n_vectors"] == largest))]
        biases = sorted(biased["logit_bias"].unique(), reverse=True)
        _line(by_bias, biased, "logit_bias", biases, "", 1)
        _line(by_bias, _at_every(rows[(rows["kind"] == "separate") & (rows["n_vectors"] == largest)], biases),
              "logit_bias", biases, "", 0)  # fmt: skip
        by_bias.set_xlabel(f"bias on the scores of the {largest} vectors")
        by_number.yaxis.set_major_formatter(PERCENT)
        figure.legend(*by_number.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def _line(axes: Axes, rows: pd.DataFrame, x: str, values: list[float], label: str, style: int) -> None:
    """Points of every seed and a line through their means, at evenly spaced places."""
    place = {value: index for index, value in enumerate(values)}
    means = rows.groupby(x)["change"].mean()
    axes.plot([place[v] for v in values], [means[v] for v in values], color=PALETTE[style], linewidth=1.5)
    axes.scatter(
        rows[x].map(place), rows["change"], color=PALETTE[style], marker=MARKERS[style], s=36, edgecolor="white",
        linewidth=0.5, label=label, zorder=3,
    )  # fmt: skip
    axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])


def _at_every(rows: pd.DataFrame, biases: list[float]) -> pd.DataFrame:
    """A softmax of their own has no need of a bias: the same rows at each of them."""
    return pd.concat([rows.assign(logit_bias=bias) for bias in biases])
