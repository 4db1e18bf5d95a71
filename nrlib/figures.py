"""The figures of the notebooks. The only module that imports matplotlib; every seed is a point, colour never speaks
alone, and nothing is drawn that is not in the table."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter

from .profiles import METHOD_LABELS
from .tables import front

LABELS = {
    **METHOD_LABELS, "unseen_original": "original domain, not in the proxy", "proxy": "original domain, proxy",
    "new": "new domain", "recommended": "neutral residues, recommended",
}  # fmt: skip
PALETTE = sns.color_palette("colorblind")
METHOD_STYLE = {
    "fine_tuning": (PALETTE[3], "s"), "lora": (PALETTE[1], "^"),
    "vanilla_adapter": (PALETTE[2], "D"), "neutral_residues": (PALETTE[0], "o"),
    "block_expansion": (PALETTE[4], "P"), "weight_interpolation": (PALETTE[5], "v"),
    "orthogonal_finetuning": (PALETTE[6], "X"), "gated_lora": (PALETTE[7], "<"),
    "elastic_weight_consolidation": ((0.5, 0.45, 0.0), ">"), "distillation": (PALETTE[9], "p"),
    "recommended": ("black", "h"),
}  # fmt: skip
# Where the plane of fronts is free beside an end of a front, the first the one of least forgetting: points to the right and
# up. Others stand to the right of the first.
_NAME_AT: dict[str, tuple[int, float, float, Literal["left", "right"]]] = {
    "fine_tuning": (-1, 8, 4, "left"), "lora": (0, -8, -3, "right"), "vanilla_adapter": (0, -8, -8, "right"),
    "block_expansion": (0, 8, -10, "left"), "orthogonal_finetuning": (0, -8, -3, "right"),
    "gated_lora": (0, -8, -6, "right"), "elastic_weight_consolidation": (-1, 8, -16, "left"),
    "distillation": (0, -8, -4, "right"), "neutral_residues": (0, -8, -4, "right"),
}  # fmt: skip
SITE_LABELS = {
    "ffn": "beside the FFN", "attention": "beside attention", "persistent_memory": "persistent vectors in attention",
}  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PERCENT = FuncFormatter(lambda value, _: f"{value * 100:.3g}%")
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 11,
}


class Picture(Figure):
    """A figure that shows itself in a notebook whatever backend is set, and that pyplot does not keep alive.

    :meta private:
    """

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()


def learning_forgetting_plane(table: pd.DataFrame, best: pd.DataFrame) -> Figure:
    """Learning against forgetting by method: the runs of `table` faint, those of `best` solid, each seed a point.

    Better is right and down. Lines join the means of one method's learning rates, from the lowest rate to the highest.
    """
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(7.2, 4.8), layout="constrained")
        axes = figure.subplots()
        for method, group in table.groupby("method", observed=True):
            color, marker = METHOD_STYLE[method]
            means = group.groupby("learning_rate")[["learning", "forgetting"]].mean()
            axes.plot(means["learning"], means["forgetting"], color=color, alpha=0.4, linewidth=1, zorder=1)
            axes.scatter(group["learning"], group["forgetting"], color=color, marker=marker, s=22, alpha=0.3, zorder=2)
            chosen = best[best["method"] == method]
            axes.scatter(
                chosen["learning"], chosen["forgetting"], color=color, marker=marker, s=75, edgecolor="white",
                label=LABELS[method], zorder=3,
            )  # fmt: skip
            weights = chosen.groupby("local_loss_weight")[["learning", "forgetting"]].mean()
            for weight, mean in weights.iterrows() if len(weights) > 1 else ():
                axes.annotate(f"{weight:g}", tuple(mean), (9, -4), textcoords="offset points", color=color, fontsize=9)
        axes.legend(frameon=False, title="at its best learning rate")
        forgetting_axis(axes, pd.concat([table["forgetting"], best["forgetting"]]))
        axes.set_xlabel("learning: share of fine-tuning's gain on the new domain (right is better)")
    return figure


def fronts(table: pd.DataFrame) -> Figure:
    """Learning against forgetting: each method's front as a staircase, through the means over seeds of the settings that
    no other of its settings beats; every run is a faint point. A name stands at an end of its front."""
    settings = ["method", "learning_rate", "strength"]
    means = table.groupby(settings, observed=True, dropna=False)[["learning", "forgetting"]].mean().reset_index()
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(6.4, 6.4), layout="constrained")
        axes = figure.subplots()
        for method, group in means.groupby("method", observed=True):
            color, marker = METHOD_STYLE[str(method)]
            runs = table[table["method"] == method]
            axes.scatter(
                runs["learning"], runs["forgetting"], color=color, marker=marker, s=14, alpha=0.3, linewidth=0, zorder=2
            )
            edge = front(group)
            axes.step(
                edge["learning"], edge["forgetting"], where="pre", color=color, linewidth=1.5, alpha=0.7, zorder=1
            )
            axes.scatter(
                edge["learning"], edge["forgetting"], color=color, marker=marker, s=60, edgecolor="white", zorder=3
            )
            end, x, y, side = _NAME_AT.get(str(method), (0, 8, -4, "left"))
            axes.annotate(
                LABELS[str(method)].replace("weight c", "weight\nc").replace(", ", ",\n"),
                (edge["learning"].iloc[end], edge["forgetting"].iloc[end]), (x, y), textcoords="offset points", ha=side,
                color=[0.6 * part for part in mpl.colors.to_rgb(color)], fontsize=10, zorder=4,
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )  # fmt: skip
        forgetting_axis(axes, table["forgetting"])
        axes.set_xlabel("learning: share of fine-tuning's gain\non the new domain (right is better)")
    return figure


def learning_curves(curves: pd.DataFrame) -> Figure:
    """Validation bits per byte over training tokens, one panel a domain, one thin line a seed."""
    panels = {"new_validation": "new domain", "unseen_original_validation": "original domain"}
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(8.4, 3.6), layout="constrained")
        axes = figure.subplots(1, 2)
        for ax, (column, title) in zip(axes, panels.items(), strict=True):
            for method, group in curves.groupby("method", observed=True):
                color, marker = METHOD_STYLE[str(method)]
                for index, (_, line) in enumerate(group.groupby("run_id")):
                    ax.plot(
                        line["n_tokens"] / 1e3, line[f"bits_per_byte_{column}"], color=color, marker=marker,
                        markersize=4, alpha=0.7, linewidth=1.2, label=LABELS[str(method)] if index == 0 else None,
                    )  # fmt: skip
            ax.set_xlabel("training tokens (thousands)")
            ax.set_ylabel(f"bits per byte, {title}")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def dose_response(table: pd.DataFrame, dose: str, by: str, xlabel: str) -> Figure:
    """Forgetting and learning against a dose (a local-loss weight, a mix ratio), one line of means for each `by`."""
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(8.8, 4.0), layout="constrained")
        axes = figure.subplots(1, 2)
        doses = sorted(table[dose].unique())
        position = {value: index for index, value in enumerate(doses)}  # evenly spaced: 0 has no place on a log axis
        for ax, metric in zip(axes, ("forgetting", "learning"), strict=True):
            for index, (name, group) in enumerate(table.groupby(by, observed=True, sort=False)):
                color, marker = METHOD_STYLE.get(str(name), (PALETTE[index], MARKERS[index]))
                means = group.groupby(dose)[metric].mean()
                ax.plot([position[v] for v in means.index], means, color=color, linewidth=1.5)
                ax.scatter(
                    group[dose].map(position), group[metric], color=color, marker=marker, s=30, edgecolor="white",
                    linewidth=0.5, label=LABELS.get(str(name), str(name)), zorder=3,
                )  # fmt: skip
            ax.set_xticks(range(len(doses)), [f"{value:g}" for value in doses])
            ax.set_xlabel(xlabel)
            ax.set_ylabel(f"{metric} ({'down' if metric == 'forgetting' else 'up'} is better)")
            if metric == "forgetting":
                if table[metric].max() > 0.03:
                    _logarithmic(ax)
                    ax.set_ylabel("forgetting (down is better; logarithmic above 1%)")
                ax.set_ylim(min(0.0, 1.3 * table[metric].min()), 1.4 * table[metric].max())
            _percent(ax, y=True)
        if table[by].nunique() > 1:
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def gate_activity(gates: pd.DataFrame, value: str = "mean_residue") -> Figure:
    """Mean residue (or gate) of each layer on original-domain and new-domain text, one line a local-loss weight."""
    texts = [name for name in ("unseen_original", "proxy", "new") if name in set(gates["text"])]
    weights = sorted(gates["local_loss_weight"].unique())
    colors = sns.color_palette("viridis", len(weights))
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(9, 3.4), layout="constrained")
        axes = figure.subplots(1, len(texts), sharey=True)
        for ax, text in zip(np.atleast_1d(axes), texts, strict=True):
            for weight, color, marker in zip(weights, colors, itertools.cycle(MARKERS), strict=False):
                chosen = gates[(gates["text"] == text) & (gates["local_loss_weight"] == weight)]
                means = chosen.groupby("layer")[value].mean()
                ax.plot(means.index, means, color=color, marker=marker, label=f"{weight:g}")
            ax.set_xticks(sorted(gates["layer"].unique()))
            ax.set_xlabel("layer")
            ax.annotate(LABELS[text], (0.02, 1.02), xycoords="axes fraction", fontsize=10)
        first = np.atleast_1d(axes)[0]
        first.set_ylabel("mean ‖residue‖₁ / D" if value == "mean_residue" else "share of open gates")
        if value == "mean_residue":
            first.set_yscale("symlog", linthresh=1e-3)  # a closed gate's residue is zero exactly
            first.set_ylim(bottom=0)
        figure.legend(
            *first.get_legend_handles_labels(), title="local-loss weight", loc="outside right center", frameon=False
        )
    return figure


def placement_map(table: pd.DataFrame) -> Figure:
    """Forgetting and learning of every placement, one row a placement, each seed a point, the mean a bar."""
    layers = table["layers"].str.replace(r"^(?=\d)", "layers ", regex=True).str.replace("_", " ")
    sites = table["site"].str.replace("_", " ")
    table = table.assign(
        placement=sites + ", " + table["position"] + ", " + layers, beside=table["site"].map(SITE_LABELS)
    )
    return rows(table, "placement", "beside", list(table.groupby("placement")["learning"].mean().sort_values().index))


def rows(table: pd.DataFrame, by: str, kind: str, order: Sequence[str]) -> Figure:
    """Learning and forgetting, one row for each value of the column `by` from the bottom up, a colour and a marker for
    each value of `kind`, each seed a point, the mean a bar."""
    place = {name: index for index, name in enumerate(order)}
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(9, 0.33 * len(order) + 1.4), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for ax, metric in zip(axes, ("learning", "forgetting"), strict=True):
            for index, (name, group) in enumerate(table.groupby(kind, sort=False)):
                ax.scatter(
                    group[metric], group[by].map(place), color=PALETTE[index], marker=MARKERS[index],
                    s=32, edgecolor="white", linewidth=0.5, label=str(name), zorder=3,
                )  # fmt: skip
            means = table.groupby(by)[metric].mean()
            ax.scatter(means, [place[name] for name in means.index], marker="|", s=160, color="black", zorder=2)
            ax.set_xlabel(f"{metric} ({'left' if metric == 'forgetting' else 'right'} is better)")
            if metric == "forgetting" and table[metric].max() > 0.1:
                _logarithmic(ax, is_x=True)
                ax.set_xlabel("forgetting (left is better;\nlogarithmic above 1%)")
                ax.set_xlim(min(-0.0005, 1.3 * table[metric].min()), 1.5 * table[metric].max())
            else:
                ax.locator_params(axis="x", nbins=5)
            _percent(ax, x=True)
        axes[0].set_yticks(range(len(order)), order)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def layer_changes(changes: pd.DataFrame) -> Figure:
    """How far each layer's output has moved from the backbone's, one line a method."""
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(6.4, 3.2), layout="constrained")
        ax = figure.subplots()
        for method, group in changes.groupby("method", sort=False):
            color, marker = METHOD_STYLE[str(method)]
            ax.plot(group["layer"], group["change"], color=color, marker=marker, label=LABELS[str(method)])
        ax.set_xticks(sorted(changes["layer"].unique()))
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(PERCENT)
        ax.set_xlabel("layer")
        ax.set_ylabel("‖h′ − h‖ / ‖h‖ on old text")
        figure.legend(loc="outside right center", frameon=False)
    return figure


def gates_over_text(gates: pd.DataFrame, n_columns: int = 78) -> Figure:
    """A text once for each layer, every token on a ground as dark as its gate is open (|gate| over the text's largest).
    Where there is a column `language`, tokens of the language 'new' stand in bold. A piece of a letter is a dot."""
    first = gates[gates["layer"] == gates["layer"].min()].sort_values("position")
    tokens = [str(token).replace("\n", " ").replace("\ufffd", "·") for token in first["token"]]
    is_new = first["language"] == "new" if "language" in first else [False] * len(first)
    places, column, line = [], 0, 0
    for token in tokens:
        if column + len(token) > n_columns:
            column, line = 0, line + 1
        places.append((column, -line))
        column += len(token)
    layers = sorted(gates["layer"].unique())
    largest = max(float(gates["gate"].abs().max()), 1e-9)
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(9, 0.33 * (line + 1.6) * len(layers)), layout="constrained")
        for ax, layer in zip(np.atleast_1d(figure.subplots(len(layers), 1)), layers, strict=True):
            values = gates[gates["layer"] == layer].sort_values("position")["gate"].abs() / largest
            for (x, y), token, value, bold in zip(places, tokens, values, is_new, strict=True):
                ground = mpl.colormaps["Oranges"](0.75 * value) if value > 0 else "white"
                ax.add_patch(mpl.patches.Rectangle((x, y - 0.45), len(token), 0.9, color=ground))
                ax.text(
                    x + len(token) / 2, y, token.strip(), ha="center", va="center", family="monospace", fontsize=8.5,
                    fontweight="bold" if bold else "normal",
                )  # fmt: skip
            ax.set(xlim=(0, n_columns), ylim=(-line - 0.6, 0.6), xticks=[], yticks=[])
            ax.grid(visible=False)
            ax.spines[["left", "bottom"]].set_visible(False)
            ax.set_ylabel(f"layer {layer}", rotation=0, ha="right", va="center")
    return figure


def before_and_after(table: pd.DataFrame, texts: Sequence[str] = ("unseen_original", "proxy", "new")) -> Figure:
    """Bits per byte of each held-out text for the backbone and each model: one row a text, one marker a model."""
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(7.2, 2.8), layout="constrained")
        ax = figure.subplots()
        for offset, (name, row) in zip(np.linspace(0.2, -0.2, len(table)), table.iterrows(), strict=True):
            color, marker = METHOD_STYLE.get(str(name), ("black", "|"))
            ax.scatter(
                [row[text] for text in texts], np.arange(len(texts)) + offset, color=color, marker=marker, s=70,
                label=LABELS.get(str(name), str(name)),
            )  # fmt: skip
        ax.set_yticks(range(len(texts)), [LABELS[text] for text in texts])
        ax.set_xlabel("bits per byte (left is better)")
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def forgetting_axis(axes: Axes, forgetting: pd.Series[float]) -> None:
    _logarithmic(axes)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylim(min(0.0, 1.3 * forgetting.min()), 1.5 * forgetting.max())
    axes.set_ylabel("forgetting on the original domain\n(down is better; logarithmic above 1%)")
    _percent(axes, x=True, y=True)


def _logarithmic(axes: Axes, *, is_x: bool = False) -> None:
    """Linear up to 1% and through zero, since forgetting may be negative, and logarithmic beyond."""
    set_scale, axis = (axes.set_xscale, axes.xaxis) if is_x else (axes.set_yscale, axes.yaxis)
    set_scale("symlog", linthresh=0.01)
    axis.set_ticks([0, 0.005, 0.01, 0.03, 0.1, 0.3, 1.0] if is_x else [0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
    axes.minorticks_off()


def _percent(axes: Axes, *, x: bool = False, y: bool = False) -> None:
    if x:
        axes.xaxis.set_major_formatter(PERCENT)
    if y:
        axes.yaxis.set_major_formatter(PERCENT)
