"""The machine a run stands on: threads, memory allocator, precision, and what to write into a record about it."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import resource
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch

from .errors import MemoryShortageError

# glibc's mallopt parameters, from malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

PACKAGES = ("nrlib", "torch", "transformers", "peft", "tokenizers", "numpy")


@functools.cache
def keep_large_blocks() -> bool:
    """Let malloc keep freed blocks instead of returning them to the kernel; True where that is possible (glibc).

    A training step frees and asks for the same large temporaries (the logits above all); by default each comes from
    the kernel as fresh pages, which costs a quarter of a step on a small model.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    settings = ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    return all(mallopt(name, value) == 1 for name, value in settings)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread: threads that wait for one another cost a very small model more than they
    bring, and several times its work on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pick_device(name: str = "auto") -> torch.device:
    """'auto' is the first accelerator, else the processor."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """The type of the matrix products: 'auto' is bfloat16 where the hardware multiplies it natively, else float32."""
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            return any("avx512_bf16" in line or "amx_bf16" in line for line in handle if line.startswith("flags"))
    except OSError:
        return False


_RANDOM_STATE_LOCK = threading.Lock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's random numbers follow from `seed`; afterwards they go on as before. One thread at a time: the
    state belongs to the process, and the runs of a sweep may share one."""
    with _RANDOM_STATE_LOCK, torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


_FLOAT32_ATTENTION = {"n_users": 0}  # runs in threads of one process share transformers' registry
_FLOAT32_ATTENTION_LOCK = threading.Lock()


@contextmanager
def attention_in_float32(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside, `transformers` models on a processor compute their attention in float32 where autocast would not.

    On processors without matrix tiles (AMX), the backward pass of PyTorch's fused attention takes three times as long
    in bfloat16 as in float32: a quarter of a step. The matrix products around it stay in bfloat16.
    """
    if device.type != "cpu" or dtype == torch.float32:
        yield
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    with _FLOAT32_ATTENTION_LOCK:
        if _FLOAT32_ATTENTION["n_users"] == 0:
            _replace_sdpa(ALL_ATTENTION_FUNCTIONS)
        _FLOAT32_ATTENTION["n_users"] += 1
    try:
        yield
    finally:
        with _FLOAT32_ATTENTION_LOCK:
            _FLOAT32_ATTENTION["n_users"] -= 1
            if _FLOAT32_ATTENTION["n_users"] == 0:
                del ALL_ATTENTION_FUNCTIONS["sdpa"]


@contextmanager
def keep_attention_precision() -> Iterator[None]:
    """Inside, `attention_in_float32` changes nothing: for a plan, which follows an accelerator's step on a processor."""
    with _FLOAT32_ATTENTION_LOCK:
        _FLOAT32_ATTENTION["n_users"] += 1  # as if another one had seen to it
    try:
        yield
    finally:
        with _FLOAT32_ATTENTION_LOCK:
            _FLOAT32_ATTENTION["n_users"] -= 1


def _replace_sdpa(registry: Any) -> None:
    fused = registry["sdpa"]

    def in_float32(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(q.device.type, enabled=False):
            return fused(module, q.float(), k.float(), v.float(), *args, **kwargs)

    registry["sdpa"] = in_float32  # on this instance only, over the registered one


def describe_device(device: torch.device) -> str:
    """'cpu: AMD EPYC, 2 cores' or the accelerator's name."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {_cpu_name()}, {os.cpu_count()} cores"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            names = [line.partition(":")[2].strip() for line in handle if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory_mb(device: torch.device) -> int:
    """Peak memory of this process in MB: the device's, or the resident set on a processor."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device) / 1e6)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak / 1e6 if sys.platform == "darwin" else peak / 1e3)


@contextmanager
def explained_shortage(batch_size: int, context_length: int, accumulation_steps: int = 1) -> Iterator[None]:
    """Inside a training, running out of memory becomes a MemoryShortageError that says what to lower."""
    with _explained(
        f"Out of memory with batch_size = {batch_size} sequences in {accumulation_steps} part(s) of context_length = "
        f"{context_length} tokens. In this order: give a larger accumulation_steps (the same result, "
        "batch_size / accumulation_steps sequences in memory at a time), a smaller context_length or batch_size, a "
        "smaller extra_ratio or backbone, or a device with more memory."
    ):
        yield


@contextmanager
def explained_evaluation_shortage(context_length: int) -> Iterator[None]:
    """Inside an evaluation, running out of memory becomes a MemoryShortageError that says what to lower."""
    with _explained(
        f"Out of memory while bits per byte or drift were measured, with context_length = {context_length} tokens. "
        "Evaluation computes as few as one sequence at a time, whatever batch_size and accumulation_steps are, but holds "
        "its logits for the whole vocabulary. Give a smaller context_length, a smaller backbone, or a device with more "
        "memory."
    ):
        yield


@contextmanager
def _explained(message: str) -> Iterator[None]:
    """The tensors that filled the memory are let go, so that the next run of a sweep can have it."""
    try:
        yield
    except MemoryShortageError:  # explained already
        raise
    except (MemoryError, RuntimeError) as error:
        if not _is_shortage(error):
            raise
        traceback.clear_frames(error.__traceback__)
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise MemoryShortageError(f"{message} [{words[0][:200]}]") from error


def _is_shortage(error: Exception) -> bool:
    # The processor's allocator raises a plain RuntimeError, and so do the libraries behind an accelerator.
    is_by_type = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_by_type or re.search("can't allocate memory|out of memory|alloc_failed", str(error), re.I) is not None


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "source"
    return versions
