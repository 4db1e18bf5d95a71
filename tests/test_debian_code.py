"""Source code as a corpus, from packages made here: what is read, what is left out, what is refused."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import nullcontext

import pytest

from nrlib.corpora import check_spec, debian_code, load_corpus
from nrlib.corpora.debian_code import MAX_BYTES, RECIPES
from nrlib.errors import CorpusError

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="packages are made with dpkg-deb")
CODE = "def answer():\n    return 42  # é\n" * 20


def make_package(cache, name, files):
    """A package in the cache, as if it had been downloaded."""
    root = cache / "root" / name
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: 1.0-1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: code\n"
    )
    for path, content in files.items():
        target = root / "usr/lib/python3/dist-packages" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    kept = cache / "corpora" / "debian-code" / "packages"
    kept.mkdir(parents=True, exist_ok=True)
    archive = kept / f"{name}_1.0-1_all.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", root, archive], check=True, capture_output=True)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NRLIB_CACHE", str(tmp_path))
    monkeypatch.setattr(debian_code, "exclusive", nullcontext)
    return tmp_path


@needs_dpkg
def test_files_are_documents_as_they_were_written(cache):
    files = {
        "django/db/models.py": CODE.encode(),
        "django/short.py": b"import os\n",
        "django/table.py": b"x = 1\n" * MAX_BYTES,
        "django/latin.py": CODE.encode("latin-1"),
        "django/page.html": CODE.encode(),
        "other/models.py": CODE.encode(),
    }
    make_package(cache, "python3-django", files)
    make_package(cache, "python3-sphinx", {"sphinx/writers/html.py": CODE.encode()})
    corpus = load_corpus("debian-code:python", progress=False)
    assert [document.id for document in corpus.documents] == [
        "python3-django/django/db/models", "python3-sphinx/sphinx/writers/html",
    ]  # fmt: skip
    first = corpus.documents[0]
    assert first.text == CODE and first.source == "python3-django" and "BSD" in first.licence
    assert corpus.versions == {"python3-django": "1.0-1", "python3-sphinx": "1.0-1"}


@needs_dpkg
def test_packages_that_are_laid_out_otherwise(cache):
    for name in RECIPES["python"].packages:
        make_package(cache, name, {"elsewhere/models.py": CODE.encode()})
    with pytest.raises(CorpusError, match=r"laid out differently. Use your own code: file:<glob>"):
        load_corpus("debian-code:python", progress=False)


def test_a_language_without_a_recipe():
    check_spec("debian-code:python")
    with pytest.raises(CorpusError, match=r"debian-code:cobol: there is no recipe for 'cobol'. Allowed: python"):
        check_spec("debian-code:cobol")
