"""The language-model loss, on an accelerator without the logits of all tokens at once.

With a vocabulary of 256,000 entries the logits of 8,192 tokens take 8 GB in float32, and their softmax as much again.
`loss_in_place_of_logits` goes from the last hidden state to the loss a few tokens at a time, and computes the logits of
each part again in the backward pass. It takes the place of the output layer during the forward pass, so that all that
stands around the model (data parallelism, sharding, hooks) sees an ordinary call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

N_LOGITS_AT_ONCE = 1 << 26  # a quarter of a gigabyte in float32


def cross_entropy_and_logits(
    model: nn.Module, inputs: Tensor, targets: Tensor, dtype: torch.dtype, head: nn.Linear | None = None
) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy, in nats per token, of targets (B, T) after inputs (B, T), a scalar; and the logits
    (B, T, V), or the same scalar where they were never there as a whole.

    dtype : type of the matrix products. head : the output layer of `model`, from `find_head`, to compute the loss in.
    """
    in_head = nullcontext() if head is None else loss_in_place_of_logits(head, targets, dtype)
    with torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype != torch.float32), in_head:
        logits: Tensor = model(input_ids=inputs, use_cache=False).logits
    if head is not None:
        return logits, logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), logits


@contextmanager
def loss_in_place_of_logits(head: nn.Linear, targets: Tensor, dtype: torch.dtype) -> Iterator[None]:
    """Inside, `head` maps hidden states (B, T, D) to their mean cross-entropy, a scalar."""
    n_tokens = max(1, N_LOGITS_AT_ONCE // head.out_features)

    def sum_over_part(hidden: Tensor, part: Tensor) -> Tensor:
        # Cast for each part: gradients of the weight from several parts are added in its own precision.
        bias = None if head.bias is None else head.bias.to(dtype)
        logits = F.linear(hidden.to(dtype), head.weight.to(dtype), bias)
        return F.cross_entropy(logits.float(), part, reduction="sum")

    def loss(hidden: Tensor) -> Tensor:
        parts = zip(hidden.flatten(0, 1).split(n_tokens), targets.flatten().split(n_tokens), strict=True)
        sums = [checkpoint(sum_over_part, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.stack(sums).sum() / targets.numel()

    head.forward = loss  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward  # the class's own again


@torch.no_grad()
def find_head(model: Any) -> nn.Linear | None:
    """The output layer, if the model's logits are exactly what it puts out.

    None for a model that scales or caps its logits (Gemma 2, Cohere, Granite). Found out by running it on two tokens.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear:  # an adapter may stand there
        return None
    outputs: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    was_training = model.training
    try:
        tokens = torch.tensor([[0, 1]], device=next(model.parameters()).device)
        logits = model.eval()(input_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()
        model.train(was_training)
    is_plain = (
        len(outputs) == 1 and outputs[0].shape == logits.shape and torch.equal(outputs[0].float(), logits.float())
    )
    return head if is_plain else None
