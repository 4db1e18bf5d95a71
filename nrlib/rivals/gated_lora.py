"""LoRA with an input-dependent gate on each rank, closed at the start; after DISeL, https://arxiv.org/abs/2605.19028.

    output = W x + B ( sigmoid(W_s x + b) * (A x) )         A, W_s: (R, D_in)   B: (D_out, R)   b: (R,), -4 at the start

B starts at zero like LoRA's, so that the model equals the backbone before the first step. What stands here follows a
short description of the method, not its code, and may differ from it in details.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..architecture import count_weights, inner_linears
from ..config import MethodConfig
from ..methods import rank_for_budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLOSED = -4.0  # sigmoid(-4) = 0.018


class GatedLoraLinear(nn.Module):
    """A frozen linear layer with a gated low-rank update beside it."""

    def __init__(self, base_layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, rank, bias=False)
        self.rank_gate = nn.Linear(base_layer.in_features, rank)
        self.up = nn.Linear(rank, base_layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.rank_gate.weight)
        nn.init.constant_(self.rank_gate.bias, CLOSED)
        nn.init.zeros_(self.up.weight)
        if not base_layer.weight.is_meta:
            self.to(base_layer.weight.device, base_layer.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D_in) to (…, D_out)."""
        update: Tensor = self.up(torch.sigmoid(self.rank_gate(x)) * self.down(x))
        return self.base_layer(x) + update


def build(backbone: PreTrainedModel, config: MethodConfig) -> nn.Module:
    """On all linear layers but the output layer; the rank follows from the budget.

    Raises
    ------
    ConfigError
        When the budget does not pay for rank 1, or the backbone has no linear layers to stand beside.
    """
    linears = inner_linears(backbone)
    per_rank = sum(2 * linear.in_features + linear.out_features + 1 for linear in linears.values())
    rank = rank_for_budget(config.extra_ratio, count_weights(backbone), per_rank)
    backbone.requires_grad_(False)
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        setattr(backbone.get_submodule(parent), child, GatedLoraLinear(linear, rank))
    return backbone
