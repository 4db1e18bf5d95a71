"""The book: notebooks are checked before it is built, pages after."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from nrlib import book
from nrlib.config import parameters
from nrlib.pages import check_pages
from nrlib.storage import project_directory

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def code_cell(*outputs: dict[str, Any], metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "cell_type": "code", "id": "c", "metadata": metadata or {}, "source": "1", "execution_count": 1,
        "outputs": list(outputs),
    }  # fmt: skip


def write_notebook(path: Path, *cells: dict[str, Any]) -> Path:
    title = {"cell_type": "markdown", "id": "t", "metadata": {}, "source": f"# {path.stem}"}
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = {"cells": [title, *cells], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return path


def figure_cell(name: str, alt: str | None) -> dict[str, Any]:
    image = {"data": {"image/png": base64.b64encode(PIXEL).decode()}, "metadata": {}, "output_type": "display_data"}
    labels: dict[str, Any] = {"figure": {"caption": "A caption.", "name": name}}
    if alt is not None:
        labels["image"] = {"alt": alt}
    return code_cell(image, metadata={"mystnb": labels})


def glue_cell(key: str, value: str) -> dict[str, Any]:
    data = {"text/plain": repr(value)}
    metadata = {"scrapbook": {"mime_prefix": "application/papermill.record/", "name": key, "has_mime_prefix": True}}
    output = {"data": {f"application/papermill.record/{k}": v for k, v in data.items()}, "metadata": metadata}
    return code_cell({**output, "output_type": "display_data"})


@pytest.fixture
def small_book(tmp_path: Path) -> Path:
    """A checkout of two pages and one notebook, with the settings of the real one."""
    source = tmp_path / "checkout"
    (source / "book").mkdir(parents=True)
    settings = (project_directory() / "_config.yml").read_text(encoding="utf-8")
    (source / "_config.yml").write_text(settings, encoding="utf-8")
    (source / "_toc.yml").write_text(
        "format: jb-book\nroot: book/index\nchapters:\n- file: notebooks/methods\n", encoding="utf-8"
    )
    (source / "book" / "references.bib").write_text("", encoding="utf-8")
    for name in ("_extensions", "_static"):
        (source / "book" / name).symlink_to(project_directory() / "book" / name)
    (source / "book" / "index.md").write_text(
        "# Title\n\n$$ a^2 $$ (eq-a)\n\nSee {eq}`eq-a`, [](../notebooks/methods.ipynb) and "
        "{glue:text}`../notebooks/methods.ipynb::number:s`.\n\n```{include} _generated/fig-methods-plane.md\n```\n",
        encoding="utf-8",
    )
    return source


def test_contents_name_existing_files() -> None:
    root = project_directory()
    names = book.notebooks_in_contents(root)
    assert names[:2] == ["forgetting", "capacity"]
    assert all((root / "notebooks" / f"{name}.ipynb").exists() for name in names)


def test_parameters_table_has_every_parameter_once() -> None:
    lines = [line for line in book.parameters_table().splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == list(parameters())
    assert all(line.count(" | ") == 4 for line in lines)


def test_reference_has_every_module() -> None:
    root = project_directory()
    documented = {
        line.removeprefix(".. automodule:: nrlib.")
        for page in (root / "book").glob("api*.md")
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith(".. automodule::")
    }
    package = root / "nrlib"
    modules = {
        ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
        for path in package.rglob("*.py")
        if path.parent.name != "commands"
    } - {"__init__", "__main__", "cli"}
    # A companion's or a study's modules need no entry of their own; every other module has one, and no entry is empty.
    required = {name for name in modules if not name.startswith(("companions", "studies"))}
    assert required <= documented <= modules


def test_missing_failed_and_unexecuted_notebooks_are_named(tmp_path: Path) -> None:
    error = {"output_type": "error", "ename": "ValueError", "evalue": "too small", "traceback": []}
    printed = {
        "output_type": "stream",
        "name": "stderr",
        "text": "Traceback (most recent call last):\n  …\nKeyError: 3\n",
    }
    executed = {
        "failed": write_notebook(tmp_path / "failed.ipynb", code_cell(error)),
        "printed": write_notebook(tmp_path / "printed.ipynb", code_cell(printed)),
        "skipped": write_notebook(tmp_path / "skipped.ipynb", code_cell() | {"execution_count": None}),
        "fine": write_notebook(tmp_path / "fine.ipynb", code_cell()),
    }
    with pytest.raises(book.BookError) as caught:
        book.check_notebooks(executed, [*executed, "missing"])
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 4
    for line, words in zip(
        lines, ("failed.*ValueError", "KeyError: 3", "skipped.*not executed", "missing"), strict=True
    ):
        assert re.search(words, line)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("<a href='other.html#here'>x</a><img src='a.png' alt='A finding'>", None),
        ("<a href='nowhere.html'>x</a>", "leads nowhere"),
        ("<a href='other.html#there'>x</a>", "anchor"),
        ("<a href='#there'>x</a>", "anchor"),
        ("<a href='other.html#gate=relu'>x</a>", None),  # what the explorer shows
        ("<img src='a.png'>", "alternative text"),
        ("<img src='a.png' alt='a.png'>", "alternative text"),
        ("<img src='a.png' alt='_images/3f2a.png'>", "alternative text"),
        ("<img src='a.png' alt='ALT_SIZES'>", "a placeholder, ALT_SIZES"),
        ("<img src='a.png' alt='TODO'>", "a placeholder, TODO"),
        ("<img src='a.png' alt='A'>", "a placeholder, A"),
        ("<script src='https://example.org/x.js'></script>", "another host"),
        ("<link rel='stylesheet' href='//example.org/x.css'>", "another host"),
        ("<p>{glue:text}`number` percent</p>", "role"),
        ("<pre>{glue:text}`number` percent</pre>", None),
        ("<pre>Traceback (most recent call last):\n  …</pre>", "traceback"),
        pytest.param("<p>" + 500_000 * "x" + "</p>", "500 kB", id="large"),
        pytest.param("<img alt='A is low' src='data:image/png;base64," + 500_000 * "A" + "'>", None, id="large image"),
        ("<a href='https://example.org/'>x</a><link rel='canonical' href='https://example.org/'>", None),
    ],
)
def test_page_checks(tmp_path: Path, body: str, problem: str | None) -> None:
    page = "<!doctype html><html><head></head><body><main>{}</main></body></html>"
    (tmp_path / "a.png").write_bytes(PIXEL)
    (tmp_path / "other.html").write_text(page.format("<p id='here'>x</p>"), encoding="utf-8")
    (tmp_path / "index.html").write_text(page.format(body), encoding="utf-8")
    problems = check_pages(tmp_path)
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


@pytest.mark.slow
def test_small_book_is_built_and_replaced_only_by_a_good_one(small_book: Path, tmp_path: Path) -> None:
    output = tmp_path / "build" / "book"
    good = write_notebook(
        tmp_path / "good.ipynb", figure_cell("fig-methods-plane", "A is low"), glue_cell("number", "42%")
    )
    page = book.build_book({"methods": good}, output, source=small_book)
    assert page.exists()
    text = (output / "book" / "index.html").read_text(encoding="utf-8")
    assert "42%" in text and "<math" in text and 'alt="A is low"' in text
    assert not re.search(r"<script[^>]*mathjax", text, re.IGNORECASE)

    bad = write_notebook(
        tmp_path / "bad.ipynb", figure_cell("fig-methods-plane", "A is low"), figure_cell("fig-b", None)
    )
    with pytest.raises(book.BookError, match="number"):  # the glued number is gone: a warning of Sphinx
        book.build_book({"methods": bad}, output, source=small_book)
    assert (output / "book" / "index.html").read_text(encoding="utf-8") == text


@pytest.mark.slow
def test_notebooks_execute_and_the_book_builds_strictly(built_book: Path) -> None:
    """Every notebook on the smallest profile with one seed and rate, without a network, then the book from them."""
    contents = book.notebooks_in_contents(project_directory())
    assert {path.stem for path in (built_book / "notebooks").glob("*.html")} == set(contents)
