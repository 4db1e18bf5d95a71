"""The book: execute the notebooks, build strictly from a staging folder, check the pages.

    python -m nrlib.book --profile laptop

The notebooks in git carry no outputs; the book renders the copies that papermill has executed. They lie in the staging
folder where their sources lie in the checkout, so that links and labels are the same in both.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from . import __version__
from .chromium import find_chromium
from .config import flat_values, make_config, parameters
from .errors import NrlibError
from .guide import guide_tables
from .launch import COLAB_BRANCH, add_install_cell, repository_url, write_copies
from .lighten import lighten_pages
from .pages import check_pages
from .pdf import print_book
from .profiles import PROFILES
from .storage import atomic_directory, project_directory

PDF = "neutral-residues.pdf"  # in the folder of the book
# Jupyter Book's own lacks language, title and icon; an empty one keeps browsers from asking while they are led on.
FRONT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Neutral residues</title>
<link rel="icon" href="data:,"><meta http-equiv="refresh" content="0; url=book/index.html"></head>
<body><main><h1>Neutral residues</h1><p><a href="book/index.html">To the book</a></p></main></body></html>
"""
PAGES = ("_config.yml", "_toc.yml", "CHANGELOG.md", "book", "nrlib")  # the package for what pages show of its source
# Figures of notebooks that a page of the book shows too: executed by the notebook, captioned there, embedded here.
SHARED_FIGURES = {"methods": ("fig-methods-plane",)}


class BookError(NrlibError):
    """The book could not be built, or its pages do not pass the checks."""


def execute_notebooks(
    profile: str, folder: Path, changes: Mapping[str, Any] | None = None, *, progress: bool = True
) -> dict[str, Path]:
    """Execute the notebooks of the table of contents; their executed copies by name.

    Parameters
    ----------
    profile : given to every notebook that has a parameter of that name; the others have defaults that suit any machine.
    folder : where the executed copies go.
    changes : further parameters, each given to the notebooks that have it.
    progress : show progress bars.
    """
    from .notebooks import execute_notebook, find_notebook, read_parameters

    executed = {}
    for name in notebooks_in_contents(project_directory()):
        declared = read_parameters(find_notebook(name))
        wanted = {key: value for key, value in {"profile": profile, **(changes or {})}.items() if key in declared}
        start = time.monotonic()
        print(f"{name}: executing", flush=True)
        executed[name] = execute_notebook(name, wanted, output_directory=folder, progress=progress)
        print(f"{name}: executed in {time.monotonic() - start:.0f} s", flush=True)
    return executed


def build_book(
    executed: Mapping[str, Path], output: Path, *, source: Path | None = None, with_pdf: bool = False
) -> Path:
    """Build the book from executed notebooks and return its first page.

    Parameters
    ----------
    executed : executed copy of each notebook in the table of contents, by name.
    output : folder of the finished book; replaced only when the build and all checks have passed.
    source : checkout with `_config.yml`, `_toc.yml` and `book/`; default this one.
    with_pdf : print the whole book too, and offer it among the downloads of every page.

    Raises
    ------
    BookError
        For a notebook that is missing or holds an error, a warning of Sphinx, or a page that fails a check.
    BrowserError
        When a PDF is wanted and no browser is found to print it.
    """
    source = source or project_directory()
    check_notebooks(executed, notebooks_in_contents(source))
    stage = output.parent / "stage"
    stage_book(source, executed, stage, with_pdf=with_pdf)
    html = _run_jupyter_book(stage)
    (html / "index.html").write_text(FRONT, encoding="utf-8")
    if with_pdf:
        print_book(_run_jupyter_book(stage, "singlehtml"), html / PDF)
    lighten_pages(html)
    if problems := check_pages(html):
        raise BookError(f"The book was built in {html}, but its pages have problems:\n" + "\n".join(problems))
    with atomic_directory(output) as finished:
        shutil.copytree(html, finished, dirs_exist_ok=True)
    return output / "index.html"


def notebooks_in_contents(source: Path) -> list[str]:
    """Names of the notebooks in `_toc.yml`, in its order."""
    contents = yaml.safe_load((source / "_toc.yml").read_text(encoding="utf-8"))
    files = [Path(entry) for entry in _files(contents)]
    return [path.name for path in files if path.parent.name == "notebooks"]


def _files(entry: Any) -> Iterator[str]:
    if isinstance(entry, list):
        for item in entry:
            yield from _files(item)
    elif isinstance(entry, dict):
        for key, value in entry.items():
            if key == "file":
                yield value
            else:
                yield from _files(value)


def check_notebooks(executed: Mapping[str, Path], expected: list[str]) -> None:
    """Raise BookError for a notebook without executed copy, an unexecuted cell or an error among the outputs."""
    problems = []
    for name in expected:
        path = executed.get(name)
        if path is None or not path.is_file():
            problems.append(f"{name}: there is no executed copy. Run: nrlib run {name}")
            continue
        for number, cell in enumerate(_cells(path), 1):
            if cell["cell_type"] == "code":
                problems += [f"{name}, cell {number}: {problem}" for problem in _cell_problems(cell)]
    if problems:
        raise BookError("The executed notebooks are not fit for the book:\n" + "\n".join(problems))


def _cell_problems(cell: dict[str, Any]) -> Iterator[str]:
    if "".join(cell["source"]).strip() and cell.get("execution_count") is None:
        yield "was not executed"
    for output in cell["outputs"]:
        text = "".join(output.get("text", ""))
        if output["output_type"] == "error":
            yield f"{output.get('ename')}: {output.get('evalue')}"
        elif "Traceback (most recent call last)" in text:
            yield f"a traceback was printed: {text.strip().splitlines()[-1]}"


def _cells(notebook: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return cells


def stage_book(source: Path, executed: Mapping[str, Path], stage: Path, *, with_pdf: bool = False) -> None:
    """Lay pages, executed notebooks and generated passages out as in the checkout, in an empty folder."""
    url = repository_url(source)
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    for name in PAGES:
        if (source / name).is_dir():
            shutil.copytree(source / name, stage / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (source / name).exists():
            shutil.copy(source / name, stage)
    _configure(stage / "_config.yml", url, with_pdf)
    (stage / "notebooks").mkdir()
    for name, path in executed.items():
        notebook = add_install_cell(json.loads(path.read_text(encoding="utf-8")), url, __version__)
        (stage / "notebooks" / f"{name}.ipynb").write_text(json.dumps(notebook, indent=1), encoding="utf-8")
    generated = stage / "book" / "_generated"
    generated.mkdir()
    (generated / "parameters.md").write_text(parameters_table(), encoding="utf-8")
    if (source / "book" / "use_plan.md").exists():
        from .plan_tables import comparison_page, paper_pages

        for name, text in {**paper_pages(), "plan-check.md": comparison_page()}.items():
            (generated / name).write_text(text, encoding="utf-8")
    if (source / "book" / "choose.md").exists():
        for name, text in guide_tables().items():
            (generated / f"{name}.md").write_text(text, encoding="utf-8")
    for name, figures in SHARED_FIGURES.items():
        if name in executed:
            for figure in figures:
                _share_figure(_cells(executed[name]), figure, generated)


def _configure(path: Path, url: str, with_pdf: bool) -> None:
    """Write into the staged settings what only this build knows: where the repository is, and that there is a PDF."""
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings["sphinx"]["config"]["book_pdf"] = PDF if with_pdf else ""
    if url:
        settings["repository"] = {"url": url, "branch": COLAB_BRANCH}  # only the Colab buttons read it
        settings["launch_buttons"] = {"colab_url": "https://colab.research.google.com"}
    path.write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")


def parameters_table() -> str:
    """All parameters of a run as a table in Markdown: name, type, default, what is allowed, description."""
    lines = [
        ":::{table}",
        ":class: parameters",
        "",
        "| name | type | default | allowed | meaning |",
        "|---|---|---|---|---|",
    ]
    values = flat_values(make_config("smoke"))
    for name, field in parameters().items():
        choices, minimum, maximum = (field.metadata[key] for key in ("choices", "minimum", "maximum"))
        if choices := tuple(PROFILES) if name == "profile" else choices:
            allowed = ", ".join(f"`{choice}`" for choice in choices)
        else:
            limits = [f"{sign} {limit:g}" for sign, limit in (("≥", minimum), ("≤", maximum)) if limit is not None]
            allowed = " and ".join(limits) or "any"
        default = f"`{values[name]!r}`" if values[name] != "" else "empty"
        meaning = field.metadata["description"].replace("|", r"\|")
        lines.append(f"| `{name}` | {type(field.default).__name__} | {default} | {allowed} | {meaning} |")
    return "\n".join([*lines, ":::", ""])


def _share_figure(cells: list[dict[str, Any]], name: str, folder: Path) -> None:
    """Write the figure of that name, with the caption and alternative text its notebook gives it, for inclusion."""
    for cell in cells:
        labels = cell["metadata"].get("mystnb", {})
        if labels.get("figure", {}).get("name") != name:
            continue
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                (folder / f"{name}.png").write_bytes(base64.b64decode("".join(output["data"]["image/png"])))
                figure = [f"```{{figure}} _generated/{name}.png", f":alt: {labels['image']['alt']}", ":align: center"]
                figure += [f":name: {name}-shared", "", labels["figure"]["caption"], "```", ""]
                (folder / f"{name}.md").write_text("\n".join(figure), encoding="utf-8")
                return
    raise BookError(f"No executed cell draws the figure {name}, which a page of the book shows.")


def _run_jupyter_book(stage: Path, builder: str = "html") -> Path:
    """Build with every warning an error; returns the folder of what was built."""
    arguments = ["build", str(stage), "--builder", builder, "-W", "--keep-going", "-n"]
    arguments += ["--all"] if builder == "html" else []
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", *arguments]
    python_path = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    settings = {"PYTHONPATH": python_path, "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    environment = {**os.environ, **settings}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode:
        printed = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
        warnings = [line for line in printed.splitlines() if "WARNING" in line or "ERROR" in line]
        report = "\n".join(warnings or printed.splitlines()[-40:]).replace(f"{stage}{os.sep}", "")
        raise BookError(f"Jupyter Book stopped:\n{report}")
    return stage / "_build" / builder


def check_links(stage: Path) -> None:
    """Ask every link of a staged book to another host for an answer; raises BookError for one that leads nowhere."""
    _run_jupyter_book(stage, "linkcheck")


def main(arguments: list[str] | None = None) -> None:
    """Execute, build, and say where the book is."""
    parser = argparse.ArgumentParser(prog="python -m nrlib.book", description="Execute the notebooks, build the book.")
    parser.add_argument("--profile", choices=list(PROFILES), default="laptop")
    parser.add_argument("--output", type=Path, default=project_directory() / "build" / "book")
    parser.add_argument("--pdf", action="store_true", help="print the whole book too; needs Chromium or Chrome")
    parser.add_argument("--links", action="store_true", help="then ask every link to another host for an answer")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        if options.pdf:
            find_chromium()  # before an hour's work, not after
        counts, page = _execute_and_build(options.profile, options.output, with_pdf=options.pdf)
        if options.links:
            check_links(options.output.parent / "stage")
    except NrlibError as error:
        raise SystemExit(f"Error: {error}") from error
    print(
        f"{counts['loaded']} runs loaded, {counts['trained']} trained, in {(time.monotonic() - start) / 60:.1f} minutes"
    )
    print(f"The book: {page.absolute().as_uri()}")


def _execute_and_build(profile: str, output: Path, *, with_pdf: bool) -> tuple[dict[str, int], Path]:
    from .notebooks import find_notebook
    from .records import read_counts

    counts_path = output.parent / "runs.jsonl"
    counts_path.unlink(missing_ok=True)
    os.environ["NRLIB_COUNTS"] = str(counts_path.absolute())  # the notebooks' kernels write there
    executed = execute_notebooks(profile, output.parent / "notebooks")
    print("building the pages", flush=True)
    page = build_book(executed, output, with_pdf=with_pdf)
    if url := repository_url(project_directory()):
        write_copies(
            [find_notebook(name) for name in executed], output.parent / "colab" / "notebooks", url, __version__
        )
    return read_counts(), page


if __name__ == "__main__":
    main()
