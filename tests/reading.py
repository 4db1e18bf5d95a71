"""A browser visits every page of a site and notes what a reader would meet there."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
THEMES = ("light", "dark")
# What changes with the theme; everything else is looked for once, in the light.
COLOURS = {"runOnly": ["color-contrast", "link-in-text-block"]}
SCROLLING = {"runOnly": ["scrollable-region-focusable"]}  # what scrolls on a phone only
LEFT = "net::ERR_ABORTED"  # the page, before all of it had come: what is missing fails otherwise
STILL = "*, *::before, *::after { transition: none !important; animation: none !important; }"
TOO_WIDE = """() => {
  const root = document.documentElement, limit = root.clientWidth + 1;
  if (root.scrollWidth < limit) return [];
  const scrolls = (e) => e !== document.body && getComputedStyle(e).overflowX !== "visible";
  const isInBox = (e) => { for (e = e.parentElement; e; e = e.parentElement) if (scrolls(e)) return true; return false; };
  const wide = [...document.body.querySelectorAll("*")].filter((e) => e.getBoundingClientRect().right > limit && !isInBox(e));
  return [`${root.scrollWidth} pixels`, ...wide.slice(0, 3).map((e) => e.cloneNode().outerHTML.slice(0, 100))];
}"""
# Of the coloured words of listings and signatures, one of each kind is enough: their contrast is most of axe-core's work.
THIN_OUT = """() => {
  const seen = new Set();
  for (const span of document.querySelectorAll("pre span[class], dt.sig span[class]")) {
    const kind = `${span.closest("div[class*=highlight]")?.parentElement?.className} ${span.className}`;
    if (!span.id && !span.querySelector("a, [id]") && seen.has(kind)) span.replaceWith(...span.childNodes);
    seen.add(kind);
  }
}"""
VIOLATIONS = """(options) => axe.run(document, {...options, preload: false, resultTypes: ["violations"]}).then((result) =>
  result.violations.filter((v) => v.impact === "serious" || v.impact === "critical").flatMap((v) =>
    v.nodes.map((n) => `${v.id}: ${n.target.join(" ")}: ${(n.any[0] ?? n.all[0] ?? n.none[0])?.message}`)))"""


@dataclass
class Visit:
    """What was met on one page."""

    errors: list[str] = field(default_factory=list)  # of the console, uncaught ones, and files that did not load
    requests: list[str] = field(default_factory=list)  # addresses that are not the site's
    violations: dict[str, list[str]] = field(default_factory=dict)  # serious or critical ones of axe-core, by theme
    too_wide: list[str] = field(default_factory=list)  # what sticks out of a phone's screen
    text: str = ""  # what is shown of it


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments: Any) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The address of a server on loopback for the files of `folder`."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()


def pages_of(folder: Path) -> list[str]:
    """Every page of a site, by its path from there."""
    found = (path.relative_to(folder) for path in folder.rglob("*.html"))
    return sorted(path.as_posix() for path in found if "_static" not in path.parts)


def visit(page: Any, address: str, path: str, *, is_examined: bool = True) -> Visit:
    """Load one page and note what a reader meets; `is_examined` also asks axe-core, in both themes, and a phone."""
    seen = Visit()
    noting = {
        "console": lambda message: message.type == "error" and seen.errors.append(message.text),
        "pageerror": lambda error: seen.errors.append(str(error)),
        "requestfailed": lambda request: request.failure == LEFT or seen.errors.append(f"did not load: {request.url}"),
        "request": lambda request: request.url.startswith((address, "data:", "blob:")) or seen.requests.append(request.url),
    }  # fmt: skip
    for event, note in noting.items():
        page.on(event, note)
    try:
        page.set_viewport_size(DESKTOP)
        page.goto(address + path, wait_until="load")
        page.wait_for_load_state("networkidle")  # a first page may lead to another
        seen.text = page.inner_text("body")
        if is_examined:
            _examine(page, seen)
    finally:
        for event, note in noting.items():
            page.remove_listener(event, note)
    return seen


def _examine(page: Any, seen: Visit) -> None:
    from axe_playwright_python.base import AXE_SCRIPT

    page.add_style_tag(content=STILL)  # colours halfway from one theme to the other are nobody's
    page.evaluate(AXE_SCRIPT)
    page.evaluate(THIN_OUT)
    for theme in THEMES:
        page.emulate_media(color_scheme=theme)
        page.wait_for_function("(theme) => document.documentElement.dataset.theme === theme", arg=theme)
        seen.violations[theme] = page.evaluate(VIOLATIONS, {} if theme == THEMES[0] else COLOURS)
    page.emulate_media(color_scheme=THEMES[0])
    page.set_viewport_size(PHONE)
    page.wait_for_timeout(500)  # the theme makes what scrolls reachable by keyboard a moment after a new width
    seen.violations[THEMES[0]] += page.evaluate(VIOLATIONS, SCROLLING)
    seen.too_wide = page.evaluate(TOO_WIDE)
