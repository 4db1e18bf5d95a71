"""Copies of notebooks that start on a machine without this package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from nrlib import book, launch
from nrlib.errors import ConfigError
from nrlib.notebooks import find_notebook
from nrlib.storage import project_directory

URL = "https://github.com/someone/a.fork"


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NRLIB_REPOSITORY", raising=False)


def checkout(folder: Path, url: str) -> Path:
    (folder / "_config.yml").write_text(yaml.safe_dump({"repository": {"url": url}}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("written", [URL, URL + "/", URL + ".git"])
def test_address_comes_from_the_environment_then_from_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    assert launch.repository_url(checkout(tmp_path, "")) == ""
    assert launch.repository_url(checkout(tmp_path, written)) == URL
    monkeypatch.setenv("NRLIB_REPOSITORY", "https://github.com/other/name")
    assert launch.repository_url(tmp_path) == "https://github.com/other/name"


@pytest.mark.parametrize("url", ["github.com/a/b", "https://example.org/a/b", URL + "'; rm -rf /", URL + "/tree/main"])
def test_address_of_another_form_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=r"https://github\.com/<owner>/<name>"):
        launch.repository_url(checkout(tmp_path, url))


def test_copy_installs_the_release_first_and_is_otherwise_the_notebook() -> None:
    notebook = json.loads(find_notebook("quickstart").read_text(encoding="utf-8"))
    changed = launch.add_install_cell(notebook, URL, "1.2.3")
    first, *rest = changed["cells"]
    assert rest == notebook["cells"] and "id" in first
    assert f"--branch v1.2.3 {URL} " in first["source"] and "%pip install" in first["source"]
    assert launch.CELL_ID not in [cell.get("id") for cell in notebook["cells"]]  # the notebook itself is not changed
    assert launch.add_install_cell(notebook, "", "1.2.3") is notebook


def test_copies_keep_the_notebooks_own_parameters(tmp_path: Path) -> None:
    path = find_notebook("methods")
    launch.write_copies([path], tmp_path / "notebooks", URL, "1.2.3")
    copied = json.loads((tmp_path / "notebooks" / "methods.ipynb").read_text(encoding="utf-8"))
    assert copied["cells"][1:] == json.loads(path.read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("url", ["", URL])
def test_staged_book_has_buttons_only_where_they_lead_somewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("NRLIB_REPOSITORY", url)
    source = tmp_path / "source"
    (source / "book").mkdir(parents=True)
    settings = (project_directory() / "_config.yml").read_text(encoding="utf-8")
    (source / "_config.yml").write_text(settings, encoding="utf-8")
    stage = tmp_path / "stage"
    book.stage_book(source, {"recipe": find_notebook("recipe")}, stage)
    staged = yaml.safe_load((stage / "_config.yml").read_text(encoding="utf-8"))
    cells = json.loads((stage / "notebooks" / "recipe.ipynb").read_text(encoding="utf-8"))["cells"]
    assert bool(staged.get("launch_buttons")) == (cells[0].get("id") == launch.CELL_ID) == bool(url)
    if url:
        assert staged["repository"] == {"url": url, "branch": launch.COLAB_BRANCH}
        assert "remove-cell" in cells[0]["metadata"]["tags"]  # not on the page
