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
from torch import Tensor

from .adapter import GatedAdapter

# Floating-point operations that must be saved before moving rows there and back pays, by kind of device; on any other device
# nothing is skipped. cpu: measured, some 30 microseconds of one core. cuda: counting open gates makes the host wait for the
# device, and what waits cannot queue ahead. Below a tenth of a millisecond of matrix products (1e11 operations at 1e15 a
# second) that cannot pay, so a long prefill skips and a decoding step does not. This figure is an estimate.
WORTHWHILE_FLOPS = {"cpu": 4e6, "cuda": 1e11}
LARGEST_OPEN_RATIO = 0.85  # with more gates open, moving rows costs what is saved: measured on a cpu


def add_residue(output: Tensor, adapter: GatedAdapter, x: Tensor) -> Tensor:
    """output (…, D) + residue(x) for the hidden states x (…, D), skipping closed gates where that pays."""
    dtype = adapter.input_projection.weight.dtype
    if x.dtype != dtype:  # PEFT keeps adapters of a half-precision backbone in float32
        x = x.to(dtype)
    if not may_skip(adapter, x):
        return output + adapter(x).to(output.dtype)
    gates = adapter.gate_values(x)  # (…, 1)
    n_tokens, n_open = gates.numel(), int(gates.count_nonzero())
    if n_open == 0:
        return output
    if n_open > LARGEST_OPEN_RATIO * n_tokens or not is_worthwhile(adapter, x, n_tokens - n_open):
        return output + (gates * adapter.glu(x)).to(output.dtype)
    rows = gates.flatten().nonzero().squeeze(1)  # (n_open,)
    residue = gates.reshape(-1, 1)[rows] * adapter.glu(x.reshape(n_tokens, -1)[rows])  # (n_open, D)
    return output.reshape(n_tokens, -1).index_add(0, rows, residue.to(output.dtype)).view(output.shape)


def may_skip(adapter: GatedAdapter, x: Tensor) -> bool:
    """Whether looking for closed gates is allowed here, and free or worth its price.

    Not in training; not while a graph is recorded, which cannot depend on the data; and not under hooks on the adapter (the
    local loss, the gate statistics), which are to see the residue of every token. A hook on the block gate sees every token
    in any case, one on a projection only the tokens that are computed.
    """
    if adapter.gate != "relu" or adapter.training or torch.is_grad_enabled():
        return False
    if adapter._forward_hooks or adapter._forward_pre_hooks:
        return False
    # A wrapper or a subclass, of the adapter or of the tensor, may do more than the formula.
    if type(adapter) is not GatedAdapter or type(x) is not Tensor:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if x.device.type == "cuda":
        n_tokens = x.numel() // x.shape[-1]
        return is_worthwhile(adapter, x, n_tokens) and not torch.cuda.is_current_stream_capturing()
    return x.device.type in WORTHWHILE_FLOPS


def is_worthwhile(adapter: GatedAdapter, x: Tensor, n_closed: int) -> bool:
    """Whether leaving out `n_closed` tokens saves enough on the device of x."""
    flops_per_token = 6 * adapter.output_projection.weight.numel()  # three matrices of D·H weights
    return n_closed * flops_per_token >= WORTHWHILE_FLOPS[x.device.type]
