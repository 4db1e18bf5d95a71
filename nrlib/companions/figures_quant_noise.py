"""The figures of the chapter on Quant-Noise, in the style of `nrlib.figures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, FuncFormatter, NullLocator

from ..figures import MARKERS, PALETTE, PERCENT, STYLE, Picture

FORM_LABELS = {"int8": "8 bits", "int4": "4 bits", "int3": "3 bits", "pq": "codebook", "ipq": "after iPQ"}


def perplexities(table: pd.DataFrame, panels: Mapping[str, Mapping[str, str]], largest: float = 100.0) -> Figure:
    """Perplexity after compression over that of the network of the same seed that was trained without noise, before
    compression. One row a way of training, one panel a compression, each seed a point.

    Parameters
    ----------
    table : columns `training` (in the order to draw them, the one without noise first), `seed`, `float`, and one for each
        compression.
    panels : title of a panel → column → label.
    largest : what lies beyond is drawn at the edge, as an arrow head.
    """
    with mpl.rc_context(STYLE):
        names = list(dict.fromkeys(table["training"]))
        place = {name: len(names) - 1 - index for index, name in enumerate(names)}
        plain = table[table["training"] == names[0]].set_index("seed")["float"]
        figure = Picture(figsize=(2.4 + 3.4 * len(panels), 1.6 + 0.35 * len(names)), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
        for ax, (title, columns) in zip(axes, panels.items(), strict=True):
            shown = table.assign(**{column: table[column] / table["seed"].map(plain) for column in columns})
            ax.axvline(1, color="black", linewidth=1, linestyle=":", label="float, trained without noise")
            for index, (column, label) in enumerate(columns.items()):
                values = shown[column].clip(upper=largest)
                rows = shown["training"].map(place) + (0.12 if len(columns) > 1 else 0) * (1 - 2 * index)
                is_beyond = shown[column] > largest
                style: dict[str, Any] = {"color": PALETTE[index], "s": 50, "edgecolor": "white", "zorder": 3}
                ax.scatter(values[~is_beyond], rows[~is_beyond], marker=MARKERS[index], label=label, **style)
                ax.scatter(values[is_beyond], rows[is_beyond], marker=">", **{**style, "s": 90}, clip_on=False)
                for row in sorted(set(rows[is_beyond])):
                    ax.annotate(
                        "beyond the axis",
                        (largest, row),
                        (-8, 0),
                        textcoords="offset points",
                        ha="right",
                        va="center",
                        fontsize=9,
                    )
            ax.set_xscale("log")
            has_beyond = bool((shown[list(columns)] > largest).any(axis=None))
            top = largest if has_beyond else 1.03 * float(shown[list(columns)].max(axis=None))
            ax.set_xlim(0.97 * min(1, float(shown[list(columns)].min(axis=None))), top)
            ticks = [1, 1.05, 1.1] if top < 1.2 else [1, 1.2, 1.4, 1.6] if top < 2 else [1, 2, 3, 5, 10, 30, 100]
            ax.xaxis.set_major_locator(FixedLocator([t for t in ticks if t <= top]))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(FormatStrFormatter("%g"))
            ax.set_yticks(range(len(names)), list(reversed(names)))
            ax.set_ylim(-0.6, len(names) - 0.4)
            ax.set_xlabel(f"{title}, perplexity over that\nof the float network (left is better)")
            ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9)
    return figure


def sizes(table: pd.DataFrame, order: Sequence[str], labels: Mapping[str, str]) -> Figure:
    """Learning, forgetting and mean residue on the original domain by the form an extension is shipped in, largest file
    first; each seed a point, the mean over the seeds a line.

    Parameters
    ----------
    table : of `quant_noise_extension.extension_table`.
    order : ways of training, as `labels` names them.
    """
    panels = {
        "learning": "learning\n(up is better)",
        "forgetting": "forgetting\n(down is better)",
        "residue_original": "mean ‖residue‖₁ / D,\noriginal domain",
    }
    forms = table.groupby("form", sort=False)["kB"].mean()
    place = {form: index for index, form in enumerate(forms.index)}
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(7.6, 7.2), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True)
        for ax, (column, title) in zip(axes, panels.items(), strict=True):
            for index, noise in enumerate(order):
                runs = table[table["noise"] == noise]
                dodge = 0.16 * (index - (len(order) - 1) / 2)
                means = runs.groupby("form", sort=False)[column].mean()
                x = [place[form] + dodge for form in means.index]
                ax.hlines(means, [at - 0.07 for at in x], [at + 0.07 for at in x], color=PALETTE[index], linewidth=2)
                ax.scatter(
                    runs["form"].map(place) + dodge, runs[column], s=30, color=PALETTE[index], marker=MARKERS[index],
                    edgecolor="white", linewidth=0.5, label=labels[noise], zorder=3,
                )  # fmt: skip
            ax.set_ylabel(title)
            ax.set_ylim(bottom=0)
            is_share = column != "residue_original"
            ax.yaxis.set_major_formatter(PERCENT if is_share else FuncFormatter(lambda value, _: f"{value:.3g}"))
        names = [f"{FORM_LABELS.get(form, form)}\n{size:,.0f} kB" for form, size in forms.items()]
        axes[-1].set_xticks(range(len(forms)), names)
        axes[-1].set_xlabel("what is shipped, and the size of its file")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure
