"""Gates with a memory: the block gate weighs the last tokens of a sequence together, not each alone.

A token can be of either language; the tokens around it rarely leave a doubt. Since the mean of products is the product of
the mean, mean(w · x) = w · mean(x), one number a token and gate is all that has to be remembered. While a model generates,
these numbers lie in its key-value cache, in layers behind those of the attention, so that the cache's own operations
(beams, cropping) reach them too.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer

from .errors import BackboneError


class BlockGate(nn.Linear):
    """w · x + b of hidden states x (B, T, D), the product averaged over the last `memory` tokens: scores (B, T, 1).

    Parameters
    ----------
    d_model : D, width of the hidden state.
    memory : tokens that are averaged, the present one the last of them; 1 reads the present token alone, as in the paper.
    """

    def __init__(self, d_model: int, memory: int = 1) -> None:
        super().__init__(d_model, 1)
        self.memory = memory
        self.sequences: Sequences | None = None  # without it, every forward pass reads whole sequences

    def forward(self, x: Tensor) -> Tensor:
        if self.memory == 1:
            return F.linear(x, self.weight, self.bias)
        products = F.linear(x, self.weight).float()  # (…, 1)
        shape = products.shape
        mask = positions = None
        if self.sequences is not None:
            products = products.reshape(self.sequences.n_sequences, -1, 1)
            products = self.sequences.with_past(self, products)
            mask, positions = self.sequences.attention_mask, self.sequences.positions
        n_tokens = shape.numel() // products.shape[0]
        mean = causal_mean(products.reshape(*products.shape[:-1]), self.memory, mask, positions)[:, -n_tokens:]
        return (mean.reshape(shape) + self.bias).to(x.dtype)


def causal_mean(values: Tensor, window: int, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
    """Mean of values (B, T) over the last `window` tokens up to each: of those whose mask (B, T) is not 0, or of those
    since the position (B, T) was last 0, where several texts stand in one row."""
    if positions is None:
        weights = torch.ones_like(values) if mask is None else mask.to(values)
        sums, counts = (
            F.avg_pool1d(F.pad(row[:, None], (window - 1, 0)), window, stride=1).squeeze(1)
            for row in (values * weights, weights)
        )
        return sums / counts.clamp(min=0.5 / window)
    place = torch.arange(values.shape[1], device=values.device)
    n_read = torch.minimum(positions, place).clamp(max=window - 1) + 1  # (B, T)
    sums = F.pad(values.double().cumsum(dim=1), (1, 0))  # (B, T + 1); in float32 a difference of long sums is rough
    first = (place + 1 - n_read).expand_as(values)
    return ((sums[:, 1:] - sums.gather(1, first)) / n_read).to(values.dtype)


class Sequences:
    """What a pass through the backbone reads: how many sequences, which positions are padding, and what went before.

    Parameters
    ----------
    decoder : the module that holds the decoder layers; a hook tells each of its passes from the next.
    n_layers : layers of the backbone, whose places in the key-value cache are the first.
    model : the outermost model around the decoder. One that reads images too hands its decoder masks of its own making, and
        only what it was given itself says which tokens are padding.
    """

    def __init__(self, decoder: nn.Module, n_layers: int, model: nn.Module) -> None:
        self.n_sequences = 1
        self.attention_mask: Tensor | None = None
        self.positions: Tensor | None = None  # where several texts may stand in one row
        self._n_layers = n_layers
        self._cache: Cache | None = None
        self._n_past = 0
        self._places: dict[BlockGate, int] = {}
        self._is_kept = False  # whether this pass may make a cache that will want the products
        self._without_cache: dict[int, Tensor] = {}
        self._refusal = ""  # why the gates cannot tell what this pass reads
        self._given_mask: Any = _UNKNOWN
        self._parameters = tuple(inspect.signature(model.forward).parameters)
        self._handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True),
        ]

    @classmethod
    def of(cls, model: nn.Module, block_name: str, n_layers: int) -> Sequences:
        """Those that the decoder around a block (of that full name) has already, else new ones: of a model's gates no two
        may have one place in its cache, whoever added them."""
        decoder = decoder_of(model, block_name)
        owners = (getattr(hook, "__self__", None) for hook in decoder._forward_pre_hooks.values())
        known = next((owner for owner in owners if isinstance(owner, cls)), None)
        return known or cls(decoder, n_layers, model)

    def follow(self, gate: BlockGate) -> None:
        """Let a gate know of the sequences it reads."""
        gate.sequences = self
        self._places[gate] = self._n_layers + len(self._places)

    def remove(self) -> None:
        """Take the hooks off the backbone."""
        for handle in self._handles:
            handle.remove()

    def with_past(self, gate: BlockGate, products: Tensor) -> Tensor:
        """A gate's products (B, T, 1) after those of the cached tokens, (B, P + T, 1)."""
        if self._refusal:
            raise BackboneError(self._refusal)
        place = self._places[gate]
        if self._cache is None:
            if self._is_kept:
                self._without_cache[place] = products.detach()
            return products
        layer = _layer(self._cache, place)
        if layer.get_seq_length() != self._n_past:
            raise BackboneError(
                f"The key-value cache holds {self._n_past} tokens, but of {layer.get_seq_length()} the gates know what they "
                "saw: it was filled with the adapter switched off, or by another model. Gates with a memory need a cache that "
                "they have filled themselves: start from an empty one."
            )
        extended: Tensor = layer.update(products[:, None], products[:, None, :, :0])[0]
        return extended[:, 0]

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given_mask = {**dict(zip(self._parameters, args, strict=False)), **kwargs}.get("attention_mask")

    def _before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = next(t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None)
        self.n_sequences = tokens.shape[0]
        given, self._given_mask = self._given_mask, _UNKNOWN
        mask = kwargs.get("attention_mask")
        if not _says_padding(mask):
            mask = given
        self.attention_mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self._cache = kwargs.get("past_key_values")
        self._n_past = 0 if self._cache is None else int(self._cache.get_seq_length())
        is_packed = self.attention_mask is None and self._n_past == 0  # padding-free training has positions and no mask
        self.positions = kwargs.get("position_ids") if is_packed else None
        self._refusal = "" if _says_padding(mask) or self.positions is not None else _MASK_REFUSAL
        if kwargs.get("cache") is not None:
            self._refusal = _PAGES_REFUSAL
        self._is_kept = self._cache is None and not decoder.training and kwargs.get("use_cache") is not False

    def _after(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        made = getattr(output, "past_key_values", None)
        if self._cache is None and isinstance(made, Cache):  # the decoder made it during this pass
            for place, products in self._without_cache.items():
                _layer(made, place).update(products[:, None], products[:, None, :, :0])
        self._without_cache.clear()
        self._is_kept = False
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            state = {name: getattr(self, name) for name in _OF_A_PASS}
            for tensor in _outputs(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self.__dict__.update(state))


# What the gates know of a pass. Recomputed activations (gradient checkpointing) ask them again in the backward pass, when
# another pass may have been the last. The gradient reaches the decoder's output before it asks for any layer within.
_OF_A_PASS = ("n_sequences", "attention_mask", "positions", "_cache", "_n_past", "_refusal")


def _outputs(output: Any) -> list[Tensor]:
    values = output if isinstance(output, tuple) else (output, *getattr(output, "__dict__", {}).values())
    return [value for value in values if isinstance(value, Tensor)]


_UNKNOWN = "unknown"
_MASK_REFUSAL = (
    "Gates with a memory have to know which tokens are padding, but the attention mask of this pass is neither None nor "
    "(sequences, tokens). Give attention_mask=(sequences, tokens) to the whole model, or position_ids that start at 0 with "
    "each text, or train an extension with gate_memory=1."
)
_PAGES_REFUSAL = (
    "Continuous batching (generate_batch, transformers serve) puts the tokens of several requests into one row and keeps "
    "their keys in pages, where gates with a memory would mix the requests. Use model.generate, or train an extension with "
    "gate_memory=1."
)


def _says_padding(mask: Any) -> bool:
    """Whether a mask is one of tokens, or none is needed; not one prepared for the attention, in which padding is lost."""
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)


def _layer(cache: Cache, place: int) -> DynamicLayer:
    while len(cache.layers) <= place:
        cache.layers.append(DynamicLayer())
    layer: DynamicLayer = cache.layers[place]
    return layer


def decoder_of(model: nn.Module, block_name: str) -> nn.Module:
    """The module that holds the layers, given the full name of a block in one of them; the model itself if none does."""
    parts = block_name.split(".")
    places = [index for index, part in enumerate(parts) if part.isdigit()]
    return model.get_submodule(".".join(parts[: places[0] - 1])) if places else model
