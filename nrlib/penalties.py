"""Further terms of the training loss that hold the extended model to its backbone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .losses import ORIGINAL

# Tokens (B, T), domain (B,) and logits (B, T, V) of a micro-batch to a scalar, already weighted and already divided by
# what belongs to the whole batch, so that accumulation does not change the result.
Penalty = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]


def kl_penalty(backbone: Callable[[Tensor], Tensor], weight: float) -> Penalty:
    """`weight` times the mean, over original-domain tokens, of the KL divergence from the backbone's next-token
    distribution to the model's, in nats.

    Parameters
    ----------
    backbone : maps tokens (B, T) to logits (B·T, V); run without gradients.
    """

    def penalty(inputs: Tensor, domain: Tensor, logits: Tensor, n_original: int, share: float) -> Tensor:
        chosen = domain == ORIGINAL
        if not chosen.any():
            return logits.new_zeros(())
        with torch.no_grad():
            before = F.log_softmax(backbone(inputs[chosen]), dim=-1)  # (tokens, V)
        after = F.log_softmax(logits[chosen].flatten(0, 1).float(), dim=-1)
        return weight * F.kl_div(after, before, reduction="sum", log_target=True) / n_original

    return penalty


def per_step(term: Callable[[], Tensor]) -> Penalty:
    """A term that depends on the weights alone: each micro-batch bears its share of it."""

    def penalty(inputs: Tensor, domain: Tensor, logits: Tensor, n_original: int, share: float) -> Tensor:
        return share * term()

    return penalty
