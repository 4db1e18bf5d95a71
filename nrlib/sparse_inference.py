"""Inference that skips closed gates: where relu(w·x + b) = 0 the residue is 0, so the adapter need not be computed.

The gates come first, one product of D numbers for each token. The adapter then reads only the tokens whose gate is open,
and what it says is added to their rows of the block's output:

    x (n, D) ──► gates (n, 1) ──► rows of open gates ──► adapter on x[rows] ──► added to output[rows]

A row with a closed gate is the block's output, bit for bit. An open row is the sum of the dense path; its matrix
products have fewer rows, and a library may add in another order, so it can differ by rounding.

No other gate is ever exactly 0: elu(z) > -1 is negative below 0, where nothing can be skipped without changing the model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .adapter import GatedAdapter

# Floating-point operations that must be saved before moving rows to and fro pays, by kind of device; on any other device
# nothing is skipped. cpu: measured, some 30 microseconds of one core. cuda: counting open gates makes the host wait for the
# device, and what waits cannot queue ahead. Below a tenth of a millisecond of matrix products (1e11 operations at 1e15 a
# second) that cannot pay, so a long prefill skips and a decoding step does not. This figure is an estimate.
WORTHWHILE_FLOPS = {"cpu": 4e6, "cuda": 1e11}
LARGEST_OPEN_RATIO = 0.85  # with more gates open, moving rows costs what is saved: measured on a cpu


def add_residue(output: Tensor, adapter: GatedAdapter, x: Tensor) -> Tensor:
    """output (…, D) + residue(x) for the hidden states x (…, D), skipping closed gates where that pays."""
    weight = adapter.output_projection.weight  # (D, H)
    x = x.to(weight.dtype)  # PEFT keeps adapters of a half-precision backbone in float32
    n_tokens = x.numel() // x.shape[-1]
    flops_per_token = 6 * weight.numel()  # three matrices of D·H weights
    if not may_skip(adapter, x, n_tokens * flops_per_token):
        return output + adapter(x).to(output.dtype)
    gates = adapter.gate_values(x)  # (…, 1)
    n_open = int(gates.count_nonzero())
    if n_open == 0:
        return output
    saved_flops = (n_tokens - n_open) * flops_per_token
    if saved_flops < WORTHWHILE_FLOPS[x.device.type] or n_open > LARGEST_OPEN_RATIO * n_tokens:
        return output + (gates * adapter.glu(x)).to(output.dtype)
    rows = gates.flatten().nonzero().squeeze(1)  # (n_open,)
    residue = gates.reshape(-1, 1)[rows] * adapter.glu(x.reshape(n_tokens, -1)[rows])  # (n_open, D)
    return output.reshape(n_tokens, -1).index_add(0, rows, residue.to(output.dtype)).view(output.shape)


def may_skip(adapter: GatedAdapter, x: Tensor, flops: int) -> bool:
    """Whether looking for closed gates is allowed here, and free or worth its price where all take `flops` to compute.

    Not in training; not while a graph is recorded, which cannot depend on the data; and not under hooks (the local loss,
    the gate statistics), which are to see the residue of every token.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
        return False
    # A wrapper or a subclass, of the adapter or of the tensor, may do more than the formula.
    if type(adapter) is not GatedAdapter or adapter.gate != "relu" or adapter.training or type(x) is not Tensor:
        return False
    if _has_hooks(adapter) or any(_has_hooks(part) for part in adapter._modules.values()):
        return False
    if x.device.type == "cuda":
        return flops >= WORTHWHILE_FLOPS["cuda"] and not torch.cuda.is_current_stream_capturing()
    return x.device.type in WORTHWHILE_FLOPS


def _has_hooks(module: nn.Module | None) -> bool:
    return module is not None and bool(module._forward_hooks or module._forward_pre_hooks)
