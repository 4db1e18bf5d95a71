"""The browser of this machine is found or its absence explained, and the book is printed with the right page numbers."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from nrlib import book, chromium, pdf
from nrlib.chromium import BrowserError, find_chromium

CHAPTER = """<span id="document-book/{n}"></span><section id="chapter-{n}"><h2>Chapter {n}<a class="headerlink" href="#chapter-{n}">#</a></h2>{pages}
<section id="part-{n}"><h3>Part of {n}</h3><p>Words.</p></section></section>"""
PAGE = """<!doctype html><html lang="en"><head><title>A book \N{EM DASH} documentation</title></head>
<body><nav class="bd-sidebar-primary">Sidebar</nav><main><article class="bd-article"><section id="top"><h1>First page</h1>{}</section></article></main></body></html>"""


def test_browser_is_named_by_the_environment_or_found_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chromium, "MACOS", ())
    monkeypatch.delenv("NRLIB_CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BrowserError, match="apt install chromium"):
        find_chromium()
    program = tmp_path / "google-chrome"
    program.write_text("#!/bin/sh\n", encoding="utf-8")
    program.chmod(0o755)
    assert find_chromium() == program
    monkeypatch.setenv("NRLIB_CHROMIUM", sys.executable)
    assert find_chromium() == Path(sys.executable)
    monkeypatch.setenv("NRLIB_CHROMIUM", "/nowhere/chromium")
    with pytest.raises(BrowserError, match="/nowhere/chromium"):
        find_chromium()


def test_a_missing_browser_is_told_before_the_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NRLIB_CHROMIUM", "/nowhere/chromium")
    monkeypatch.setattr(book, "execute_notebooks", lambda *_a, **_k: pytest.fail("the notebooks were executed"))
    with pytest.raises(SystemExit, match="/nowhere/chromium"):
        book.main(["--pdf", "--output", str(tmp_path / "book")])


@pytest.mark.browser
@pytest.mark.slow
def test_printed_book_has_contents_with_page_numbers_and_an_outline(tmp_path: Path) -> None:
    from pypdf import PdfReader

    try:
        find_chromium()
    except BrowserError as error:
        if os.environ.get("NRLIB_REQUIRE_BROWSER") == "1":
            raise
        pytest.skip(str(error))
    long = '<div style="height: 60cm">Long.</div>'  # more than two pages
    chapters = "".join(CHAPTER.format(n=n, pages=long) for n in (1, 2, 3))
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "index.html").write_text(PAGE.format(chapters), encoding="utf-8")
    target = tmp_path / "book.pdf"
    pdf.print_book(tmp_path / "single", target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.pdf", "single"]

    reader = PdfReader(target)
    texts = [page.extract_text() for page in reader.pages]
    assert "A book" in texts[0] and "documentation" not in texts[0]
    assert "Sidebar" not in "".join(texts)
    contents = dict(re.findall(r"(Chapter \d|First page)\W*?(\d+)\b", texts[1].replace("\n", " ")))
    assert list(contents) == ["First page", "Chapter 1", "Chapter 2", "Chapter 3"]
    for heading, number in contents.items():
        assert heading in texts[int(number) - 1], heading
        assert number in texts[int(number) - 1].split("\n"), "the page's own number stands below it"
    assert int(contents["Chapter 2"]) - int(contents["Chapter 1"]) >= 3
    top, nested = reader.outline[:2]
    assert top.title == "First page"
    chapters = [entry.title for entry in nested if not isinstance(entry, list)]
    assert [title.rstrip("#") for title in chapters] == ["Chapter 1", "Chapter 2", "Chapter 3"]
