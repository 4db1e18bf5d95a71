"""The recipe logic with an invented archive: `apt-get` and `dpkg-deb` are small scripts on the PATH."""

from __future__ import annotations

import gzip
import io
import os
import sys
import tarfile
from pathlib import Path

import pytest

from nrlib.corpora import debian_docs, extract
from nrlib.corpora.debian_docs import load_debian_docs
from nrlib.corpora.debian_recipes import FAMILIES, groups_of, languages, packages_of, page_pattern
from nrlib.errors import CorpusError, StorageError

ENGLISH = "The garden gate stays shut until the last of the geese has gone home."
FRENCH = "La porte du jardin reste fermée jusqu'au retour de la dernière oie."

APT_GET = """#!/bin/sh
echo "$@" >> "$ARCHIVE/calls"
for last; do :; done
if [ "$last" = update ]; then
    [ -e "$ARCHIVE/offline" ] && { echo "E: Temporary failure resolving 'deb.example'" >&2; exit 100; }
    exit 0
fi
file=$(cd "$ARCHIVE" && ls "${last}"_*.deb 2>/dev/null)
if [ -z "$file" ] || [ -e "$ARCHIVE/offline" ]; then echo "E: Unable to locate package $last" >&2; exit 100; fi
case "$*" in *--print-uris*) echo "'http://deb.example/$file' $file 1000 SHA256:0";; *)
    if [ -e "$ARCHIVE/broken" ]; then head -c 100 "$ARCHIVE/$file" > "$file"; echo "E: Failed to fetch" >&2; exit 100; fi
    cp "$ARCHIVE/$file" .;;
esac
"""
DPKG_DEB = '#!/bin/sh\n[ "$1" = --fsys-tarfile ] && exec cat "$2"\nexit 2\n'


def man_page(*paragraphs: str) -> bytes:
    body = "\n.PP\n".join(paragraphs)
    return gzip.compress(f".TH GOOSE 1\n.SH DESCRIPTION\n{body}\n".encode())


def package(folder: Path, name: str, pages: dict[str, bytes]) -> None:
    with tarfile.open(folder / f"{name}.deb", "w") as archive:
        for path, content in pages.items():
            member = tarfile.TarInfo(f"./{path}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("./usr/share/man/man1/link.1.gz")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that the two false programs serve from; the cache lies beside it."""
    programs, folder = tmp_path / "bin", tmp_path / "archive"
    programs.mkdir()
    folder.mkdir()
    for name, script in {"apt-get": APT_GET, "dpkg-deb": DPKG_DEB}.items():
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("ARCHIVE", str(folder))
    monkeypatch.setenv("NRLIB_CACHE", str(tmp_path / "cache"))
    package(folder, "manpages_1%3a2.0-1_all", {
        "usr/share/man/man1/goose.1.gz": man_page(ENGLISH, f"{ENGLISH} Twice."),
        "usr/share/man/man7/gander.7.gz": man_page(ENGLISH, f"{ENGLISH} And on."),
        "usr/share/man/de/man1/goose.1.gz": man_page(f"{ENGLISH} Wrong language."),
        "usr/share/doc/manpages/copyright": b"text",
    })  # fmt: skip
    package(folder, "manpages-dev_1%3a2.0-1_all", {"usr/share/man/man2/honk.2.gz": man_page(f"{ENGLISH} Honk.")})
    package(folder, "manpages-fr_3_all", {"usr/share/man/fr/man1/goose.1.gz": man_page(FRENCH, ENGLISH)})
    package(folder, "manpages-fr-dev_3_all", {"usr/share/man/fr/man2/honk.2.gz": man_page(f"{FRENCH} Couac.")})
    return folder


def calls(archive: Path) -> list[str]:
    return (archive / "calls").read_text().splitlines() if (archive / "calls").exists() else []


def test_documents_versions_and_ids_shared_by_translations(archive: Path) -> None:
    english, versions = load_debian_docs("en/manpages", progress=False)
    assert [document.id for document in english] == [
        "manpages/manpages/man1/goose.1",
        "manpages/manpages/man2/honk.2",
        "manpages/manpages/man7/gander.7",
    ]
    assert versions == {"manpages": "1:2.0-1", "manpages-dev": "1:2.0-1"}
    assert english[0].text == f"{ENGLISH}\n\n{ENGLISH} Twice." and english[0].source == "manpages"
    assert english[0].licence
    assert english[2].text == f"{ENGLISH} And on."  # the repeated paragraph stands in the first document only

    french, _ = load_debian_docs("fr/manpages", progress=False)
    assert [document.id for document in french] == [document.id for document in english[:2]]
    assert french[0].text == FRENCH  # what was left in English is gone


def test_the_second_call_needs_no_network_and_no_programs(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_debian_docs("en/manpages", progress=False)
    n_calls = len(calls(archive))
    monkeypatch.setenv("PATH", "/nonexistent")
    assert load_debian_docs("en/manpages", progress=False) == first
    assert len(calls(archive)) == n_calls


def test_kept_packages_serve_a_new_extractor_offline(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_debian_docs("en/manpages", progress=False)
    (archive / "offline").touch()
    monkeypatch.setattr(debian_docs, "EXTRACTOR_VERSION", extract.EXTRACTOR_VERSION + 1)
    monkeypatch.setattr(debian_docs, "man_paragraphs", lambda source: [f"{ENGLISH} Anew."])
    again, versions = load_debian_docs("en/manpages", progress=False)
    assert again[0].text == f"{ENGLISH} Anew." and versions == first[1]


def test_a_run_killed_while_it_extracts_leaves_nothing_half_read(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = debian_docs.man_paragraphs, []

    def stop_half_way(source: str) -> list[str]:
        seen.append(source)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(source)

    monkeypatch.setattr(debian_docs, "man_paragraphs", stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        load_debian_docs("en/manpages", progress=False)
    monkeypatch.setattr(debian_docs, "man_paragraphs", real)
    (archive / "offline").touch()  # the packages are kept, so what is left to do needs no network
    documents, _ = load_debian_docs("en/manpages", progress=False)
    assert len(documents) == 3


def test_a_run_killed_while_it_writes_leaves_nothing_to_read(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(debian_docs.storage, "_sync", stop)  # all is written, the file has not its name yet
        load_debian_docs("en/manpages", progress=False)
    assert not list((tmp_path / "cache").rglob("en.manpages.jsonl"))
    assert len(load_debian_docs("en/manpages", progress=False)[0]) == 3


def test_a_truncated_extraction_is_made_anew(archive: Path, tmp_path: Path) -> None:
    first = load_debian_docs("en/manpages", progress=False)
    (extraction,) = (tmp_path / "cache").rglob("en.manpages.jsonl")
    lines = extraction.read_text().splitlines(keepends=True)
    for damaged in ("".join(lines[:-1]), "".join(lines)[:-20], ""):
        extraction.write_text(damaged)
        assert load_debian_docs("en/manpages", progress=False) == first


def test_a_download_that_fails_half_way_keeps_nothing(archive: Path, tmp_path: Path) -> None:
    (archive / "broken").touch()
    with pytest.raises(CorpusError, match=r"manpages could not be downloaded.*Failed to fetch.*synthetic"):
        load_debian_docs("en/manpages", progress=False)
    assert not list((tmp_path / "cache").rglob("packages/*.deb"))
    (archive / "broken").unlink()
    assert len(load_debian_docs("en/manpages", progress=False)[0]) == 3


def test_a_damaged_package_is_removed_and_named(archive: Path, tmp_path: Path) -> None:
    kept = tmp_path / "cache" / "corpora" / "debian-docs" / "packages"
    kept.mkdir(parents=True)
    whole = (archive / "manpages_1%3a2.0-1_all.deb").read_bytes()
    damaged = kept / "manpages_1%3a2.0-1_all.deb"
    damaged.write_bytes(whole[:700])
    with pytest.raises(CorpusError, match="was damaged and has been removed"):
        load_debian_docs("en/manpages", progress=False)
    assert not damaged.exists()
    assert len(load_debian_docs("en/manpages", progress=False)[0]) == 3


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("xx", r"unknown language 'xx'.*en.*fr"),
        ("", r"unknown language ''"),
        ("fr/manpages+geese", r"no group 'geese'.*language 'fr'.*libreoffice"),
        ("uk/debian", r"no group 'debian'.*'uk'.*Allowed: gnome, manpages"),
    ],
)
def test_unknown_languages_and_groups(archive: Path, spec: str, said: str) -> None:
    with pytest.raises(CorpusError, match=said):
        load_debian_docs(spec, progress=False)
    assert not calls(archive)


def test_a_package_no_source_holds_is_named_with_its_group(archive: Path) -> None:
    (archive / "manpages-dev_1%3a2.0-1_all.deb").unlink()
    with pytest.raises(CorpusError, match=r"manpages-dev \(group 'manpages' of debian-docs:en.*none of this system's"):
        load_debian_docs("en/manpages", progress=False)


def test_without_a_network(archive: Path) -> None:
    (archive / "offline").touch()
    with pytest.raises(CorpusError, match=r"could not be downloaded.*Temporary failure.*CORPUS=synthetic.*file:"):
        load_debian_docs("en/manpages", progress=False)


def test_without_debians_tools(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(CorpusError, match=r"apt-get and dpkg-deb cannot be found.*CORPUS=synthetic.*file:"):
        load_debian_docs("en/manpages", progress=False)


def test_a_package_laid_out_differently_is_an_error(archive: Path) -> None:
    package(archive, "manpages-fr_3_all", {"usr/share/man/french/man1/goose.1.gz": man_page(FRENCH)})
    with pytest.raises(CorpusError, match=r"manpages-fr 3 holds no pages.*'manpages'"):
        load_debian_docs("fr/manpages", progress=False)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions")
def test_a_cache_that_cannot_be_written(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NRLIB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match="NRLIB_CACHE"):
        load_debian_docs("en/manpages", progress=False)


def test_a_relative_cache_and_other_names_of_a_language(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NRLIB_CACHE", "here")
    assert load_debian_docs("en-US/manpages", progress=False) == load_debian_docs(
        " EN/manpages+manpages ", progress=False
    )
    assert (tmp_path / "here" / "corpora").is_dir()
    assert f"Dir::State={tmp_path}/here/" in calls(archive)[0]  # apt-get runs in another folder


@pytest.mark.parametrize(
    ("family", "language", "path", "name"),
    [
        ("libreoffice-help", "en", "usr/share/libreoffice/help/en-US/text/a/b.html", "a/b"),
        ("libreoffice-help", "pt-br", "usr/share/libreoffice/help/pt-BR/text/a/b.html", "a/b"),
        ("manpages", "zh-cn", "usr/share/man/zh_CN/man1/ls.1.gz", "man1/ls.1"),
        ("debian-reference", "zh-cn", "usr/share/debian-reference/ch01.zh-cn.html", "ch01"),
        ("developers-reference", "en", "usr/share/developers-reference/pkgs.html", "pkgs"),
        ("developers-reference", "fr", "usr/share/developers-reference/fr/pkgs.html", "pkgs"),
        ("debian-faq", "en", "usr/share/doc/debian/FAQ/kernel.en.html", "kernel"),
        ("debian-faq", "fr", "usr/share/doc/debian/FAQ/fr/kernel.fr.html", "kernel"),
        ("gnome-user-docs", "en", "usr/share/help/C/gnome-help/a11y.page", "gnome-help/a11y"),
        ("gnome-user-docs", "zh-cn", "usr/share/help/zh_CN/gnome-help/a11y.page", "gnome-help/a11y"),
        ("installation-guide", "fr", "usr/share/doc/installation-guide-amd64/fr/ch01.html", "ch01"),
        ("debian-handbook", "fr", "usr/share/doc/debian-handbook/html/fr-FR/apt.html", "apt"),
        ("debian-handbook", "pt-br", "usr/share/doc/debian-handbook/html/pt-BR/apt.html", "apt"),
    ],
)
def test_paths_inside_packages(family: str, language: str, path: str, name: str) -> None:
    recipe = next(f for f in FAMILIES if f.name == family)
    match = page_pattern(recipe, language).fullmatch(path)
    assert match is not None and match[1] == name
    assert page_pattern(recipe, "de" if language != "de" else "fr").fullmatch(path) is None


def test_package_names() -> None:
    by_name = {family.name: family for family in FAMILIES}
    assert packages_of(by_name["libreoffice-help"], "en") == ["libreoffice-help-en-us"]
    assert packages_of(by_name["libreoffice-help"], "zh-cn") == ["libreoffice-help-zh-cn"]
    assert packages_of(by_name["manpages"], "en") == ["manpages", "manpages-dev"]
    assert packages_of(by_name["manpages"], "fr") == ["manpages-fr", "manpages-fr-dev"]
    assert packages_of(by_name["manpages"], "sv") == ["manpages-sv"]
    assert packages_of(by_name["manpages"], "zh-tw") == ["manpages-zh"]
    assert packages_of(by_name["debian-faq"], "en") == ["debian-faq"]
    assert {"en", "fr", "de", "es", "ru", "ja", "pl", "zh-cn"} <= set(languages())
    everything = ["debian", "gnome", "handbook", "installation", "libreoffice", "manpages"]
    assert groups_of("en") == groups_of("fr") == everything
