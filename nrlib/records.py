"""A record: what a run was, what came out and what it ran on. Published records are JSON files under data/results/,
written only from a clean tree; all others lie in the cache."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .config import RunConfig, config_from_dict
from .errors import RecordError
from .machine import describe_device, package_versions, peak_memory_mb, pick_precision
from .storage import atomic_path, cache_directory, project_directory, results_directory

SCHEMA_VERSION = 1  # layout of the file
RESULT_VERSION = 2  # raised when a change of the code changes results of the same configuration


@dataclass(frozen=True)
class Record:
    """One finished run."""

    run_id: str
    notebook: str  # the experiment that asked for the run first
    config: dict[str, Any]
    results: dict[str, Any]
    curve: list[dict[str, float]]
    provenance: dict[str, Any]
    schema_version: int = SCHEMA_VERSION
    result_version: int = RESULT_VERSION

    @property
    def run_config(self) -> RunConfig:
        return config_from_dict(self.config)


def collect_provenance(
    config: RunConfig, corpora: dict[str, Any], device: torch.device, seconds: float, git_at_start: tuple[str, bool]
) -> dict[str, Any]:
    """Everything about a run that is not its configuration. A tree that changed while the run was going is dirty."""
    commit, is_dirty = git_at_start
    return {
        "seed": config.seed,
        "device": describe_device(device),
        "n_threads": torch.get_num_threads(),
        "precision": str(pick_precision(config.training.precision, device)).removeprefix("torch."),
        "seconds": round(seconds, 1),
        "peak_memory_mb": peak_memory_mb(device),
        "versions": package_versions(),
        "corpora": corpora,
        "git_commit": commit,
        "is_dirty": is_dirty or git_state() != git_at_start,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def git_state() -> tuple[str, bool]:
    """Commit of the checkout and whether anything but records differs from it; ('unknown', True) outside a checkout."""
    folder = project_directory()
    try:
        commit = _git(folder, "rev-parse", "HEAD").strip()
        changes = _git(folder, "status", "--porcelain", "--", ".", ":!data/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True
    return commit, bool(changes.strip())


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def is_publishing() -> bool:
    """Whether new records are to go to data/results/."""
    return os.environ.get("NRLIB_PUBLISH") == "1"


def check_clean_tree() -> None:
    """Raise RecordError if the working tree has uncommitted changes: no commit would describe what it publishes."""
    if git_state()[1]:
        raise RecordError(
            "Records cannot be published: the working tree has uncommitted changes, so no commit describes the code "
            "that would make them. Commit first, or run without --publish."
        )


def save_record(record: Record) -> Path:
    """Write a record: with NRLIB_PUBLISH=1 under data/results/, else into the cache.

    Raises
    ------
    RecordError
        When a record is to be published whose tree had or got uncommitted changes; it is written into the cache.
    """
    is_refused = is_publishing() and record.provenance["is_dirty"]
    folder = results_directory() if is_publishing() and not is_refused else cache_directory() / "records"
    path = folder / f"{record.run_id}.json"
    parts = {key: json.dumps(value, ensure_ascii=False) for key, value in asdict(record).items()}
    lines = ",\n".join(f'"{key}": {value}' for key, value in parts.items())  # one line a part: readable differences
    with atomic_path(path) as temporary:
        temporary.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    if is_refused:
        raise RecordError(
            f"{record.run_id} cannot be published: the working tree changed while it ran, so no commit describes the code "
            f"that made it. It is kept as {path}; commit, and run again to publish."
        )
    return path


def load_record(config: RunConfig) -> Record | None:
    """The stored record of this configuration, a published one first; None if there is none.

    While publishing, only published records count: what lies in the cache may be of another commit.
    """
    for folder in (results_directory(), *(() if is_publishing() else (cache_directory() / "records",))):
        path = folder / f"{config.run_id}.json"
        if path.exists():
            record = read_record(path)
            if record.config != config.to_dict():
                raise RecordError(f"{path} holds another configuration than its name says. Delete it and run again.")
            return record
    return None


def read_record(path: Path) -> Record:
    """Read one record.

    Raises
    ------
    RecordError
        For a file that is no record, or one of another schema or result version.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        versions = (stored["schema_version"], stored["result_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} is not a run record ({error}). Delete it, and the run is made again.") from error
    if versions != (SCHEMA_VERSION, RESULT_VERSION):
        raise RecordError(
            f"{path} has schema version {versions[0]} and result version {versions[1]}; this nrlib reads schema "
            f"{SCHEMA_VERSION} and result version {RESULT_VERSION}. Use the nrlib that wrote it (commit "
            f"{stored.get('provenance', {}).get('git_commit', 'unknown')}), or delete the file to run it again."
        )
    try:
        return Record(**stored)
    except TypeError as error:
        raise RecordError(f"{path} is not a run record ({error}). Delete it, and the run is made again.") from error


def readable_records() -> list[Record]:
    """All records of this version, published and the reader's own."""
    return [*_readable(results_directory()), *own_records()]


def own_records() -> list[Record]:
    """Records of runs that were made here and not published, those of this version; the oldest first."""
    return sorted(_readable(cache_directory() / "records"), key=lambda record: record.provenance["created"])


def _readable(folder: Path) -> list[Record]:
    found = []
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(RecordError):
            found.append(read_record(path))
    return found


def published_records() -> Iterator[Record]:
    """All records under data/results/, by name."""
    for path in sorted(results_directory().glob("*.json")):
        yield read_record(path)


def write_counts(*, notebook: str = "", **run_ids: Sequence[str]) -> None:
    """Note which runs were loaded, trained or failed, and for which notebook: a build sums them up, and its explorer names
    the pages that use a run."""
    path = _counts_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps({"notebook": notebook, **run_ids}) + "\n")


def read_counts() -> dict[str, int]:
    """Different runs loaded, trained and failed since the counts were last deleted; one that was trained and then loaded
    by the next notebook counts as trained."""
    found: dict[str, set[str]] = {"loaded": set(), "trained": set(), "failed": set()}
    for line in _counted():
        for outcome in found:
            found[outcome] |= set(line.get(outcome, ()))
    found["loaded"] -= found["trained"]
    return {outcome: len(run_ids) for outcome, run_ids in found.items()}


def pages_of_runs() -> dict[str, list[str]]:
    """The notebooks that asked for each run since the counts were last deleted, by the run's name."""
    pages: dict[str, set[str]] = {}
    for line in _counted():
        for run_id in [*line.get("loaded", ()), *line.get("trained", ())]:
            pages.setdefault(run_id, set()).add(line.get("notebook", ""))
    return {run_id: sorted(names - {""}) for run_id, names in pages.items()}


def _counted() -> list[dict[str, Any]]:
    path = _counts_path()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _counts_path() -> Path:
    return Path(os.environ.get("NRLIB_COUNTS") or project_directory() / "build" / "runs.jsonl")
