"""Quant-Noise: training that gets a network used to being compressed (Fan, Stock, Graham, Grave, Gribonval, Jégou and
Joulin, *Training with Quantization Noise for Extreme Model Compression*, ICLR 2021, https://arxiv.org/abs/2004.07320).

    W (O, I) cut into blocks ──┬─ a random share, noise_ratio ──► φ(block): what compression will make of it
                               └─ the others ───────────────────► as they are, with exact gradients

φ is a scheme of `quant_noise_schemes`: an integer grid (blocks of one weight), a codebook (product quantisation), or 0 as
a stand-in. A noise_ratio of 1 is quantisation-aware training, 0 is plain training. `ipq` quantises a trained network
group by group and finetunes the centroids; `quant_noise_files` writes compressed weights.

`torch.nn.utils.parametrize` puts the noise in front of any `nn.Linear`: the weights are never overwritten by it, so that
it does not add up over steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import ConfigError
from .quant_noise_schemes import (
    Compressed,
    ProductQuantiser,
    Proxy,
    Scheme,
    check_weight,
    compress,
    join_blocks,
    split_blocks,
)


class QuantNoise(nn.Module):
    """A parametrisation: in training, a new random share of the blocks is quantised at every use of the weight.

    Gradients pass unchanged: exact for the blocks that were left alone, straight-through for the others. In evaluation
    the weight is returned as it is, so that metrics during training are those of the uncompressed network.

    Parameters
    ----------
    noise : what happens to a block.
    noise_ratio : share of the blocks, 0 to 1.
    generator : source of the random choice; None is torch's own, which activation checkpointing repeats correctly.
    """

    table: Tensor | None

    def __init__(self, noise: Scheme | Proxy, noise_ratio: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.noise, self.noise_ratio, self.generator = noise, noise_ratio, generator
        self.register_buffer("table", None, persistent=False)

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Learn the codebook from where the weights are now."""
        if isinstance(self.noise, ProductQuantiser):
            self.table = self.noise.learn(weight)

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training or self.noise_ratio == 0:
            return weight
        return weight + self.change(weight)

    @torch.no_grad()
    def change(self, weight: Tensor) -> Tensor:
        """What the noise adds to the weight (O, I) this time: φ(block) − block in the random share, else 0."""
        blocks = split_blocks(weight, self.noise.block_size, self.noise.axis)
        device = weight.device if self.generator is None else self.generator.device
        draws = torch.rand(len(blocks), generator=self.generator, device=device)
        is_noised = (draws < self.noise_ratio).to(weight.device)
        with torch.autocast(weight.device.type, enabled=False):  # distances in bfloat16 would choose other centroids
            quantised = self.noise.quantise_blocks(weight, is_noised, self.table)
        change = torch.where(is_noised[:, None], quantised.to(blocks) - blocks, 0)
        return join_blocks(change, weight.shape, self.noise.axis)


def add_noise(
    linears: Mapping[str, nn.Linear],
    noise: Scheme | Proxy,
    noise_ratio: float,
    generator: torch.Generator | None = None,
) -> None:
    """From now on train these layers, given by name, with noise on their weights.

    Raises
    ------
    ConfigError
        For a noise_ratio outside [0, 1], or a weight that has noise already or cannot be quantised; no layer is changed
        then.
    """
    if not 0 <= noise_ratio <= 1:
        raise ConfigError(f"noise_ratio = {noise_ratio!r} is out of range: it is a share of blocks, from 0 to 1.")
    for name, linear in linears.items():
        if parametrize.is_parametrized(linear, "weight"):
            raise ConfigError(f"{name} has noise on its weight already. Call remove_noise first.")
        check_weight(name, linear.weight, noise)
    for linear in linears.values():
        module = QuantNoise(noise, noise_ratio, generator).train(linear.training)
        module.refresh(linear.weight)
        parametrize.register_parametrization(linear, "weight", module)


def refresh_noise(linears: Iterable[nn.Linear]) -> None:
    """Learn all codebooks anew, as the paper does from time to time; the scales of a grid always are."""
    for linear in linears:
        if parametrize.is_parametrized(linear, "weight"):
            parametrisations = _parametrisations(linear)
            parametrisations[0].refresh(parametrisations.original)


def remove_noise(linears: Iterable[nn.Linear]) -> None:
    """Leave plain layers, with the weights as they were trained, not quantised."""
    for linear in linears:
        if parametrize.is_parametrized(linear, "weight"):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)


def _parametrisations(linear: nn.Linear) -> Any:
    """What stands before the weight: indexed, the modules; `original`, the parameter that is trained."""
    weights: Any = linear.parametrizations
    return weights["weight"]


class _LookUp(torch.autograd.Function):
    """codebook[codes], where the gradient of a centroid is the mean of those of its blocks, not their sum."""

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.n_centroids = len(codebook)
        return codebook[codes]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (codes,) = ctx.saved_tensors
        total = gradient.new_zeros(ctx.n_centroids, gradient.shape[1]).index_add_(0, codes, gradient)
        counts = codes.bincount(minlength=ctx.n_centroids).clamp(min=1)
        return total / counts[:, None], None


class TrainableCodebook(nn.Module):
    """A parametrisation: the weight is looked up in a codebook (K, block_size), and that is what is trained."""

    codes: Tensor

    def __init__(self, compressed: Compressed) -> None:
        super().__init__()
        self.compressed = compressed
        self.register_buffer("codes", compressed.codes.long())

    def forward(self, codebook: Tensor) -> Tensor:
        blocks = _LookUp.apply(codebook, self.codes)
        return join_blocks(blocks, self.compressed.shape, self.compressed.scheme.axis)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The codebook in place of the weight."""
        return self.compressed.table.to(weight.dtype)


def ipq(
    groups: Sequence[Mapping[str, nn.Linear]],
    scheme: ProductQuantiser,
    finetune: Callable[[int], None],
) -> dict[str, Compressed]:
    """Iterative product quantisation: quantise one group of layers after the other, and call `finetune` after each.

    `finetune(index)` is to train what requires gradients: centroids with fixed assignments, and the layers still to come.
    It needs an optimiser of its own each time, since the parameters change. The paper's order of groups is feed-forward,
    embeddings, attention.

    Returns
    -------
    The compressed weights by name. The layers are plain again and hold the same weights, decompressed.

    Raises
    ------
    ConfigError
        When a weight cannot be quantised; nothing has been changed then.
    """
    everything = {name: linear for group in groups for name, linear in group.items()}
    for name, linear in everything.items():
        check_weight(name, linear.weight, scheme)
    for index, group in enumerate(groups):
        for name, linear in group.items():
            linear.weight.grad = None  # of the old shape
            codebook = TrainableCodebook(compress(linear.weight, scheme, name))
            parametrize.register_parametrization(linear, "weight", codebook, unsafe=True)  # it changes the shape
        finetune(index)
    return {name: _take(linear) for name, linear in everything.items()}


@torch.no_grad()
def _take(linear: nn.Linear) -> Compressed:
    """The finetuned codebook with its codes; the layer becomes a plain one."""
    parametrisations = _parametrisations(linear)
    codebook = parametrisations.original
    compressed = replace(parametrisations[0].compressed, table=codebook.detach().to(torch.float16))
    parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
    linear.weight = nn.Parameter(compressed.weight().to(codebook), requires_grad=codebook.requires_grad)
    return compressed
