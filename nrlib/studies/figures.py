"""The figures of the chapters on gates and on several languages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from ..figures import LABELS, MARKERS, METHOD_STYLE, PALETTE, STYLE, Picture, forgetting_axis, gates_over_text


def detector_by_layer(table: pd.DataFrame) -> Figure:
    """The area under the curve of |gate| by layer, one line of means for each gate, each seed a point."""
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(6.6, 3.4), layout="constrained")
        ax = figure.subplots()
        for index, (gate, group) in enumerate(table.groupby("gate", sort=False)):
            means = group.groupby("layer")["auc"].mean()
            ax.plot(means.index, means, color=PALETTE[index])
            ax.scatter(
                group["layer"], group["auc"], color=PALETTE[index], marker=MARKERS[index], s=32, edgecolor="white",
                linewidth=0.5, label=str(gate), zorder=3,
            )  # fmt: skip
        ax.axhline(0.5, color="black", linewidth=0.8)
        ax.set(xlabel="layer", ylabel="area under the curve", ylim=(0.4, 1.02))
        ax.set_xticks(sorted(table["layer"].unique()))
        figure.legend(title="gate", loc="outside right center", frameon=False)
    return figure


def documents(studies: pd.DataFrame) -> Figure:
    """Left the mean |gate| of held-out documents, each a point, rows by `kind` of gate and language; right how well it tells
    the languages apart when only the first tokens of a document are read, each seed a point.

    studies : a row for each result of `gates.gates_by_document`, with the name of its gate under `kind`.
    """
    kinds = list(dict.fromkeys(studies["kind"]))
    random = np.random.default_rng(0)  # scatters points across their row, which has no meaning
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        rows = [(kind, language) for kind in kinds for language in ("old", "new")]
        for place, (kind, language) in enumerate(rows):
            found = studies[(studies["kind"] == kind) & (studies["seed"] == studies["seed"].min())]["documents"].iloc[0]
            index = kinds.index(kind)
            left.scatter(
                found[language], -place + random.uniform(-0.3, 0.3, len(found[language])), color=PALETTE[index],
                marker=MARKERS[index], s=10, alpha=0.4, linewidth=0,
            )  # fmt: skip
        left.set_yticks([-place for place in range(len(rows))], [f"{kind}: {language}" for kind, language in rows])
        left.set(xlabel="mean size of the gate in a document", xlim=(0, None))
        for index, (kind, group) in enumerate(studies.groupby("kind", sort=False)):
            areas = pd.DataFrame(
                {"tokens": int(n), "auc": by["mean"]} for study in group["auc_by_token"] for n, by in study.items()
            )
            means = areas.groupby("tokens")["auc"].mean()
            right.plot(means.index, means, color=PALETTE[index])
            right.scatter(
                areas["tokens"], areas["auc"], color=PALETTE[index], marker=MARKERS[index], s=32, edgecolor="white",
                linewidth=0.5, label=kind, zorder=3,
            )  # fmt: skip
        right.set_xscale("log", base=2)
        right.xaxis.set_major_formatter("{x:g}")
        right.axhline(0.5, color="black", linewidth=0.8)
        right.annotate(
            "chance",
            (1, 0.5),
            (-3, 3),
            xycoords=right.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            fontsize=9,
        )
        right.set(xlabel="tokens read of a document", ylabel="area under the curve", ylim=(0.35, 1.02))
        right.legend(title="gate", loc="center right", frameon=False)
    return figure


def singular_values(studies: Sequence[dict[str, Any]]) -> Figure:
    """Singular values of W_g over the largest: one panel a gate, one line a layer, the mean over seeds."""
    gates = list(dict.fromkeys(study["gate"] for study in studies))
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(9, 3.2), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(gates), sharey=True))
        for ax, gate in zip(axes, gates, strict=True):
            layers = sorted(studies[0]["singular_values"], key=int)
            for layer, color, marker in zip(
                layers, sns.color_palette("viridis", len(layers)), MARKERS * 9, strict=False
            ):
                values = np.mean([s["singular_values"][layer] for s in studies if s["gate"] == gate], axis=0)
                ax.plot(range(1, len(values) + 1), values, color=color, marker=marker, markersize=3, label=layer)
            ax.set_xlabel("number of the singular value")
            ax.annotate(f"gate {gate}", (0.5, 1.02), xycoords="axes fraction", ha="center")
        axes[0].set(ylabel="over the largest", ylim=(0, 1.05))
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, title="layer", loc="outside right center", frameon=False)
    return figure


def switched_text(study: Mapping[str, Any]) -> Figure:
    """The gates over a text that changes its language, token by token, of one result of `gates.gate_activity`."""
    switched = study["switched"]
    rows = [
        {"position": place, "token": token, "language": language, "layer": int(layer), "gate": values[place]}
        for layer, values in switched["gates"].items()
        for place, (token, language) in enumerate(zip(switched["tokens"], switched["language"], strict=True))
    ]
    return gates_over_text(pd.DataFrame(rows))


def planes(table: pd.DataFrame, panel: str, kind: str) -> Figure:
    """Learning against forgetting, one panel for each value of `panel`, each run a point in the style of its `kind`."""
    panels = list(table[panel].unique())
    n_rows = -(-len(panels) // 3)
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(9, 2.9 * n_rows + 0.5), layout="constrained")
        axes = np.atleast_1d(figure.subplots(n_rows, min(3, len(panels)), sharex=True, sharey=True)).flatten()
        for ax, value in zip(axes, panels, strict=False):
            for name, group in table[table[panel] == value].groupby(kind, sort=False):
                color, marker = METHOD_STYLE[str(name)]
                ax.scatter(
                    group["learning"], group["forgetting"], color=color, marker=marker, s=45, edgecolor="white",
                    linewidth=0.5, label=LABELS[str(name)], zorder=3,
                )  # fmt: skip
            forgetting_axis(ax, table["forgetting"])
            ax.set(ylabel="", ylim=(-0.0006, None))  # points at zero stay whole
            ax.annotate(str(value), (0.04, 0.9), xycoords="axes fraction", fontweight="bold")
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        figure.supxlabel("learning: share of fine-tuning's gain (right is better)", fontsize=10)
        figure.supylabel("forgetting (down is better)", fontsize=10)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def ends(stages: pd.DataFrame, languages: Sequence[str]) -> Figure:
    """Bits per byte at the end of each way of teaching several languages, one panel a text, each seed a point; a line
    where the backbone is."""
    before = stages[stages["after"] == "backbone"].iloc[0]
    ends = stages.groupby(["kind", "way", "seed"], sort=False).tail(1)
    rows = ends["kind"].map(LABELS).str.removesuffix(", recommended") + ", " + ends["way"]
    place = {name: -index for index, name in enumerate(dict.fromkeys(rows))}
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(9.4, 0.4 * len(place) + 1.2), layout="constrained")
        axes = figure.subplots(1, 1 + len(languages), sharey=True)
        for ax, text in zip(axes, ["old language", *languages], strict=True):
            for kind, group in ends.groupby("kind", sort=False):
                color, marker = METHOD_STYLE[str(kind)]
                ax.scatter(
                    group[text], rows[group.index].map(place), color=color, marker=marker, s=40, edgecolor="white",
                    linewidth=0.5, zorder=3,
                )  # fmt: skip
            ax.axvline(before[text], color="black", linewidth=1, linestyle=":")
            ax.annotate("backbone", (before[text], 0.55), fontsize=8, ha="center", backgroundcolor="white")
            ax.margins(x=0.15)
            ax.set(xlabel=text, ylim=(min(place.values()) - 0.5, 0.9))
            ax.set_yticks(list(place.values()), list(place))
        figure.supxlabel("bits per byte of held-out text (left is better)", fontsize=10)
    return figure
