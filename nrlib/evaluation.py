"""Bits per byte, forgetting, learning, drift and gate statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batches import TokenStream, evaluation_batches
from .losses import GateStatistics


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    stream: TokenStream,
    context_length: int,
    *,
    statistics: GateStatistics | None = None,
) -> float:
    """Cross-entropy of a held-out text in bits, over its UTF-8 bytes; comparable across tokenizers.

    Every token, and the end of every document, is predicted once, in windows of `context_length` tokens.
    """
    total = 0.0
    with statistics.collect(stream.name) if statistics is not None else nullcontext():
        for inputs, targets in evaluation_batches(stream, context_length):
            logits, targets = _logits(model, inputs), targets.to(_device(model))
            total += F.cross_entropy(logits, targets.flatten(), reduction="sum").item()
    return total / math.log(2) / stream.n_bytes


@torch.no_grad()
def drift(
    model: nn.Module, backbone: Callable[[Tensor], Tensor], stream: TokenStream, context_length: int, n_batches: int = 8
) -> float:
    """Mean KL divergence from the backbone's next-token distribution to the model's, in nats per token.

    `backbone` maps tokens (B, T) to logits (B·T, V). Only the first `n_batches` batches of the text are used.
    """
    total, n_tokens = 0.0, 0
    for index, (inputs, targets) in enumerate(evaluation_batches(stream, context_length)):
        if index == n_batches:
            break
        before = F.log_softmax(backbone(inputs), dim=-1)
        after = F.log_softmax(_logits(model, inputs), dim=-1)
        total += F.kl_div(after, before, reduction="sum", log_target=True).item()
        n_tokens += targets.numel()
    return total / n_tokens


def forgetting(method: float, backbone: float) -> float:
    """(method − backbone) / backbone, bits per byte on the original domain."""
    return (method - backbone) / backbone


def learning(method: float, backbone: float, fine_tuning: float) -> float:
    """(backbone − method) / (backbone − fine-tuning), bits per byte on the new domain; fine-tuning at its best rate."""
    return (backbone - method) / (backbone - fine_tuning)


def logits_function(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model as a function from tokens (B, T) to logits (B·T, V)."""
    return lambda inputs: _logits(model, inputs)


def evaluate(
    model: nn.Module, held_out: dict[str, TokenStream], names: tuple[str, ...], context_length: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Bits per byte by text, and the gate statistics gathered on the way, one row for each adapter and text."""
    was_training = model.training
    model.eval()
    statistics = GateStatistics(model)
    values = {
        name: bits_per_byte(model, held_out[name], context_length, statistics=statistics)
        for name in names
        if name in held_out
    }
    model.train(was_training)
    return values, statistics.table()


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=inputs.to(_device(model)), use_cache=False).logits
    return logits.flatten(0, 1).float()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
