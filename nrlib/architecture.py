"""The one module that knows model families: where the blocks are, how wide the model is, what a budget buys."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .config import LAYER_CHOICES
from .errors import BackboneError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What the families call their blocks, inside one decoder layer. Where fc1 comes up the feed-forward block is no module
# of its own (OPT), and `JoinedFeedForward` makes it one.
BLOCK_NAMES = {
    "ffn": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc1"),
    "attention": ("self_attn", "self_attention", "attention", "attn"),
}
BLOCK_NAMES["persistent_memory"] = BLOCK_NAMES["attention"]


def find_blocks(model: nn.Module, site: str) -> list[str]:
    """The full name of the feed-forward or attention block of every decoder layer, first layer first.

    Raises
    ------
    BackboneError
        When no list of decoder layers with such a block is found; the message lists what the layers contain.
    """
    layers_name, layers = _decoder_layers(model)
    names = []
    for index, layer in enumerate(layers):
        children = [name for name, _ in layer.named_children()]
        block = next((name for name in BLOCK_NAMES[site] if name in children), None)
        if block is None:
            raise BackboneError(
                f"No {site} block was found in {layers_name}.{index} of {type(model).__name__}: looked for "
                f"{', '.join(BLOCK_NAMES[site])}; the layer has {', '.join(children)}. Give the full names of the blocks "
                f"yourself: target_modules=['{layers_name}.0.NAME', '{layers_name}.1.NAME', …]."
            )
        names.append(f"{layers_name}.{index}.{block}")
    return names


def layer_children(model: nn.Module) -> list[str]:
    """The full names of what the first decoder layer holds: the candidates for target_modules."""
    name, layers = _decoder_layers(model)
    return [f"{name}.0.{child}" for child, _ in layers[0].named_children()]


def count_layers(model: nn.Module) -> int:
    """L, the number of decoder layers."""
    return len(_decoder_layers(model)[1])


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, first layer first."""
    return list(_decoder_layers(model)[1])


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    start, decoder = _text_decoder(model)
    lists = [
        (name, module) for name, module in decoder.named_modules(prefix=start) if isinstance(module, nn.ModuleList)
    ]
    # Inner lists (experts) are longer at times, but the decoder's own list is the outermost.
    outer = [(n, m) for n, m in lists if not any(n.startswith(other + ".") for other, _ in lists) and len(m) > 0]
    if not outer:
        raise BackboneError(f"{type(model).__name__} has no list of layers: is it a decoder-only language model?")
    return max(outer, key=lambda item: len(item[1]))


def text_config(model: nn.Module) -> Any:
    """The configuration that holds the sizes of the text decoder: of a model that reads images or sound too (Gemma 3 from 4B
    on) a part of the model's own, else all of it; None without one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _text_decoder(model: nn.Module) -> tuple[str, nn.Module]:
    """Where the decoder layers are to be looked for, by full name: not in the tower that reads images."""
    config = text_config(model)
    if config is not getattr(model, "config", None):
        for name, module in model.named_modules():
            if type(getattr(module, "config", None)) is type(config):  # a copy of it in some versions of transformers
                return name, module
    return "", model


class JoinedFeedForward(nn.Sequential):
    """The fc1, activation_fn and fc2 of a decoder layer as one block, which takes the place of fc1.

    The layer's own code runs unchanged: it calls fc1, which now does everything, and two identities.
    """

    @classmethod
    def join(cls, layer: nn.Module) -> JoinedFeedForward:
        """Move the three modules of `layer` into one."""
        joined = cls(*(layer.get_submodule(name) for name in ("fc1", "activation_fn", "fc2")))
        layer.fc1, layer.activation_fn, layer.fc2 = joined, nn.Identity(), nn.Identity()
        return joined

    def split(self, layer: nn.Module) -> None:
        """Give `layer` its three modules back."""
        layer.fc1, layer.activation_fn, layer.fc2 = self


# The attention blocks whose queries can be read: what makes them (alone, or as the first part of what one layer makes), and
# what brings the heads back to the model's width.
_QUERY_NAMES, _OUTPUT_NAMES = ("q_proj", "qkv_proj", "c_attn"), ("o_proj", "out_proj", "c_proj")


def attention_shape(block: nn.Module) -> tuple[int, int]:
    """Heads of an attention block's queries, and their width d_h.

    Raises
    ------
    BackboneError
        When it is no attention block, or one whose queries stand mixed with its keys.
    """
    n_heads = getattr(getattr(block, "config", None), "num_attention_heads", None)
    d_head = getattr(block, "head_dim", None)
    if not (n_heads and d_head and _part(block, _QUERY_NAMES) and _part(block, _OUTPUT_NAMES)):
        block = getattr(block, "base_layer", block)
        raise BackboneError(
            f"site = 'persistent_memory' reads the queries of an attention block, but in {type(block).__name__} they are not "
            f"found: looked for {', '.join(_QUERY_NAMES)} with {', '.join(_OUTPUT_NAMES)}; it holds "
            f"{', '.join(name for name, _ in block.named_children()) or 'nothing'}. Choose site = 'attention' or 'ffn', "
            "which need to know nothing of the block."
        )
    return n_heads, d_head


def attention_queries(block: nn.Module, x: Tensor) -> Tensor:
    """Queries (…, heads, d_h) of an attention block for hidden states x (…, D), before any rotation by position."""
    n_heads, d_head = attention_shape(block)
    made: Tensor = _part(block, _QUERY_NAMES)(x)  # type: ignore[misc]
    queries = made[..., : n_heads * d_head]
    norm: Any = getattr(block, "q_norm", None)
    if norm is not None and norm.weight.numel() != d_head:  # over all heads at once (OLMo 2)
        queries = norm(queries)
    queries = queries.unflatten(-1, (n_heads, d_head))
    return norm(queries) if norm is not None and norm.weight.numel() == d_head else queries


def attention_output(block: nn.Module, mixed: Tensor) -> Tensor:
    """The output projection of an attention block, without its bias, of mixed values (…, heads · d_h)."""
    projection: Any = _part(block, _OUTPUT_NAMES)
    output: Tensor = projection(mixed)
    bias = getattr(projection, "bias", None)
    return output if bias is None else output - bias


def _part(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((part for name in names if (part := getattr(block, name, None)) is not None), None)


def inner_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """All linear layers but the output layer, by full name.

    Raises
    ------
    BackboneError
        When there is none (GPT-2 has layers of its own kind).
    """
    output = model.get_output_embeddings()
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not output}
    if not found:
        raise BackboneError(
            f"{type(model).__name__} has no torch.nn.Linear layers, which this method changes. Choose another method, for "
            "example neutral_residues."
        )
    return found


def model_width(model: nn.Module) -> int:
    """D, whatever the family calls it."""
    width = getattr(text_config(model), "hidden_size", None)
    if width is None:
        raise BackboneError(
            f"{type(model).__name__} has no config.hidden_size, so the width D of its hidden states is "
            "unknown. A model of your own says it so: model.config = transformers.PretrainedConfig(hidden_size=D)."
        )
    return int(width)


def select_layers(layers: str, n_layers: int) -> list[int]:
    """The indices that 'all', 'first_half', 'last_half', 'every_other' or '0,2,3' stand for.

    Raises
    ------
    ConfigError
        For an index beyond the model, or one that is named twice.
    """
    half = math.ceil(n_layers / 2)
    if layers in LAYER_CHOICES:
        chosen = {
            "all": range(n_layers),
            "first_half": range(half),
            "last_half": range(n_layers - half, n_layers),
            "every_other": range(1, n_layers, 2) if n_layers > 1 else range(1),
        }[layers]
        return list(chosen)
    indices = [int(part) for part in layers.split(",")]
    beyond = [index for index in indices if index >= n_layers]
    if beyond:
        raise ConfigError(
            f"layers = {layers!r} names layer {beyond[0]}, but the model has {n_layers} layers: allowed are 0 to "
            f"{n_layers - 1}. Choose indices in that range, or one of {', '.join(LAYER_CHOICES)}."
        )
    if len(set(indices)) < len(indices):
        raise ConfigError(f"layers = {layers!r} names a layer twice. Name each layer once.")
    return sorted(indices)


def count_weights(model: nn.Module) -> int:
    """All weights of the model, embeddings included, tied ones once, adapters left out."""
    return sum(n_weights(p) for name, p in model.named_parameters() if "neutral_residues_" not in name)


def n_weights(parameter: nn.Parameter) -> int:
    """The weights a parameter stands for: its elements, but where bitsandbytes packs two weights of 4 bits into one."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)


def width_for_budget(model: nn.Module, extra_ratio: float, n_blocks: int, has_gate: bool, per_unit: int) -> int:
    """The largest width whose weights, over all blocks, stay within `extra_ratio` of the backbone's.

    Parameters
    ----------
    per_unit : weights of one unit of width in one block: 3·D of an adapter, a key and a value of each head (2·heads·d_h)
        of persistent memory.

    Raises
    ------
    ConfigError
        When the budget does not pay for a width of 1.
    """
    d_model, n_backbone = model_width(model), count_weights(model)
    per_block = extra_ratio * n_backbone / n_blocks - ((d_model + 1) if has_gate else 0)
    width = int(per_block // per_unit)
    if width < 1:
        smallest = n_blocks * (per_unit + ((d_model + 1) if has_gate else 0)) / n_backbone
        raise ConfigError(
            f"extra_ratio = {extra_ratio:g} is too small: {extra_ratio:.2%} of {n_backbone:,} backbone weights over "
            f"{n_blocks} adapters pays for less than one unit of width. Give at least {smallest:.2g}, or fewer layers."
        )
    return width
