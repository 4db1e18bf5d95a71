"""Cases that take turns, and what is said about their times."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

WIDE: dict[str, Any] = {"d_model": 1024, "n_layers": 3, "n_heads": 16, "ffn_width": 2816, "batch_size": 4}


@dataclass(frozen=True)
class Settings:
    """How much is measured. Weights and tokens are random: neither changes the speed.

    n_steps : timed steps of a round; one more, which is not timed, goes before them and pays for the set-up.
    seconds : no new round is started after this time.
    changes : parameters that differ from the profile's.
    wide : those of the kinds whose names end in '_wide'.

    In a model as narrow as the profile's, the calls take as long as the products; what the extension costs in a usual
    model, the wider one shows better: its layers are those of a model of half a billion weights.
    """

    profile: str = "laptop"
    n_rounds: int = 12
    n_steps: int = 8
    seconds: float = float("inf")
    prompt_length: int = 16
    n_generated: int = 48
    with_memory: bool = True
    with_gpu: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict)
    wide: Mapping[str, Any] = field(default_factory=lambda: WIDE)


QUICK = Settings(n_rounds=5, n_steps=2, seconds=35.0, n_generated=24)


@dataclass(frozen=True)
class Stamp:
    """A moment: wall clock and the processor time this process has used."""

    seconds: float
    user_seconds: float
    system_seconds: float

    @staticmethod
    def now() -> Stamp:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return Stamp(time.perf_counter(), usage.ru_utime, usage.ru_stime)


Case = Callable[[], tuple[Stamp, Stamp, int]]  # runs one round; returns start, end and tokens between them


@dataclass(frozen=True)
class Timing:
    """One round of one case."""

    n_tokens: int
    seconds: float
    user_seconds: float
    system_seconds: float

    @staticmethod
    def of(case: Case) -> Timing:
        start, end, n_tokens = case()
        user, system = end.user_seconds - start.user_seconds, end.system_seconds - start.system_seconds
        return Timing(n_tokens, end.seconds - start.seconds, user, system)

    @property
    def processor_seconds(self) -> float:
        return self.user_seconds + self.system_seconds


def take_turns(
    cases: Mapping[tuple[str, str], Case], settings: Settings, progress: bool, description: str = "benchmark"
) -> dict[tuple[str, str], list[Timing]]:
    """Every case once for warming up, then rounds of all cases in turn."""
    start = time.perf_counter()
    timings: dict[tuple[str, str], list[Timing]] = {key: [] for key in cases}
    bar = tqdm(total=settings.n_rounds * len(cases), desc=description, disable=not progress, unit="case", leave=False)
    for case in cases.values():
        case()
    for _ in range(settings.n_rounds):
        for key, case in cases.items():
            bar.set_postfix_str(" ".join(key), refresh=False)
            timings[key].append(Timing.of(case))
            bar.update()
        if time.perf_counter() - start > settings.seconds:
            break
    bar.close()
    return timings


def summarise(rounds: list[Timing], reference: list[Timing], peak_memory_mb: int | None) -> dict[str, Any]:
    """Speed of a case, and its time over the reference's, round by round."""
    pairs = list(zip(rounds, reference, strict=True))
    processor_seconds = max(sum(t.processor_seconds for t in rounds), 1e-9)
    return {
        "tokens_per_second": _spread([t.n_tokens / t.seconds for t in rounds], 1),
        "ratio": _spread([mine.seconds / other.seconds for mine, other in pairs], 4),
        "processor_ratio": _spread([mine.processor_seconds / other.processor_seconds for mine, other in pairs], 4),
        "kernel_time_ratio": round(sum(t.system_seconds for t in rounds) / processor_seconds, 4),
        "peak_memory_mb": peak_memory_mb,
    }


def _spread(values: list[float], digits: int) -> dict[str, float]:
    low, middle, high = min(values), statistics.median(values), max(values)
    return {"median": round(middle, digits), "lowest": round(low, digits), "highest": round(high, digits)}
