"""Notebooks that start on a machine without this package, such as a fresh Colab runtime.

The notebooks in git stay as they are. A copy gets a first cell that fetches the release, with its published records, and
installs it; the book's Colab buttons open these copies on the branch `colab`, to which a release pushes them.
"""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError
from .storage import atomic_path

COLAB_BRANCH = "colab"  # where .github/workflows/pages.yml puts the copies
FOLDER = "neutral-residues"  # of the release on the other machine
CELL_ID = "install"


def repository_url(source: Path) -> str:
    """Where the repository is published: `$NRLIB_REPOSITORY`, else `repository.url` of `_config.yml`; may be empty.

    Raises
    ------
    ConfigError
        For another form than `https://github.com/<owner>/<name>`, the only one Colab opens.
    """
    settings = yaml.safe_load((source / "_config.yml").read_text(encoding="utf-8"))
    url = os.environ.get("NRLIB_REPOSITORY") or str((settings.get("repository") or {}).get("url") or "")
    url = url.rstrip("/").removesuffix(".git")
    if url and not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        raise ConfigError(
            f"The repository's address is {url!r}, but must have the form https://github.com/<owner>/<name>. Correct "
            "NRLIB_REPOSITORY or repository.url in _config.yml; empty leaves the Colab buttons away."
        )
    return url


def install_cell(url: str, version: str) -> dict[str, Any]:
    """A code cell that fetches and installs release `version` from `url`, where the package is missing.

    The whole release is fetched, not only the package: its published records are loaded instead of trained again. On the
    book's page the cell is left out.
    """
    lines = [
        "# On a machine without this book's package, such as a fresh Colab runtime: fetch and install the release.",
        "import importlib.util",
        "",
        'if importlib.util.find_spec("nrlib") is None:',
        f"    !git -c advice.detachedHead=false clone --quiet --depth 1 --branch v{version} {url} {FOLDER}",
        f'    %pip install --quiet "./{FOLDER}[book,companions]"',
        f"    %cd {FOLDER}",
    ]
    return {
        "cell_type": "code",
        "id": CELL_ID,
        "metadata": {"tags": ["remove-cell"]},
        "source": "\n".join(lines),
        "outputs": [],
        "execution_count": None,
    }


def add_install_cell(notebook: dict[str, Any], url: str, version: str) -> dict[str, Any]:
    """A copy of a notebook with the installing cell first; the notebook itself where no `url` is known."""
    if not url:
        return notebook
    changed = copy.deepcopy(notebook)
    changed["cells"].insert(0, install_cell(url, version))
    return changed


def write_copies(notebooks: list[Path], folder: Path, url: str, version: str) -> None:
    """Write the copies that Colab opens, with the parameters of the notebooks in git, under `folder`."""
    for path in notebooks:
        changed = add_install_cell(json.loads(path.read_text(encoding="utf-8")), url, version)
        with atomic_path(folder / path.name) as temporary:
            temporary.write_text(json.dumps(changed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
