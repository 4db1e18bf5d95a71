"""What a sweep sends to a worker of another process or machine: one run, or one backbone, done only if the worker has the
same code, reads the same text and extends the same backbone as the process that collects the records."""

from __future__ import annotations

import functools
import hashlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from .backbone import backbone_directory, get_backbone
from .config import RunConfig
from .errors import ClusterError, NrlibError
from .machine import package_versions
from .records import Record, git_state, is_publishing
from .runs import run_or_load
from .storage import cache_directory
from .texts import PreparedText, prepare_text

SOURCE = "source of nrlib"


@dataclass(frozen=True)
class Expected:
    """What a worker must find to be its own as well.

    code : see `describe_code`; corpora : fingerprints by role; backbone : name of the folder that holds a backbone
    trained by nrlib, '' for one that is loaded by name; is_published : whether records go to data/results/; git_commit :
    of the collecting process, '' where nothing is published.
    """

    code: dict[str, str]
    corpora: dict[str, str]
    backbone: str
    is_published: bool
    git_commit: str


@functools.cache  # as it was when this process began to use it: an edited file is not what runs here
def describe_code() -> dict[str, str]:
    """Fingerprint of the package's source and the versions of the packages that can change a number.

    Builds of one version ('2.13.0+cpu') and the third part of Python's version may differ between a login node and its
    workers; every record names its worker's own.
    """
    versions = {name: version.partition("+")[0] for name, version in package_versions().items() if name != "nrlib"}
    versions["python"] = versions["python"].rpartition(".")[0]
    return {SOURCE: _source_fingerprint(), **versions}


def _source_fingerprint() -> str:
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def expect(config: RunConfig, progress: bool = False) -> Expected:
    """What this process has, for the workers to compare with; the same for all runs on one backbone.

    Raises
    ------
    CorpusError
        When the text of the run cannot be had here.
    """
    text = prepare_text(config.data, config.backbone, progress)
    commit = git_state()[0] if is_publishing() else ""
    return Expected(describe_code(), _fingerprints(text), _backbone_name(config, text), is_publishing(), commit)


def run_task(config: RunConfig, notebook: str, expected: Expected) -> Record | Exception:
    """One run, on the worker; its record is stored there too, so that nothing is lost if the collector is.

    An error that would come again (a loss that became nan, a worker of another kind) is returned, not raised: a
    scheduler that retries what was raised would train in vain. Anything else, such as a broken accelerator, is raised.
    """
    try:
        _publish_as(expected)
        check_worker(config, expected)
        return run_or_load(config, notebook=notebook, progress=False)
    except (NrlibError, FloatingPointError) as error:
        return error


def backbone_task(config: RunConfig, expected: Expected) -> Exception | None:
    """Train the backbone of a run on the worker, unless it is there; errors as for `run_task`."""
    try:
        check_worker(config, expected, needs_backbone=False)
        if expected.backbone:
            get_backbone(config, prepare_text(config.data, config.backbone, False), progress=False)
    except (NrlibError, FloatingPointError) as error:
        return error
    return None


def check_worker(config: RunConfig, expected: Expected, *, needs_backbone: bool = True) -> None:
    """Raise ClusterError unless this process has what `expected` says."""
    check_code(describe_code(), expected.code, _here())
    if expected.is_published and (commit := git_state()[0]) != expected.git_commit:
        raise ClusterError(
            f"{_here()} is at commit {commit[:12]}, the sweep that publishes its records at {expected.git_commit[:12]}. "
            "Check out the same commit on both and restart the workers."
        )
    text = prepare_text(config.data, config.backbone, False)
    found = _fingerprints(text)
    others = [role for role in expected.corpora if found.get(role) != expected.corpora[role]]
    if others or _backbone_name(config, text) != expected.backbone:
        what = ", ".join(others) or "the tokenised text"
        raise ClusterError(
            f"{_here()} reads other text than the sweep's own process ({what}), so their runs would not compare. Let both "
            f"use one cache (NRLIB_CACHE, on the worker {cache_directory()}) or the same versions of the corpora; a "
            "worker that read files before they changed must be restarted."
        )
    folder = cache_directory() / "backbones" / expected.backbone
    if needs_backbone and expected.backbone and not folder.exists():
        raise ClusterError(
            f"{_here()} does not see the backbone {folder}, and one trained there would have other weights. Workers must "
            "share one cache: set NRLIB_CACHE, in the environment they are started in, to a folder that all of them see, "
            "or copy the folder there."
        )


def check_code(found: dict[str, str], expected: dict[str, str], who: str) -> None:
    """Raise ClusterError if the code of a worker, named by `who`, differs from the expected."""
    differences = [
        f"{name} {found.get(name, 'absent')} instead of {version}"
        for name, version in expected.items()
        if found.get(name) != version
    ]
    if differences:
        raise ClusterError(
            f"{who} has {'; '.join(differences)}. Install the same commit and constraints.txt as in the sweep's own "
            "process, then restart the workers: a worker keeps the code it was started with."
        )


def _publish_as(expected: Expected) -> None:
    """The worker was started without knowing whether a later sweep would publish. Not set back: the next task says its own."""
    if expected.is_published:
        os.environ["NRLIB_PUBLISH"] = "1"
    else:
        os.environ.pop("NRLIB_PUBLISH", None)


def _fingerprints(text: PreparedText) -> dict[str, str]:
    return {role: corpus["fingerprint"] for role, corpus in text.corpora.items()}


def _backbone_name(config: RunConfig, text: PreparedText) -> str:
    return "" if config.backbone.backbone_name else backbone_directory(config, text).name


def _here() -> str:
    return f"The worker process {os.getpid()} on {socket.gethostname()}"
