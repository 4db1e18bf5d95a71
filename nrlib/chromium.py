"""The Chromium or Chrome of this machine, driven by Playwright: prints the book and, in the tests, reads it.

Playwright's own browsers are not used, so that nothing beyond the package index is downloaded.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import NrlibError

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
MACOS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
# Nothing but this machine can be reached, whatever a page asks for, and the browser asks for nothing itself.
OPTIONS = (
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",  # small in containers, where pages then crash
    "--disable-gpu",
    "--disable-sync",
    "--no-first-run",
)


class BrowserError(NrlibError):
    """No browser was found, or Playwright is not installed."""


def find_chromium() -> Path:
    """`$NRLIB_CHROMIUM`, else the first of the usual names that is installed.

    Raises
    ------
    BrowserError
        When there is none.
    """
    if named := os.environ.get("NRLIB_CHROMIUM"):
        if found := shutil.which(named):
            return Path(found)
        raise BrowserError(f"NRLIB_CHROMIUM = {named} is no program. Set it to the path of Chromium or Chrome.")
    for name in (*NAMES, *MACOS):
        if found := shutil.which(name):
            return Path(found)
    raise BrowserError(
        f"No browser was found under the names {', '.join(NAMES)}. Install Chromium (Debian: apt install chromium; macOS: "
        "brew install --cask chromium) or Chrome, or set NRLIB_CHROMIUM to its path."
    )


@contextmanager
def open_chromium() -> Iterator[Browser]:
    """A headless browser with a profile of its own, closed at the end of the block.

    Raises
    ------
    BrowserError
        When there is no browser, or no Playwright to drive it.
    """
    program = find_chromium()
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError as error:
        raise BrowserError("Playwright is not installed. Run: pip install 'nrlib[pdf]'") from error
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0  # as in a container: Chromium's sandbox refuses
    options = [*OPTIONS, "--no-sandbox"] if is_root else list(OPTIONS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=options)
        try:
            yield browser
        finally:
            browser.close()
