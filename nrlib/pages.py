"""What Sphinx does not check on the pages it builds: links, alternative texts, requests to other hosts, size.

What takes a browser to see is seen by tests/test_browser.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lxml import html

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
_IMAGE_NAME = re.compile(r"\.(png|svg|jpe?g|gif|webp)$|^_?images?/", re.IGNORECASE)
MAXIMUM_BYTES = 500_000  # of a page, without its images
_PLACEHOLDER = re.compile(r"[A-Z0-9_-]*[A-Z][A-Z0-9_-]*")  # one token in capitals: to be written later, and forgotten
_EMBEDDED_IMAGE = re.compile(r"data:image/[^\"')]+")
_RAW_ROLE = re.compile(r"\{(?:glue|py|eq|ref|numref|cite|doc)[:\w]*\}`")


def check_pages(folder: Path) -> list[str]:
    """Problems of all pages under `folder`, one line each; none for a book that is fit to be read.

    Every internal link leads to a file and every anchor to an element; every image of the text has an alternative text
    that is neither its file name nor a placeholder; no page loads a script, style sheet or image from another host; no
    role is left unread, no traceback is shown, and no page is larger than 500 kB without its images.
    """
    pages = {path: html.parse(path).getroot() for path in sorted(folder.rglob("*.html")) if "_static" not in path.parts}
    anchors = {path: _anchors(root) for path, root in pages.items()}
    problems = []
    for path, root in pages.items():
        found = [*_link_problems(path, root, anchors), *_image_problems(root), *_host_problems(root), *_left_over(root)]
        found += [*_size_problems(path), *([] if "_modules" in path.parts else _traceback_problems(root))]
        problems += [f"{path.relative_to(folder)}: {problem}" for problem in dict.fromkeys(found)]
    return problems


def _anchors(root: html.HtmlElement) -> set[str]:
    return {*root.xpath("//@id"), *root.xpath("//a/@name")}


def _link_problems(page: Path, root: html.HtmlElement, anchors: dict[Path, set[str]]) -> Iterator[str]:
    for link in [*root.xpath("//a/@href"), *root.xpath("//img/@src | //script/@src | //link/@href")]:
        parts = urlsplit(str(link))
        if parts.scheme or parts.netloc or str(link) == "#":
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page.resolve()
        if target.is_dir():
            target /= "index.html"
        if not target.exists():
            yield f"{link} leads nowhere"
        elif "=" in parts.fragment:
            continue  # where the explorer's dials stand
        elif parts.fragment and target in anchors and unquote(parts.fragment) not in anchors[target]:
            yield f"{link} names an anchor that the page does not have"


def _image_problems(root: html.HtmlElement) -> Iterator[str]:
    for image in root.xpath("//main//img"):
        source, alternative = str(image.get("src", "")), str(image.get("alt", "")).strip()
        if not alternative or alternative == source or _IMAGE_NAME.search(alternative):
            yield f"the image {source[:80]} has no alternative text (cell metadata mystnb.image.alt, or :alt:)"
        elif _PLACEHOLDER.fullmatch(alternative):
            yield f"the image {source[:80]} has a placeholder, {alternative}, in place of an alternative text: write it"


def _host_problems(root: html.HtmlElement) -> Iterator[str]:
    for tag, attribute in LOADED.items():
        for element in root.iter(tag):
            address = str(element.get(attribute, ""))
            is_loaded = tag != "link" or element.get("rel") in ("stylesheet", "preload", "preconnect", "icon")
            if is_loaded and urlsplit(address).netloc:
                yield f"loads {address} from another host"


def _left_over(root: html.HtmlElement) -> Iterator[str]:
    for text in root.xpath("//main//text()[not(ancestor::pre) and not(ancestor::code) and not(ancestor::script)]"):
        if match := _RAW_ROLE.search(str(text)):
            yield f"{str(text)[match.start() : match.start() + 60]!r} was not understood as a role"


def _traceback_problems(root: html.HtmlElement) -> Iterator[str]:
    if any("Traceback (most recent call last)" in str(text) for text in root.xpath("//main//text()")):
        yield "shows a traceback"


def _size_problems(path: Path) -> Iterator[str]:
    size = len(_EMBEDDED_IMAGE.sub("", path.read_text(encoding="utf-8")).encode())
    if size > MAXIMUM_BYTES:
        yield f"has {size / 1000:.0f} kB without its images, more than {MAXIMUM_BYTES / 1000:.0f}: split the page"
