"""The training methods by name: each takes a backbone and returns the model to train, all at the same budget."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from peft import LoraConfig, get_peft_model
from torch import nn

from .architecture import lora_rank_for_budget
from .config import MethodConfig
from .machine import seeded
from .peft_method import NeutralResiduesConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fine_tuning(backbone: PreTrainedModel, config: MethodConfig) -> nn.Module:
    """Train every weight of the backbone."""
    return backbone.requires_grad_(True)


def lora(backbone: PreTrainedModel, config: MethodConfig) -> nn.Module:
    """LoRA (arXiv 2106.09685) on all linear layers but the output layer, by PEFT; the rank follows from the budget."""
    rank = lora_rank_for_budget(backbone, config.extra_ratio)
    return get_peft_model(backbone, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))


def neutral_residues(backbone: PreTrainedModel, config: MethodConfig) -> nn.Module:
    """Gated adapters (arXiv 2410.02744); without gate and local loss they are vanilla adapters."""
    return get_peft_model(
        backbone,
        NeutralResiduesConfig(
            extra_ratio=config.extra_ratio,
            gate=config.gate,
            local_loss=config.local_loss,
            local_loss_weight=config.local_loss_weight,
            initialisation=config.initialisation,
            position=config.position,
            site=config.site,
            layers=config.layers,
        ),
    )


BUILDERS: dict[str, Callable[[PreTrainedModel, MethodConfig], nn.Module]] = {
    "fine_tuning": fine_tuning,
    "lora": lora,
    "vanilla_adapter": neutral_residues,
    "neutral_residues": neutral_residues,
}


def apply_method(backbone: PreTrainedModel, config: MethodConfig, seed: int) -> nn.Module:
    """Build the model to train. The backbone is taken over, not copied; new weights depend on `seed` alone.

    Raises
    ------
    ConfigError
        When the budget does not pay for the smallest adapter, or a layer does not exist.
    """
    with seeded(seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT's, not ours
        return BUILDERS[config.method](backbone, config)


def count_extra_weights(model: nn.Module, n_backbone_weights: int) -> int:
    """Weights the method added to the backbone's `n_backbone_weights`."""
    return sum(p.numel() for p in model.parameters()) - n_backbone_weights
