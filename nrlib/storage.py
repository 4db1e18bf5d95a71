"""Where caches live, and how files are written: to a temporary name first, then renamed, so that a killed run never
leaves a half-written file under a name that is read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import StorageError


def project_directory() -> Path:
    """The checkout this package is imported from, or the working directory for an installed package."""
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "_config.yml").exists() else Path.cwd()


def cache_directory() -> Path:
    """`$NRLIB_CACHE`, else `data/cache` of the checkout. Ignored by git; safe to delete."""
    return Path(os.environ.get("NRLIB_CACHE") or project_directory() / "data" / "cache")


def results_directory() -> Path:
    """`$NRLIB_RESULTS`, else `data/results` of the checkout: the published records."""
    return Path(os.environ.get("NRLIB_RESULTS") or project_directory() / "data" / "results")


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces. What fingerprints are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def fingerprint(value: Any, n_digits: int = 64) -> str:
    """SHA-256 of the canonical JSON of `value`, as `n_digits` hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:n_digits]


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary file name beside `path`; rename it to `path` when the block ends without an error.

    Raises
    ------
    StorageError
        When the disk is full or the folder cannot be written; nothing is left under `path`.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        _sync(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except Exception as error:
        if reason := _why_not_written(error, path):
            raise StorageError(
                f"Could not write {path}: {reason}. Nothing was left half-written. Free some space or set "
                f"NRLIB_CACHE to a folder with room (now {cache_directory()}), then run the same command again: "
                "what was finished is kept."
            ) from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Like `atomic_path` for a folder: filled under a temporary name, then renamed over `path`."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    except OSError as error:
        raise StorageError(f"Could not create a folder in {path.parent}: {error.strerror}.") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except Exception as error:
        if reason := _why_not_written(error, path):
            raise StorageError(
                f"Could not write {path}: {reason}. Nothing was left half-written; free some space and run again."
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _why_not_written(error: Exception, path: Path) -> str:
    """What the system refused, or '' for an error of another kind. Writers in C++ and Rust raise no OSError."""
    if isinstance(error, OSError) and error.errno is not None:
        refused = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
        return (error.strerror or str(error)) if error.errno in refused else ""
    if isinstance(error, StorageError):
        return ""
    is_full = path.parent.exists() and shutil.disk_usage(path.parent).free < 1 << 20
    return "No space left on device" if is_full or "No space left on device" in str(error) else ""


def _sync(path: Path) -> None:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
