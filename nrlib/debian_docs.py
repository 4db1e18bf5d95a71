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
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import storage
from .debian_packages import OTHERWISE, exclusive, fetch_packages, package_version, read_members
from .documents import Document
from .errors import CorpusError
from .extract import EXTRACTOR_VERSION, html_paragraphs, mallard_paragraphs, mallard_titles, paragraphs_kept
from .man_pages import man_paragraphs


@dataclass(frozen=True)
class Family:
    """Packages that hold the same pages in several languages.

    In the templates `{package}` is a language as in package names (pt-br), `{locale}` as in locales (pt_BR), `{tag}`
    as in BCP 47 (pt-BR) and `{region}` a pattern for a tag with any region (fr-[A-Z]{2}).
    """

    group: str
    name: str
    languages: str
    packages: str
    paths: str  # of the pages in the package; the first parenthesis, the same in all languages, goes into the id
    licence: str
    english_packages: str = ""  # where English does not follow the pattern
    english_paths: str = ""


_DEV_MAN_PAGES = "en cs da de es fr it ja nl pl pt pt-br ru uk"
_MAN_LICENCE = "various free licences, see /usr/share/doc/manpages/copyright"

FAMILIES = (
    Family(
        "libreoffice",
        "libreoffice-help",
        "ca cs da de el en es et eu fi fr gl hi hu id it ja ko nl pl pt pt-br ru sk sl sv tr vi zh-cn zh-tw",
        "libreoffice-help-{package}",
        r"usr/share/libreoffice/help/{tag}/text/(.+)\.html",
        "MPL-2.0 (LibreOffice help)",
        english_packages="libreoffice-help-en-us",
        english_paths=r"usr/share/libreoffice/help/en-US/text/(.+)\.html",
    ),
    Family(
        "manpages",
        "manpages",
        "cs da de en es fi fr hu id it ja nb nl pl pt-br ro ru sr sv tr uk vi zh-cn zh-tw",
        "manpages-{package}",
        r"usr/share/man/{locale}/(man\d/.+)\.gz",
        _MAN_LICENCE,
        english_packages="manpages",
        english_paths=r"usr/share/man/(man\d/.+)\.gz",
    ),
    Family(
        "debian",
        "debian-reference",
        "de en es fr id it ja pt pt-br zh-cn zh-tw",
        "debian-reference-{package}",
        r"usr/share/debian-reference/(.+)\.{package}\.html",
        "GPL-2+ (Debian Reference)",
    ),
    Family(
        "debian",
        "developers-reference",
        "de en fr it ja ru",
        "developers-reference-{package}",
        r"usr/share/developers-reference/{package}/([^/]+)\.html",
        "GPL-2+ (Debian Developer's Reference)",
        english_packages="developers-reference",
        english_paths=r"usr/share/developers-reference/([^/]+)\.html",
    ),
    Family(
        "debian",
        "aptitude-doc",
        "cs en es fi fr it ja nl ru",
        "aptitude-doc-{package}",
        r"usr/share/doc/aptitude/html/{package}/(.+)\.html",
        "GPL-2+ (aptitude user's manual)",
    ),
    Family(
        "debian",
        "debian-faq",
        "de en fr it ja nl pt ru zh-cn",
        "debian-faq-{package}",
        r"usr/share/doc/debian/FAQ/(?:.+/)?([^/]+)\.{package}\.html",
        "GPL-2+ (Debian FAQ)",
        english_packages="debian-faq",
    ),
    Family(
        "gnome",
        "gnome-user-docs",
        "ca cs da de el en es fi fr gl hr hu id it ja ko nl pl pt pt-br ro ru sl sr sv tr uk vi zh-cn",
        "gnome-user-docs",
        r"usr/share/help/{locale}/(.+)\.page",
        "CC-BY-SA-3.0 (GNOME user documentation)",
        english_paths=r"usr/share/help/C/(.+)\.page",
    ),
    Family(
        "installation",
        "installation-guide",
        "ca cs da de el en es fr id it ja ko nl pt ro ru sv vi zh-cn",
        "installation-guide-amd64",
        r"usr/share/doc/installation-guide-amd64/{locale}/(.+)\.html",
        "GPL-2 (Debian installation guide)",
    ),
    Family(
        "handbook",
        "debian-handbook",
        "ca cs de en es fr id it ja nb nl pl pt-br ro ru sv tr vi zh-cn zh-tw",
        "debian-handbook",
        r"usr/share/doc/debian-handbook/html/{region}/(.+)\.html",
        "CC-BY-SA-3.0 or GPL-2+ (The Debian Administrator's Handbook)",
    ),
)
_OTHER_NAMES = {"zh": "zh-cn", "en-us": "en"}
_NO_PROSE = re.compile(r"(^|/)(search|genindex|index)$")  # tables of contents and empty search pages


def languages() -> list[str]:
    """The languages there is a recipe for."""
    return sorted({language for family in FAMILIES for language in family.languages.split()})


def groups_of(language: str) -> list[str]:
    """The groups the recipe of `language` lists."""
    return sorted({family.group for family in FAMILIES if language in family.languages.split()})


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
    language = _OTHER_NAMES.get(language, language)
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


def _packages(family: Family, language: str) -> list[str]:
    is_man = family.name == "manpages"
    name = "zh" if is_man and language.startswith("zh-") else language  # one package for both scripts
    name = family.packages.format(package=name)
    if language == "en":
        name = family.english_packages or name
    return [name, f"{name}-dev"] if is_man and language in _DEV_MAN_PAGES.split() else [name]


def _load_group(language: str, group: str, progress: bool) -> tuple[list[Document], dict[str, str]]:
    families = [f for f in FAMILIES if f.group == group and language in f.languages.split()]
    names = [name for family in families for name in _packages(family, language)]
    folder = storage.cache_directory().resolve() / "corpora" / "debian-docs"
    path = folder / f"{language}.{group}.jsonl"
    recipe = storage.fingerprint([EXTRACTOR_VERSION, *map(astuple, families)], 16)
    if (cached := _read_extraction(path, recipe)) is not None:
        return cached
    with exclusive(folder):  # two runs that start together download and extract once
        if (cached := _read_extraction(path, recipe)) is None:
            archives = fetch_packages(names, folder, f"group {group!r} of language {language!r}", progress)
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
    except (FileNotFoundError, StopIteration, ValueError, KeyError, TypeError):
        return None
    return (documents, header["packages"]) if len(documents) == header["n_documents"] else None


def _extract(
    families: list[Family], language: str, archives: dict[str, Path], title: str, progress: bool
) -> list[dict[str, Any]]:
    records: dict[str, dict[str, Any]] = {}
    with tqdm(desc=title, unit=" pages", disable=not progress) as bar:
        for family in families:
            for package in _packages(family, language):
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
    base, _, region = language.partition("-")
    template = family.english_paths or family.paths if language == "en" else family.paths
    tag = f"{base}-{region.upper()}" if region else base
    paths = template.format(
        package=language, locale=tag.replace("-", "_"), tag=tag, region=tag if region else f"{base}-[A-Z][A-Z]"
    )
    for match, content in read_members(archive, re.compile(paths)):
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
