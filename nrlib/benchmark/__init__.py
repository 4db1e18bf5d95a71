"""Speed and memory of training and inference, side by side in one run.

The cases take turns (A B C D A B C D …) in one process, so that another program on the machine slows all of them, and
are compared round by round. Processor time is compared as well: it hardly moves when other programs take the cores.
Peak memory is measured apart, in a fresh process for each case. Where there is a GPU, larger shapes follow on it.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from ..config import make_config
from ..machine import describe_device, keep_large_blocks, package_versions, pick_device, pick_precision
from .cases import CASES, OURS, TITLES, inference_dtype, make_case
from .gpu import SHAPES, format_gpu_table, run_gpu_benchmark
from .inference import OPEN_RATIOS
from .memory import measure_memory
from .timing import QUICK, Settings, summarise, take_turns


def run_benchmark(quick: bool = False, progress: bool = True, settings: Settings | None = None) -> dict[str, Any]:
    """Measure all cases; the result can be written as JSON.

    Speeds are tokens per second, as median, lowest and highest over the rounds. A ratio is a case's time over that of the
    first case of its kind (neutral residues in training, the bare backbone at inference) in the same round, so above 1 the
    case is slower; `processor_ratio` is the same by processor time, of all threads together. `kernel_time_ratio` is the
    system's share of the processor time. `peak_memory_mb` counts what the case needs above the imported libraries: weights,
    gradients, optimiser state and temporaries. With CUDA, `gpu` holds the result of
    `nrlib.benchmark.gpu.run_gpu_benchmark`.
    """
    settings = settings or (QUICK if quick else Settings())
    keep_large_blocks()  # for every case alike: our loop does it, Trainer profits from it here
    start = time.perf_counter()
    cases = {(kind, name): make_case(kind, name, settings) for kind, names in CASES.items() for name in names}
    timings = take_turns(cases, settings, progress)
    result = _describe(settings, n_rounds=len(timings["training", OURS]))
    del cases
    memory = measure_memory(settings, progress) if settings.with_memory else {}
    for kind, names in CASES.items():
        result[kind] = {
            name: summarise(timings[kind, name], timings[kind, names[0]], memory.get((kind, name))) for name in names
        }
    if settings.with_gpu and torch.cuda.is_available():
        result["gpu"] = run_gpu_benchmark({name: SHAPES[name] for name in (["125M"] if quick else SHAPES)}, progress)
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def format_table(result: dict[str, Any]) -> str:
    """The result as text: one line for each case."""
    machine, precision = result["machine"], result["precision"]
    shares = " and ".join(f"{ratio:.1%} of {name.replace('_', '-')} tokens" for name, ratio in OPEN_RATIOS.items())
    lines = [
        f"{machine['device']}; {machine['n_threads']} threads; training in {precision['training']}, inference in "
        f"{precision['inference']}; {result['n_rounds']} rounds in {result['seconds']} s",
        "ratio: this case's time over the first case's of its kind in the same round, median (lowest to highest), by wall",
        "clock and by processor time; kernel: its share of the processor time; memory: peak, above the imported libraries;",
        f"ReLU gates are open on {shares}; wide: d_model = {result['wide']['d_model']}",
        "",
        f"{'':55} {'tokens/s':>9}  {'ratio, wall clock':<20} {'ratio, processor':<20} {'kernel':>6} {'memory':>7}",
    ]
    for kind, names in CASES.items():
        for name in names:
            row = result[kind][name]
            ratios = ["" if name == names[0] else _format_spread(row[key]) for key in ("ratio", "processor_ratio")]
            memory = "" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']} MB"
            lines.append(
                f"{kind:17} {TITLES[name]:37} {row['tokens_per_second']['median']:>9,.0f}  {ratios[0]:<20} "
                f"{ratios[1]:<20} {row['kernel_time_ratio']:>6.1%} {memory:>7}"
            )
    if "gpu" in result:
        lines += ["", format_gpu_table(result["gpu"])]
    return "\n".join(lines)


def _format_spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"


def _describe(settings: Settings, n_rounds: int) -> dict[str, Any]:
    config, device = make_config(settings.profile, **settings.changes), pick_device()
    shape = {key: getattr(config.backbone, key) for key in ("d_model", "n_layers", "ffn_width", "vocabulary_size")}
    shape |= {key: getattr(config.training, key) for key in ("context_length", "batch_size")}
    training_dtype = pick_precision(config.training.precision, device)
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
        "precision": {
            "training": str(training_dtype).removeprefix("torch."),
            "inference": str(inference_dtype(device)).removeprefix("torch."),
        },
        "wide": dict(settings.wide),
        "open_ratios": dict(OPEN_RATIOS),
        "n_rounds": n_rounds,
        "n_steps_per_round": settings.n_steps,
    }
