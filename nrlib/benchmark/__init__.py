"""Speed and memory of training and inference, side by side in one run.

The cases take turns (A B C D A B C D …) in one process, so that another program on the machine slows all of them, and
are compared round by round. Processor time is compared as well: it hardly moves when other programs take the cores.
Peak memory is measured apart, in a fresh process for each case.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ..config import make_config
from ..machine import describe_device, keep_large_blocks, package_versions, pick_device, pick_precision
from .cases import CASES, OURS, QUICK, TITLES, Case, Settings, make_case
from .memory import measure_memory


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


def run_benchmark(quick: bool = False, progress: bool = True, settings: Settings | None = None) -> dict[str, Any]:
    """Measure all cases; the result can be written as JSON.

    Speeds are tokens per second, as median, lowest and highest over the rounds. A ratio is the speed of neutral
    residues over the other case's in the same round, so above 1 neutral residues are faster; `processor_ratio` is the
    same by processor time, of all threads together. `kernel_time_ratio` is the system's share of the processor time.
    `peak_memory_mb` counts what the case needs above the imported libraries: weights, gradients, optimiser state and
    temporaries.
    """
    settings = settings or (QUICK if quick else Settings())
    keep_large_blocks()  # for every case alike: our loop does it, Trainer profits from it here
    start = time.perf_counter()
    cases = {(kind, name): make_case(kind, name, settings) for kind, names in CASES.items() for name in names}
    timings: dict[tuple[str, str], list[Timing]] = {key: [] for key in cases}
    bar = tqdm(total=settings.n_rounds * len(cases), desc="benchmark", disable=not progress, unit="case", leave=False)
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
    result = _describe(settings, n_rounds=len(timings["training", OURS]))
    memory = measure_memory(settings, progress) if settings.with_memory else {}
    for kind, names in CASES.items():
        result[kind] = {
            name: _summary(timings[kind, name], timings[kind, OURS], memory.get((kind, name))) for name in names
        }
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def format_table(result: dict[str, Any]) -> str:
    """The result as text: one line for each case."""
    machine = result["machine"]
    lines = [
        f"{machine['device']}; {machine['n_threads']} threads; training in {result['precision']}, inference in float32; "
        f"{result['n_rounds']} rounds in {result['seconds']} s",
        "ratio: speed of neutral residues over this case's in the same round, median (lowest to highest), by wall clock",
        "and by processor time; kernel: its share of the processor time; memory: peak, above the imported libraries",
        "",
        f"{'':48} {'tokens/s':>9}  {'ratio, wall clock':<20} {'ratio, processor':<20} {'kernel':>6} {'memory':>7}",
    ]
    for kind in CASES:
        for name, row in result[kind].items():
            ratios = ["" if name == OURS else _format_spread(row[key]) for key in ("ratio", "processor_ratio")]
            memory = "" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']} MB"
            lines.append(
                f"{kind:10} {TITLES[name]:37} {row['tokens_per_second']['median']:>9,.0f}  {ratios[0]:<20} "
                f"{ratios[1]:<20} {row['kernel_time_ratio']:>6.1%} {memory:>7}"
            )
    return "\n".join(lines)


def _format_spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"


def _spread(values: list[float], digits: int) -> dict[str, float]:
    low, middle, high = min(values), statistics.median(values), max(values)
    return {"median": round(middle, digits), "lowest": round(low, digits), "highest": round(high, digits)}


def _summary(rounds: list[Timing], ours: list[Timing], peak_memory_mb: int | None) -> dict[str, Any]:
    pairs = list(zip(ours, rounds, strict=True))
    processor_seconds = max(sum(t.processor_seconds for t in rounds), 1e-9)
    return {
        "tokens_per_second": _spread([t.n_tokens / t.seconds for t in rounds], 1),
        "ratio": _spread([other.seconds / mine.seconds for mine, other in pairs], 4),
        "processor_ratio": _spread([other.processor_seconds / mine.processor_seconds for mine, other in pairs], 4),
        "kernel_time_ratio": round(sum(t.system_seconds for t in rounds) / processor_seconds, 4),
        "peak_memory_mb": peak_memory_mb,
    }


def _describe(settings: Settings, n_rounds: int) -> dict[str, Any]:
    config, device = make_config(settings.profile), pick_device()
    shape = {key: getattr(config.backbone, key) for key in ("d_model", "n_layers", "ffn_width", "vocabulary_size")}
    shape |= {key: getattr(config.training, key) for key in ("context_length", "batch_size")}
    return {
        "profile": settings.profile,
        "shape": shape | {"extra_ratio": config.method.extra_ratio},
        "machine": {
            "device": describe_device(device),
            "n_threads": torch.get_num_threads(),
            # above the number of cores, other programs were running too
            "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        },
        "versions": package_versions(),
        "precision": str(pick_precision(config.training.precision, device)).removeprefix("torch."),
        "n_rounds": n_rounds,
        "n_steps_per_round": settings.n_steps,
    }
