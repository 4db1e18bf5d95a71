"""Devices to plan for: peak speed, memory, and the share of the peak that training reaches."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .errors import ConfigError

if TYPE_CHECKING:
    from .step_cost import StepCost

ASSUMED_UTILISATION = 0.4  # share of the peak that a well-fed GPU reaches in training; small models reach less


@dataclass(frozen=True)
class Hardware:
    """One device.

    tflops, tflops_float32 : peak of dense matrix products in bfloat16 and float32, in 10^12 operations per second.
    memory_gb : memory in 10^9 bytes; utilisation : share of the peak that training is assumed to reach.
    bandwidth_gb : 10^9 bytes a second that operations other than products move; None leaves their time to `utilisation`.
    source : where the peak comes from.
    """

    name: str
    tflops: float
    tflops_float32: float
    memory_gb: float
    utilisation: float = ASSUMED_UTILISATION
    source: str = "vendor's peak, dense"
    bandwidth_gb: float | None = None

    @property
    def is_accelerator(self) -> bool:
        return self.name != "cpu"

    def seconds_per_token(self, cost: StepCost, dtype: torch.dtype) -> float:
        """Time of products and attention, and, if the bandwidth is known, of everything else."""
        peak = self.tflops if dtype == torch.bfloat16 else self.tflops_float32
        moving = cost.moved_bytes / (self.bandwidth_gb * 1e9) if self.bandwidth_gb else 0.0
        return cost.training_flops / (peak * 1e12 * self.utilisation) + moving


HARDWARE = {
    h.name: h
    for h in (
        Hardware("h200", 989, 67, 141),
        Hardware("h100", 989, 67, 80),  # the SXM version
        Hardware("a100", 312, 19.5, 80),
        Hardware("rtx4090", 165, 82.6, 24),
    )
}


def parse_hardware(text: str) -> Hardware:
    """A name of HARDWARE, 'cpu' for this machine, or 'tflops=…,memory=…GB,utilisation=…,bandwidth=…GB'; a name may be followed by what
    is to be changed, as in 'h100,utilisation=0.5'.

    Raises
    ------
    ConfigError
        For anything else.
    """
    name, _, rest = text.partition(",") if "=" not in text.partition(",")[0] else ("", "", text)
    values: dict[str, float] = {}
    for part in filter(None, rest.split(",")):
        match = re.fullmatch(
            r"\s*(tflops|memory|utilisation|bandwidth)\s*=\s*(\d+(?:\.\d*)?(?:e\d+)?|\.\d+)\s*(?:GB)?\s*", part
        )
        if match is None or match[1] in values or not float(match[2]) > 0:
            raise ConfigError(_not_hardware(text, part.strip()))
        values[match[1]] = float(match[2])
    if name not in HARDWARE and name not in ("", "cpu"):
        raise ConfigError(_not_hardware(text, name))
    if not name and not {"tflops", "memory"} <= values.keys():
        raise ConfigError(_not_hardware(text, text))
    if values.get("utilisation", 1.0) > 1:
        raise ConfigError(f"utilisation = {values['utilisation']:g} is a share of the peak: give at most 1.")
    known = HARDWARE.get(name) or (this_machine() if name == "cpu" else None)
    changed = "tflops" in values or known is None
    return Hardware(
        name=name or "given",
        tflops=values.get("tflops", known.tflops if known else 0.0),
        tflops_float32=values.get("tflops", known.tflops_float32 if known else 0.0),
        memory_gb=values.get("memory", known.memory_gb if known else 0.0),
        utilisation=values.get("utilisation", known.utilisation if known else ASSUMED_UTILISATION),
        source="as given" if changed or known is None else known.source,
        bandwidth_gb=values.get("bandwidth"),
    )


def _not_hardware(text: str, part: str) -> str:
    return (
        f"hardware = {text!r}: {part!r} is not known. Give one of {', '.join(HARDWARE)}, cpu (this machine), or "
        "numbers, such as 'tflops=312,memory=80GB,utilisation=0.4'."
    )


def this_machine() -> Hardware:
    """The processor here; its peak is what a large matrix product reaches, since vendors give none for a share of one."""
    peaks = {dtype: _matrix_tflops(dtype) for dtype in (torch.bfloat16, torch.float32)}
    n_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return Hardware(
        "cpu", peaks[torch.bfloat16], peaks[torch.float32], n_bytes / 1e9, source="measured here, matrix product"
    )


def _matrix_tflops(dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    a = torch.ones(size, size, dtype=dtype)
    a @ a
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12
