"""Larger shapes, for a GPU: utilisation and memory in training, and what the extension costs at inference.

Model FLOPs utilisation (MFU) is the rate of the floating-point operations that a step needs, whatever it really does, over
the rate the device can reach: PaLM, https://arxiv.org/abs/2204.02311, appendix B. A frozen weight needs no gradient, so a
step of an adapter needs fewer operations than one of fine-tuning.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..hardware import HARDWARE
from ..machine import describe_device, pick_device, pick_precision
from .cases import CASES, OURS, TITLES, case_of, make_model
from .timing import Case, Settings, summarise, take_turns

# Llama-like, with tied embeddings.
_COMMON = {"vocabulary_size": 50_304, "context_length": 1024}
SHAPES: dict[str, dict[str, Any]] = {
    "125M": _COMMON | {"d_model": 768, "n_layers": 12, "n_heads": 12, "ffn_width": 2048, "batch_size": 16},
    "1.3B": _COMMON | {"d_model": 2048, "n_layers": 24, "n_heads": 16, "ffn_width": 5504, "batch_size": 8},
}
GPU_CASES = {"training": (OURS, "fine_tuning", "lora")} | {
    kind: CASES[kind] for kind in ("prefill", "decoding", "decoding_one")
}
GPU_SETTINGS = Settings(profile="gpu", n_rounds=7, n_steps=4, prompt_length=128, n_generated=64, seconds=60.0)


def run_gpu_benchmark(
    shapes: Mapping[str, Mapping[str, Any]] = SHAPES, progress: bool = True, settings: Settings = GPU_SETTINGS
) -> dict[str, Any]:
    """Measure every shape; rows as in `nrlib.benchmark.run_benchmark`, in training with `mfu` as well.

    `reachable_flops` is the rate of one large matrix product measured here, `peak_flops` the vendor's, or the measured
    one for a device that is not in `nrlib.hardware.HARDWARE`. A kind that does not fit into the memory is None.
    """
    device = pick_device()
    reachable = matrix_product_flops(device, pick_precision("auto", device))
    name = describe_device(device)
    peak = next((h.tflops * 1e12 for h in HARDWARE.values() if h.name in name.lower().replace(" ", "")), reachable)
    result: dict[str, Any] = {"device": name, "reachable_flops": reachable, "peak_flops": peak, "shapes": {}}
    for shape, changes in shapes.items():
        of_shape = dataclasses.replace(settings, changes=changes)
        result["shapes"][shape] = {
            kind: _measure_or_none(kind, names, of_shape, peak, progress) for kind, names in GPU_CASES.items()
        }
    return result


def _measure_or_none(kind: str, names: tuple[str, ...], settings: Settings, peak: float, progress: bool) -> Any:
    try:
        return _measure(kind, names, settings, peak, progress)
    except torch.OutOfMemoryError:
        return None
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _measure(
    kind: str, names: tuple[str, ...], settings: Settings, peak: float, progress: bool
) -> dict[str, dict[str, Any]]:
    cases: dict[tuple[str, str], Case] = {}
    memory, flops = {}, {}
    for name in names:
        before = _allocated_mb()
        model, config = make_model(kind, name, settings)
        cases[kind, name] = case_of(model, config, kind, name, settings)
        memory[name] = _peak_mb(cases[kind, name], before)
        if kind == "training":
            flops[name] = training_flops_per_token(model, config.training.context_length)
    timings = take_turns(cases, settings, progress, f"{settings.changes.get('d_model', settings.profile)} {kind}")
    rows = {name: summarise(timings[kind, name], timings[kind, names[0]], memory[name]) for name in names}
    for name, count in flops.items():
        rows[name] |= {
            "flops_per_token": count,
            "mfu": round(rows[name]["tokens_per_second"]["median"] * count / peak, 4),
        }
    return rows


def _allocated_mb() -> float:
    return torch.cuda.memory_allocated() / 1e6 if torch.cuda.is_available() else 0.0


def _peak_mb(case: Case, before: float) -> int | None:
    """What the case needs at most, above what the device held before it was made; only a GPU counts that itself."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    case()
    return round(torch.cuda.max_memory_allocated() / 1e6 - before)


def training_flops_per_token(model: nn.Module, context_length: int) -> int:
    """Floating-point operations of one training step, over its tokens, of a Llama-like model.

    Every matrix product is done once forwards, once for the gradient of its input and once for that of its weights, each
    where it is needed; attention counts every pair of tokens, as is customary, though half of them are masked.
    `nrlib.step_cost` counts what is really done, products that the backward pass repeats to save memory included.
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight: Tensor = module.weight  # type: ignore[assignment]
        has_input_gradient = inputs[0].requires_grad
        total += 2 * weight.numel() * (1 + has_input_gradient + weight.requires_grad)
        if module in attention_outputs:
            total += 4 * context_length * weight.shape[1] * (3 if has_input_gradient else 1)

    named = list(model.named_modules())
    attention_outputs = {
        module.get_submodule("base_layer") if hasattr(module, "base_layer") else module
        for name, module in named
        if name.endswith("o_proj")
    }
    handles = [module.register_forward_hook(count) for _, module in named if isinstance(module, nn.Linear)]
    tokens = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with torch.enable_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return total


@torch.no_grad()
def matrix_product_flops(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Operations a second of one large square matrix product: the best of several tries."""
    size = size or (8192 if device.type == "cuda" else 512)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        _synchronise(device)
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        _synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 4 * 2 * size**3 / best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def format_gpu_table(result: dict[str, Any]) -> str:
    """The result as text: one line for each case."""
    lines = [
        f"{result['device']}; peak {result['peak_flops'] / 1e12:,.1f} TFLOP/s, a large matrix product reaches "
        f"{result['reachable_flops'] / 1e12:,.1f}",
        f"{'':57} {'tokens/s':>11}  {'ratio':<20} {'MFU':>6} {'memory':>9}",
    ]
    for shape, kinds in result["shapes"].items():
        for kind, rows in kinds.items():
            if rows is None:
                lines.append(f"{shape:6} {kind:12} does not fit into the device's memory")
                continue
            for name, row in rows.items():
                ratio, mfu, memory = row["ratio"], row.get("mfu"), row["peak_memory_mb"]
                lines.append(
                    f"{shape:6} {kind:12} {TITLES[name]:37} {row['tokens_per_second']['median']:>11,.0f}  "
                    f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})".ljust(91)
                    + ("" if mfu is None else f"{mfu:>6.1%}").rjust(7)
                    + ("" if memory is None else f"{memory:,} MB").rjust(10)
                )
    return "\n".join(lines)
