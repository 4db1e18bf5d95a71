"""Bits per byte, forgetting, learning, drift and gate statistics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .architecture import text_config
from .batches import TokenStream, evaluation_batches
from .losses import GateStatistics

MAX_LOGITS = 2**28  # elements of the logits (B·T·V) computed at a time: a gigabyte, and drift keeps five such
MAX_SEQUENCES = 16


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
    total, n_at_a_time = 0.0, sequences_at_a_time(_vocabulary_size(model), context_length)
    with statistics.collect(stream.name) if statistics is not None else nullcontext():
        for batch in evaluation_batches(stream, context_length, MAX_SEQUENCES):
            for inputs, targets in _parts(batch, n_at_a_time):
                logits, targets = _logits(model, inputs), targets.to(_device(model))
                total += F.cross_entropy(logits, targets.flatten(), reduction="sum").item()
    return total / math.log(2) / stream.n_bytes


@torch.no_grad()
def drift(
    model: nn.Module, backbone: Callable[[Tensor], Tensor], stream: TokenStream, context_length: int, n_batches: int = 8
) -> float:
    """Mean KL divergence from the backbone's next-token distribution to the model's, in nats per token.

    `backbone` maps tokens (B, T) to logits (B·T, V). Only the first `n_batches` batches of the text are used, of 16
    sequences each (128 in all), however few of them are computed at a time.
    """
    total, n_tokens, n_at_a_time = 0.0, 0, sequences_at_a_time(_vocabulary_size(model), context_length)
    for batch in itertools.islice(evaluation_batches(stream, context_length, MAX_SEQUENCES), n_batches):
        for inputs, targets in _parts(batch, n_at_a_time):
            before = F.log_softmax(backbone(inputs), dim=-1)
            after = F.log_softmax(_logits(model, inputs), dim=-1)
            total += F.kl_div(after, before, reduction="sum", log_target=True).item()
            n_tokens += targets.numel()
    return total / n_tokens


def sequences_at_a_time(vocabulary_size: int, context_length: int) -> int:
    """How many sequences an evaluation computes at a time: at most 16, fewer where their logits would be more than
    `MAX_LOGITS` numbers, and one at least."""
    return max(1, min(MAX_SEQUENCES, MAX_LOGITS // (context_length * vocabulary_size)))


def _vocabulary_size(model: nn.Module) -> int:
    """Logits a token has; 1 of a model that does not say it, as toys do not."""
    owner = next((module for module in model.modules() if hasattr(module, "config")), model)
    return getattr(text_config(owner), "vocab_size", 1)


def _parts(batch: tuple[Tensor, Tensor], n_sequences: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of a batch, `n_sequences` at a time."""
    return zip(*(tensor.split(n_sequences) for tensor in batch), strict=True)


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
