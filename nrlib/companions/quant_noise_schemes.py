"""What a weight becomes when it is compressed: integers on a grid, or indices into a codebook of centroids.

Each scheme has three verbs: `learn` a table (scales, centroids) from a weight (O, I), `encode` the weight into codes
under it, `decode` codes into a weight. faiss does the k-means; no library is needed for the grid, and torchao's and
torch's fake quantisation know no product quantisation and quantise all weights or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError

LARGEST_CODEBOOK = 256  # an index then fits a byte
AXES = ("input", "output", "either")  # of a layer; either: the input where the block size divides it, else the output
_BLOCKS_AT_A_TIME = 1 << 15  # distances to 256 centroids: 32 MB


@dataclass(frozen=True)
class IntegerGrid:
    """Signed integers of `n_bits` times a scale: q·s with q in {-Q, …, Q}, Q = 2^(n_bits − 1) − 1.

    The grid is symmetric, so that 0 stays 0 exactly, at the price of one of its 2^n_bits values. Scales are bfloat16: it
    has the range of float32, and its coarseness does not matter, since the integers are chosen for the rounded scale.

    Parameters
    ----------
    n_bits : bits of a weight, 2 to 8.
    per_row : one scale for each row of the weight; False: one for the whole of it.
    """

    n_bits: int = 8
    per_row: bool = True
    block_size: ClassVar[int] = 1  # the blocks of the noise
    axis: ClassVar[str] = "input"

    def __post_init__(self) -> None:
        if not 2 <= self.n_bits <= 8:
            raise ConfigError(f"n_bits = {self.n_bits} is out of range: an integer grid has 2 to 8 bits.")

    @property
    def largest(self) -> int:
        """Q, the largest integer of the grid."""
        return int(2 ** (self.n_bits - 1)) - 1

    def learn(self, weight: Tensor) -> Tensor:
        """Scales (O, 1) or (1, 1), bfloat16: the largest weight falls on the end of the grid."""
        size = weight.abs()
        peak = size.amax(dim=1, keepdim=True) if self.per_row else size.amax().reshape(1, 1)
        return (peak / self.largest).to(torch.bfloat16)

    def encode(self, weight: Tensor, table: Tensor) -> Tensor:
        """Integers (O·I,), from 0 for −Q to 2Q for Q."""
        scale = table.float()
        integers = (weight / torch.where(scale > 0, scale, 1)).round().clamp(-self.largest, self.largest)
        return (integers + self.largest).to(torch.uint8).flatten()

    def decode(self, codes: Tensor, table: Tensor, shape: Sequence[int]) -> Tensor:
        """Weight (O, I), float32."""
        return (codes.reshape(*shape).float() - self.largest) * table.float()

    def quantise_blocks(self, weight: Tensor, is_chosen: Tensor, table: Tensor | None) -> Tensor:
        """Single weights (n_blocks, 1) as they become, on a grid for the weight as it is now."""
        table = self.learn(weight)
        return self.decode(self.encode(weight, table), table, weight.shape).reshape(-1, 1)


@dataclass(frozen=True)
class ProductQuantiser:
    """Blocks of weights, each replaced by the nearest of a few centroids; one codebook for each weight.

    Parameters
    ----------
    block_size : weights of a block.
    n_centroids : K, entries of the codebook, 2 to 256.
    n_iterations : rounds of k-means.
    axis : along which side of the layer blocks lie, one of `AXES`; the input as in the paper.
    """

    block_size: int = 8
    n_centroids: int = LARGEST_CODEBOOK
    n_iterations: int = 20
    axis: str = "input"

    def __post_init__(self) -> None:
        _check_blocks(self.block_size, self.axis)
        if not 2 <= self.n_centroids <= LARGEST_CODEBOOK:
            raise ConfigError(
                f"n_centroids = {self.n_centroids} is out of range: a codebook has 2 to {LARGEST_CODEBOOK} centroids."
            )

    @property
    def n_bits(self) -> int:
        """Bits of an index, ⌈log2 K⌉."""
        return (self.n_centroids - 1).bit_length()

    def learn(self, weight: Tensor) -> Tensor:
        """Codebook (K, block_size), float16, by k-means; faiss starts from random blocks (always the same ones) and fills
        an empty cluster from a big one."""
        import faiss

        blocks = split_blocks(weight, self.block_size, self.axis).float().cpu().numpy()
        kmeans = faiss.Kmeans(
            self.block_size, self.n_centroids, niter=self.n_iterations, seed=0, min_points_per_centroid=1,
            max_points_per_centroid=1 + len(blocks) // self.n_centroids,  # all blocks, not a sample
        )  # fmt: skip
        kmeans.train(blocks)
        return torch.from_numpy(kmeans.centroids).to(weight.device, torch.float16)

    def encode(self, weight: Tensor, table: Tensor) -> Tensor:
        """Indices (n_blocks,) of the nearest centroids."""
        return _nearest(split_blocks(weight, self.block_size, self.axis), table)

    def decode(self, codes: Tensor, table: Tensor, shape: Sequence[int]) -> Tensor:
        """Weight (O, I), float32."""
        return join_blocks(table.float()[codes.long()], shape, self.axis)

    def quantise_blocks(self, weight: Tensor, is_chosen: Tensor, table: Tensor | None) -> Tensor:
        """Blocks (n_blocks, block_size), the chosen ones as they become under a codebook that was learnt earlier."""
        if table is None:
            raise ValueError("a product quantiser needs the codebook that learn() returns")
        blocks = split_blocks(weight, self.block_size, self.axis).clone()
        blocks[is_chosen] = table.to(blocks)[_nearest(blocks[is_chosen], table).long()]
        return blocks


@dataclass(frozen=True)
class Proxy:
    """Blocks become 0: noise for training that needs no codebook. What is left is not scaled up. Options as those of
    `ProductQuantiser`."""

    block_size: int = 8
    axis: str = "input"

    def __post_init__(self) -> None:
        _check_blocks(self.block_size, self.axis)

    def quantise_blocks(self, weight: Tensor, is_chosen: Tensor, table: Tensor | None) -> Tensor:
        """Zeros (n_blocks, block_size)."""
        return weight.new_zeros(len(is_chosen), self.block_size)


Scheme = IntegerGrid | ProductQuantiser


@dataclass(frozen=True)
class Compressed:
    """A weight as it is stored: codes (n,), uint8, not packed yet; the table they refer to; what to do with both."""

    scheme: Scheme
    shape: tuple[int, ...]
    codes: Tensor
    table: Tensor

    def weight(self) -> Tensor:
        """The weight (O, I) that the codes stand for, float32."""
        return self.scheme.decode(self.codes, self.table, self.shape)


@torch.no_grad()
def compress(weight: Tensor, scheme: Scheme, name: str = "The weight") -> Compressed:
    """Quantise a trained weight (O, I), called `name` in errors.

    Raises
    ------
    ConfigError
        When it cannot be cut into blocks, has fewer blocks than centroids, or is not finite.
    """
    check_weight(name, weight, scheme)
    weight = weight.detach().float()
    table = scheme.learn(weight)
    return Compressed(scheme, tuple(weight.shape), scheme.encode(weight, table), table)


def bits_per_weight(scheme: Scheme, shape: Sequence[int]) -> float:
    """Codes and table of a weight (O, I), in bits over its weights."""
    n_weights = shape[0] * shape[1]
    if isinstance(scheme, IntegerGrid):
        return scheme.n_bits + 16 * (shape[0] if scheme.per_row else 1) / n_weights
    return scheme.n_bits / scheme.block_size + 16 * scheme.n_centroids * scheme.block_size / n_weights


def split_blocks(weight: Tensor, block_size: int, axis: str = "input") -> Tensor:
    """Blocks (n_blocks, block_size) of a weight (O, I)."""
    along_input = _is_along_input(weight.shape, block_size, axis)
    return (weight if along_input else weight.T).reshape(-1, block_size)


def join_blocks(blocks: Tensor, shape: Sequence[int], axis: str = "input") -> Tensor:
    """The inverse of `split_blocks`."""
    n_rows, n_columns = shape
    along_input = _is_along_input(shape, blocks.shape[1], axis)
    return blocks.reshape(n_rows, n_columns) if along_input else blocks.reshape(n_columns, n_rows).T


def _is_along_input(shape: Sequence[int], block_size: int, axis: str) -> bool:
    """Whether blocks lie along the input of a weight (O, I); `ConfigError` where they do not fit the side asked for."""
    fits = {"output": shape[0] % block_size == 0, "input": shape[1] % block_size == 0}
    if not (any(fits.values()) if axis == "either" else fits[axis]):
        fitting = [side for side, is_fit in fits.items() if is_fit]
        raise ConfigError(
            f"The shape {tuple(shape)}, (output, input), cannot be cut into blocks along axis = {axis!r}: block_size = "
            f"{block_size} does not divide it. Choose a block size that does, or "
            + (f"axis = {fitting[0]!r}, which it divides." if fitting else "another width of the layer.")
        )
    return fits["input"] if axis == "either" else axis == "input"


def _check_blocks(block_size: int, axis: str) -> None:
    if block_size < 1:
        raise ConfigError(f"block_size = {block_size} is out of range: a block has one weight or more.")
    if axis not in AXES:
        raise ConfigError(f"axis = {axis!r} is unknown. Choose one of: {', '.join(AXES)}.")


def check_weight(name: str, weight: Tensor, scheme: Scheme | Proxy) -> None:
    """Raise ConfigError for a weight that cannot be quantised so: by its shape, too few blocks, or what is no number."""
    size = scheme.block_size
    if weight.dim() != 2:
        raise ConfigError(f"{name} has the shape {tuple(weight.shape)}; only matrices (O, I) are quantised.")
    if not weight.isfinite().all():
        raise ConfigError(f"{name} holds NaN or infinite values, which no grid and no codebook has. Train it again.")
    try:
        _is_along_input(weight.shape, size, scheme.axis)
    except ConfigError as error:
        raise ConfigError(f"{name} cannot be quantised. {error}") from error
    n_blocks = weight.numel() // size
    if isinstance(scheme, ProductQuantiser) and n_blocks < scheme.n_centroids:
        raise ConfigError(
            f"{name} has {n_blocks} blocks of {size} weights, fewer than n_centroids = {scheme.n_centroids}: the codebook "
            f"would be longer than what it stands for. Give an n_centroids of at most {n_blocks}, or a smaller block_size."
        )


def _nearest(blocks: Tensor, table: Tensor) -> Tensor:
    parts = blocks.float().split(_BLOCKS_AT_A_TIME)
    return torch.cat([torch.cdist(part, table.float()).argmin(dim=1).to(torch.uint8) for part in parts])
