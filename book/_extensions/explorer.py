"""A Sphinx extension: the parts of the explorer page, made from the published records.

`{explorer} plane`, and `commands`, `table`, `files`. Everything a reader needs is on the page without a
script: a picture, a table and the data as files; `_static/explorer.js` moves it. Vega draws the live picture; its
scripts are those that vl-convert carries, so that nothing is asked from another host.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import explorer_plot
import pandas as pd
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from nrlib.explorer import DIALS, explorer_data, run_rows
from nrlib.figures import LABELS
from nrlib.records import published_records
from nrlib.storage import atomic_path

FOLDER = "_static/explorer"
WITHOUT_SCRIPT = ".explorer-dials > :not(fieldset), .explorer-dials input, .explorer-dials button, .explorer-search"
NUMERIC = (
    "local_loss_weight",
    "mix_ratio",
    "kl_weight",
    "learning_rate",
    "n_tokens",
    "extra_ratio",
)  # dials that are sliders


class Explorer(SphinxDirective):
    """One part of the explorer."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {"alt": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        part = directives.choice(self.arguments[0], ("plane", "commands", "table", "files"))
        if self.env.app.builder.format != "html":
            return []
        records = list(published_records())
        if not records:
            return [nodes.paragraph(text="There are no published records.")]
        data = self.env.temp_data.get("explorer") or explorer_data(records)
        self.env.temp_data["explorer"] = data  # the parts of a page share it
        root = "../" * self.env.docname.count("/")
        if part == "plane":
            write_files(Path(self.env.app.outdir, FOLDER), data, run_rows(records))
            html = plane(data, root, self.options.get("alt", ""))
        else:
            html = {"commands": commands(root), "table": table(data), "files": files(root)}[part]
        return [nodes.raw("", html, format="html")]


def write_files(folder: Path, data: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """What the page loads and offers: picture, data for the script and for download, Vega."""
    import vl_convert

    shown = [setting for setting in data["settings"] if setting["learning"] is not None]
    labels = {setting["id"]: label(setting) for setting in data["settings"]}
    plot = explorer_plot.specification(shown, data["methods"], labels)
    fit = {"autosize": {"type": "fit", "contains": "padding"}, "datasets": {name: [] for name in plot["datasets"]}}
    page = {**data, "labels": labels, "ticks": explorer_plot.TICKS, "plot": {**plot, **fit}}
    contents = {
        "plane.svg": vl_convert.vegalite_to_svg(plot),
        "data.js": f"window.explorerData = {json.dumps(page)};\n",
        "records.json": json.dumps(rows, indent=1, ensure_ascii=False) + "\n",
        "records.csv": pd.DataFrame(rows).to_csv(index=False),
        "vega.js": _vega(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")


@lru_cache
def _vega() -> str:
    import vl_convert

    return f"(() => {{{vl_convert.javascript_bundle()}}})();\n"  # its names are not to meet those of Sphinx's scripts


def label(setting: Mapping[str, Any]) -> str:
    """A setting in words: its method, and where its dials stand."""
    dials = [f"{dial.label} {value_label(setting[dial.name])}" for dial in DIALS if setting[dial.name] is not None]
    return ", ".join([LABELS[setting["method"]], *dials, *([setting["other"]] if setting["other"] else [])])


def value_label(value: str) -> str:
    """The value of a dial as readers see it: large numbers with commas, names without underscores."""
    return f"{int(value):,}" if value.isdecimal() and len(value) > 4 else value.replace("_", " ")


def plane(data: Mapping[str, Any], root: str, alternative: str) -> str:
    """Picture, legend and dials."""
    profiles = list(data["conflicts"])
    first = max(profiles, key=lambda name: sum(len(s["runs"]) for s in data["settings"] if s["profile"] == name))
    lines = [
        f'<link rel="stylesheet" href="{root}_static/explorer.css">',
        f'<div class="explorer" data-vega="{root}{FOLDER}/vega.js" data-profile="{first}">',
        f'<div class="explorer-plot"><img src="{root}{FOLDER}/plane.svg" width="700" height="470" '
        f'alt="{escape(alternative)}"></div>',
        '<p class="explorer-status" role="status"></p>',
        '<p class="explorer-choice" hidden><strong></strong> <button type="button">its commands</button></p>',
        '<form class="explorer-dials" aria-label="Which runs are shown">',
        '<fieldset class="explorer-methods"><legend>method</legend>',
        *(_method(name) for name in data["methods"]),
        '<span><button type="button" data-every="true">all</button> <button type="button" data-every="false">none</button></span>',
        "</fieldset>",
        _select("profile", "profile", profiles, selected=first),
        *(_dial(name, list(values)) for name, values in data["dials"].items()),
        '<p class="explorer-actions"><label><input type="checkbox" name="zoom"> zoom to what is shown</label>',
        '<button type="reset">reset all</button></p>',
        "</form>",
        f"<noscript><style>{WITHOUT_SCRIPT} {{ display: none !important }}</style>"
        "<p>The dials need JavaScript. The picture shows all runs, the table below lists them.</p></noscript>",
        "</div>",
        *(f'<script defer src="{root}{name}"></script>' for name in (f"{FOLDER}/data.js", "_static/explorer.js")),
    ]
    return "\n".join(lines)


def _method(name: str) -> str:
    shape = f'<path d="{explorer_plot.marker(name)}" fill="{explorer_plot.color(name)}"/>'
    symbol = f'<svg viewBox="-2 -2 4 4" width="18" height="18" aria-hidden="true">{shape}</svg>'
    box = f'<input type="checkbox" name="method" value="{name}" checked>'
    return f"<label>{box} {symbol} {LABELS[name]}</label>"


def _dial(name: str, values: list[str]) -> str:
    words = next(dial.label for dial in DIALS if dial.name == name)
    if name not in NUMERIC:
        return _select(name, words, values, every="all")
    identifier = f"explorer-{name}"
    stops = " ".join(["all", *values])
    slider = (
        f'<input type="range" id="{identifier}" name="{name}" min="0" max="{len(values)}" value="0" step="1" '
        f'data-stops="{stops}" aria-valuetext="all">'
    )
    return f'<p><label for="{identifier}">{words}</label> <output for="{identifier}">all</output>{slider}</p>'


def _select(name: str, words: str, values: Sequence[str], *, every: str = "", selected: str = "") -> str:
    options = [f'<option value="">{every}</option>'] if every else []
    options += [
        f'<option value="{escape(value)}"{" selected" if value == selected else ""}>{escape(value_label(value))}</option>'
        for value in values
    ]
    return (
        f'<p><label for="explorer-{name}">{words}</label> '
        f'<select id="explorer-{name}" name="{name}">{"".join(options)}</select></p>'
    )


def commands(root: str) -> str:
    """The place of the commands, filled by the script."""
    return (
        '<div class="explorer-commands"><noscript><p>The file <a href="'
        f'{root}{FOLDER}/records.csv">records.csv</a> holds the command of every run in its last column.</p></noscript></div>'
    )


def table(data: Mapping[str, Any]) -> str:
    """All settings as a table; a dial the method does not have is a dash."""
    dials = [dial for dial in DIALS if dial.name in data["dials"]]
    heads = ["method", "forgetting", "learning", "seeds", *(dial.label for dial in dials), "other", "profile"]
    cells = "".join(f'<th scope="col"><button type="button">{head}</button></th>' for head in heads)
    rows = "\n".join(_row(setting, [dial.name for dial in dials]) for setting in data["settings"])
    return (
        '<p class="explorer-search"><label for="explorer-search">rows that contain</label> '
        '<input type="search" id="explorer-search" autocomplete="off"></p>\n'
        '<div class="explorer-table" role="region" tabindex="0" aria-label="Table of all settings">\n'
        f"<table><thead><tr>{cells}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def files(root: str) -> str:
    """Links to the data."""
    links = [f'<a href="{root}{FOLDER}/{name}" download>{name}</a>' for name in ("records.csv", "records.json")]
    return f"<p>Download: {', '.join(links)}.</p>"


def _row(setting: Mapping[str, Any], dials: Sequence[str]) -> str:
    name = f'<button type="button">{LABELS[setting["method"]]}</button>'
    cells = [f'<th scope="row">{name}</th>', *_metrics(setting), f"<td>{setting['seeds']}</td>"]
    cells += ["<td>–</td>" if setting[d] is None else f"<td>{escape(value_label(setting[d]))}</td>" for d in dials]
    cells.append(f"<td>{escape(setting['other'])}</td><td>{setting['profile']}</td>")
    return f'<tr data-id="{setting["id"]}">{"".join(cells)}</tr>'


def _metrics(setting: Mapping[str, Any]) -> Iterator[str]:
    for metric, digits in (("forgetting", 2), ("learning", 1)):
        mean, limits = setting[metric], setting[f"{metric}_range"]
        if mean is None:
            yield "<td>–</td>"
        else:
            low, high = (f"{100 * value:.{digits}f}" for value in limits)
            spread = f" <small>({low} to {high})</small>" if setting["seeds"] > 1 else ""
            yield f'<td data-value="{mean}">{100 * mean:.{digits}f}%{spread}</td>'


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("explorer", Explorer)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
