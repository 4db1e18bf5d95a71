"""Debian packages without root: `apt-get download` with folders of its own, and reading an archive with `dpkg-deb`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

from tqdm import tqdm

from ..errors import CorpusError, StorageError

OTHERWISE = (
    "A corpus that needs no download: CORPUS=synthetic (as a corpus spec `synthetic:<name>`), or your own text with "
    "`file:<glob>`."
)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Let one process at a time into the block; the lock ends with the process, however it ends."""
    _require("apt-get", "dpkg-deb")
    import fcntl  # not on Windows, where apt-get is not either

    make_folder(folder)
    with open(folder / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def fetch_packages(names: list[str], folder: Path, purpose: str, progress: bool) -> dict[str, Path]:
    """The archives of the named packages, kept in `folder/packages`; only those missing there are downloaded.

    Raises
    ------
    CorpusError
        The package lists or a package cannot be downloaded, or no source holds a package.
    """
    kept = folder / "packages"
    archives = {name: archive for name in names if (archive := _kept_archive(kept, name)) is not None}
    missing = [name for name in names if name not in archives]
    if missing:
        problem = _update_lists(folder)
        offers = {name: _offer(name, folder, purpose, problem) for name in missing}
        total = sum(size for _, size in offers.values())
        with tqdm(total=total, desc="download", unit="B", unit_scale=True, disable=not progress) as bar:
            for name, (file_name, size) in offers.items():
                bar.set_postfix_str(name)
                archives[name] = _download(name, file_name, folder)
                bar.update(size)
    return {name: archives[name] for name in names}


def package_version(archive: Path) -> str:
    """The version an archive's file name states, `4:7.4.7-1` of `libreoffice-help-fr_4%3a7.4.7-1_all.deb`."""
    return unquote(archive.name.split("_")[1])


def read_members(archive: Path, pattern: re.Pattern[str]) -> Iterator[tuple[re.Match[str], bytes]]:
    """The plain files of a package whose whole path matches `pattern`, without unpacking the others to the disk.

    Links are left out: what they point to has a name of its own.
    """
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as members:
                for member in members:
                    match = pattern.fullmatch(member.name.removeprefix("./"))
                    content = members.extractfile(member) if match and member.isreg() else None
                    if match and content:
                        yield match, content.read()
            if process.stdout:
                process.stdout.read()  # padding after the last member: let dpkg-deb end by itself
            is_damaged = process.wait() != 0
        except (tarfile.TarError, EOFError):
            is_damaged = True
        finally:
            process.kill()
    if is_damaged:
        archive.unlink(missing_ok=True)
        raise CorpusError(f"{archive.name} in the cache was damaged and has been removed. Run the same command again.")


def make_folder(folder: Path) -> Path:
    """Create a folder of the cache, and those above it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"Could not write to {folder}: {error.strerror}. Free some space or set NRLIB_CACHE to another folder."
        ) from error
    return folder


def _require(*programs: str) -> None:
    absent = [program for program in programs if shutil.which(program) is None]
    if absent:
        raise CorpusError(
            f"Corpora from Debian are made with its package tools, and {' and '.join(absent)} cannot be found: "
            f"this seems to be no Debian or Ubuntu system. {OTHERWISE}"
        )


def _kept_archive(folder: Path, name: str) -> Path | None:
    return max(folder.glob(f"{name}_*.deb"), key=lambda path: path.stat().st_mtime, default=None)


def _apt_get(folder: Path, *arguments: str, working_directory: Path | None = None) -> subprocess.CompletedProcess[str]:
    state, cache = folder / "apt" / "state", folder / "apt" / "cache"
    make_folder(state / "lists" / "partial")
    make_folder(cache / "archives" / "partial")
    options = {
        "Dir::State": state,
        "Dir::State::Lists": state / "lists",
        "Dir::Cache": cache,
        # As root apt would become user _apt, who may not write into our folders; for others this has no effect.
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::Retries": 2,
        "Acquire::http::Timeout": 20,
        "Acquire::https::Timeout": 20,
    }
    command = ["apt-get", "-q", *(part for key, value in options.items() for part in ("-o", f"{key}={value}"))]
    environment = os.environ | {"LC_ALL": "C", "LANGUAGE": "C"}
    return subprocess.run(
        [*command, *arguments],
        cwd=working_directory or folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _update_lists(folder: Path) -> str:
    """Bring the package lists up to date; what went wrong, or "". Not an error yet: one foreign source that does not
    answer, or lists of an earlier run, leave the packages within reach."""
    done = _apt_get(folder, "update")
    complaints = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith(("E:", "W:", "Err:"))]
    return complaints[-1] if complaints else ""


def _offer(name: str, folder: Path, purpose: str, problem: str) -> tuple[str, int]:
    """File name and size in bytes of the package the system's sources offer."""
    done = _apt_get(folder, "--print-uris", "download", name)
    match = re.search(r"^'[^']*' (\S+\.deb) (\d+)", done.stdout, re.MULTILINE)
    if match:
        return match[1], int(match[2])
    if problem:
        raise CorpusError(
            f"Package {name} ({purpose}) cannot be had: the package lists could not be "
            f"downloaded; apt-get said {problem!r}. Is there a network? {OTHERWISE}"
        )
    raise CorpusError(
        f"Package {name} ({purpose}) is in none of this system's package sources. Add a source that holds it, such as "
        f"Debian's main or Ubuntu's universe, or leave it out (debian-docs:<language>/<group>+<group>). {OTHERWISE}"
    )


def _download(name: str, file_name: str, folder: Path) -> Path:
    partial, kept = folder / "partial", folder / "packages"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed; the lock is ours
    make_folder(kept)
    done = _apt_get(folder, "download", name, working_directory=make_folder(partial))
    archive = partial / file_name
    if done.returncode != 0 or not archive.exists():
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        if "No space left" in done.stderr:
            raise StorageError(f"Could not download {name} to {folder}: the disk is full. Free some space, run again.")
        raise CorpusError(f"Package {name} could not be downloaded; apt-get said {said!r}. Run again, or: {OTHERWISE}")
    archive.rename(kept / file_name)
    return kept / file_name
