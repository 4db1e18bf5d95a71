"""Orthogonal subspace fine-tuning: Nayak et al., Sculpting Subspaces, https://arxiv.org/abs/2504.07097, by PEFT.

Each weight matrix is split by its singular values. The large directions are frozen, the small ones trained, and the
gradient is kept orthogonal to the frozen ones. No weights are added; the trained ones are counted as the budget.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from peft import OSFConfig, get_peft_model
from torch import nn

from ..architecture import count_weights, inner_linears
from ..config import MethodConfig
from ..methods import rank_for_budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build(backbone: PreTrainedModel, config: MethodConfig) -> nn.Module:
    """Train the same number of singular directions of every matrix, as many as the budget pays for.

    Raises
    ------
    ConfigError
        When the budget does not pay for one direction, or the backbone has no linear layers.
    """
    linears = inner_linears(backbone)
    n_backbone = count_weights(backbone)
    per_rank = sum(linear.in_features + linear.out_features + 1 for linear in linears.values())
    rank = rank_for_budget(config.extra_ratio, n_backbone, per_rank)
    preserved: dict[str, int | float] = {
        re.escape(name): max(1, min(linear.weight.shape) - rank) for name, linear in linears.items()
    }
    return get_peft_model(backbone, OSFConfig(target_modules="all-linear", rank_pattern=preserved))
