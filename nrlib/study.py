"""Studies: functions of a few settings whose results are kept like runs, so that a page is built without computing anew.

A study is a function of a module of `nrlib.studies` or `nrlib.companions`. It takes keyword arguments that JSON knows,
`seed` among them, and returns a dictionary of numbers, texts and lists. Its results are published with
`nrlib run NOTEBOOK --publish`.
"""

from __future__ import annotations

import datetime
import inspect
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .errors import ConfigError, RecordError
from .machine import describe_device, package_versions, pick_device
from .records import check_clean_tree, git_state, is_publishing, write_counts
from .storage import atomic_path, cache_directory, fingerprint, results_directory
from .sweep import SweepError, worker_pool

Study = Callable[..., dict[str, Any]]


def run_study(
    study: Study, settings: Sequence[Mapping[str, Any]], *, n_workers: int | None = None, progress: bool = True
) -> list[dict[str, Any]]:
    """The results of `study` for each of the settings, in their order: loaded where they are stored, else computed in
    parallel, one thread a process, and stored.

    Returns
    -------
    For each setting one flat dictionary: the study's arguments, what it returned, `seconds`, `device` and `git_commit`.

    Raises
    ------
    ConfigError
        For an argument the study does not have, or one that is missing.
    SweepError
        When computations failed, after all others have finished and are stored.
    """
    arguments = [_arguments(study, setting) for setting in settings]
    paths = [_file_name(study, a) for a in arguments]
    stored = {name: found for name in paths if (found := _load(name)) is not None}
    missing = {name: a for name, a in zip(paths, arguments, strict=True) if name not in stored}
    failures: dict[str, BaseException] = {}
    if missing:
        if is_publishing():
            check_clean_tree()
        with worker_pool(n_workers) as pool:
            futures = {pool.submit(_compute_and_store, study, a, name): name for name, a in missing.items()}
            bar = tqdm(as_completed(futures), total=len(futures), desc=study.__name__, unit="run", disable=not progress)
            for future in bar:
                if error := future.exception():
                    failures[futures[future]] = error
                else:
                    stored[futures[future]] = future.result()
    write_counts(loaded=sorted(stored.keys() - missing.keys()), trained=sorted(missing.keys() - failures.keys()))
    if failures:
        lines = "\n".join(f"  {name}: {type(error).__name__}: {error}" for name, error in failures.items())
        raise SweepError(f"{len(failures)} of {len(settings)} computations failed; the others are stored:\n{lines}")
    return [_flat(stored[name]) for name in paths]


def published_studies(study: Study) -> list[dict[str, Any]]:
    """All published results of a study as its code is now, as `run_study` returns them; those of an earlier
    RESULT_VERSION, or of a study of the same name in another module, are left out."""
    files = sorted((results_directory() / "studies").glob(f"{study.__name__}-s*.json"))
    found = {path.name: _read(path) for path in files}
    return [_flat(stored) for name, stored in found.items() if name == _file_name(study, stored["arguments"])]


def _arguments(study: Study, setting: Mapping[str, Any]) -> dict[str, Any]:
    try:
        bound = inspect.signature(study).bind(**setting)
    except TypeError as error:
        raise ConfigError(f"{study.__name__}: {error}. Its arguments are {inspect.signature(study)}.") from error
    bound.apply_defaults()
    return {name: list(value) if isinstance(value, tuple) else value for name, value in bound.arguments.items()}


def _file_name(study: Study, arguments: Mapping[str, Any]) -> str:
    version = getattr(sys.modules[study.__module__], "RESULT_VERSION", 1)  # raised when the code changes the results
    key = fingerprint([study.__module__, study.__name__, version, dict(arguments)], 8)
    return f"{study.__name__}-s{arguments.get('seed', 0)}-{key}.json"


def _folders() -> list[Path]:
    published = results_directory() / "studies"
    return [published] if is_publishing() else [published, cache_directory() / "studies"]


def _load(name: str) -> dict[str, Any] | None:
    found = [folder / name for folder in _folders() if (folder / name).exists()]
    return _read(found[0]) if found else None


def _read(path: Path) -> dict[str, Any]:
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {key: stored[key] for key in ("study", "arguments", "results", "provenance")}
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} is not the result of a study ({error}). Delete it, and it is made again.") from error


def _compute_and_store(study: Study, arguments: dict[str, Any], name: str) -> dict[str, Any]:
    commit, is_dirty = git_state()
    start = time.perf_counter()
    results = study(**arguments)
    seconds = time.perf_counter() - start
    stored = {
        "study": f"{study.__module__}.{study.__name__}",
        "arguments": arguments,
        "results": results,
        "provenance": {
            "seconds": round(seconds, 1),
            "device": describe_device(_device_used()),
            "versions": package_versions(),
            "git_commit": commit,
            "is_dirty": is_dirty or git_state() != (commit, is_dirty),
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        },
    }
    with atomic_path(_folders()[-1] / name) as temporary:
        lines = ",\n".join(f'"{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in stored.items())
        temporary.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    return stored


def _device_used() -> torch.device:
    """Where this process has put tensors. An accelerator that was only asked for its random state, as
    `torch.random.fork_rng` does, holds none."""
    return pick_device() if torch.cuda.max_memory_allocated() > 0 else torch.device("cpu")


def _flat(stored: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: stored["provenance"][key] for key in ("seconds", "device", "git_commit")}
    return {**stored["arguments"], **stored["results"], **kept}
