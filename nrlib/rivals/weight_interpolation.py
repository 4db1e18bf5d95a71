"""Weight interpolation: Wortsman et al., Robust fine-tuning of zero-shot models (WiSE-FT),
https://arxiv.org/abs/2109.01903.

Fine-tune every weight, then go back part of the way: backbone + ratio · (fine-tuned − backbone). No cost at inference.
"""

from __future__ import annotations

import torch
from torch import nn

from ..config import MethodConfig
from ..methods import fine_tuning as build  # noqa: F401


@torch.no_grad()
def finish(model: nn.Module, backbone: nn.Module, config: MethodConfig) -> None:
    """Replace the fine-tuned weights by the interpolated ones."""
    before = dict(backbone.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.lerp(before[name], parameter, config.interpolation_ratio))
