"""Compressed weights on disk: one safetensors file of packed codes, tables and plain tensors, read back in one call.

A weight `name` under a scheme becomes `name.codes` (uint8, packed) and `name.table`; what the codes mean stands in the
file's header. Nothing but the file is needed to read it, and reading it runs no code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import WeightsError
from ..storage import atomic_path
from .quant_noise_schemes import Compressed, IntegerGrid, ProductQuantiser, Scheme, compress

FORMAT = "nrlib.quant_noise/1"
_KINDS: dict[str, type[Any]] = {"integer_grid": IntegerGrid, "product_quantiser": ProductQuantiser}


def compress_matrices(tensors: Mapping[str, Tensor], scheme: Scheme, keep: str = "") -> dict[str, Tensor | Compressed]:
    """All matrices (O, I) with more than one row and column under the scheme, everything else in float16.

    keep : part of the names of tensors that stay in float16 whatever their shape.
    """
    return {
        name: compress(tensor, scheme, name)
        if tensor.dim() == 2 and min(tensor.shape) > 1 and not (keep and keep in name)
        else tensor.to(torch.float16)
        for name, tensor in tensors.items()
    }


def save_compressed(tensors: Mapping[str, Tensor | Compressed], path: Path | str) -> int:
    """Write compressed weights and plain tensors; returns the size of the file in bytes.

    Raises
    ------
    StorageError
        When the file cannot be written; nothing is left half-written.
    """
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            stored[name] = tensor.detach().contiguous()
            continue
        kind = next(kind for kind, of_type in _KINDS.items() if isinstance(tensor.scheme, of_type))
        described[name] = {"kind": kind, "shape": list(tensor.shape), **_options(tensor.scheme)}
        stored[f"{name}.codes"] = pack_bits(tensor.codes, tensor.scheme.n_bits)
        stored[f"{name}.table"] = tensor.table.contiguous()
    metadata = {"format": FORMAT, "weights": json.dumps(described, separators=(",", ":"))}
    with atomic_path(path) as temporary:
        save_file(stored, temporary, metadata)
    return Path(path).stat().st_size


def load_compressed(path: Path | str) -> dict[str, Tensor]:
    """Every tensor of the file by name, decompressed, float32.

    Raises
    ------
    WeightsError
        For a file that `save_compressed` did not write, or that is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise WeightsError(
                    f"{path} is not a file of compressed weights (its format is {metadata.get('format')!r}, not "
                    f"{FORMAT!r}). Read plain safetensors with safetensors.torch.load_file, adapters with PEFT."
                )
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
        tensors = {name: _decompress(name, stored, how) for name, how in json.loads(metadata["weights"]).items()}
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        raise WeightsError(
            f"{path} cannot be read as compressed weights ({error}). Copy it again, or write it anew with save_compressed."
        ) from error
    return tensors | {name: tensor.float() for name, tensor in stored.items()}


def _options(scheme: Scheme) -> dict[str, Any]:
    """What a file says of a scheme; without the axis where the shape tells it."""
    return {key: value for key, value in asdict(scheme).items() if (key, value) != ("axis", "either")}


def _decompress(name: str, stored: dict[str, Tensor], how: dict[str, Any]) -> Tensor:
    options = {key: value for key, value in how.items() if key not in ("kind", "shape")}
    if how["kind"] == "product_quantiser":
        options.setdefault("axis", "either")
    scheme: Scheme = _KINDS[how["kind"]](**options)
    n_codes = int(np.prod(how["shape"])) // scheme.block_size
    codes = unpack_bits(stored.pop(f"{name}.codes"), scheme.n_bits, n_codes)
    return Compressed(scheme, tuple(how["shape"]), codes, stored.pop(f"{name}.table")).weight()


def pack_bits(codes: Tensor, n_bits: int) -> Tensor:
    """Codes (n,), uint8 below 2^n_bits, as ⌈n·n_bits / 8⌉ bytes."""
    bits = np.unpackbits(codes.cpu().numpy()[:, None], axis=1, count=n_bits, bitorder="little")
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def unpack_bits(packed: Tensor, n_bits: int, n_codes: int) -> Tensor:
    """The inverse of `pack_bits`."""
    if len(packed) != -(-n_codes * n_bits // 8):
        raise ValueError(f"{len(packed)} bytes do not hold {n_codes} codes of {n_bits} bits")
    bits = np.unpackbits(packed.numpy(), count=n_codes * n_bits, bitorder="little").reshape(n_codes, n_bits)
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little")[:, 0])
