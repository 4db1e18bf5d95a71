"""The training methods by name: each takes a backbone and returns the model to train, all at the same budget."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from .architecture import count_weights, n_weights
from .config import MethodConfig
from .errors import ConfigError
from .machine import seeded
from .peft_method import NeutralResiduesConfig
from .profiles import RIVALS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fine_tuning(backbone: PreTrainedModel, config: MethodConfig) -> nn.Module:
    """Train every weight of the backbone.

    Raises
    ------
    ConfigError
        For a quantised backbone.
    """
    quantiser = getattr(backbone, "hf_quantizer", None)
    if quantiser is not None:
        raise ConfigError(
            f"method = 'fine_tuning' changes every weight, but those of this backbone are quantised "
            f"({type(quantiser).__name__}) and cannot be trained. Choose lora, vanilla_adapter or neutral_residues, which "
            "leave the backbone as it is, or load it without a quantization_config."
        )
    return backbone.requires_grad_(True)


def lora(backbone: PreTrainedModel, config: MethodConfig) -> nn.Module:
    """LoRA (arXiv 2106.09685) on all linear layers but the output layer, by PEFT; the rank follows from the budget."""
    return get_peft_model(backbone, _lora_config(lora_rank_for_budget(backbone, config.extra_ratio)))


def lora_rank_for_budget(backbone: PreTrainedModel, extra_ratio: float) -> int:
    """The largest LoRA rank on all linear layers but the output layer whose weights stay within the budget.

    Counted on a copy without weights, since only PEFT knows what it takes for a linear layer (experts, for one).

    Raises
    ------
    ConfigError
        When the budget does not pay for rank 1.
    """
    n_backbone = count_weights(backbone)
    with torch.device("meta"):
        skeleton = type(backbone)(backbone.config)
        per_rank = count_extra_weights(get_peft_model(skeleton, _lora_config(1)), n_backbone)
    return rank_for_budget(extra_ratio, n_backbone, per_rank)


def rank_for_budget(extra_ratio: float, n_backbone: int, per_rank: int) -> int:
    """The largest rank whose weights, `per_rank` for each, stay within the budget.

    Raises
    ------
    ConfigError
        When the budget does not pay for rank 1.
    """
    rank = int(extra_ratio * n_backbone // per_rank)
    if rank < 1:
        raise ConfigError(
            f"extra_ratio = {extra_ratio:g} is too small: rank 1 on all linear layers takes {per_rank:,} weights. Give at "
            f"least {per_rank / n_backbone:.2g}."
        )
    return rank


def _lora_config(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")


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
            activation=config.activation,
            gate_memory=config.gate_memory,
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


def rival(name: str) -> Any:
    """The module of a rival method, imported when it is asked for; None for the project's own four."""
    return importlib.import_module(f"nrlib.rivals.{name}") if name in RIVALS else None


def apply_method(backbone: PreTrainedModel, config: MethodConfig, seed: int) -> nn.Module:
    """Build the model to train. The backbone is taken over, not copied; new weights depend on `seed` alone.

    Raises
    ------
    ConfigError
        When the budget does not pay for the smallest adapter, or a layer does not exist.
    """
    with seeded(seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT's, not ours
        module = rival(config.method)
        build = BUILDERS[config.method] if module is None else module.build
        model: nn.Module = build(backbone, config)
        return model


def count_extra_weights(model: nn.Module, n_backbone_weights: int) -> int:
    """Weights the method added to the backbone's `n_backbone_weights`."""
    return sum(n_weights(p) for p in model.parameters()) - n_backbone_weights
