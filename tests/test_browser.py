"""The book as its readers meet it: every page in a real browser, with nothing but this machine to be reached.

`make browser` runs these on the book that `make book` built. Without Chromium or Chrome they are skipped, unless
NRLIB_REQUIRE_BROWSER=1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reading

from nrlib.chromium import BrowserError, find_chromium, open_chromium

pytestmark = [pytest.mark.browser, pytest.mark.slow]

BAD_PAGE = """<!doctype html><html lang="en" data-theme="light"><head><title>Bad</title>
<script>
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", () => { document.documentElement.dataset.theme = dark.matches ? "dark" : "light"; });
</script>
<style>p { color: #444; background: #fff } [data-theme=dark] p { color: #444; background: #333 }</style></head>
<body><main><h1>Bad</h1><p>Dark on dark.</p><div style="width: 500px">wide</div><img src="missing.png"></main>
<script>fetch("http://example.org/a").catch(() => 0); undefined_name()</script></body></html>"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        find_chromium()
    except BrowserError as error:
        if os.environ.get("NRLIB_REQUIRE_BROWSER") == "1":
            raise
        pytest.skip(str(error))
    with open_chromium() as opened:
        yield opened


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport=reading.DESKTOP)
    yield context.new_page()
    context.close()


@pytest.fixture(scope="module")
def visits(browser: Any, built_book: Path) -> dict[str, reading.Visit]:
    """Every page of the book, visited once for all questions below."""
    context = browser.new_context(viewport=reading.DESKTOP)
    page = context.new_page()
    with reading.serve(built_book) as address:
        found = {path: reading.visit(page, address, path) for path in reading.pages_of(built_book)}
    context.close()
    return found


def report(visits: dict[str, reading.Visit], problems: Any) -> str:
    return "\n".join(f"{path}: {problem}" for path, visit in visits.items() for problem in problems(visit))


def test_every_page_loads_without_an_error(visits: dict[str, reading.Visit]) -> None:
    assert len(visits) > 20
    assert not report(visits, lambda visit: visit.errors)
    assert not [path for path, visit in visits.items() if not visit.text.strip()]


def test_no_page_asks_another_host(visits: dict[str, reading.Visit]) -> None:
    assert not report(visits, lambda visit: visit.requests)


def test_no_page_shows_a_traceback(visits: dict[str, reading.Visit]) -> None:
    shown = {path: visit for path, visit in visits.items() if not path.startswith("_modules/")}  # our own sources
    assert not [path for path, visit in shown.items() if "Traceback (most recent call last)" in visit.text]


@pytest.mark.parametrize("theme", reading.THEMES)
def test_axe_finds_no_serious_violation(visits: dict[str, reading.Visit], theme: str) -> None:
    assert not report(visits, lambda visit: visit.violations[theme])


def test_no_page_is_wider_than_a_phone(visits: dict[str, reading.Visit]) -> None:
    assert not report(visits, lambda visit: visit.too_wide)


def test_pages_work_from_the_disk(page: Any, built_book: Path) -> None:
    """Opened as a file, as from an unpacked archive, with the network cut."""
    page.context.set_offline(True)
    address = f"{built_book.as_uri()}/"
    visits = {path: reading.visit(page, address, path, is_examined=False) for path in reading.pages_of(built_book)}
    assert not report(visits, lambda visit: [*visit.errors, *visit.requests])


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        ("forgetting", "notebooks/methods.html"),
        ("Debian", "book/reproduce.html"),
        ("GatedAdapter", "book/api"),
    ],
)
def test_search_finds(page: Any, built_book: Path, term: str, expected: str) -> None:
    with reading.serve(built_book) as address:
        page.goto(address + "book/index.html")
        page.keyboard.press("Control+k")
        page.locator("dialog[open] input[type=search], .bd-search input[type=search]:visible").first.fill(term)
        page.keyboard.press("Enter")
        page.wait_for_url("**/search.html?q=*")
        page.wait_for_selector("#search-results li a")
        page.wait_for_function("() => document.querySelector('#search-results .search-summary')?.textContent.includes('found')")  # fmt: skip
        links = page.eval_on_selector_all("#search-results li a", "(links) => links.map((link) => link.href)")
    assert any(expected in link for link in links), links


def test_the_theme_is_switched_by_its_button_and_kept(page: Any, built_book: Path) -> None:
    with reading.serve(built_book) as address:
        page.goto(address + "book/index.html")
        themes = []
        for _ in range(3):  # light, dark, the system's
            page.locator("button.theme-switch-button:visible").first.click()
            themes.append(page.evaluate("document.documentElement.dataset.mode"))
        assert set(themes) == {"light", "dark", "auto"}
        while page.evaluate("document.documentElement.dataset.mode") != "dark":
            page.locator("button.theme-switch-button:visible").first.click()
        page.goto(address + "search.html")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_code_is_copied_by_its_button(page: Any, built_book: Path) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    with reading.serve(built_book) as address:
        page.goto(address + "notebooks/quickstart.html")
        cell = page.locator("div.highlight:has(button.copybtn)").first
        cell.hover()
        cell.locator("button.copybtn").click()
        copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.strip() and copied.strip() in cell.inner_text().replace("\xa0", " ")


def test_a_picture_opens_alone_to_be_enlarged(page: Any, built_book: Path) -> None:
    with reading.serve(built_book) as address:
        page.goto(address + "notebooks/methods.html")
        picture = page.locator("a.picture img").first
        box = picture.bounding_box()  # its place is kept before it is loaded
        assert box["height"] > 100
        picture.click()
        page.wait_for_url("**/_images/*.png")


def test_print_hides_what_only_a_screen_needs(page: Any, built_book: Path) -> None:
    page.goto((built_book / "notebooks" / "methods.html").as_uri())
    page.emulate_media(media="print")
    for selector in ("#pst-primary-sidebar", ".bd-header-article", ".prev-next-footer", "button.copybtn"):
        assert not page.locator(f"{selector}:visible").count(), selector
    assert page.locator("article.bd-article h1:visible").count() == 1
    for block in page.query_selector_all("article.bd-article pre, article.bd-article table"):
        assert block.evaluate("(e) => e.scrollWidth <= e.clientWidth + 2"), block.inner_text()[:80]  # nothing cut off


def test_the_dials_of_the_explorer_change_picture_table_and_commands(page: Any, built_book: Path) -> None:
    with reading.serve(built_book) as address:
        page.goto(address + "book/explorer.html")
        page.wait_for_selector(".explorer-plot svg, .explorer-plot canvas")
        rows = page.locator(".explorer-table tbody tr:visible")
        every = rows.count()
        assert every > 20

        def picture() -> bytes:
            return page.locator(".explorer-plot").screenshot()

        before = picture()
        page.focus("#explorer-mix_ratio")  # by keyboard alone
        page.keyboard.press("ArrowRight")
        page.wait_for_function("(n) => [...document.querySelectorAll('.explorer-table tbody tr')].filter((r) => r.offsetParent).length < n", arg=every)  # fmt: skip
        page.wait_for_timeout(500)  # the picture is drawn after the table
        assert 0 < rows.count() < every
        assert picture() != before
        assert "mix_ratio=" in page.evaluate("location.hash")

        chosen = []
        for row in (rows.first, rows.last):
            row.locator("button").first.press("Enter")
            page.wait_for_function("() => document.querySelector('.explorer-commands').textContent.includes('nrlib ')")
            chosen.append(page.inner_text(".explorer-commands"))
        assert chosen[0] != chosen[1]

        shown, link = rows.count(), page.url
        page.goto("about:blank")
        page.goto(link)
        page.wait_for_selector(".explorer-plot svg, .explorer-plot canvas")
        assert rows.count() == shown  # the link holds the view


def test_the_checks_above_see_what_they_look_for(page: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(BAD_PAGE, encoding="utf-8")
    (tmp_path / "favicon.ico").write_bytes(b"")
    with reading.serve(tmp_path) as address:
        seen = reading.visit(page, address, "bad.html")
    assert any("undefined_name" in error for error in seen.errors)
    assert any("404" in error for error in seen.errors)
    assert "http://example.org/a" in seen.requests
    assert any("image-alt" in violation for violation in seen.violations["light"])
    assert not any("color-contrast" in violation for violation in seen.violations["light"])
    assert any("color-contrast" in violation for violation in seen.violations["dark"])
    assert seen.too_wide
