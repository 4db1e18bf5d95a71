"""Built pages made light: what stands between a phone and the first words of a page.

Sphinx and its theme put ten style sheets, mostly rules for what no page here has, and a dozen scripts before the text of
every page, among them the index of the search. Afterwards one style sheet of the rules in use is left, scripts wait for the
text, pictures until they come near the screen (their place is kept), the index is loaded by the page that searches, and icons come from the
theme's font alone, not from a script as well.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path

SHEET = Path("_static", "styles", "pages.css")
_SHEET_LINK = re.compile(r'<link\b[^>]*\brel="stylesheet"[^>]*?\bhref="([^"?]+)[^"]*"[^>]*>|'
                         r'<link\b[^>]*?\bhref="([^"?]+)[^"]*"[^>]*\brel="stylesheet"[^>]*>')  # fmt: skip
_SCRIPT = re.compile(r'<script\b([^>]*)\bsrc="([^"?]+)([^"]*)"([^>]*)></script>\n?')
_IMAGE = re.compile(r"<img (?![^>]*\bloading=)([^>]*)>")
_PRELOAD = re.compile(r'<link rel="preload" as="script"[^>]*>\n?')  # before the style sheets, else
_SELECTOR = re.compile(r"(?:[^,(]|\((?:[^()]|\([^()]*\))*\))+")  # one of a list: no comma but in brackets
_VARIABLE = re.compile(r"""(?<=[{;])\s*(--[\w-]+)\s*:(?:[^;{}"']|"[^"]*"|'[^']*')*(?:;|(?=\}))""")
_AT_ONCE = "documentation_options.js"  # small, and scripts in the page add to what it defines
_ICONS = "fontawesome.js"
# Only search.html searches: search_as_you_type is off.
_SEARCH = ("searchtools.js", "language_data.js", "searchindex.js")


def lighten_pages(folder: Path) -> None:
    """Rewrite all pages under `folder` that share their style sheets, and write the one sheet they then have."""
    texts = {path: path.read_text(encoding="utf-8") for path in folder.rglob("*.html") if "_static" not in path.parts}
    sheets = {path: tuple(_sheets(path, text)) for path, text in texts.items()}
    if not (shared := max(sheets.values(), key=len, default=())):
        return
    pages = {path: text for path, text in texts.items() if sheets[path] == shared}
    style = rules_in_use("".join(_read_sheet(sheet, folder / SHEET) for sheet in shared), _names(texts))
    (folder / SHEET).write_text(style, encoding="utf-8")
    version = hashlib.sha256(style.encode()).hexdigest()[:8]
    for path, text in pages.items():
        href = f"{Path(os.path.relpath(folder / SHEET, path.parent)).as_posix()}?v={version}"
        path.write_text(_lighten(path, text, href, is_search=path == folder / "search.html"), encoding="utf-8")


def _head(text: str) -> tuple[str, str]:
    head, end, body = text.partition("</head>")
    return head, end + body


def _sheets(page: Path, text: str) -> Iterable[Path]:
    for match in _SHEET_LINK.finditer(_head(text)[0]):
        yield Path(os.path.normpath(page.parent / (match[1] or match[2])))


def _lighten(path: Path, text: str, href: str, *, is_search: bool) -> str:
    def script(match: re.Match[str]) -> str:
        name = match[2].rpartition("/")[2]
        if name == _ICONS or (name in _SEARCH and not is_search):
            return ""
        if name == _AT_ONCE or "defer" in match[1] + match[4]:
            return match[0]
        return match[0].replace("<script", "<script defer", 1)

    head, body = _head(text)
    first = _SHEET_LINK.search(head)
    assert first
    start, rest = head[: first.start()], _SHEET_LINK.sub("", head[first.end() :])
    head = f'{start}<link rel="stylesheet" href="{href}" />{_PRELOAD.sub("", rest)}'
    return _SCRIPT.sub(script, head + _IMAGE.sub(lambda match: _late(path, match[1]), body))


def _late(page: Path, attributes: str) -> str:
    """An image that is loaded when it comes near, in a place of its size: text below does not jump then."""
    source = re.search(r'\bsrc="([^"?]+\.png)', attributes)
    size = ""
    if source and not re.search(r"\bwidth=", attributes) and (file := page.parent / source[1]).is_file():
        width, height = struct.unpack(">2I", file.read_bytes()[16:24])  # where every PNG has them
        size = f'width="{width}" height="{height}" '
    return f'<img loading="lazy" {size}{attributes}>'


def _read_sheet(sheet: Path, target: Path) -> str:
    """A style sheet with what it imports, addresses changed to be read from where `target` lies."""

    def address(match: re.Match[str]) -> str:
        if re.match(r"[a-z]+:|#|/", match[2]):
            return match[0]
        return f"url({match[1]}{Path(os.path.relpath(sheet.parent / match[2], target.parent)).as_posix()}"

    text = re.sub(r"(?s)/\*.*?\*/|@charset[^;]*;", "", sheet.read_text(encoding="utf-8"))
    text = re.sub(r"url\(([\"']?)([^\"')]+)", address, text)
    return re.sub(r"@import [\"']([^\"']+)[\"'];", lambda match: _read_sheet(sheet.parent / match[1], target), text)


def _names(texts: dict[Path, str]) -> set[str]:
    """The classes and identifiers of all pages, and every word of their scripts and of sheets of their own."""
    names: set[str] = set()
    files: set[Path] = set()
    for path, text in texts.items():
        names.update(name for value in re.findall(r'\b(?:class|id)="([^"]*)"', text) for name in value.split())
        names.update(re.findall(r"var\(\s*(--[\w-]+)", text))
        files.update(path.parent / match[2] for match in _SCRIPT.finditer(text))
        files.update(path.parent / (match[1] or match[2]) for match in _SHEET_LINK.finditer(_head(text)[1]))
    for file in {Path(os.path.normpath(file)) for file in files}:
        if file.name not in (_ICONS, "searchindex.js") and file.is_file():
            names.update(re.findall(r"[\w-]+", file.read_text(encoding="utf-8")))
    return names


def rules_in_use(style: str, names: set[str]) -> str:
    """The style sheet without selectors of classes and identifiers that are not among `names`, and variables unread."""

    def is_in_use(selector: str) -> bool:
        while (outer := re.sub(r"\([^()]*\)", "", selector)) != selector:  # what :not() or :is() name may be absent
            selector = outer
        return all(name in names for name in re.findall(r"[.#](-?[A-Za-z_][\w-]*)", selector))

    def rule(match: re.Match[str]) -> str:
        selectors = [part for part in _SELECTOR.findall(match[1]) if is_in_use(part)]
        return f"{','.join(selectors)}{{{match[2]}}}" if selectors else ""

    style = re.sub(r"([^{}@;]+)\{([^{}]*)\}", rule, style)
    while (without_empty := re.sub(r"@(?:media|supports)[^{}]*\{\s*\}", "", style)) != style:
        style = without_empty
    while unused := set(_VARIABLE.findall(style)) - set(re.findall(r"var\(\s*(--[\w-]+)", style)) - names:
        style = _VARIABLE.sub(lambda match: "" if match[1] in unused else match[0], style)
    return re.sub(r"\s*\n\s*", "\n", style).strip()
