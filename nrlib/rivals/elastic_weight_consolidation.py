"""Elastic weight consolidation: Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks,
https://arxiv.org/abs/1612.00796.

    training loss = language-model loss + ewc_weight / 2 · Σ_i F_i (θ_i − θ_i of the backbone)²

F is the diagonal of the Fisher information on original-domain text: the mean squared gradient of a sequence's mean loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import MethodConfig
from ..methods import fine_tuning as build  # noqa: F401

N_SEQUENCES = 256


def make_penalty(
    model: nn.Module, backbone: nn.Module, config: MethodConfig, sequences: Iterable[tuple[Tensor, Tensor]]
) -> Callable[[], Tensor]:
    """The penalty as a function of the model's present weights.

    Parameters
    ----------
    sequences : original-domain text, (inputs, targets) of shape (1, T) each; the first `N_SEQUENCES` are used.
    """
    importance = _fisher_diagonal(backbone, itertools.islice(sequences, N_SEQUENCES))
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}

    def penalty() -> Tensor:
        terms = [(importance[name] * (p - before[name]) ** 2).sum() for name, p in model.named_parameters()]
        return config.ewc_weight / 2 * torch.stack(terms).sum()

    return penalty


def _fisher_diagonal(backbone: nn.Module, sequences: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    parameters = dict(backbone.named_parameters())
    squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
    n_sequences = 0
    for n_sequences, (inputs, targets) in enumerate(sequences, start=1):  # noqa: B007
        logits = backbone(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for square, gradient in zip(squares.values(), gradients, strict=True):
            square += gradient**2
    return {name: square / max(1, n_sequences) for name, square in squares.items()}
