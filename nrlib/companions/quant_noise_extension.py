"""The study of the chapter's second half: an extension of the backbone, trained with and without noise, written to a file
in every compressed form, read back into a fresh model and measured there.

Only adapters are shipped, since the backbone is already at the reader's: W_i, W_g and W_o in the form under test, block
gates always in float16, as they are few and decide what is neutral.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..backbone import get_backbone
from ..config import RunConfig
from ..evaluation import evaluate, forgetting, learning
from ..experiments import arm
from ..methods import apply_method
from ..peft_method import NeutralResiduesLayer
from ..records import Record
from ..runs import backbone_metrics, make_batches
from ..tables import results_table
from ..texts import PreparedText, prepare_text
from ..training import Hooks, train
from .quant_noise import add_noise, ipq, refresh_noise, remove_noise
from .quant_noise_files import compress_matrices, load_compressed, save_compressed
from .quant_noise_schemes import Compressed, IntegerGrid, ProductQuantiser, Proxy
from .quant_noise_study import check_noise

RESULT_VERSION = 1
N_REFRESHES = 10  # new codebooks during training
IPQ_TOKENS_RATIO, IPQ_RATE_RATIO = 0.1, 1 / 3  # finetuning after each of two groups: tokens, and rate, over training's

BLOCK_SIZE, BLOCKS_PER_CENTROID = 8, 8  # with fewer blocks the codebook would be most of the file
GRIDS = {f"int{n_bits}": IntegerGrid(n_bits) for n_bits in (8, 4, 3)}
NOISES = (*GRIDS, "pq", "proxy")
FORMS = ("float32", "float16", *GRIDS, "pq", "ipq")
MEASURED = ("unseen_original", "new")


# What the chapter compares: half of the weights on a grid, as in the paper, or a tenth of the codebook's blocks.
TRAININGS: dict[str, dict[str, Any]] = {
    "none": {},
    "int4": {"noise": "int4", "noise_ratio": 0.5},
    "int3": {"noise": "int3", "noise_ratio": 0.5},
    "pq": {"noise": "pq", "noise_ratio": 0.1},
}


def extension_settings(profile: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Every training in `TRAININGS` with every seed, for `run_study`."""
    return [{**options, "seed": seed, "profile": profile} for options in TRAININGS.values() for seed in seeds]


def extension_study(
    *, seed: int, profile: str = "smoke", noise: str = "none", noise_ratio: float = 0.0
) -> dict[str, Any]:
    """Train an extension with one kind of noise, ship it in every form, and measure what arrives.

    Parameters
    ----------
    seed : of new weights, data order and noise.
    profile : of the backbone, the texts and the training.
    noise : 'none', or one of `NOISES`.
    noise_ratio : share of blocks that are noised at each step.

    Returns
    -------
    n_adapter_weights, the backbone's bits per byte, and `forms`: for each of `FORMS` the size of the file in
    bytes, bits per byte by text, and the mean ||residue||_1 / D by text, over tokens and layers.
    """
    check_noise(noise, NOISES)
    config = arm(profile, "neutral_residues", seed=seed)
    text = prepare_text(config.data, config.backbone, progress=False)
    model = apply_method(get_backbone(config, text, progress=False), config.method, seed)
    linears = adapter_matrices(model)
    quantiser = codebook_for(linears)
    hooks = Hooks()
    if noise != "none":
        kinds: dict[str, Any] = {**GRIDS, "pq": quantiser, "proxy": Proxy(BLOCK_SIZE, "either")}
        add_noise(linears, kinds[noise], noise_ratio, torch.Generator().manual_seed(seed))
        hooks = Hooks(log=_refreshes(linears, make_batches(config, text).n_steps))
    _train(model, config, text, hooks)
    remove_noise(linears.values())
    tensors = adapter_tensors(model)
    backbone = backbone_metrics(config, text)
    results: dict[str, Any] = {
        "n_adapter_weights": sum(tensor.numel() for tensor in tensors.values()),
        "backbone_bits_per_byte": {name: round(backbone[name], 5) for name in MEASURED},
        "n_centroids": quantiser.n_centroids,
    }
    forms: dict[str, Any] = {"float32": torch.float32, "float16": torch.float16, **GRIDS, "pq": quantiser}
    results["forms"] = {name: _ship(model, in_form(tensors, form), config, text) for name, form in forms.items()}
    load_adapter_tensors(model, tensors)
    results["forms"]["ipq"] = _ship(model, _finetuned(model, quantiser, config, text), config, text)
    return results


def codebook_for(linears: Mapping[str, nn.Linear]) -> ProductQuantiser:
    """As many centroids, a power of two up to 256, as leave `BLOCKS_PER_CENTROID` blocks for each in the smallest layer."""
    n_blocks = min(linear.weight.numel() for linear in linears.values()) // BLOCK_SIZE
    n_bits = min(8, max(1, (n_blocks // BLOCKS_PER_CENTROID).bit_length() - 1))
    # W_o reads the adapter's width, which need not be a multiple of the block size; its output, D, is one.
    return ProductQuantiser(BLOCK_SIZE, 2**n_bits, axis="either")


def adapter_matrices(model: nn.Module) -> dict[str, nn.Linear]:
    """W_i, W_g and W_o of every adapter by name, without the block gates."""
    return {
        f"{name}.{part}": linear
        for name, layer in model.named_modules()
        if isinstance(layer, NeutralResiduesLayer)
        for part, linear in layer.named_modules()
        if "neutral_residues_adapters" in part and isinstance(linear, nn.Linear) and not part.endswith("block_gate")
    }


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    """A copy of the weights that PEFT saves for the active adapter, by the names it saves them under."""
    from peft import get_peft_model_state_dict

    return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def load_adapter_tensors(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put weights that were read from a file into the adapter of a model.

    Raises
    ------
    WeightsError
        When they do not fit it.
    """
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, dict(tensors))


def in_form(tensors: Mapping[str, Tensor], form: Any) -> dict[str, Tensor | Compressed]:
    """The adapter as it is to be stored: all of it in a floating-point type, or its matrices under a scheme."""
    if isinstance(form, torch.dtype):
        return {name: tensor.to(form) for name, tensor in tensors.items()}
    return compress_matrices(tensors, form, keep="block_gate")


def extension_table(results: Sequence[Mapping[str, Any]], references: Sequence[Record]) -> pd.DataFrame:
    """One row for each result and form: noise, seed, size, forgetting, learning (relative to the references' fine-tuning)
    and mean residues on the original and the new domain."""
    fine_tuning = results_table(references)["bits_per_byte_new"].mean()
    rows = []
    for result in results:
        backbone = result["backbone_bits_per_byte"]
        for form, measured in result["forms"].items():
            bits = measured["bits_per_byte"]
            rows.append(
                {
                    "noise": result["noise"], "seed": result["seed"], "form": form, "kB": measured["n_bytes"] / 1000,
                    "bits_per_weight": 8 * measured["n_bytes"] / result["n_adapter_weights"],
                    "forgetting": forgetting(bits["unseen_original"], backbone["unseen_original"]),
                    "learning": learning(bits["new"], backbone["new"], fine_tuning),
                    "residue_original": measured["mean_residue"]["unseen_original"],
                    "residue_new": measured["mean_residue"]["new"],
                    "seconds": result["seconds"], "device": result["device"],
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def extension_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds, lowest and highest, for each training and form, as `nrlib.tables.readable` takes it."""
    summary = table.groupby(["noise", "form"], sort=False).agg(
        seeds=("seed", "nunique"),
        kB=("kB", "mean"),
        bits_per_weight=("bits_per_weight", "mean"),
        forgetting=("forgetting", "mean"),
        forgetting_min=("forgetting", "min"),
        forgetting_max=("forgetting", "max"),
        learning=("learning", "mean"),
        learning_min=("learning", "min"),
        learning_max=("learning", "max"),
        residue_original=("residue_original", "mean"),
        residue_new=("residue_new", "mean"),
    )
    return summary.round({"kB": 1, "bits_per_weight": 2}).reset_index()


def _refreshes(linears: Mapping[str, nn.Linear], n_steps: int) -> Callable[[int, Mapping[str, float]], None]:
    """A hook that learns new codebooks `N_REFRESHES` times; on an accelerator it is not called after every step."""
    every, n_done = max(1, n_steps // N_REFRESHES), 0

    def log(step: int, _: Mapping[str, float]) -> None:
        nonlocal n_done
        if step // every > n_done:
            n_done = step // every
            refresh_noise(linears.values())

    return log


def _train(model: nn.Module, config: RunConfig, text: PreparedText, hooks: Hooks | None = None) -> None:
    method = config.method
    train(
        model, make_batches(config, text), config.training, local_loss=method.local_loss,
        local_loss_weight=method.local_loss_weight, hooks=hooks, progress=False,
    )  # fmt: skip


def _finetuned(
    model: nn.Module, quantiser: ProductQuantiser, config: RunConfig, text: PreparedText
) -> dict[str, Tensor | Compressed]:
    """The adapter after iterative product quantisation: W_i and W_g of all layers, then W_o."""
    c = config.training
    short = dataclasses.replace(
        c,
        n_tokens=max(c.batch_size * c.context_length, round(IPQ_TOKENS_RATIO * c.n_tokens)),
        learning_rate=IPQ_RATE_RATIO * c.learning_rate,
    )
    linears = adapter_matrices(model)
    outputs = {name: linear for name, linear in linears.items() if name.endswith("output_projection")}
    inputs = {name: linear for name, linear in linears.items() if name not in outputs}

    def finetune(index: int) -> None:
        _train(model, dataclasses.replace(config, training=short, seed=config.seed + 1000 + index), text)

    compressed = ipq([inputs, outputs], quantiser, finetune)
    by_saved_name = {f"{_saved_name(name)}.weight": weight for name, weight in compressed.items()}
    return {name: by_saved_name.get(name, t.to(torch.float16)) for name, t in adapter_tensors(model).items()}


def _saved_name(name: str) -> str:
    return name.replace("neutral_residues_adapters.default.", "neutral_residues_adapters.")


def _ship(
    model: Any, tensors: Mapping[str, Tensor | Compressed], config: RunConfig, text: PreparedText
) -> dict[str, Any]:
    """Write, read back, measure."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        n_bytes = save_compressed(tensors, path)
        load_adapter_tensors(model, load_compressed(path))
    values, statistics = evaluate(model, text.held_out, MEASURED, config.training.context_length)
    residues = pd.DataFrame(statistics).groupby("text")["mean_residue"].mean()
    return {
        "n_bytes": n_bytes,
        "bits_per_byte": {name: round(value, 5) for name, value in values.items()},
        "mean_residue": {name: round(float(residues[name]), 6) for name in MEASURED},
    }
