"""The plan against measurement: peak memory, arithmetic and speed of real training steps at three shapes.

    python -m nrlib.benchmark.plan_check

Memory is what PyTorch's allocator handed out, as its profiler reports it; operations are counted by PyTorch's own counter
on the real step; speed is in tokens per second of processor time, which other programs change least. The speeds of all
methods at one shape tell how fast products are and how fast everything else is, and so predict the other shapes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ..backbone import build_backbone
from ..config import RunConfig, make_config
from ..hardware import Hardware
from ..machine import describe_device, package_versions
from ..methods import apply_method
from ..plan import make_plan
from ..plan_tables import COMPARISON_FILE
from ..profiles import METHODS
from ..step_cost import PROCESSOR_ATTENTION, enable_checkpointing
from ..storage import atomic_path
from ..training import train
from .cases import random_batches

SHAPES: tuple[dict[str, int], ...] = (
    {"d_model": 128, "n_layers": 4, "n_heads": 4, "ffn_width": 352},
    {"d_model": 256, "n_layers": 4, "n_heads": 4, "ffn_width": 704},
    {"d_model": 512, "n_layers": 4, "n_heads": 8, "ffn_width": 1408},
)
SETTINGS: dict[str, Any] = {"batch_size": 8, "precision": "float32"}
CALIBRATED_ON = 256  # the shape whose speeds predict those of the others
_PROCESSOR = Hardware("cpu", tflops=1, tflops_float32=1, memory_gb=1)  # only hours depend on the numbers


@dataclass(frozen=True)
class Comparison:
    """Plan and measurement of one method at one shape."""

    d_model: int
    method: str
    planned_bytes: int
    measured_bytes: int
    planned_bytes_with_checkpointing: int
    measured_bytes_with_checkpointing: int
    planned_flops: float  # per token
    measured_flops: float
    planned_moved_bytes: float  # per token
    tokens_per_second: float = 0.0  # of processor time


def compare(config: RunConfig) -> Comparison:
    """Plan and measure memory and operations of a run's steps."""
    plan = make_plan(config, _PROCESSOR)
    return Comparison(
        config.backbone.d_model,
        config.method.method,
        plan.cost.peak_bytes,
        peak_allocated(lambda: train_steps(make_model(config), config, 2)),
        plan.cost_with_checkpointing.peak_bytes,
        peak_allocated(lambda: train_steps(enable_checkpointing(make_model(config)), config, 2)),
        plan.cost.training_flops,
        count_flops(config),
        plan.cost.moved_bytes,
    )


def make_model(config: RunConfig) -> nn.Module:
    """The extended model, with real weights."""
    return apply_method(build_backbone(config, config.backbone.vocabulary_size, 0), config.method, config.seed)


def train_steps(model: nn.Module, config: RunConfig, n_steps: int) -> float:
    """Seconds of processor time of the steps."""
    batches, m = random_batches(config, n_steps), config.method
    start = time.process_time()
    train(
        model, batches, config.training, local_loss=m.local_loss, local_loss_weight=m.local_loss_weight, progress=False
    )
    return time.process_time() - start


def peak_allocated(action: Callable[[], object]) -> int:
    """Highest number of bytes PyTorch's allocator for the processor had handed out at a time while `action` ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    alive = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def count_flops(config: RunConfig) -> float:
    """Floating-point operations per token of a real training step."""
    model = make_model(config)
    with FlopCounterMode(display=False, custom_mapping=PROCESSOR_ATTENTION) as counter:
        train_steps(model, config, 1)
    return counter.get_total_flops() / (config.training.batch_size * config.training.context_length)


def check_plan(n_rounds: int = 3, n_steps: int = 3, progress: bool = True) -> dict[str, Any]:
    """Compare plan and measurement for every method at every shape; the result can be written as JSON."""
    configs = {
        (shape["d_model"], method): make_config("laptop", method=method, **SETTINGS, **shape)
        for shape in SHAPES
        for method in METHODS
    }
    rows = {key: compare(config) for key, config in tqdm(configs.items(), disable=not progress, desc="memory")}
    seconds: dict[tuple[int, str], list[float]] = {key: [] for key in configs}
    for _ in tqdm(range(n_rounds), disable=not progress, desc="speed"):
        for key, config in configs.items():  # in turn: what slows the machine slows all
            model = make_model(config)
            train_steps(model, config, 1)
            seconds[key].append(train_steps(model, config, n_steps))
    c = next(iter(configs.values())).training
    tokens_per_step = c.batch_size * c.context_length
    speeds = {key: n_steps * tokens_per_step / min(found) for key, found in seconds.items()}
    result = [{**vars(row), "tokens_per_second": round(speeds[key])} for key, row in rows.items()]
    return {
        "calibrated_on": CALIBRATED_ON,
        "tokens_per_step": tokens_per_step,
        "device": describe_device(torch.device("cpu")),
        "n_threads": torch.get_num_threads(),
        "versions": package_versions(),
        "comparisons": result,
    }


def main() -> None:
    """Measure, and write the result as JSON."""
    parser = argparse.ArgumentParser(prog="python -m nrlib.benchmark.plan_check", description=__doc__)
    parser.add_argument("--output", type=Path, default=COMPARISON_FILE)
    output = parser.parse_args().output
    result = check_plan()
    with atomic_path(output) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {output}")


if __name__ == "__main__":
    main()
