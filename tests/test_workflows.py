"""The workflows of continuous integration: pinned, with few rights, and only commands that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from nrlib.launch import COLAB_BRANCH
from nrlib.storage import project_directory

ROOT = project_directory()
FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.yml"))}
# The jobs that may change anything, and what.
WRITING = {("pages", "publish"): {"pages", "id-token"}, ("pages", "colab"): {"contents"}}


def jobs() -> list[Any]:
    found = [(name, job) for name, workflow in WORKFLOWS.items() for job in workflow["jobs"]]
    return [pytest.param(name, job, WORKFLOWS[name]["jobs"][job], id=f"{name}-{job}") for name, job in found]


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z]+):(?!=)", makefile, re.MULTILINE))


def triggers(name: str) -> Any:
    return WORKFLOWS[name][True]  # YAML reads `on` as a truth value


def test_the_workflows_are_those_that_are_announced() -> None:
    assert set(WORKFLOWS) == {"book", "links", "pages", "reproduce", "test"}
    matrix = WORKFLOWS["test"]["jobs"]["test"]["strategy"]["matrix"]
    assert len(matrix["python"]) == 3 and {system.split("-")[0] for system in matrix["system"]} == {"ubuntu", "macos"}
    assert WORKFLOWS["test"]["jobs"]["oldest"]["steps"][-1] == {"run": "make matrix"}
    assert set(triggers("book")) == {"push", "pull_request", "workflow_call"}
    assert triggers("pages") == {"push": {"tags": ["v*"]}}
    assert "schedule" in triggers("links")
    assert set(triggers("reproduce")) == {"workflow_dispatch"}


def test_pages_publishes_what_the_book_workflow_built() -> None:
    pages, (book,) = WORKFLOWS["pages"]["jobs"], WORKFLOWS["book"]["jobs"].values()
    assert pages["book"]["uses"] == "./.github/workflows/book.yml"
    kept = {step["with"]["name"] for step in book["steps"] if "upload-artifact" in step.get("uses", "")}
    for job in ("publish", "colab"):
        assert pages[job]["needs"] == "book"
        taken = {step["with"]["name"] for step in pages[job]["steps"] if "download-artifact" in step.get("uses", "")}
        assert taken and taken <= kept
        assert not [step for step in pages[job]["steps"] if "make pdf" in step.get("run", "")]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_rights_are_few_and_said_at_the_top(name: str) -> None:
    assert WORKFLOWS[name]["permissions"] in ({}, {"contents": "read"})


@pytest.mark.parametrize(("name", "job_name", "job"), jobs())
def test_jobs_are_pinned_and_have_no_more_rights_than_they_need(name: str, job_name: str, job: dict[str, Any]) -> None:
    written = {right for right, level in job.get("permissions", {}).items() if level != "read"}
    assert written == WRITING.get((name, job_name), set())
    if "uses" in job:
        assert job["uses"].startswith("./")  # of this very commit
        return
    assert job["timeout-minutes"] > 0
    for step in job["steps"]:
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), (
                f"{step['uses']} is not pinned by its hash"
            )
        if "actions/checkout@" in step.get("uses", ""):
            keeps_token = step.get("with", {}).get("persist-credentials", True)
            assert keeps_token == (written == {"contents"})


@pytest.mark.parametrize(("name", "job_name", "job"), jobs())
def test_commands_are_make_targets_and_hold_no_expression(name: str, job_name: str, job: dict[str, Any]) -> None:
    for step in job.get("steps", ()):
        command = step.get("run", "")
        assert "${{" not in command, f"{command} mixes what others may write into a shell"  # env: carries it
        for line in command.splitlines():
            first, *rest = shlex.split(line)
            assert first in ("make", ".ci/run", "echo"), line
            if first == "make":
                assert {word for word in rest if "=" not in word} <= targets(), line


def test_actions_of_one_name_have_one_version_with_its_number_beside_it() -> None:
    pins: dict[str, set[str]] = {}
    for path in FOLDER.glob("*.yml"):
        for action, rest in re.findall(r"uses: ([\w/-]+)@(.*)", path.read_text(encoding="utf-8")):
            assert re.fullmatch(r"[0-9a-f]{40} # v\d+\.\d+\.\d+", rest), f"{path.name}: {action}@{rest}"
            pins.setdefault(action, set()).add(rest)
    assert pins and all(len(versions) == 1 for versions in pins.values()), pins


def test_colab_target_replaces_the_branch_and_touches_nothing_else(tmp_path: Path) -> None:
    def git(*arguments: str, cwd: Path) -> str:
        settings = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
        return subprocess.run(
            ["git", *settings, *arguments], cwd=cwd, check=True, capture_output=True, text=True
        ).stdout

    origin, clone = tmp_path / "origin.git", tmp_path / "clone"
    git("init", "--bare", str(origin), cwd=tmp_path)
    git("clone", str(origin), str(clone), cwd=tmp_path)
    (clone / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    (clone / ".gitignore").write_text("build/\n", encoding="utf-8")
    git("add", ".", cwd=clone)
    git("commit", "-m", "a", cwd=clone)
    for release in ("first", "second"):
        notebooks = clone / "build" / "colab" / "notebooks"
        notebooks.mkdir(parents=True, exist_ok=True)
        (notebooks / "a.ipynb").write_text(release, encoding="utf-8")
        subprocess.run(["make", "colab"], cwd=clone, check=True, capture_output=True)
        assert git("ls-tree", "-r", "--name-only", COLAB_BRANCH, cwd=origin).split() == ["notebooks/a.ipynb"]
        assert git("show", f"{COLAB_BRANCH}:notebooks/a.ipynb", cwd=origin) == release
        assert git("rev-list", "--count", COLAB_BRANCH, cwd=origin).strip() == "1"
    assert git("status", "--porcelain", cwd=clone) == ""
