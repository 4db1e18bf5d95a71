"""Execute a notebook with changed parameters, by papermill, and make a page of the executed copy.

The kernel is this very Python, whatever kernels are installed for the user, and is reached over TCP on this machine.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigError, NrlibError
from .notebook_parameters import Parameter, check_parameters, convert_value, read_parameters
from .storage import atomic_path, fingerprint, project_directory

__all__ = [
    "Parameter",
    "check_parameters",
    "convert_value",
    "execute_notebook",
    "find_notebook",
    "list_notebooks",
    "read_parameters",
    "render_page",
]

PUBLISHED = {"profile": "laptop"}  # the parameters of the published runs: everything else as in the notebook
CONCLUSIONS = "## What we see"  # the heading of the cell that speaks of them


def list_notebooks() -> list[str]:
    """Names of the notebooks in `notebooks/` of the checkout."""
    return sorted(path.stem for path in (project_directory() / "notebooks").glob("*.ipynb"))


def find_notebook(name: str | Path) -> Path:
    """The file of a notebook, by its name (`methods`) or by its path.

    Raises
    ------
    ConfigError
        When there is none of that name.
    """
    name = str(name)
    candidates = [Path(name)] if name.endswith(".ipynb") else []
    candidates.append(project_directory() / "notebooks" / f"{name.removesuffix('.ipynb')}.ipynb")
    for path in candidates:
        if path.is_file():
            return path.absolute()
    allowed = ", ".join(list_notebooks())
    remedy = f"Allowed: {allowed}, or a path that ends in .ipynb." if allowed else "Run this in the project's checkout."
    raise ConfigError(f"There is no notebook {name!r} in {candidates[-1].parent}. {remedy}")


def execute_notebook(
    name: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    output_directory: Path | str | None = None,
    progress: bool = True,
    publish: bool = False,
) -> Path:
    """Execute a notebook and return the path of the executed copy.

    The copy appears under its name only when all cells have run: `<name>.ipynb`, or `<name>-<8 hexadecimal
    digits>.ipynb` where parameters differ from the notebook's own.

    Parameters
    ----------
    name : name or path of the notebook.
    changes : parameters by name; see `check_parameters`.
    output_directory : default `build/notebooks` of the checkout.
    progress : show what the kernel writes to its standard error stream, such as progress bars.
    publish : write the records of new runs under `data/results/`.

    Raises
    ------
    ConfigError, CorpusError
        Before anything runs.
    NrlibError
        When a cell fails or the kernel dies; the cells so far are kept in `<name>.failed.ipynb`.
    """
    path = find_notebook(name)
    declared, changes = read_parameters(path), check_parameters(path, changes or {})
    changes = {name: value for name, value in changes.items() if value != declared[name].default}
    if publish:
        from .records import check_clean_tree  # torch is slow to import

        check_clean_tree()
    folder = Path(output_directory) if output_directory else project_directory() / "build" / "notebooks"
    target = folder.absolute() / f"{path.stem}{'-' + fingerprint(changes, 8) if changes else ''}.ipynb"
    failed = target.with_suffix(".failed.ipynb")
    with atomic_path(target) as temporary:
        try:
            _run_papermill(path, temporary, changes, progress=progress, publish=publish)
        except BaseException as error:
            message = _explain(error, path, temporary, has_injected_cell=bool(changes))
            if message is None:
                raise
            os.replace(temporary, failed)
            raise NrlibError(f"{message} The cells so far are in {failed}.") from error
        _note_what_the_prose_is_about(temporary, {**_profile(declared), **changes})
    failed.unlink(missing_ok=True)
    return target


def _profile(declared: Mapping[str, Parameter]) -> dict[str, Any]:
    return {"profile": declared["profile"].default} if "profile" in declared else {}


def _note_what_the_prose_is_about(executed: Path, changes: Mapping[str, Any]) -> None:
    """Say above the conclusions that they were written about other runs, where the parameters are not the published ones."""
    if changes in ({}, PUBLISHED):
        return
    import nbformat

    notebook = nbformat.read(executed, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith(CONCLUSIONS):
            values = ", ".join(f"{name} = {value!r}" for name, value in changes.items())
            note = (
                f"```{{note}}\nThese sentences were written about the published runs. This copy was run with {values}: the "
                "numbers in them are this copy's, a number that is missing belongs to a value that was not run, and what "
                "they conclude may not hold.\n```"
            )
            cell.source = f"{CONCLUSIONS}\n\n{note}\n{cell.source.removeprefix(CONCLUSIONS)}"
    nbformat.write(notebook, executed)


def _run_papermill(path: Path, output: Path, changes: Mapping[str, Any], *, progress: bool, publish: bool) -> None:
    import papermill

    package_parent = str(Path(__file__).resolve().parent.parent)
    python_path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    environment = {"PYTHONPATH": python_path, **({"NRLIB_PUBLISH": "1"} if publish else {})}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The specified file .* does not end in")  # the temporary name
        papermill.execute_notebook(
            str(path),
            str(output),
            dict(changes),
            kernel_name="python3",
            language="python",
            cwd=str(path.parent),
            progress_bar=False,
            stderr_file=sys.stderr if progress else None,
            coalesce_streams=True,  # of a progress bar, keep the last state
            kernel_manager_class=_this_python(environment),
        )


def _this_python(environment: dict[str, str]) -> type:
    """A kernel manager that starts the running interpreter, on TCP with encryption where the libraries can."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import default

    spec = KernelSpec(
        # critical messages only: an interrupted kernel complains about its closed socket
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--IPKernelApp.log_level=50"],
        display_name="Python 3",
        language="python",
        env=environment,
        metadata={"debugger": True, "supported_encryption": "curve"},
    )

    class ThisPython(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return spec

        @default("transport")
        def _transport(self) -> str:
            return "tcp"

        @default("transport_encryption")
        def _transport_encryption(self) -> str:
            return "auto"

    return ThisPython


def _explain(error: BaseException, path: Path, output: Path, *, has_injected_cell: bool) -> str | None:
    """One sentence for an error of the notebook; None for one that is not the notebook's."""
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    name = path.name
    if isinstance(error, PapermillExecutionError):
        number = error.cell_index + (0 if has_injected_cell else 1)  # papermill puts its cell behind the parameters
        lines = [line.strip() for line in str(error.evalue).splitlines() if line.strip()]
        # a library's last line is its message; ours are whole paragraphs
        message = " ".join(lines)[:2000] if error.ename.endswith(("SweepError", "NrlibError")) else (lines or [""])[-1]
        return f"{name} failed in cell {number} (In [{error.exec_count}]): {error.ename}: {message}"
    if isinstance(error, DeadKernelError):
        number = _last_started_cell(output) - int(has_injected_cell)
        return (
            f"{name}: the kernel died in cell {number}, most often because the memory was full. Close other programs "
            "or choose a smaller profile, then run the same command again: finished runs are kept."
        )
    if isinstance(error, RuntimeError) and "Kernel" in str(error):
        return f"{name}: the kernel of {sys.executable} did not start ({error}). Install ipykernel there and try again."
    return None


def _last_started_cell(executed: Path) -> int:
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    started = [i for i, cell in enumerate(cells, 1) if cell["metadata"].get("papermill", {}).get("status") != "pending"]
    return max(started, default=1)


def render_page(executed: Path | str) -> Path:
    """An HTML page of an executed notebook, as the book shows it, in the folder `html` beside the notebook.

    Raises
    ------
    NrlibError
        When Sphinx cannot build it.
    """
    from sphinx.application import Sphinx
    from sphinx.errors import SphinxError

    executed = Path(executed)
    target = executed.parent / "html" / f"{executed.stem}.html"
    with tempfile.TemporaryDirectory(prefix="nrlib-page-") as name:
        source, output = Path(name, "source"), Path(name, "html")
        source.mkdir()
        shutil.copy(executed, source)
        try:
            Sphinx(
                srcdir=source,
                confdir=None,
                outdir=output,
                doctreedir=Path(name, "doctrees"),
                buildername="html",
                confoverrides=_page_settings(executed.stem, source),
                status=None,
                warning=None,  # references to other pages of the book lead nowhere here
            ).build()
        except SphinxError as error:
            raise NrlibError(
                f"No page could be made of {executed}: {error} The executed notebook is complete."
            ) from error
        shutil.copytree(output, target.parent, dirs_exist_ok=True)
    return target


def _page_settings(root: str, source: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "root_doc": root,
        "project": "Neutral residues",
        "extensions": ["myst_nb", "sphinx_design", "sphinx_togglebutton"],
        "myst_enable_extensions": ["amsmath", "colon_fence", "dollarmath"],
        "nb_execution_mode": "off",
        "nb_output_stderr": "remove",
        "numfig": True,
        "html_theme": "sphinx_book_theme",
        "html_copy_source": False,
    }
    bibliography = project_directory() / "book" / "references.bib"
    if bibliography.exists():
        shutil.copy(bibliography, source)
        settings["extensions"].append("sphinxcontrib.bibtex")
        settings["bibtex_bibfiles"] = [bibliography.name]
    return settings
