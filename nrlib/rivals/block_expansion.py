"""Block expansion: Wu et al., LLaMA Pro: Progressive LLaMA with Block Expansion, https://arxiv.org/abs/2401.02415.

Copies of decoder layers are inserted behind their originals, with the output projections of attention and feed-forward
set to zero, so that a copy is the identity at the start. Only the copies are trained.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..architecture import count_weights, find_blocks, text_config
from ..config import MethodConfig
from ..errors import BackboneError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build(backbone: PreTrainedModel, config: MethodConfig) -> nn.Module:
    """As many copies as the budget pays for, one at least, evenly spaced, each behind the layer it copies.

    Raises
    ------
    ConfigError
        When one copy is more than twice the budget.
    BackboneError
        When a copy is not the identity, as in families whose blocks end in something else than a linear layer.
    """
    blocks = find_blocks(backbone, "ffn")
    list_name = blocks[0].rsplit(".", 2)[0]
    layers = list(backbone.get_submodule(list_name))
    n_copies = _n_copies(backbone, layers, config.extra_ratio)
    copied = {round((index + 1) * len(layers) / n_copies) - 1 for index in range(n_copies)}
    probe = torch.arange(8)[None] % text_config(backbone).vocab_size
    before = None if backbone.device.type == "meta" else _logits(backbone, probe)
    backbone.requires_grad_(False)
    expanded = nn.ModuleList()
    for index, layer in enumerate(layers):
        expanded.append(layer)
        if index in copied:
            expanded.append(_identity_copy(backbone, layer, index))
    parent_name, _, name = list_name.rpartition(".")
    setattr(backbone.get_submodule(parent_name), name, expanded)
    _renumber(backbone, expanded, copied)
    if before is not None and not torch.equal(before, _logits(backbone, probe)):
        raise BackboneError(
            f"A copied layer of {type(backbone).__name__} is not the identity when its last linear layers are zero, so "
            "block expansion cannot start from this backbone. Choose another method."
        )
    return backbone


def _n_copies(backbone: nn.Module, layers: list[nn.Module], extra_ratio: float) -> int:
    n_layer = sum(p.numel() for p in layers[0].parameters())
    n_backbone = count_weights(backbone)
    if n_layer > 2 * extra_ratio * n_backbone:
        raise ConfigError(
            f"extra_ratio = {extra_ratio:g} is too small: one copied layer takes {n_layer:,} weights, more than twice the "
            f"budget. Give at least {n_layer / n_backbone:.2g}."
        )
    return min(len(layers), max(1, int(extra_ratio * n_backbone // n_layer)))


def _identity_copy(backbone: PreTrainedModel, layer: nn.Module, index: int) -> nn.Module:
    clone = copy.deepcopy(layer).requires_grad_(True)
    for site in ("attention", "ffn"):
        block = clone.get_submodule(find_blocks(backbone, site)[index].rpartition(".")[2])
        last = [m for m in block.modules() if [p.dim() for p in m.parameters(recurse=False)][:1] == [2]][-1]
        for parameter in last.parameters():  # of a Linear, or of GPT-2's Conv1D
            nn.init.zeros_(parameter)
    return clone


def _renumber(backbone: PreTrainedModel, layers: nn.ModuleList, copied: set[int]) -> None:
    """Every layer its own place in the cache of keys and values."""
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010  (declared by some families only)
    shape = text_config(backbone)
    shape.num_hidden_layers = len(layers)
    if getattr(shape, "layer_types", None):
        shape.layer_types = [
            kind for index, kind in enumerate(shape.layer_types) for _ in range(2 if index in copied else 1)
        ]


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=tokens.to(model.device), use_cache=False).logits
    return logits
