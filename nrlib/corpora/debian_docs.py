"""The corpus `debian-docs:<language>[/<group>+<group>...]`: documentation translated by volunteers, from Debian packages.

Packages come from the system's own sources through `apt-get` with folders of its own, so no root is needed, and are
read with `dpkg-deb`; nothing is installed. This module holds recipes, never texts. What was downloaded and extracted
stays in the cache: later calls need neither network nor apt.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import storage
from ..errors import CorpusError
from .debian_packages import OTHERWISE, exclusive, fetch_packages, package_version, read_members
from .debian_recipes import FAMILIES, OTHER_NAMES, Family, groups_of, languages, packages_of, page_pattern
from .documents import Document
from .extract import EXTRACTOR_VERSION, html_paragraphs, mallard_paragraphs, mallard_titles, paragraphs_kept
from .man_pages import man_paragraphs

_NO_PROSE = re.compile(r"(^|/)(search|genindex|index)$")  # tables of contents and empty search pages


def load_debian_docs(languages_and_groups: str, progress: bool = True) -> tuple[list[Document], dict[str, str]]:
    """Resolve `debian-docs:<languages_and_groups>`: download, unpack and extract what is not in the cache yet.

    Parameters
    ----------
    languages_and_groups
        A language, alone (`"fr"`: all its groups) or with groups (`"en/libreoffice+gnome"`).
    progress
        Show progress bars on the standard error stream.

    Returns
    -------
    documents, versions
        One document per page, sorted by id; a page has the id of its translations. A paragraph stands in the first
        document that holds it only. Versions by package name.

    Raises
    ------
    CorpusError
        Unknown language or group, no apt, no network, or a package the system's sources do not hold.
    StorageError
        The cache cannot be written.
    """
    language, groups = _parse(languages_and_groups)
    documents: list[Document] = []
    versions: dict[str, str] = {}
    for group in groups:
        group_documents, group_versions = _load_group(language, group, progress)
        documents += group_documents
        versions |= group_versions
    return _without_repeats(sorted(documents, key=lambda document: document.id)), dict(sorted(versions.items()))


def _parse(text: str) -> tuple[str, list[str]]:
    language, _, names = text.strip().partition("/")
    language = language.lower().replace("_", "-")
    language = OTHER_NAMES.get(language, language)
    if language not in languages():
        raise CorpusError(f"debian-docs:{text}: unknown language {language!r}. Allowed: {', '.join(languages())}.")
    allowed = groups_of(language)
    groups = sorted({name.strip() for name in names.split("+")}) if names else allowed
    unknown = [group for group in groups if group not in allowed]
    if unknown:
        raise CorpusError(
            f"debian-docs:{text}: no group {', '.join(map(repr, unknown))} in the recipe of language {language!r}. "
            f"Allowed: {', '.join(allowed)}; several are joined by '+'."
        )
    return language, groups


def _load_group(language: str, group: str, progress: bool) -> tuple[list[Document], dict[str, str]]:
    families = [f for f in FAMILIES if f.group == group and language in f.languages.split()]
    names = [name for family in families for name in packages_of(family, language)]
    folder = storage.cache_directory().resolve() / "corpora" / "debian-docs"
    path = folder / f"{language}.{group}.jsonl"
    recipe = storage.fingerprint([EXTRACTOR_VERSION, *map(astuple, families)], 16)
    if (cached := _read_extraction(path, recipe)) is not None:
        return cached
    with exclusive(folder):  # two runs that start together download and extract once
        if (cached := _read_extraction(path, recipe)) is None:
            archives = fetch_packages(names, folder, f"group {group!r} of debian-docs:{language}", progress)
            records = _extract(families, language, archives, f"extract {language}/{group}", progress)
            header = {
                "recipe": recipe,
                "packages": {name: package_version(archive) for name, archive in archives.items()},
                "n_documents": len(records),
            }
            with storage.atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as handle:
                handle.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in [header, *records])
            cached = _read_extraction(path, recipe)
    assert cached is not None
    return cached


def _read_extraction(path: Path, recipe: str) -> tuple[list[Document], dict[str, str]] | None:
    """What an earlier run extracted, if it is whole and was made by this recipe and extractor."""
    try:
        with open(path, encoding="utf-8") as handle:
            header = json.loads(next(handle))
            if header["recipe"] != recipe:
                return None
            documents = [Document(**json.loads(line)) for line in handle]
    except (OSError, StopIteration, ValueError, KeyError, TypeError):
        return None
    return (documents, header["packages"]) if len(documents) == header["n_documents"] else None


def _extract(
    families: list[Family], language: str, archives: dict[str, Path], title: str, progress: bool
) -> list[dict[str, Any]]:
    records: dict[str, dict[str, Any]] = {}
    with tqdm(desc=title, unit=" pages", disable=not progress) as bar:
        for family in families:
            for package in packages_of(family, language):
                pages = dict(_pages(family, language, archives[package]))
                if not pages:
                    raise CorpusError(
                        f"Package {package} {package_version(archives[package])} holds no pages where the recipe of "
                        f"group {family.group!r} looks for language {language!r}; this release of the package is laid "
                        f"out differently. Leave the group out. {OTHERWISE}"
                    )
                titles = mallard_titles(pages.values()) if family.name == "gnome-user-docs" else {}
                for name, page in sorted(pages.items()):
                    bar.update()
                    paragraphs = paragraphs_kept(_paragraphs_of(family, page, titles), language)
                    identity = f"{family.group}/{family.name}/{name}"
                    if paragraphs and identity not in records:
                        records[identity] = {
                            "id": identity,
                            "source": family.group,
                            "text": "\n\n".join(paragraphs),
                            "licence": family.licence,
                        }
    return [records[identity] for identity in sorted(records)]


def _pages(family: Family, language: str, archive: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each page of the language in a package."""
    for match, content in read_members(archive, page_pattern(family, language)):
        if not _NO_PROSE.search(match[1]):
            yield match[1], gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def _paragraphs_of(family: Family, page: bytes, titles: dict[str, str]) -> list[str]:
    if family.name == "manpages":
        return man_paragraphs(page.decode("utf-8", errors="replace"))
    return mallard_paragraphs(page, titles) if family.name == "gnome-user-docs" else html_paragraphs(page)


def _without_repeats(documents: list[Document]) -> list[Document]:
    seen: set[str] = set()
    kept = []
    for document in documents:
        paragraphs = [paragraph for paragraph in document.text.split("\n\n") if paragraph not in seen]
        seen.update(paragraphs)
        if paragraphs:
            kept.append(Document(document.id, document.source, "\n\n".join(paragraphs), document.licence))
    return kept
