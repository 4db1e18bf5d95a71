"""Set-up files that must agree with each other and with the code."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import nrlib
from nrlib.storage import project_directory

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = project_directory()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ("3.10.0", "3.11.0", "3.11.9", "3.12.0", "3.13.0")
IMPORT_NAMES = {
    "faiss-cpu": "faiss",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}  # where the package has another name than what is imported


def pins(python: str) -> dict[str, str]:
    """Pinned versions that hold for a Python on Linux; fails on a name that is pinned twice."""
    environment = {**default_environment(), "sys_platform": "linux", "os_name": "posix"}
    environment |= {"python_full_version": python, "python_version": ".".join(python.split(".")[:2])}
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{line} is not an exact pin"
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is pinned twice on Python {python}"
            found[name] = specifier.version
    return found


def direct_requirements() -> list[Requirement]:
    extras = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    requirements = [Requirement(line) for line in [*PROJECT["dependencies"], *extras]]
    own = [requirement for requirement in requirements if requirement.name == PROJECT["name"]]
    assert all(requirement.extras <= PROJECT["optional-dependencies"].keys() for requirement in own)
    return [requirement for requirement in requirements if requirement not in own]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_direct_dependency_is_pinned_within_its_range(python: str) -> None:
    pinned = pins(python)
    for requirement in direct_requirements():
        version = pinned[canonicalize_name(requirement.name)]
        assert Version(version) in requirement.specifier, f"{requirement} does not allow the pinned {version}"


def test_the_oldest_versions_tried_are_the_lower_ends_of_the_ranges() -> None:
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {"peft", "transformers"} <= pinned.keys()
    assert pinned.pop("torch") == pins(PYTHONS[0])["torch"]
    floors = {r.name: specifier.version for r in direct_requirements() for specifier in r.specifier if specifier.operator == ">="}  # fmt: skip
    for name, version in pinned.items():
        assert Version(version) == Version(floors[name]), name


def test_conda_environment_is_the_pip_installation() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    python, conda_pip = conda  # everything else would be a second place for versions
    assert conda_pip == "pip"
    assert Version(python.removeprefix("python=")) in Requirement(f"python{PROJECT['requires-python']}").specifier

    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (install,) = re.findall(r"pip install --quiet (-c \S+) (-e) '(\S+)'", makefile)
    assert pip == [install[0], " ".join(install[1:])]


def test_everything_imported_is_declared() -> None:
    imported = set()
    for path in (ROOT / "nrlib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).partition(".")[0])
    names = [canonicalize_name(requirement.name) for requirement in direct_requirements()]
    declared = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}
    transitive = {"jupyter_client", "traitlets", "sphinx"}  # parts of papermill and of jupyter-book
    assert imported - set(sys.stdlib_module_names) - declared - transitive <= {"nrlib"}


def test_versions_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == nrlib.__version__
    assert citation["license"] == PROJECT["license"] == "MIT"


def test_continuous_integration_runs_the_tests() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")


def test_citation_and_archive_say_the_same() -> None:
    """CITATION.cff by its own rules, and the metadata that Zenodo reads beside it."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format requires
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    archive = json.loads((ROOT / ".zenodo.json").read_text(encoding="utf-8"))
    assert archive["title"] == citation["title"]
    assert archive["license"] == citation["license"].lower()
    assert archive["upload_type"] == citation["type"]
    assert [creator["name"] for creator in archive["creators"]] == [author["name"] for author in citation["authors"]]
    (paper,) = citation["references"]
    (identifier,) = (entry["value"] for entry in paper["identifiers"])
    assert archive["related_identifiers"] == [
        {
            "identifier": identifier,
            "relation": "isDerivedFrom",
            "resource_type": "publication-article",
            "scheme": "arxiv",
        }
    ]
    assert "version" not in archive  # Zenodo takes the tag's


@pytest.mark.slow
def test_the_wheel_is_whole_and_works_without_the_checkout(tmp_path: Path) -> None:
    """Built, checked as an index would, installed into an environment of its own, and used far from the checkout."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "nrlib", source / "nrlib", ignore=shutil.ignore_patterns("__pycache__"))
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True, cwd=tmp_path)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)])
    files = sorted(str(path) for path in (tmp_path / "dist").iterdir())
    assert [Path(name).suffix for name in files] == [".whl", ".gz"]
    run([sys.executable, "-m", "twine", "check", "--strict", *files])

    run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")])
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run([str(python), "-c", "import site; print(site.getsitepackages()[0])"]).stdout.strip())
    with zipfile.ZipFile(files[0]) as wheel:
        wheel.extractall(site)
        packed = {name for name in wheel.namelist() if name.startswith("nrlib/")}
    assert packed == {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "nrlib").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    # The dependencies of this environment, behind the wheel; finders of editable installations are not read there.
    (site / "dependencies.pth").write_text("\n".join(map(sysconfig.get_path, ("purelib", "platlib"))), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import nrlib, nrlib.cli; print(nrlib.__file__); nrlib.cli.main()"
    done = run([str(python), "-c", code, "--help"], env=environment)
    assert str(site) in done.stdout and "evaluate" in done.stdout


def test_no_path_or_host_of_one_machine() -> None:
    for name in ("pyproject.toml", "constraints.txt", "constraints-oldest.txt", "environment.yml", "Makefile"):
        text = Path(ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|file://|--(extra-)?index-url|/home/|/root/|/tmp/", text), name
