"""Is everything here that nrlib needs? Each check says what it found and, if something is missing, what to do."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from ..storage import cache_directory, project_directory

NEEDED_GB, COMFORTABLE_GB = 1, 5  # in the cache: texts, backbones and checkpoints of the laptop profile, with room
OLDEST_PYTHON = (3, 10)
NEEDED_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "tokenizers",
    "numpy",
    "pandas",
    "matplotlib",
    "papermill",
    "ipykernel",
)
MARKS = {"ok": "ok  ", "note": "note", "missing": "MISSING"}


@dataclass(frozen=True)
class Check:
    """One finding; `missing` means that nrlib does not work without it."""

    status: str  # a key of MARKS
    subject: str
    finding: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"\n        {self.remedy}" if self.remedy and self.status != "ok" else ""
        return f"{MARKS[self.status]:7s} {self.subject}: {self.finding}{remedy}"


def examine() -> Iterator[Check]:
    """All checks, the quick ones first."""
    yield _python()
    yield from _packages()
    yield _disk(cache_directory())
    yield _debian_tools()
    if all(_installed(name) for name in ("torch", "transformers", "peft")):
        yield from _machine()
        yield _tree()


def _python() -> Check:
    is_new_enough = sys.version_info >= OLDEST_PYTHON
    needed = ".".join(map(str, OLDEST_PYTHON))
    return Check(
        "ok" if is_new_enough else "missing", "Python", f"{platform.python_version()} at {sys.executable}",
        f"Python {needed} or newer is needed.",
    )  # fmt: skip


def _packages() -> Iterator[Check]:
    absent = [name for name in NEEDED_PACKAGES if _installed(name) is None]
    finding = f"{', '.join(absent)} not installed" if absent else f"all {len(NEEDED_PACKAGES)} core packages are there"
    remedy = "Install with: pip install -c constraints.txt -e ."
    yield Check("missing" if absent else "ok", "packages", finding, remedy)
    path = project_directory() / "constraints.txt"
    if not path.exists():
        yield Check("note", "versions", f"no {path}, so versions were not compared", "Run this in the checkout.")
        return
    pins = read_pins(path)
    others = [
        f"{name} {found} (pinned {pinned})"
        for name, pinned in pins.items()
        if (found := _installed(name)) is not None and found.partition("+")[0] != pinned
    ]
    finding = "; ".join(others) if others else f"all as in {path.name} ({len(pins)} pins)"
    remedy = "Published numbers were made with the pinned versions; with others the last digits may differ."
    yield Check("note" if others else "ok", "versions", finding, remedy)


def read_pins(path: Path) -> dict[str, str]:
    """The `name==version` lines of a constraints file that apply to this Python and system."""
    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if "==" in (text := line.partition("#")[0].strip()):
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate():
                pins[requirement.name] = next(iter(requirement.specifier)).version
    return pins


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _disk(cache: Path) -> Check:
    existing = next(folder for folder in (cache.absolute(), *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free / 1e9
    is_writable = os.access(existing, os.W_OK)
    status = "missing" if free < NEEDED_GB or not is_writable else "note" if free < COMFORTABLE_GB else "ok"
    finding = f"{cache}, {free:.1f} GB free" + ("" if is_writable else ", not writable")
    return Check(status, "cache", finding, f"Set NRLIB_CACHE to a folder with {COMFORTABLE_GB} GB of room.")


def _debian_tools() -> Check:
    absent = [name for name in ("apt-get", "dpkg-deb") if shutil.which(name) is None]
    return Check(
        "note" if absent else "ok",
        "debian-docs",
        f"{' and '.join(absent)} not found" if absent else "apt-get and dpkg-deb are there (root is not needed)",
        "The corpora debian-docs:… need them, and so does training for the profiles laptop and gpu. Everything else "
        "works: use synthetic:, file: or hub: corpora, or `make book CORPUS=synthetic`.",
    )


def _machine() -> Iterator[Check]:
    import torch

    from ..machine import describe_device, keep_large_blocks, pick_device, pick_precision

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    variable = os.environ.get("OMP_NUM_THREADS")
    yield Check(
        "note" if variable and torch.get_num_threads() < (allowed or 1) else "ok",
        "threads",
        f"{torch.get_num_threads()} for one run, {allowed} cores allowed"
        + (f", OMP_NUM_THREADS={variable}" if variable else ""),
        "Unset OMP_NUM_THREADS to use all cores; a sweep sets threads for its own processes.",
    )
    is_fast = pick_precision("auto", torch.device("cpu")) == torch.bfloat16
    finding = "multiplied natively: precision = auto uses it" if is_fast else "not native: precision = auto is float32"
    yield Check("ok", "bfloat16 on the processor", finding)
    yield Check(
        "ok" if keep_large_blocks() else "note",
        "memory allocator",
        "keeps large blocks (glibc)" if keep_large_blocks() else "cannot be told to keep large blocks",
        "Training works, up to a third slower on small models: the C library is not glibc.",
    )
    has_cuda = torch.cuda.is_available()
    finding = describe_device(pick_device()) if has_cuda else "none that torch can use; runs use the processor"
    yield Check("ok", "CUDA", finding)


def _tree() -> Check:
    from ..records import git_state

    commit, is_dirty = git_state()
    finding = f"commit {commit[:12]}, " + ("with uncommitted changes" if is_dirty else "clean")
    return Check(
        "note" if is_dirty else "ok",
        "working tree",
        finding,
        "Records can be published from a clean tree only: commit first.",
    )
