"""The whole book as one PDF: Sphinx writes it as a single page, the browser prints that, with page numbers and outline.

It is printed twice: the table of contents names pages, and only the first printing tells which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chromium import open_chromium
from .errors import NrlibError
from .storage import atomic_path, project_directory

if TYPE_CHECKING:
    from playwright.sync_api import Browser

STYLE = Path("book", "_static", "print.css")
# The title page and the table of contents, made from the headings of chapters; Sphinx marks where each page of the book
# begins, the first alone stands for itself.
_CONTENTS = """() => {
  document.documentElement.dataset.theme = "light";  // which a script of the theme would have done
  const article = document.querySelector("article.bd-article");
  const add = (parent, tag, name, text) => {
    const element = parent.appendChild(document.createElement(tag));
    element.className = name;
    element.textContent = text ?? "";
    return element;
  };
  const chapters = [article.querySelector("section"), ...article.querySelectorAll("[id^='document-'] + section")];
  const title = document.createElement("header"), contents = document.createElement("nav");
  title.className = "print-title";
  add(title, "p", "print-name", document.title.split(" \u2014 ")[0]);
  contents.className = "print-contents";
  add(contents, "p", "print-heading", "Contents");
  const names = chapters.map((chapter, n) => {
    const heading = chapter.querySelector("h1, h2, h3, h4"), name = `print-${n}`;
    chapter.classList.add("print-chapter");
    const copy = heading.cloneNode(true);
    copy.querySelectorAll("a").forEach((link) => link.remove());
    heading.id = name;
    const isNested = chapter.parentElement.closest("section.print-chapter") !== chapters[0];
    const line = add(contents, "a", n && isNested ? "print-line print-nested" : "print-line");
    line.href = `#${name}`;
    add(line, "span", "", copy.textContent);
    add(line, "i", "");
    add(line, "b", "").dataset.target = name;
    return name;
  });
  article.prepend(title, contents);
  document.body.replaceChildren(article);  // no menus, and none of the theme's grids, which break badly over pages
  return names;
}"""
_NUMBERS = """(pages) => document.querySelectorAll("b[data-target]").forEach(
  (number) => { number.textContent = pages[number.dataset.target] ?? ""; })"""


class PrintError(NrlibError):
    """The book could not be printed."""


def print_book(folder: Path, target: Path) -> None:
    """Print the single page that Sphinx wrote into `folder` as `target`, which lies in the folder of the book's pages.

    Raises
    ------
    BrowserError
        When there is no browser.
    PrintError
        When the browser stops, or a heading is found on no page.
    """
    page_file = target.with_suffix(".html")
    try:
        page_file.write_text(_single_page(folder), encoding="utf-8")
        with open_chromium() as browser, atomic_path(target) as temporary:
            _print_page(browser, page_file, temporary)
    finally:
        page_file.unlink(missing_ok=True)


def _single_page(folder: Path) -> str:
    """The page that holds the book: without scripts, its styles and images found from the folder of the book."""
    pages = [path for path in folder.rglob("*.html") if "_static" not in path.parts]
    text = max(pages, key=lambda path: path.stat().st_size).read_text(encoding="utf-8")  # another one leads there
    return re.sub(r'\bsrc="(?:\.\./)+', 'src="', re.sub(r"(?s)<script\b.*?</script>", "", text))


def _print_page(browser: Browser, page_file: Path, target: Path) -> None:
    from playwright.sync_api import Error

    try:
        page = browser.new_page(color_scheme="light", reduced_motion="reduce")
        page.goto(page_file.as_uri(), wait_until="load")
        page.add_style_tag(path=project_directory() / STYLE)
        names = page.evaluate(_CONTENTS)
        page.emulate_media(media="print")
        pages: Mapping[str, int] = {}
        for _ in range(2):  # without the numbers of the pages, then with them
            page.evaluate(_NUMBERS, pages)
            page.pdf(path=target, outline=True, prefer_css_page_size=True, print_background=True, tagged=True)
            pages = find_pages(target)
    except Error as error:
        raise PrintError(f"The browser could not print {page_file}: {error.message}") from error
    if missing := set(names) - set(pages):
        raise PrintError(f"{len(missing)} headings of {page_file} are on no page of the PDF.")


def find_pages(pdf: Path) -> dict[str, int]:
    """The page, counted from 1, that each named place of a PDF lies on."""
    from pypdf import PdfReader

    reader = PdfReader(pdf)
    places: dict[str, Any] = reader.named_destinations
    return {name.removeprefix("/"): _page(reader, place) for name, place in places.items()}


def _page(reader: Any, place: Any) -> int:
    return int(reader.get_destination_page_number(place)) + 1
