"""The explorer's picture: a Vega-Lite specification with the colours and markers of the book's figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.colors import to_hex
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path

from nrlib.figures import METHOD_STYLE

TICKS = [-0.01, 0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]  # of forgetting
EDGE = "#767676"  # around every mark: visible on a light and on a dark page, where some colours are faint


def color(method: str) -> str:
    """The method's colour as #rrggbb."""
    return str(to_hex(METHOD_STYLE[method][0]))


def marker(method: str) -> str:
    """The method's marker as a path of SVG, two units wide around the origin."""
    style = MarkerStyle(METHOD_STYLE[method][1])
    path = style.get_path().transformed(style.get_transform())
    return "".join(_path_steps(path))


_LETTERS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C"}


def _path_steps(path: Path) -> Iterable[str]:
    for points, code in path.iter_segments(simplify=False, curves=True):
        if code == Path.CLOSEPOLY:
            yield "Z"
        else:  # matplotlib's y axis points up, and its markers are one unit wide
            flipped = [f"{(2, -2)[i % 2] * value:.4g}" for i, value in enumerate(points)]
            yield _LETTERS[code] + ",".join(flipped)


def frame(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The part of the plane that holds these settings with all their seeds."""
    learning = [value for setting in settings for value in setting["learning_range"]] or [0.0, 1.0]
    forgetting = [value for setting in settings for value in setting["forgetting_range"]] or [0.0]
    top, bottom = 1.3 * max(*forgetting, 0.005), min(0.0, 1.3 * min(forgetting))
    return {
        "left": min(learning) - 0.02, "right": max(learning) + 0.02, "bottom": bottom, "top": top,
        "ticks": [tick for tick in TICKS if bottom <= tick <= top],
    }  # fmt: skip


def specification(
    settings: Sequence[Mapping[str, Any]], methods: Iterable[str], labels: Mapping[str, str]
) -> dict[str, Any]:
    """Learning against forgetting: runs faint, means over seeds solid, a ring around the setting that is chosen."""
    names = list(methods)
    axes = {"x": _axis("learning", "left", "right"), "y": _axis("forgetting", "bottom", "top")}
    axes["x"]["axis"] |= {"tickCount": {"expr": "width / 80"}}
    axes["x"]["title"] = "learning (right is better)"
    axes["y"] |= {"title": "forgetting (down is better)"}
    axes["y"]["scale"] |= {"type": "symlog", "constant": 0.01}  # linear through zero: forgetting may be negative
    axes["y"]["axis"] |= {"values": {"expr": "ticks"}}
    look = {
        "color": _scale("method", names, [color(name) for name in names]),
        "shape": _scale("method", names, [marker(name) for name in names]),
    }
    tooltip = [{"field": "label", "title": "setting"}, {"field": "seeds", "title": "seeds"}]
    tooltip += [{"field": name, "title": name, "format": ".2%"} for name in ("forgetting", "learning")]
    point = {"type": "point", "filled": True, "clip": True, "cursor": "pointer", "aria": False}
    return {
        "background": None,
        "width": 640,
        "height": 420,
        "params": [{"name": name, "value": value} for name, value in frame(settings).items()],
        "datasets": {"settings": [_mean(s, labels) for s in settings], "runs": runs(settings), "chosen": []},
        "layer": [
            {"data": {"values": [{}]}, "mark": {"type": "rule", "clip": True, "aria": False}, "encoding": {"y": {"datum": 0}}},
            {
                "data": {"name": "runs"},
                "mark": {**point, "size": 22, "opacity": 0.45},
                "encoding": {**axes, **look},
            },
            {
                "data": {"name": "settings"},
                "mark": {**point, "size": 75, "opacity": 1, "stroke": EDGE, "strokeWidth": 0.8},
                "encoding": {**axes, **look, "tooltip": tooltip},
            },
            {
                "data": {"name": "chosen"},
                "mark": {"type": "point", "shape": "circle", "size": 380, "strokeWidth": 2.5, "aria": False},
                "encoding": axes,
            },
        ],
        "config": {"view": {"stroke": None}, "axis": {"gridOpacity": 0.35, "labelFontSize": 12, "titleFontSize": 12}},
    }  # fmt: skip


def _axis(field: str, low: str, high: str) -> dict[str, Any]:
    limits = {"domain": [{"expr": low}, {"expr": high}], "zero": False, "nice": False}
    axis = {"labelExpr": "format(100 * datum.value, '~g') + '%'", "titleFontWeight": "normal", "grid": True}
    return {"field": field, "type": "quantitative", "scale": limits, "axis": axis}


def _scale(field: str, domain: list[str], values: list[str]) -> dict[str, Any]:
    return {"field": field, "type": "nominal", "scale": {"domain": domain, "range": values}, "legend": None}


def _mean(setting: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    kept = {name: setting[name] for name in ("id", "method", "seeds", "forgetting", "learning")}
    return {**kept, "label": labels[setting["id"]]}


def runs(settings: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every run as a point of its setting."""
    return [
        {"id": setting["id"], "method": setting["method"], "forgetting": run["forgetting"], "learning": run["learning"]}
        for setting in settings
        for run in setting["runs"]
    ]
