"""Peak memory of each case, in a process of its own.

ru_maxrss would be wrong: a child process inherits its parent's value, which is large here. The kernel's high water mark
VmHWM belongs to the process's own memory, and can be set back to the present size.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import torch
from tqdm import tqdm

from ..machine import keep_large_blocks
from .cases import CASES, make_case
from .timing import Settings


def peak_memory_of(action: Callable[[], object]) -> int:
    """Highest memory, in MB, that `action` needs above what the process holds at its start."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        action()
        return round(torch.cuda.max_memory_allocated() / 1e6)
    _reset_high_water_mark()
    before = _resident_mb("VmRSS")
    action()
    return round(_resident_mb("VmHWM") - before)


def _reset_high_water_mark() -> None:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as handle:
            handle.write("5")
    except OSError:
        pass  # in a fresh process the mark is the present size, but for what the imports gave back


def _resident_mb(entry: str) -> float:
    try:
        with open("/proc/self/status", encoding="utf-8") as handle:
            return next(int(line.split()[1]) * 1.024e-3 for line in handle if line.startswith(entry + ":"))
    except (OSError, StopIteration):  # not Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def measure_memory(settings: Settings, progress: bool) -> dict[tuple[str, str], int]:
    """Peak memory of every training and scoring case, in MB, by kind and name."""
    keys = [(kind, name) for kind in ("training", "scoring") for name in CASES[kind]]
    # The imports take ten times as long as the measurement. On Linux one new process does them and forks for each case.
    groups = [keys] if sys.platform == "linux" else [[key] for key in keys]
    peaks = (peak for group in groups for peak in _memory_in_new_process(group, settings.profile))
    bar = tqdm(peaks, total=len(keys), desc="peak memory", disable=not progress, unit="case", leave=False)
    return dict(zip(keys, bar, strict=True))


def _memory_in_new_process(keys: list[tuple[str, str]], profile: str) -> Iterator[int]:
    names = [f"{kind}/{name}" for kind, name in keys]
    command = [sys.executable, "-m", "nrlib.benchmark.memory", profile, str(torch.get_num_threads()), *names]
    environment = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # CUDA must not be started before a fork
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            yield int(json.loads(line))
        if process.wait():
            errors.seek(0)
            raise RuntimeError(f"Measuring peak memory failed:\n{errors.read()[-2000:]}")


def _memory_process(profile: str, n_threads: str, *names: str) -> None:
    import transformers.trainer  # noqa: F401  before the measurement: the library itself is not counted

    for name in names:
        child = os.fork() if len(names) > 1 else 0
        if child:
            _, status = os.waitpid(child, 0)
            if status:
                raise SystemExit(1)
            continue
        torch.set_num_threads(int(n_threads))
        keep_large_blocks()
        kind, case = name.split("/")
        settings = Settings(profile=profile, n_steps=2)
        print(json.dumps(peak_memory_of(lambda: make_case(kind, case, settings)())), flush=True)  # noqa: B023
        if len(names) > 1:
            os._exit(0)


if __name__ == "__main__":
    _memory_process(*sys.argv[1:])
