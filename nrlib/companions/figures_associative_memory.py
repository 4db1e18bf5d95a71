"""Figures of the chapter on associative memory; colours and style are those of `nrlib.figures`. All take what
`nrlib.study.run_study` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..figures import LABELS, MARKERS, METHOD_STYLE, PALETTE, STYLE, Picture
from .associative_memory_extension import METHODS

Rows = Sequence[Mapping[str, Any]]
MATRICES = {
    "output": "$W_O^2$: copying",
    "key_2": "$W_K^2$: triggers",
    "key_1": "$W_K^1$: previous token",
    "feed_forward": "$W_F$: bigram table",
    "adapter_1": "adapter of layer 1",
    "adapter_2": "adapter of layer 2",
}
_TEXTS = {"old": "old language", "new": "new language"}


def growth(in_context: Rows, all_tokens: Rows) -> Figure:
    """Left: strength of three memories over the steps of runs on in-context tokens. Right: of runs on all tokens, how much
    of the bigram table's and of the in-context task's distance is covered. One line a seed."""
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for index, name in enumerate(("output", "key_2", "key_1")):
            for n, row in enumerate(in_context):
                curve = row["curve"]
                _line(left, curve["step"], curve[f"{name}_strength"], index, MATRICES[name] if n == 0 else None)
        left.set_ylabel("strength of the memory\n(standard deviations above the rest)")
        for n, row in enumerate(all_tokens):
            curve = row["curve"]
            loss = np.array(curve["bigram_loss"])
            covered = (loss[0] - loss) / (loss[0] - row["entropy"])
            _line(right, curve["step"], covered, 3, "bigrams: share of the loss above entropy gone" if n == 0 else None)
            accuracy = curve["in_context_accuracy"]
            _line(right, curve["step"], accuracy, 4, "in-context accuracy" if n == 0 else None)
        right.set_ylim(-0.02, 1.02)
        for axes in (left, right):
            axes.set_xlabel("training step")
            axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def _line(axes: Axes, x: Sequence[float], y: Any, index: int, label: str | None) -> None:
    axes.plot(
        x, y, color=PALETTE[index], marker=MARKERS[index], markersize=4, markevery=max(1, len(x) // 8), linewidth=1.2,
        alpha=0.8, label=label,
    )  # fmt: skip


def attention_maps(row: Mapping[str, Any]) -> Figure:
    """Both layers' attention on the first tokens of one sequence; triggers are marked on the axes by a star."""
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Picture(figsize=(9, 4.5), layout="constrained")
        panels = figure.subplots(1, len(row["attentions"]))
        names = [f"{token}*" if token in row["triggers"] else str(token) for token in row["tokens"]]
        for layer, (axes, attention) in enumerate(zip(np.atleast_1d(panels), row["attentions"], strict=True), 1):
            image = axes.imshow(attention, cmap="Blues", vmin=0, vmax=1)
            axes.set_xticks(range(len(names)), names, fontsize=6, rotation=90)
            axes.set_yticks(range(len(names)), names, fontsize=6)
            axes.set_xlabel(f"layer {layer} looks at")
            axes.set_ylabel("from token")
        figure.colorbar(image, ax=panels, label="attention", shrink=0.8)
    return figure


_READINGS = {  # of each memory: what to read, its label, whether up is better
    "key_1": ("previous_attention_{text}", "attention to the\nprevious token"),
    "key_2": ("induction_attention_{text}", "attention to what\nfollowed the trigger"),
    "output": ("in_context_accuracy_{text}", "in-context\naccuracy"),
    "feed_forward": ("divergence_{text}", "KL from the bigram\ntable (nats, down is better)"),
}


def memories(rows: Rows) -> Figure:
    """What each memory does on the old language (top) and on the new one (bottom): each seed a point, its mean a bar."""
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(10, 5.2), layout="constrained")
        panels = figure.subplots(2, len(_READINGS), sharex=True, sharey="col")
        for column, (part, (reading, label)) in enumerate(_READINGS.items()):
            for line, (text, title) in enumerate(_TEXTS.items()):
                axes = panels[line, column]
                for place, method in enumerate(METHODS):
                    values = [row[reading.format(text=text)] for row in rows if row["method"] == method]
                    _points(axes, place, values, method)
                axes.set_ylim(bottom=0, top=None if part == "feed_forward" else 1.05)
                axes.set_xticks([])
                axes.set_xlim(-0.6, len(METHODS) - 0.4)
                axes.grid(axis="x", visible=False)
                if line == 0:
                    axes.annotate(MATRICES[part], (0.5, 1.04), xycoords="axes fraction", ha="center", fontsize=11)
                axes.set_ylabel(label, fontsize=9)
                if column == 0:
                    axes.annotate(
                        title, (-0.62, 0.5), xycoords="axes fraction", rotation=90, va="center", fontweight="bold"
                    )
        for axes in panels[:, 3]:
            axes.set_yscale("symlog", linthresh=0.2)
            axes.set_yticks([0, 0.1, 0.2, 0.5, 1, 2, 4], ["0", "0.1", "0.2", "0.5", "1", "2", "4"])
            axes.minorticks_off()
            axes.set_ylim(0, 6)
        _method_legend(figure, panels[0, 0])
    return figure


def _points(axes: Axes, place: float, values: Sequence[float], method: str) -> None:
    color, marker = METHOD_STYLE.get(method, ("black", "_"))
    places = place + np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else [place]
    line = {"linewidth": 2} if marker == "_" else {"linewidth": 0.5, "edgecolor": "white"}
    axes.scatter(places, values, color=color, marker=marker, s=45, label=LABELS.get(method, method), zorder=3, **line)


def _method_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)


def put_back(rows: Rows) -> Figure:
    """Loss on each language when one part alone is put back as it was in the backbone: one row a method and part, each
    seed a point, as a difference from the extended model's loss."""
    lines = [(m, part) for m in METHODS for row in rows if row["method"] == m for part in row["restored"]]
    lines = list(dict.fromkeys(lines))
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(9, 0.34 * len(lines) + 1.3), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (text, title) in zip(panels, _TEXTS.items(), strict=True):
            for place, (method, part) in enumerate(lines):
                color, marker = METHOD_STYLE.get(method, ("black", "|"))
                changes = [row["restored"][part][text] - row[f"loss_{text}"] for row in rows if row["method"] == method]
                axes.scatter(changes, [-place] * len(changes), color=color, marker=marker, s=45, edgecolor="white",
                             linewidth=0.5, zorder=3)  # fmt: skip
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_xlabel(f"change of the loss on the {title}\nwith this part put back (nats per token)")
        panels[0].set_yticks(
            [-place for place in range(len(lines))], [f"{LABELS.get(m, m)}, {MATRICES[part]}" for m, part in lines]
        )
    return figure


def reuse(rows: Rows) -> Figure:
    """In-context accuracy on the new language by whether the old one had the trigger and the output; then with each memory
    of the old induction head emptied. Each seed a point."""
    cases = {
        "old_trigger_old_output": "old trigger,\nold output", "old_trigger_new_output": "old trigger,\nnew output",
        "new_trigger_old_output": "new trigger,\nold output", "new_trigger_new_output": "new trigger,\nnew output",
        "without_key_1": "without\n$W_K^1$", "without_key_2": "without\n$W_K^2$", "without_output": "without\n$W_O^2$",
    }  # fmt: skip
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(9.5, 3.8), layout="constrained")
        axes = figure.subplots()
        for offset, method in zip((-0.3, -0.1, 0.1, 0.3), METHODS, strict=True):
            color, marker = METHOD_STYLE.get(method, ("black", "_"))
            found = [row["reuse"] for row in rows if row["method"] == method]
            x = [
                place + offset + shift for place in range(len(cases)) for shift in np.linspace(-0.05, 0.05, len(found))
            ]
            y = [values[case] for case in cases for values in found]
            line = {"linewidth": 2} if marker == "_" else {"linewidth": 0.5, "edgecolor": "white"}
            axes.scatter(x, y, color=color, marker=marker, s=40, label=LABELS.get(method, method), zorder=3, **line)
        axes.axvline(3.5, color="0.5", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(cases)), list(cases.values()), fontsize=9)
        axes.grid(axis="x", visible=False)
        axes.set_ylim(-0.03, 1.05)
        axes.set_ylabel("in-context accuracy\non the new language")
        _method_legend(figure, axes)
    return figure
