"""Which Debian packages hold translated documentation, for which languages, and where its pages lie in them.

A recipe lists what is worth having: a package may hold a few pages in more languages than stand here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


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
        "ca cs da de el en es fi fr gl hr hu id it ja ko nl pl pt pt-br ru sl sr sv uk vi zh-cn",
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
        "ca cs de en es fr id it ja nb nl pl pt-br ru sv tr vi zh-cn zh-tw",
        "debian-handbook",
        r"usr/share/doc/debian-handbook/html/{region}/(.+)\.html",
        "CC-BY-SA-3.0 or GPL-2+ (The Debian Administrator's Handbook)",
    ),
)
OTHER_NAMES = {"zh": "zh-cn", "en-us": "en"}


def languages() -> list[str]:
    """The languages there is a recipe for."""
    return sorted({language for family in FAMILIES for language in family.languages.split()})


def groups_of(language: str) -> list[str]:
    """The groups the recipe of `language` lists."""
    return sorted({family.group for family in FAMILIES if language in family.languages.split()})


def packages_of(family: Family, language: str) -> list[str]:
    is_man = family.name == "manpages"
    name = "zh" if is_man and language.startswith("zh-") else language  # one package for both scripts
    name = family.packages.format(package=name)
    if language == "en":
        name = family.english_packages or name
    return [name, f"{name}-dev"] if is_man and language in _DEV_MAN_PAGES.split() else [name]


def page_pattern(family: Family, language: str) -> re.Pattern[str]:
    """Paths of the pages of a language inside the packages of a family."""
    base, _, region = language.partition("-")
    tag = f"{base}-{region.upper()}" if region else base
    template = family.english_paths or family.paths if language == "en" else family.paths
    region_pattern = tag if region else f"{base}-[A-Z][A-Z]"
    return re.compile(template.format(package=language, locale=tag.replace("-", "_"), tag=tag, region=region_pattern))
