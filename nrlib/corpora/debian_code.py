"""The corpus `debian-code:<language>`: source code from Debian packages, a domain that is no language of people.

Packages come from the system's own sources as those of `debian_docs` do. A document is a file, as it was written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .. import storage
from ..errors import CorpusError
from .debian_packages import exclusive, fetch_packages, package_version, read_members
from .documents import Document

MIN_BYTES, MAX_BYTES = 500, 60_000  # shorter files hold imports, longer ones tables of data


@dataclass(frozen=True)
class Recipe:
    """Packages of code in one language, and the licence of each."""

    packages: dict[str, str]
    paths: str  # of the files in a package; the first parenthesis goes into the id


RECIPES = {
    "python": Recipe(
        {"python3-django": "BSD-3-Clause (Django)", "python3-sphinx": "BSD-2-Clause (Sphinx)"},
        r"usr/lib/python3/dist-packages/((?:django|sphinx)/.+)\.py",
    ),
}


def parse_debian_code(name: str) -> Recipe:
    """The recipe of `debian-code:<name>`.

    Raises
    ------
    CorpusError
        For a language without one.
    """
    if name not in RECIPES:
        raise CorpusError(f"debian-code:{name}: there is no recipe for {name!r}. Allowed: {', '.join(RECIPES)}.")
    return RECIPES[name]


def load_debian_code(name: str, progress: bool = True) -> tuple[list[Document], dict[str, str]]:
    """Resolve `debian-code:<name>`: download what is not in the cache yet, and read the files.

    Returns
    -------
    documents, versions
        One document per file, sorted by id; files too short or too long are left out. Versions by package name.

    Raises
    ------
    CorpusError
        Unknown language, no apt, no network, or a package the system's sources do not hold.
    StorageError
        The cache cannot be written.
    """
    recipe = parse_debian_code(name)
    folder = storage.cache_directory().resolve() / "corpora" / "debian-code"
    with exclusive(folder):  # two runs that start together download once
        archives = fetch_packages(list(recipe.packages), folder, f"the corpus debian-code:{name}", progress)
    documents = [
        Document(f"{package}/{match[1]}", package, content.decode(), recipe.packages[package])
        for package, archive in archives.items()
        for match, content in read_members(archive, re.compile(recipe.paths))
        if MIN_BYTES <= len(content) <= MAX_BYTES and _is_utf8(content)
    ]
    if not documents:
        raise CorpusError(
            f"debian-code:{name}: the packages {', '.join(archives)} hold no files where the recipe looks; this release of "
            "them is laid out differently. Use your own code: file:<glob>."
        )
    return sorted(documents, key=lambda d: d.id), {p: package_version(a) for p, a in sorted(archives.items())}


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
